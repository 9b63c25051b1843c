"""The one pass: a denoising loop that trains while it rolls out.

The weights do not change inside a round, so the student's forward that rolls the state out is the forward that trains:
at each step the student predicts with gradient, the teachers without, one kernel turns both into the next state, the
loss and the gradient at the student's output, and the backward runs at once. The gradient equals that of rolling out
first, asking the teachers next, and training last; only one step's activations are alive.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from opd_fast.device import to_device
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning
from opd_fast.objectives import Surrogate, score_factors
from opd_fast.reporting.telemetry import annotate
from opd_fast.solvers import SolverTable
from opd_fast.training.batch import RoundBatch
from opd_fast.training.guided_step import Prediction, add_loss, guided_step
from opd_fast.training.step_graphs import StepGraphs
from opd_fast.training.student import Student
from opd_fast.training.teachers import TeacherBank, TeacherConditioning
from opd_kernels import StepOutput, philox_normal
from opd_kernels.philox import INITIAL_NOISE


@dataclass(frozen=True)
class RoundOutput:
    """What a round leaves on the device; reading it is the caller's only synchronisation."""

    losses: Tensor
    """(trained steps, B) float32, scaled as in the batch; their sum is the round's loss."""
    x: Tensor
    """(B, C, H, W) float32: the state after the last trained step."""


def one_pass(
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    batch: RoundBatch,
    table: SolverTable,
    weight: Tensor,
    *,
    train_last: bool = False,
    micro_batch: int | None = None,
    **options: Any,
) -> RoundOutput:
    """Roll the student out and accumulate the gradient of the round's loss in its parameters.

    `weight` (N,) float64 is the loss weight of each solver step (`objectives.step_weights`). A step of weight 0 is only
    rolled through, without teacher or gradient, and the rollout ends at the last step that has a weight. Without
    `train_last` the last step is left out, because nothing needs the state it leads to. `micro_batch` is the most
    samples of a forward; None takes all at once. `options` are reduction, surrogate, anchor and graphs of `_Rollout`.
    """
    steps = table.steps if train_last else table.steps - 1
    rollout = _Rollout(model, student, teachers, table, (weight[:steps] != 0).tolist(), **options)
    if rollout.surrogate is not None:
        table.require_stochastic("the ppo objective", range(steps))
    rows = to_device(table.rows(weight), batch.keys.device)
    losses = torch.zeros(steps, len(batch), device=batch.keys.device)
    states = []
    with student.merged_for_round():
        for part_rows, part in batch.split(micro_batch):
            last = part_rows.stop == len(batch)
            states.append(rollout.run(part, rows, losses[:, part_rows], last=last))
    return RoundOutput(losses, torch.cat(states))


