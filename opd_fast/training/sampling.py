"""Sampling by a solver, without gradient, teacher or kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel, TextEmbeds
from opd_fast.models.guidance import Conditioning, predict_velocities
from opd_fast.solvers import SolverTable
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE


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
        x_next = a * x + b * velocity
        if x0 is not None:
            x_next = x_next + h * x0
        if table.uses_history:
            x0 = x - sigma * velocity
        if std > 0 and noise is not None:
            x_next = x_next + std * noise[j]
        elif std > 0 and keys is not None:
            x_next = x_next + std * philox_normal(keys, x.shape[1:], j)
        x = x_next
    return x
