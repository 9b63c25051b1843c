"""The denoising loops: one that trains while it rolls out, one that only samples.

`one_pass` is the engine's core. The weights do not change inside a round, so the student's forward that rolls the state
out is the forward that trains: at each step the student predicts with gradient, the teachers without, one kernel turns
both into the next state, the loss and the gradient at the student's output, and the backward runs at once. The gradient
equals that of rolling out first, asking the teachers next, and training last; only one step's activations are alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel, TextEmbeds
from opd_fast.objectives import Surrogate, score_factors
from opd_fast.solvers import SolverTable
from opd_fast.student import Student
from opd_fast.teachers import TeacherBank
from opd_fast.telemetry import annotate
from opd_fast.velocity import Conditioning, velocities
from opd_kernels import StepOutput, fused_step, philox_normal
from opd_kernels.philox import INITIAL_NOISE


@dataclass(frozen=True)
class RoundBatch:
    """The samples of one round, task after task."""

    text: TextEmbeds
    """B rows."""
    negative: TextEmbeds | None
    """One row; needed when any guidance differs from 1."""
    tasks: tuple[tuple[int, slice], ...]
    """(teacher's index, the rows of the batch it teaches); none, where all of the task's samples are elsewhere."""
    keys: Tensor
    """(B,) int64 noise keys."""
    scale: Tensor
    """(B,) float32: the round's loss is the sum over samples and steps of scale * w_j * mean((v_S - v_T)^2)."""
    shape: tuple[int, int, int]
    """Latent (C, H, W)."""
    x: Tensor | None = None
    """Initial state (B, C, H, W) float32; None draws it from the keys."""
    noise: Tensor | None = None
    """Noise of each step (N, B, C, H, W) float32; None draws it from the keys."""

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, size: int | None) -> Iterator[tuple[slice, RoundBatch]]:
        """Micro-batches of at most `size` samples, with the rows each holds; None leaves the batch whole."""
        size = size or len(self)
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            cut = [
                (teacher, slice(max(task.start, rows.start) - start, min(task.stop, rows.stop) - start))
                for teacher, task in self.tasks
            ]
            yield (
                rows,
                replace(
                    self,
                    text=self.text.index(rows),
                    tasks=tuple((teacher, slice(task.start, max(task.start, task.stop))) for teacher, task in cut),
                    keys=self.keys[rows],
                    scale=self.scale[rows],
                    x=None if self.x is None else self.x[rows],
                    noise=None if self.noise is None else self.noise[:, rows],
                ),
            )


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
) -> RoundOutput:
    """Roll the student out and accumulate the gradient of the round's loss in its parameters.

    `weight` (N,) float64 is the loss weight of each solver step (`objectives.step_weights`). Without `train_last` the
    last step is left out altogether: nothing needs the state it leads to. A step of weight 0 is only rolled through,
    without teacher or gradient, and the rollout ends at the last step that has a weight.

    `surrogate` replaces the gradient of the weighted gap by a policy gradient with that gap as its reward. Where this
    looks ahead, a first rollout without gradient, on the same noise, measures the rewards. `anchor` is a bank of one
    frozen model and the factor of its loss, of the teachers' form, which is added for every sample.
    """
    steps = table.steps if train_last else table.steps - 1
    rows = table.rows(weight, batch.keys.device)
    if surrogate is not None:
        table.require_stochastic("the ppo objective", range(steps))
    plan = _Plan(
        table, rows, (weight[:steps] != 0).tolist(), score_factors(table).tolist(), reduction, surrogate, anchor
    )
    losses = torch.zeros(steps, len(batch), device=batch.keys.device)
    states = []
    with student.at_rest():
        for part_rows, part in batch.split(micro_batch):
            last = part_rows.stop == len(batch)
            states.append(_roll_out(model, student, teachers, part, plan, losses[:, part_rows], last=last))
    return RoundOutput(losses, torch.cat(states))


@dataclass(frozen=True)
class _Plan:
    """What is the same for all micro-batches of a round."""

    table: SolverTable
    rows: Tensor
    asked: list[bool]
    """Of each trained step: whether it has a loss."""
    score: list[float]
    reduction: Literal["mean", "sum"]
    surrogate: Surrogate | None
    anchor: tuple[TeacherBank, float] | None

    @property
    def steps(self) -> int:
        """Steps up to the last that has a loss."""
        return max((j + 1 for j, asked in enumerate(self.asked) if asked), default=0)


