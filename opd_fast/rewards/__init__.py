"""Rewards by name. A reward takes images (B, 3, H, W) float in 0..1 and their B prompts, and returns (B,) float32."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence

from torch import Tensor

from opd_fast.prompts import Prompt

Reward = Callable[[Tensor, Sequence[Prompt]], Tensor]

REWARDS: dict[str, str] = {
    "composition": "opd_fast.rewards.composition:score",
    "composition_strict": "opd_fast.rewards.composition:strict",
    "text": "opd_fast.rewards.text:score",
    "colour": "opd_fast.rewards.colour:score",
}

REPORTED: dict[str, tuple[str, ...]] = {"composition": ("composition_strict",)}
"""What evaluations report beside a reward."""


def get_reward(name: str) -> Reward:
    """The reward called `name`; its module is imported here, not before."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown reward {name!r}: {hint}known are {', '.join(REWARDS)}")
    module, function = REWARDS[name].split(":")
    reward: Reward = getattr(importlib.import_module(module), function)
    return reward
