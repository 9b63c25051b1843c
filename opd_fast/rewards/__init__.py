"""The registry of rewards, and the types of a reward of one's own: `Reward`, `RewardValues` and `Prompt`.

A new reward is a file beside this one and a line of `REWARDS`. A reward from elsewhere is named by its dotted path,
`package.module:function`. docs/rewards.md says what a reward is given and what it may return. `runner.py` calls a
reward and survives its failures, `values.py` reads what it returns, `metadata.py` checks what it needs of prompts.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opd_fast.config import TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import one_line

__all__ = [
    "REPORTED",
    "REWARDS",
    "Prompt",
    "Reward",
    "RewardValues",
    "Term",
    "get_reward",
    "prompt_groups",
    "reward_terms",
]

RewardValues = Tensor | np.ndarray[Any, Any] | Sequence[float]
"""B real numbers, one for each image in order; `values.read_values` says in what forms."""


class Reward(Protocol):
    """A function that judges images; it is called once for a batch of one task.

    Args:
        images: (B, 3, H, W) float32 in 0..1 on the device of the model, without gradient. They are a copy.
        prompts: B prompts, `prompts[i]` being the one that `images[i]` was drawn for, with its text in `.text` and what
            its file says beside it in the dict `.metadata`. They are copies.

    Returns:
        B real numbers, the larger the better, on any device. They are read as float32.

    An exception, a value that is NaN or infinite, and more than `evaluation.reward_timeout` seconds are failures: an
    evaluation leaves the values out, a run that learns from the reward ends.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt], /) -> RewardValues: ...


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
    if (fault := _not_a_reward(found)) is not None:
        raise ValueError(f"reward {path} is {fault}, not a function of (images, prompts)")
    reward: Reward = found
    return reward


def _not_a_reward(found: Any) -> str | None:
    """What cannot be called as a reward is, in words; None for what can."""
    if isinstance(found, type):
        return "a class"
    if not callable(found):
        return f"a {type(found).__name__}"
    for is_one, what in (
        (inspect.iscoroutinefunction, "an async function"),
        (inspect.isasyncgenfunction, "an async generator"),
        (inspect.isgeneratorfunction, "a generator"),
    ):
        if is_one(found) or is_one(getattr(found, "__call__", None)):  # noqa: B004
            return what
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C, it may have none
        return None
    try:
        signature.bind(None, None)
    except TypeError:
        return f"a function of {signature}"
    return None


def prompt_groups(prompts: Sequence[Prompt]) -> Tensor:
    """(B,) int64: which group of equal prompts each belongs to, numbered by first appearance."""
    seen: dict[Prompt, int] = {}
    return torch.tensor([seen.setdefault(prompt, len(seen)) for prompt in prompts], dtype=torch.int64)