def _roll_out(
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    batch: RoundBatch,
    plan: _Plan,
    losses: Tensor,
    *,
    last: bool,
) -> Tensor:
    """`one_pass` of one micro-batch; fills losses (steps, B) and returns the state after the last of them.

    `last` says that it is the round's last micro-batch. Under `torch.no_grad` the same rollout and its losses, without
    gradient.
    """
    table, rows, surrogate = plan.table, plan.rows, plan.surrogate
    later = None
    if surrogate is not None and surrogate.looks_ahead:
        measured = torch.zeros_like(losses)
        with torch.no_grad():
            _roll_out(model, student, teachers, batch, replace(plan, surrogate=None, anchor=None), measured, last=False)
        later = surrogate.returns(_unscaled(measured, batch.scale))
    condition = Conditioning.build(model, batch.text, batch.negative, student.guidance)
    guidance = torch.full_like(batch.scale, student.guidance)
    course = teachers.course(batch)
    anchored = None
    if plan.anchor is not None:
        anchored = plan.anchor[0].course(replace(batch, tasks=((0, slice(0, len(batch))),)))
    sigmas = rows[:, -1]
    x = philox_normal(batch.keys, batch.shape, INITIAL_NOISE) if batch.x is None else batch.x
    x0 = None
    for j in range(plan.steps):
        with annotate("student.forward"), torch.set_grad_enabled(plan.asked[j] and torch.is_grad_enabled()):
            v_student = student.velocities(model, x, sigmas[j], condition)
        with annotate("teacher.forward"):
            v_teacher = teachers.velocities(x, sigmas[j], course) if plan.asked[j] else v_student
        with annotate("step"):
            step = fused_step(
                x,
                v_student.cond.detach(),
                None if v_student.uncond is None else v_student.uncond.detach(),
                v_teacher.cond,
                v_teacher.uncond,
                guidance,
                course.guidance if plan.asked[j] else guidance,
                rows,
                j,
                batch.scale,
                noise=batch.noise[j] if batch.noise is not None and table.stochastic else None,
                keys=batch.keys if batch.noise is None and table.stochastic else None,
                history=x0,
                want_x0=table.uses_history,
                reduction=plan.reduction,
            )
        if surrogate is not None and plan.asked[j]:
            step = _policy_gradient(surrogate, step, batch, plan, j, guidance, None if later is None else later[j])
        if plan.anchor is not None and anchored is not None and plan.asked[j]:
            with annotate("anchor.forward"):
                v_anchor = plan.anchor[0].velocities(x, sigmas[j], anchored)
            pull = fused_step(
                x,
                v_student.cond.detach(),
                None if v_student.uncond is None else v_student.uncond.detach(),
                v_anchor.cond,
                v_anchor.uncond,
                guidance,
                anchored.guidance,
                rows,
                j,
                batch.scale * plan.anchor[1],
                reduction=plan.reduction,
            )
            step = _sum(step, pull)
        if v_student.cond.requires_grad:
            with annotate("backward"):
                student.before_backward(last=last and j == plan.steps - 1)
                torch.autograd.backward(
                    [v for v in (v_student.cond, v_student.uncond) if v is not None],
                    [g for g in (step.grad_cond, step.grad_uncond) if g is not None],
                )
        losses[j] = step.loss
        x, x0 = step.x_next, step.x0
    return x


def _unscaled(losses: Tensor, scale: Tensor) -> Tensor:
    """losses / scale; 0 for the rows of scale 0 that only keep the ranks in step."""
    return torch.where(scale > 0, losses / scale, 0.0)


def _policy_gradient(
    surrogate: Surrogate,
    step: StepOutput,
    batch: RoundBatch,
    plan: _Plan,
    j: int,
    guidance: Tensor,
    later: Tensor | None,
) -> StepOutput:
    """The step with the surrogate's gradient in place of the KL's; `loss` stays scale times the KL."""
    noise = philox_normal(batch.keys, batch.shape, j) if batch.noise is None else batch.noise[j]
    elements = noise[0].numel() if plan.reduction == "mean" else 1
    cond, uncond = surrogate.gradients(
        step.grad_cond,
        step.grad_uncond,
        kl=_unscaled(step.loss, batch.scale),
        later=later,
        noise=noise,
        score=batch.scale * (plan.score[j] / elements),
        guidance=guidance,
    )
    return step._replace(grad_cond=cond, grad_uncond=uncond)


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
    guidance: float,
    table: SolverTable,
    *,
    shape: tuple[int, int, int] | None = None,
    keys: Tensor | None = None,
    x: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample by all steps of `table`, without gradient; the latents (B, C, H, W) float32.

    The initial state is `x`, or drawn from `keys` (B,) int64 in the latent `shape`; the noise of the steps is `noise`
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
        v = velocities(model, transformer, x, torch.tensor(sigma, device=x.device), condition)
        velocity = v.cond.float()
        if v.uncond is not None:
            velocity = torch.lerp(v.uncond.float(), velocity, guidance)
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
