"""Advantages as GRPO has them: the images of a prompt are a group, and each reward is compared to their mean."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def varied(rewards: Tensor, groups: Tensor) -> Tensor:
    """Returns (B,) bool, whether a sample's group has different rewards; a group of equal rewards teaches nothing."""
    count = int(groups.max()) + 1 if len(groups) else 0
    highest = rewards.new_full((count,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    lowest = rewards.new_full((count,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    return (highest > lowest)[groups]


def advantages(
    rewards: Tensor, groups: Tensor, *, std: Literal["global", "group"] = "global", eps: float = 1e-4, clip: float = 5.0
) -> Tensor:
    """(reward - mean of its group) / (std + eps), clipped to [-clip, clip].

    `groups` (B,) int64 is equal for the images of one prompt, numbered from 0 (`rewards.prompt_groups`). `std` is the
    population standard deviation of all rewards (B,), Flow-GRPO's default, or of each group's. Returns (B,) float32,
    exactly 0 in groups whose rewards are all equal. Raises ValueError for a reward that is not finite, because the mean
    would spread it over its group.
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
