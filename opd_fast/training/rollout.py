"""The denoising loops: one that trains while it rolls out, one that only samples.

`one_pass` is the engine's core. The weights do not change inside a round, so the student's forward that rolls the state
out is the forward that trains: at each step the student predicts with gradient, the teachers without, one kernel turns
both into the next state, the loss and the gradient at the student's output, and the backward runs at once. The gradient
equals that of rolling out first, asking the teachers next, and training last; only one step's activations are alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from opd_fast.device import send
from opd_fast.engine.cuda_graphs import Graphs, Static
from opd_fast.models.base import DiffusionModel, TextEmbeds
from opd_fast.models.guidance import Conditioning, predict_velocities
from opd_fast.objectives import Surrogate, score_factors
from opd_fast.reporting.telemetry import annotate
from opd_fast.solvers import SolverTable
from opd_fast.training.batch import RoundBatch
from opd_fast.training.student import Student
from opd_fast.training.teachers import TeacherBank, TeacherConditioning
from opd_kernels import StepOutput, fused_step, philox_normal
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
    reduction: Literal["mean", "sum"] = "mean",
    micro_batch: int | None = None,
    surrogate: Surrogate | None = None,
    anchor: tuple[TeacherBank, float] | None = None,
    graphs: Graphs | None = None,
) -> RoundOutput:
    """Roll the student out and accumulate the gradient of the round's loss in its parameters.

    `weight` (N,) float64 is the loss weight of each solver step (`objectives.step_weights`). Without `train_last` the
    last step is left out altogether: nothing needs the state it leads to. A step of weight 0 is only rolled through,
    without teacher or gradient, and the rollout ends at the last step that has a weight.

    `surrogate` replaces the gradient of the weighted gap by a policy gradient with that gap as its reward. Where this
    looks ahead, a first rollout without gradient, on the same noise, measures the rewards. `anchor` is a bank of one
    frozen model and the factor of its loss, of the teachers' form, which is added for every sample.

    `graphs` replays each step as one CUDA graph, or, with a surrogate or a sharded student, the teachers alone. Give
    every round of a run the same ones.
    """
    steps = table.steps if train_last else table.steps - 1
    if surrogate is not None:
        table.require_stochastic("the ppo objective", range(steps))
    rollout = _Rollout(
        model, student, teachers, table, (weight[:steps] != 0).tolist(), reduction, surrogate, anchor, graphs
    )
    rows = send(table.rows(weight), batch.keys.device)
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
    """The losses (N, B) of every step that has a weight at `states` (N, B, C, H, W), and those states.

    None takes the states of the student's rollout. Nothing is trained, and no graph is captured.
    """
    rollout = _Rollout(model, student, teachers, table, (weight != 0).tolist(), "mean", None, None, None)
    rows = send(table.rows(weight), batch.keys.device)
    losses, seen = [], []
    with student.merged_for_round():
        inputs = rollout._inputs(batch, rows)
        x = philox_normal(batch.keys, batch.shape, INITIAL_NOISE) if batch.x is None else batch.x
        x0 = None
        for j in range(rollout.steps):
            x = x if states is None else states[j]
            step = rollout._step(inputs, j, x, x0, rollout.asked[j])
            losses.append(step.loss)
            seen.append(x)
            x, x0 = step.x_next, step.x0
    return torch.stack(losses), torch.stack(seen)


@dataclass(frozen=True)
class _Inputs:
    """What all steps of a micro-batch read."""

    condition: Conditioning
    teacher_condition: TeacherConditioning
    anchored: TeacherConditioning | None
    guidance: Tensor
    """(B,) float32, g of the student's branches."""
    rows: Tensor
    """(N, 6) float32, the solver's."""
    keys: Tensor
    scale: Tensor
    noise: Tensor | None
    numbers: Tensor
    """(N,) int64, those of the steps."""


