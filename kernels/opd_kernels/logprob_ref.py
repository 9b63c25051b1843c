"""Log-probability and ratio of a drawn step in plain torch: the specification of `logprob_triton.py`, and the CPU path.

With row (a, b, h, std, weight, sigma) = table[step], std > 0 and h = 0, D = C*H*W, M = 1/D (reduction "mean") or 1
("sum"), for sample i:

    v         = u + g_i * (c - u)              guidance; v = c where g_i = 1 or u is None
    mean      = a*x + b*v
    logp      = -M * sum_CHW (sample - mean)^2 / (2 std^2) - M*D * (ln std + ln(2 pi) / 2)
    log_ratio = logp - logp_old = M * sum_CHW (mean - mean_old) * (2 sample - mean - mean_old) / (2 std^2)
    drift     = M * sum_CHW (mean - mean_old)^2 / (2 std^2)

`log_ratio` is computed as the sum of its terms, not as the difference of two log-probabilities: so it is exactly 0
where mean = mean_old and keeps its digits where clip ranges are 1e-4 and below. The mean over elements is the published
convention (Flow-GRPO, arXiv 2505.05470); log_ratio + drift = M * sum (mean - mean_old) * (sample - mean_old) / std^2,
the part of log_ratio whose mean is zero, is what GRPO-Guard (arXiv 2510.22319) normalises. Gradients:

    d logp / d mean = d log_ratio / d mean = M (sample - mean) / std^2
    d drift / d mean = M (mean - mean_old) / std^2

and d mean / d c = b * g_i, d mean / d u = b * (1 - g_i).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import Reduction
from .step_ref import guided, table_row

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class LogProb(NamedTuple):
    """The outputs for a drawn step of B samples of shape (C, H, W)."""

    logp: Tensor
    """(B,) float32."""
    log_ratio: Tensor | None
    """(B,) float32, logp - logp_old; with `mean_old`."""
    drift: Tensor | None
    """(B,) float32, squared distance of the means over 2 std^2; with `mean_old`."""
    mean: Tensor | None
    """(B, C, H, W) float32, without gradient; with `return_mean`."""


def _drawn_row(table: Tensor, step: int | Tensor) -> tuple[float, float, float]:
    """Return (a, b, std) of a row that draws. Raises ValueError for a row without noise."""
    a, b, h, std, _, _ = table_row(table, step)
    if std <= 0 or h != 0:
        raise ValueError(
            f"row {int(step)} draws nothing around its mean (std {std:g}, h {h:g}): it has no log-probability"
        )
    return a, b, std


def _mean(x: Tensor, cond: Tensor, uncond: Tensor | None, guidance: Tensor, a: float, b: float) -> Tensor:
    return torch.mul(x, a).add_(guided(cond, uncond, guidance, x.dtype), alpha=b)


def log_prob_reference(
    x: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    mean_old: Tensor | None = None,
    return_mean: bool = False,
    reduction: Reduction = "mean",
) -> LogProb:
    """Compute the formulas above; arguments are as in `log_prob`.

    Any device and dtype; computes in the dtype of `x`. Nothing is attached to the autograd graph. Raises ValueError for
    a row without noise, IndexError for one outside the table.
    """
    a, b, std = _drawn_row(table, step)
    with torch.no_grad():
        mean = _mean(x, cond, uncond, guidance, a, b)
        count = mean[0].numel() if len(mean) else 1
        share = 1.0 / count if reduction == "mean" else 1.0
        factor = share / (2 * std**2)
        away = (sample - mean).flatten(1)
        logp = -factor * away.square().sum(1) - share * count * (math.log(std) + HALF_LOG_2PI)
        log_ratio = drift = None
        if mean_old is not None:
            moved = (mean - mean_old).flatten(1)
            log_ratio = factor * (moved * (away + (sample - mean_old).flatten(1))).sum(1)
            drift = factor * moved.square().sum(1)
        return LogProb(logp, log_ratio, drift, mean if return_mean else None)


def log_prob_backward_reference(
    grad_logp: Tensor,
    grad_drift: Tensor | None,
    x: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    mean_old: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients at cond and uncond, in their dtypes, of sum_i grad_logp_i * logp_i + grad_drift_i * drift_i.

    The gradients of logp and log_ratio are equal, so the caller adds what arrives at the two into `grad_logp` (B,).
    """
    a, b, std = _drawn_row(table, step)
    with torch.no_grad():
        mean = _mean(x, cond, uncond, guidance, a, b)
        share = 1.0 / mean[0].numel() if reduction == "mean" and len(mean) else 1.0

        def spread(t: Tensor) -> Tensor:
            return t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

        slope = spread(grad_logp) * (sample - mean)
        if grad_drift is not None and mean_old is not None:
            slope = slope + spread(grad_drift) * (mean - mean_old)
        slope = slope * (share * b / std**2)
        if uncond is None:
            return slope.to(cond.dtype), None
        return (spread(guidance) * slope).to(cond.dtype), (spread(1 - guidance) * slope).to(uncond.dtype)
