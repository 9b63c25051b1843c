"""Rewards by name. A reward takes images (B, 3, H, W) float in 0..1 and their B prompts, and returns (B,) float32.

It is called once for a batch, with the images on the device of the model, and may compute and answer on any device. One
from elsewhere is named by its dotted path, `package.module:function`; `judge.py` calls either and survives both.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_fast.config import TeacherConfig
from opd_fast.errors import one_line
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
    """The reward called `name`, or at the dotted path `name`; its module is imported here, not before.

    Raises ValueError for an unknown name and for a path that leads to no function.
    """
    if name in REWARDS:
        return _imported(REWARDS[name])
    if ":" in name:
        return _imported(name)
    close = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown reward {name!r}: {hint}known are {', '.join(REWARDS)}, and package.module:function")


@dataclass(frozen=True)
class Term:
    """A summand of a task's reward."""

    factor: float
    reward: str


def reward_terms(text: str) -> list[Term]:
    """The summands of `REWARD` or of a weighted sum, `0.8*text + 0.2*colour`, in order.

    Raises ValueError for what reads as neither.
    """
    terms = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        try:
            value = float(factor) if star else 1.0
        except ValueError:
            value = math.nan
        if not name.strip() or not math.isfinite(value):
            raise ValueError(f"reward {text!r} is no sum: write NAME, or FACTOR*NAME + FACTOR*NAME")
        terms.append(Term(value, name.strip()))
    return terms


def judged_rewards(task: TeacherConfig) -> list[str]:
    """The rewards that evaluations report of a task: the first of its sum, and what is reported beside that."""
    if task.reward is None:
        return []
    first = reward_terms(task.reward)[0].reward
    return [first, *REPORTED.get(first, ())]


def _imported(path: str) -> Reward:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"reward {path} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    if not callable(found):
        raise ValueError(f"reward {path} is a {type(found).__name__}, no function of (images, prompts)")
    reward: Reward = found
    return reward


def prompt_groups(prompts: Sequence[Prompt]) -> Tensor:
    """(B,) int64: which group of equal prompts each belongs to, numbered by first appearance."""
    seen: dict[Prompt, int] = {}
    return torch.tensor([seen.setdefault(prompt, len(seen)) for prompt in prompts], dtype=torch.int64)
