"""GRPO for flow-matching models (Flow-GRPO, arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319): advantages and losses.

A group is the images of one prompt; what a reward is worth is how far it lies from its group's mean. The
log-probability of a drawn step, mean over the elements, and its ratio to the policy that drew come from
`opd_kernels.log_prob`; the KL to the base, mean((mu - mu_base)^2) / (2 g^2), is the loss of `opd_kernels.fused_step`
with the base for a teacher and the `published` weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_fast.solvers import SolverTable

# --- advantages -------------------------------------------------------------------------------------------------------


def varied(rewards: Tensor, groups: Tensor) -> Tensor:
    """(B,) bool: whether a sample's group holds different rewards. One that does not teaches nothing and is dropped."""
    count = int(groups.max()) + 1 if len(groups) else 0
    highest = rewards.new_full((count,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    lowest = rewards.new_full((count,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    return (highest > lowest)[groups]


def advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    clip: float = 5.0,
) -> Tensor:
    """(reward - mean of its group) / (std + eps), at most `clip` in size.

    Args:
        rewards: (B,) finite.
        groups: (B,) int64, equal for the images of one prompt, numbered from 0 (`rewards.prompt_groups`).
        std: population standard deviation of all rewards (Flow-GRPO's default), or of each group's.

    Returns:
        (B,) float32; exactly 0 in groups whose rewards are all equal.

    Raises:
        ValueError: a reward that is not finite; the mean would spread it over its group.
    """
    if not bool(rewards.isfinite().all()):
        raise ValueError("a reward is NaN or infinite; it would spoil its group's mean: judge with policy raise")
    values = rewards.double()
    count = int(groups.max()) + 1 if len(groups) else 0
    size = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, groups, torch.ones_like(values))
    mean = torch.zeros_like(size).index_add_(0, groups, values) / size
    gap = (values - mean[groups]).masked_fill(~varied(rewards, groups), 0.0)  # the mean of equals is rounded
    if std == "group":
        spread = (torch.zeros_like(size).index_add_(0, groups, gap.square()) / size).sqrt()[groups]
    else:
        spread = values.std(correction=0)
    return (gap / (spread + eps)).clamp(-clip, clip).float()


# --- losses -----------------------------------------------------------------------------------------------------------


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's max(-A rho, -A clip(rho, 1 +- clip)), rho = exp(log_ratio); all (B,)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def guard_log_ratio(log_ratio: Tensor, drift: Tensor, std: float) -> Tensor:
    """GRPO-Guard's normalised log-ratio, (B,).

    std * (log_ratio + drift) = mean(eps * (mu - mu_old)), eps being the noise that was drawn: its mean is 0 and its
    size does not depend on the step's noise, so that one clip range suits all steps. The bias `drift` is each sample's.
    """
    return std * (log_ratio + drift)


def policy_loss(
    log_ratio: Tensor, drift: Tensor, advantage: Tensor, table: SolverTable, step: int, *, guard: bool, clip: float
) -> Tensor:
    """The loss of one drawn step, (B,), from `log_prob`'s log_ratio and drift under reduction mean.

    Flow-GRPO: the clipped surrogate. Guard: that of the normalised ratio, divided by the step length sigma_j -
    sigma_{j+1}, which evens out the gradients of the steps.
    """
    if not guard:
        return clipped_surrogate(log_ratio, advantage, clip)
    length = float(table.sigmas[step] - table.sigmas[step + 1])
    return clipped_surrogate(guard_log_ratio(log_ratio, drift, float(table.std[step])), advantage, clip) / length