@dataclass(frozen=True)
class _Rollout:
    """What is the same for all micro-batches of a round, and the walk through one of them."""

    model: DiffusionModel
    student: Student
    teachers: TeacherBank
    table: SolverTable
    asked: list[bool]
    """Of each trained step: whether it has a loss."""
    reduction: Literal["mean", "sum"]
    surrogate: Surrogate | None
    anchor: tuple[TeacherBank, float] | None
    graphs: Graphs | None

    @functools.cached_property
    def score(self) -> list[float]:
        """`score_factors` of each step."""
        assert self.surrogate is not None
        found: list[float] = score_factors(self.table, self.surrogate.log_prob).tolist()
        return found

    @property
    def steps(self) -> int:
        """Steps up to the last that has a loss."""
        return max((j + 1 for j, asked in enumerate(self.asked) if asked), default=0)

    def run(self, batch: RoundBatch, rows: Tensor, losses: Tensor, *, last: bool) -> Tensor:
        """Roll one micro-batch out; fills losses (steps, B) and returns the state after the last step with a loss.

        `last` says that it is the round's last micro-batch. Under `torch.no_grad` the same rollout and its losses,
        without gradient.
        """
        later = None
        if self.surrogate is not None and self.surrogate.looks_ahead:
            measured = torch.zeros_like(losses)
            with torch.no_grad():
                replace(self, surrogate=None, anchor=None, graphs=None).run(batch, rows, measured, last=False)
            later = self.surrogate.returns(_unscaled(measured, batch.scale))
        inputs = self._inputs(batch, rows)
        x = philox_normal(batch.keys, batch.shape, INITIAL_NOISE) if batch.x is None else batch.x
        if self.graphs is not None and self.graphs.on and self.surrogate is None and not self.student.world.sharded:
            return self._replay(self.graphs, inputs, batch.tasks, x, losses)
        x0 = None
        for j in range(self.steps):
            final = last and j == self.steps - 1
            step = self._step(inputs, j, x, x0, self.asked[j], later=None if later is None else later[j], final=final)
            losses[j] = step.loss
            x, x0 = step.x_next, step.x0
        return x

    def _inputs(self, batch: RoundBatch, rows: Tensor) -> _Inputs:
        whole = replace(batch, tasks=((0, slice(0, len(batch))),))
        condition = Conditioning.build(self.model, batch.text, batch.negative, self.student.guidance)
        sigmas = rows[:, -1]
        self.student.remember(sigmas, condition)
        return _Inputs(
            condition=condition,
            teacher_condition=self.teachers.condition(batch, sigmas),
            anchored=None if self.anchor is None else self.anchor[0].condition(whole, sigmas),
            guidance=torch.full_like(batch.scale, condition.branch_guidance),
            rows=rows,
            keys=batch.keys,
            scale=batch.scale,
            noise=batch.noise if self.table.stochastic else None,
            numbers=torch.arange(len(rows), device=rows.device),
        )

    def _step(
        self,
        inputs: _Inputs,
        j: int | Tensor,
        x: Tensor,
        x0: Tensor | None,
        asked: bool,
        *,
        later: Tensor | None = None,
        final: bool = False,
    ) -> StepOutput:
        """One step of the rollout and, where it is asked for its loss, the gradient of that.

        `j` is the step's number, or a 0-dim int64 tensor of it on the device; `final` says that no backward follows in
        this round.
        """
        sigma, noise = _at(inputs.rows, j)[-1], None if inputs.noise is None else _at(inputs.noise, j)
        number = inputs.numbers[j] if isinstance(j, int) else j
        with annotate("student.forward"), torch.set_grad_enabled(asked and torch.is_grad_enabled()):
            v_student = self.student.velocities(self.model, x, sigma, inputs.condition, number)
        graphs = self.graphs if isinstance(j, int) else None  # within a graph there is no other
        with annotate("teacher.forward"):
            v_teacher = (
                self.teachers.velocities(x, sigma, inputs.teacher_condition, graphs, number) if asked else v_student
            )
        with annotate("step"):
            step = fused_step(
                x,
                v_student.cond.detach(),
                None if v_student.uncond is None else v_student.uncond.detach(),
                v_teacher.cond.detach(),
                None if v_teacher.uncond is None else v_teacher.uncond.detach(),
                inputs.guidance,
                inputs.teacher_condition.guidance if asked else inputs.guidance,
                inputs.rows,
                j,
                inputs.scale,
                noise=noise,
                keys=inputs.keys if noise is None and self.table.stochastic else None,
                history=x0,
                want_x0=self.table.uses_history,
                reduction=self.reduction,
            )
        if self.surrogate is not None and isinstance(j, int) and asked:
            step = self._policy_gradient(self.surrogate, step, inputs, j, x, later)
        if self.anchor is not None and inputs.anchored is not None and asked:
            with annotate("anchor.forward"):
                v_anchor = self.anchor[0].velocities(x, sigma, inputs.anchored, graphs, number)
            pull = fused_step(
                x,
                v_student.cond.detach(),
                None if v_student.uncond is None else v_student.uncond.detach(),
                v_anchor.cond,
                v_anchor.uncond,
                inputs.guidance,
                inputs.anchored.guidance,
                inputs.rows,
                j,
                inputs.scale * self.anchor[1],
                reduction=self.reduction,
            )
            step = _sum(step, pull)
        if v_student.cond.requires_grad:
            with annotate("backward"):
                self.student.before_backward(last=final)
                torch.autograd.backward(
                    [v for v in (v_student.cond, v_student.uncond) if v is not None],
                    [g for g in (step.grad_cond, step.grad_uncond) if g is not None],
                )
        return step

    def _policy_gradient(
        self, surrogate: Surrogate, step: StepOutput, inputs: _Inputs, j: int, x: Tensor, later: Tensor | None
    ) -> StepOutput:
        """The step with the surrogate's gradient in place of the KL's; `loss` stays scale times the KL."""
        noise = philox_normal(inputs.keys, x.shape[1:], j) if inputs.noise is None else inputs.noise[j]
        elements = noise[0].numel() if self.reduction == "mean" else 1
        cond, uncond = surrogate.gradients(
            step.grad_cond,
            step.grad_uncond,
            kl=_unscaled(step.loss, inputs.scale),
            later=later,
            noise=noise,
            score=inputs.scale * (self.score[j] / elements),
            guidance=inputs.guidance,
        )
        return step._replace(grad_cond=cond, grad_uncond=uncond)

    def _replay(
        self, graphs: Graphs, inputs: _Inputs, tasks: tuple[tuple[int, slice], ...], x: Tensor, losses: Tensor
    ) -> Tensor:
        """`run` by graphs of a whole step each, kept for this form of batch."""
        counts = ", ".join(str(rows.stop - rows.start) for _, rows in tasks)
        grad = torch.is_grad_enabled()

        def make() -> _StepGraphs:
            name = f"the step of {len(x)} samples ({counts})"
            return _StepGraphs(graphs, name, self, inputs, x, len(losses))

        key = ("step", len(x), tuple((i, rows.start, rows.stop) for i, rows in tasks), grad, self.reduction)
        kept = graphs.keep(key, make)
        return kept.run(self, inputs, x, losses)


