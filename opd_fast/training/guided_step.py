"""The one call of the step's kernel, for the one pass and for the methods that roll out with it: two predictions in,
the next state, the loss and its gradient out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from opd_fast.models.guidance import Velocities
from opd_kernels import StepOutput, fused_step


class Prediction(NamedTuple):
    """What the student or a teacher predicts at a state, and how its branches combine."""

    velocities: Velocities
    guidance: Tensor
    """(B,) float32, g of v = uncond + g * (cond - uncond)."""

    def detach(self) -> Prediction:
        cond, uncond = self.velocities.cond, self.velocities.uncond
        return Prediction(Velocities(cond.detach(), None if uncond is None else uncond.detach()), self.guidance)


def guided_step(
    x: Tensor, student: Prediction, teacher: Prediction, rows: Tensor, j: int | Tensor, scale: Tensor, **options: Any
) -> StepOutput:
    """Step `j` of the solver's `rows` (N, 6) from x (B, C, H, W) float32, by `opd_kernels.fused_step`.

    `scale` (B,) float32 weighs each sample's loss; `options` are the kernel's. Raises ValueError as the kernel does.
    """
    (v_student, g_student), (v_teacher, g_teacher) = student, teacher
    branches = v_student.cond, v_student.uncond, v_teacher.cond, v_teacher.uncond
    return fused_step(x, *branches, g_student, g_teacher, rows, j, scale, **options)


def add_loss(step: StepOutput, other: StepOutput) -> StepOutput:
    """The step with the loss and the gradients of another one added; where the other one leads does not matter."""
    uncond = None
    if step.grad_uncond is not None and other.grad_uncond is not None:
        uncond = step.grad_uncond + other.grad_uncond
    return step._replace(loss=step.loss + other.loss, grad_cond=step.grad_cond + other.grad_cond, grad_uncond=uncond)