@torch.no_grad()
def losses_at(
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    batch: RoundBatch,
    table: SolverTable,
    weight: Tensor,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Measure the losses at given states, or at those of the student's rollout (None), without training.

    Returns the losses (N, B) of every step that has a weight, and the states (N, B, C, H, W). No graph is captured.
    """
    rollout = _Rollout(model, student, teachers, table, (weight != 0).tolist())
    rows = to_device(table.rows(weight), batch.keys.device)
    losses, visited = [], []
    with student.merged_for_round():
        inputs = rollout.inputs(batch, rows)
        x, x0 = _initial_state(batch), None
        for j in range(rollout.steps):
            x = x if states is None else states[j]
            step = rollout.step(inputs, j, x, x0, rollout.has_loss[j])
            losses.append(step.loss)
            visited.append(x)
            x, x0 = step.x_next, step.x0
    return torch.stack(losses), torch.stack(visited)


@dataclass(frozen=True)
class _Inputs:
    """What all steps of a micro-batch read."""

    condition: Conditioning
    """The student's."""
    teacher_condition: TeacherConditioning
    anchor_condition: TeacherConditioning | None
    guidance: Tensor
    """(B,) float32, g of the student's branches."""
    rows: Tensor
    """(N, 6) float32, the solver's."""
    keys: Tensor
    scale: Tensor
    noise: Tensor | None
    numbers: Tensor
    """(N,) int64, those of the steps."""
    future_returns: Tensor | None = None
    """(N, B), the sum of the rewards that follow each step, where the surrogate looks ahead."""


@dataclass(frozen=True)
class _Rollout:
    """What is the same for all micro-batches of a round, and the walk through one of them."""

    model: DiffusionModel
    student: Student
    teachers: TeacherBank
    table: SolverTable
    has_loss: list[bool]
    """Whether each step has a loss."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the elements of a sample."""
    surrogate: Surrogate | None = None
    """Replaces the gradient of the weighted gap by a policy gradient with that gap as its reward. Where this looks
    ahead, a first rollout without gradient, on the same noise, measures the rewards."""
    anchor: tuple[TeacherBank, float] | None = None
    """A bank of one frozen model and the factor of its loss, of the teachers' form, which is added for every sample."""
    graphs: Graphs | None = None
    """Replays each step as one CUDA graph, or, with a surrogate or a sharded student, the teachers alone. Give every
    round of a run the same ones."""

    @property
    def steps(self) -> int:
        """Steps up to the last that has a loss."""
        return max((j + 1 for j, has_loss in enumerate(self.has_loss) if has_loss), default=0)

    def run(self, batch: RoundBatch, rows: Tensor, losses: Tensor, *, last: bool) -> Tensor:
        """Roll one micro-batch out; fills losses (steps, B) and returns the state after the last step with a loss.

        `last` says that it is the round's last micro-batch. Under `torch.no_grad` nothing is trained.
        """
        inputs, x = self.inputs(batch, rows), _initial_state(batch)
        if self.graphs is not None and self.graphs.on and self.surrogate is None and not self.student.world.sharded:
            return self._replay(self.graphs, inputs, batch.tasks, x, losses)
        if self.surrogate is not None and self.surrogate.looks_ahead:
            measured = torch.zeros_like(losses)
            with torch.no_grad():
                replace(self, surrogate=None, anchor=None, graphs=None)._walk(inputs, x, measured, last=False)
            inputs = replace(inputs, future_returns=self.surrogate.returns(_unscaled(measured, batch.scale)))
        return self._walk(inputs, x, losses, last=last)

    def _walk(self, inputs: _Inputs, x: Tensor, losses: Tensor, *, last: bool) -> Tensor:
        x0 = None
        for j in range(self.steps):
            step = self.step(inputs, j, x, x0, self.has_loss[j], last=last and j == self.steps - 1)
            losses[j] = step.loss
            x, x0 = step.x_next, step.x0
        return x

    def inputs(self, batch: RoundBatch, rows: Tensor) -> _Inputs:
        """Make once what every step of the micro-batch reads."""
        one_task = replace(batch, tasks=((0, slice(0, len(batch))),))
        condition = Conditioning.build(self.model, batch.text, batch.negative, self.student.guidance)
        sigmas = rows[:, -1]
        self.student.fill_cache(sigmas, condition)
        return _Inputs(
            condition=condition,
            teacher_condition=self.teachers.condition(batch, sigmas),
            anchor_condition=None if self.anchor is None else self.anchor[0].condition(one_task, sigmas),
            guidance=torch.full_like(batch.scale, condition.branch_guidance),
            rows=rows,
            keys=batch.keys,
            scale=batch.scale,
            noise=batch.noise if self.table.stochastic else None,
            numbers=torch.arange(len(rows), device=rows.device),
        )

    def step(
        self, inputs: _Inputs, j: int | Tensor, x: Tensor, x0: Tensor | None, has_loss: bool, *, last: bool = False
    ) -> StepOutput:
        """Take one step of the rollout and, where it has a loss, accumulate the loss's gradient.

        `j` is the step's number, or a 0-dim int64 tensor of it on the device; `last` says that no backward follows in
        this round.
        """
        sigma, noise = _select_row(inputs.rows, j)[-1], None if inputs.noise is None else _select_row(inputs.noise, j)
        number = inputs.numbers[j] if isinstance(j, int) else j
        with annotate("student.forward"), torch.set_grad_enabled(has_loss and torch.is_grad_enabled()):
            velocities = self.student.velocities(self.model, x, sigma, inputs.condition, number)
        student = Prediction(velocities, inputs.guidance).detach()
        teacher = student
        graphs = self.graphs if isinstance(j, int) else None  # a graph cannot hold another one
        if has_loss:
            with annotate("teacher.forward"):
                of_teachers = self.teachers.velocities(x, sigma, inputs.teacher_condition, graphs, number)
            teacher = Prediction(of_teachers, inputs.teacher_condition.guidance)
        with annotate("step"):
            step = guided_step(
                *(x, student, teacher, inputs.rows, j, inputs.scale),
                noise=noise,
                keys=inputs.keys if noise is None and self.table.stochastic else None,
                history=x0,
                want_x0=self.table.uses_history,
                reduction=self.reduction,
            )
        if has_loss and self.surrogate is not None and isinstance(j, int):
            step = self._policy_gradient(self.surrogate, step, inputs, j, x)
        if has_loss and self.anchor is not None and inputs.anchor_condition is not None:
            bank, factor = self.anchor
            with annotate("anchor.forward"):
                of_anchor = bank.velocities(x, sigma, inputs.anchor_condition, graphs, number)
            anchor = Prediction(of_anchor, inputs.anchor_condition.guidance)
            scale = inputs.scale * factor
            step = add_loss(step, guided_step(x, student, anchor, inputs.rows, j, scale, reduction=self.reduction))
        if velocities.cond.requires_grad:
            with annotate("backward"):
                self.student.before_backward(last=last)
                torch.autograd.backward(
                    [v for v in (velocities.cond, velocities.uncond) if v is not None],
                    [g for g in (step.grad_cond, step.grad_uncond) if g is not None],
                )
        return step

    def _policy_gradient(
        self, surrogate: Surrogate, step: StepOutput, inputs: _Inputs, j: int, x: Tensor
    ) -> StepOutput:
        """The step with the surrogate's gradient in place of the KL's; `loss` stays scale times the KL."""
        noise = philox_normal(inputs.keys, x.shape[1:], j) if inputs.noise is None else inputs.noise[j]
        elements = noise[0].numel() if self.reduction == "mean" else 1
        score = float(score_factors(self.table, surrogate.log_prob)[j])
        cond, uncond = surrogate.gradients(
            step.grad_cond,
            step.grad_uncond,
            kl=_unscaled(step.loss, inputs.scale),
            later=None if inputs.future_returns is None else inputs.future_returns[j],
            noise=noise,
            score=inputs.scale * (score / elements),
            guidance=inputs.guidance,
        )
        return step._replace(grad_cond=cond, grad_uncond=uncond)

    def _replay(
        self, graphs: Graphs, inputs: _Inputs, tasks: tuple[tuple[int, slice], ...], x: Tensor, losses: Tensor
    ) -> Tensor:
        """Do what `run` does by graphs of a whole step each, which are kept for this form of batch."""
        counts = ", ".join(str(rows.stop - rows.start) for _, rows in tasks)

        def make() -> StepGraphs[_Inputs]:
            name = f"the step of {len(x)} samples ({counts})"
            return StepGraphs(graphs, name, inputs, x, len(losses), history=self.table.uses_history)

        form = tuple((i, rows.start, rows.stop) for i, rows in tasks)
        kept = graphs.keep(("step", len(x), form, torch.is_grad_enabled(), self.reduction), make)
        gradients = self.student.gradients.in_place()
        return kept.run(self.step, self.has_loss[: self.steps], gradients, inputs, x, losses)


def _initial_state(batch: RoundBatch) -> Tensor:
    """(B, C, H, W) float32: the one that the batch gives, or the one that its keys draw."""
    return philox_normal(batch.keys, batch.shape, INITIAL_NOISE) if batch.x is None else batch.x


def _select_row(rows: Tensor, j: int | Tensor) -> Tensor:
    """rows[j], without asking the device for a number."""
    return rows[j] if isinstance(j, int) else rows.index_select(0, j.view(1))[0]


def _unscaled(losses: Tensor, scale: Tensor) -> Tensor:
    """losses / scale; 0 for the rows of scale 0 that only keep the ranks in step."""
    return torch.where(scale > 0, losses / scale, 0.0)