class _StepGraphs:
    """The steps of one form of batch as CUDA graphs: student, teachers, step kernel and backward in one launch.

    The step's number is a tensor on the device that the graph itself counts up; state, losses and the student's
    gradients lie in buffers that stay.
    """

    def __init__(self, graphs: Graphs, name: str, rollout: _Rollout, inputs: _Inputs, x: Tensor, steps: int) -> None:
        self.graphs, self.name = graphs, name
        self.inputs = Static(name, inputs)
        self.x = x.detach().clone(memory_format=torch.contiguous_format)
        self.x0 = torch.zeros_like(self.x) if rollout.table.uses_history else None
        self.losses = torch.zeros(steps, len(x), device=x.device)
        self.step = torch.zeros((), dtype=torch.int64, device=x.device)
        self._replays: dict[bool, Callable[[], None]] = {}

    def run(self, rollout: _Rollout, inputs: _Inputs, x: Tensor, losses: Tensor) -> Tensor:
        """As `_Rollout.run`."""
        self.inputs.load(inputs)
        gradients = rollout.student.gradients_in_place()
        torch._foreach_zero_([t for t in (self.x0, self.losses, self.step) if t is not None])
        self.x.copy_(x)
        for j in range(rollout.steps):
            asked = rollout.asked[j]
            if asked not in self._replays:
                name = self.name if asked else f"{self.name} without loss"
                state = [t for t in (self.x, self.x0, self.losses, self.step) if t is not None]
                work = functools.partial(self._work, rollout, asked)
                self._replays[asked] = self.graphs.capture(name, work, [*state, *gradients])
            self._replays[asked]()
        losses.copy_(self.losses)
        return self.x.clone()

    def _work(self, rollout: _Rollout, asked: bool) -> None:
        step = rollout._step(self.inputs.value, self.step, self.x, self.x0, asked)
        with torch.no_grad():
            self.losses.index_copy_(0, self.step.view(1), step.loss.unsqueeze(0))
            self.x.copy_(step.x_next)
            if self.x0 is not None and step.x0 is not None:
                self.x0.copy_(step.x0)
            self.step.add_(1).remainder_(len(self.losses))  # warming up must not run off the table


