"""The fused step in plain torch: the specification of the kernel in `step_triton.py`, and the CPU path.

With row (a, b, h, std, weight, sigma) = table[step], D = C*H*W (reduction "mean") or 1 ("sum"), for sample i:

    v      = u + g_i * (c - u)                 guidance, for student and teacher alike; v = c where g_i = 1 or u is None
    x_next = a*x + b*v_S + h*history + std*noise
    loss_i = scale_i * weight * sum_CHW (v_S - v_T)^2 / D
    dloss_i/dc_S = scale_i * weight * 2 (v_S - v_T) / D * g_i          dloss_i/du_S: (1 - g_i) in place of g_i
    x0     = x - sigma * v_S                   mean_S, mean_T: x_next without the noise, for either velocity

Why the loss is a weighted velocity gap: student and teacher share the row, so mu_S - mu_T = b*(v_S - v_T), and the
KL of two Gaussians of equal covariance is |mu_S - mu_T|^2 / (2 std^2) (DiffusionOPD, arXiv 2605.15055). `weight`
carries b^2/(2 std^2), or b^2/2 for a deterministic step.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import Reduction
from .philox import philox_normal


class StepOutput(NamedTuple):
    """The outputs of one step, for B samples of shape (C, H, W)."""

    x_next: Tensor
    """(B, C, H, W) float32, the next state."""
    loss: Tensor
    """(B,) float32. From `fused_step`: differentiable with respect to cond_s and uncond_s."""
    grad_cond: Tensor
    """d loss_i / d cond_s, shape and dtype of cond_s."""
    grad_uncond: Tensor | None
    """d loss_i / d uncond_s, shape and dtype of uncond_s; None without uncond_s."""
    x0: Tensor | None
    """(B, C, H, W) float32, the student's estimate x - sigma*v_S; with `history` or `want_x0`."""
    mean_s: Tensor | None
    """(B, C, H, W) float32, the student's mean; with `return_means`."""
    mean_t: Tensor | None
    """(B, C, H, W) float32, the teacher's mean; with `return_means`."""


def table_row(table: Tensor, step: int | Tensor) -> list[float]:
    """Return row `step` of the table. Raises IndexError for one outside of it."""
    row = int(step)
    if not 0 <= row < table.shape[0]:
        raise IndexError(f"step {row} is outside the table, which has {table.shape[0]} rows")
    values: list[float] = table[row].tolist()
    return values


def guided(cond: Tensor, uncond: Tensor | None, guidance: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the guided velocity in `dtype`, perhaps `cond` itself. Rows with guidance 1 do not read `uncond`."""
    c = cond.to(dtype)
    if uncond is None:
        return c
    u, v, first = uncond.to(dtype), torch.empty(c.shape, dtype=dtype, device=c.device), 0
    for g, run in groupby(guidance.tolist()):  # neighbours of equal guidance in one call: most often all of a task
        rows = slice(first, first + len(list(run)))
        first = rows.stop
        if g == 1.0:
            v[rows] = c[rows]
        else:
            torch.lerp(u[rows], c[rows], g, out=v[rows])
    return v


def fused_step_reference(
    x: Tensor,
    cond_s: Tensor,
    uncond_s: Tensor | None,
    cond_t: Tensor,
    uncond_t: Tensor | None,
    guidance_s: Tensor,
    guidance_t: Tensor,
    table: Tensor,
    step: int | Tensor,
    scale: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    history: Tensor | None = None,
    want_x0: bool = False,
    return_means: bool = False,
    reduction: Reduction = "mean",
) -> StepOutput:
    """Take one solver step by the formulas above, with its loss and gradients; arguments are as in `fused_step`.

    Any device and dtype; computes in the dtype of `x` (float32, or float64 as a reference). Reads the row and the
    guidance on the host. Nothing is attached to the autograd graph: gradients are outputs.
    """
    a, b, h, std, weight, sigma = table_row(table, step)
    dtype = x.dtype
    with torch.no_grad():
        x = x.contiguous()
        v_s = guided(cond_s, uncond_s, guidance_s, dtype)
        v_t = guided(cond_t, uncond_t, guidance_t, dtype)

        def mean(v: Tensor) -> Tensor:
            m = torch.mul(x, a).add_(v, alpha=b)
            return m if history is None or h == 0.0 else m.add_(history, alpha=h)

        x_next = mean(v_s)
        mean_s = x_next.clone() if return_means else None
        mean_t = mean(v_t) if return_means else None
        if std != 0.0:
            if keys is not None:
                noise = philox_normal(keys, x.shape[1:], int(step))
            if noise is not None:
                x_next.add_(noise, alpha=std)
        x0 = torch.sub(x, v_s, alpha=sigma) if want_x0 or history is not None else None

        # Velocities that were made here are of no further use: the gradients take over their memory.
        made = v_t is not cond_t and v_t.is_contiguous()
        gap = torch.sub(v_s, v_t, out=v_t if made else torch.empty_like(x))
        flat = gap.flatten(1)
        factor = torch.mul(scale, weight / flat.shape[1] if reduction == "mean" else weight)
        loss = torch.linalg.vector_norm(flat, dim=1).square_().mul_(factor)
        slope = factor.mul_(2.0).to(dtype).unsqueeze(1)
        grad_uncond = None
        if uncond_s is not None:
            g = guidance_s.to(dtype).unsqueeze(1)
            grad_uncond = torch.mul(flat, slope * (1.0 - g), out=v_s.flatten(1)).view_as(x).to(uncond_s.dtype)
            slope = slope * g
        flat.mul_(slope)
        return StepOutput(x_next, loss, gap.to(cond_s.dtype), grad_uncond, x0, mean_s, mean_t)
