"""The steps of a rollout as CUDA graphs: student, teachers, step kernel and backward in one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from opd_fast.engine.cuda_graphs import Graphs, Static
from opd_kernels import StepOutput

T = TypeVar("T")
Step = Callable[[T, Tensor, Tensor, Tensor | None, bool], StepOutput]
"""(inputs, the step's number as a 0-dim int64 tensor, x, x0 of the step before, whether the step has a loss)."""


class StepGraphs(Generic[T]):
    """The graphs of one form of batch: one for the steps that have a loss, and one for those that have none.

    The step's number is a tensor on the device that the graph itself counts up; inputs, state, losses and the student's
    gradients lie in buffers that stay.
    """

    def __init__(self, graphs: Graphs, name: str, inputs: T, x: Tensor, steps: int, *, history: bool) -> None:
        """`steps` are those of the losses; `history` says that a step reads x0 of the step before."""
        self.graphs, self.name = graphs, name
        self.inputs = Static(name, inputs)
        self.x = x.detach().clone(memory_format=torch.contiguous_format)
        self.x0 = torch.zeros_like(self.x) if history else None
        self.losses = torch.zeros(steps, len(x), device=x.device)
        self.step = torch.zeros((), dtype=torch.int64, device=x.device)
        self._zeroed = [t for t in (self.x0, self.losses, self.step) if t is not None]
        self._replays: dict[bool, Callable[[], None]] = {}

    def run(
        self, step: Step[T], has_loss: Sequence[bool], gradients: Sequence[Tensor], inputs: T, x: Tensor, losses: Tensor
    ) -> Tensor:
        """Roll out from x by the steps of `has_loss`; fills losses (steps, B) and returns the last state.

        `gradients` are the buffers in which the steps accumulate.
        """
        self.inputs.load(inputs)
        torch._foreach_zero_(self._zeroed)
        self.x.copy_(x)
        for asked in has_loss:
            if asked not in self._replays:
                name = self.name if asked else f"{self.name} without loss"
                changes = [self.x, *self._zeroed, *gradients]
                self._replays[asked] = self.graphs.capture(name, functools.partial(self._work, step, asked), changes)
            self._replays[asked]()
        losses.copy_(self.losses)
        return self.x.clone()

    def _work(self, step: Step[T], has_loss: bool) -> None:
        out = step(self.inputs.value, self.step, self.x, self.x0, has_loss)
        with torch.no_grad():
            self.losses.index_copy_(0, self.step.view(1), out.loss.unsqueeze(0))
            self.x.copy_(out.x_next)
            if self.x0 is not None and out.x0 is not None:
                self.x0.copy_(out.x0)
            self.step.add_(1).remainder_(len(self.losses))  # warming up must not run off the table


class GradientBuffers:
    """A buffer for the gradient of each of `parameters`, made when they are first asked for."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._buffers: list[Tensor] = []

    def in_place(self) -> list[Tensor]:
        """Every parameter's gradient in the same buffer from round to round, with what was there: zeros for None."""
        if not self._buffers:
            self._buffers = [torch.zeros_like(p) for p in self._parameters]
        empty = []
        for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        return self._buffers