def _at(rows: Tensor, j: int | Tensor) -> Tensor:
    """rows[j], without asking the device for a number."""
    return rows[j] if isinstance(j, int) else rows.index_select(0, j.view(1))[0]


def _unscaled(losses: Tensor, scale: Tensor) -> Tensor:
    """losses / scale; 0 for the rows of scale 0 that only keep the ranks in step."""
    return torch.where(scale > 0, losses / scale, 0.0)


def _sum(step: StepOutput, pull: StepOutput) -> StepOutput:
    """The step with the loss and the gradients of another one added, `pull`'s next state being of no interest."""
    uncond = None
    if step.grad_uncond is not None and pull.grad_uncond is not None:
        uncond = step.grad_uncond + pull.grad_uncond
    return step._replace(loss=step.loss + pull.loss, grad_cond=step.grad_cond + pull.grad_cond, grad_uncond=uncond)


@torch.no_grad()
def sample(
    model: DiffusionModel,
    transformer: nn.Module,
    text: TextEmbeds,
    negative: TextEmbeds | None,
    guidance: float | None,
    table: SolverTable,
    *,
    shape: tuple[int, int, int] | None = None,
    keys: Tensor | None = None,
    x: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample by all steps of `table`, without gradient; the latents (B, C, H, W) float32.

    `guidance` is as it is set (`DiffusionModel.strength`); None is unguided, and needs no `negative`. The initial state
    is `x`, or drawn from `keys` (B,) int64 in the latent `shape`; the noise of the steps is `noise`
    (N, B, C, H, W), or drawn from `keys`. Raises ValueError where neither is given.
    """
    if x is None:
        if keys is None or shape is None:
            raise ValueError("sample needs an initial state: give x, or keys and shape to draw it from")
        x = philox_normal(keys, shape, INITIAL_NOISE)
    if table.stochastic and noise is None and keys is None:
        raise ValueError(f"solver {table.solver} adds noise: give noise, or keys to draw it from")
    condition = Conditioning.build(model, text, negative, guidance)
    x0 = None
    for j, (a, b, h, std, _, sigma) in enumerate(table.rows().tolist()):
        v = predict_velocities(model, transformer, x, torch.tensor(sigma, device=x.device), condition)
        velocity = v.cond.float()
        if v.uncond is not None:
            velocity = torch.lerp(v.uncond.float(), velocity, condition.branch_guidance)
        following = a * x + b * velocity
        if x0 is not None:
            following = following + h * x0
        if table.uses_history:
            x0 = x - sigma * velocity
        if std > 0 and noise is not None:
            following = following + std * noise[j]
        elif std > 0 and keys is not None:
            following = following + std * philox_normal(keys, x.shape[1:], j)
        x = following
    return x
