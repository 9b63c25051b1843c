"""The registry of rewards, and the types of a reward of one's own: `Reward`, `RewardValues` and `Prompt`.

A new reward is a file beside this one and a line of `REWARDS`. A reward from elsewhere is named by its dotted path,
`package.module:function`. A reward that has a model is a subclass of `ModelReward`. docs/rewards.md says what a reward
is given and what it may return. `runner.py` calls a reward and survives its failures, `values.py` reads what it
returns, `metadata.py` checks what it needs of prompts, `model_files.py` finds weights.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig, TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import one_line
from opd_fast.rewards.model_reward import ModelReward

__all__ = [
    "REPORTED",
    "REWARDS",
    "ModelReward",
    "Prompt",
    "Reward",
    "RewardValues",
    "Term",
    "evaluated_rewards",
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
    "pickscore": "opd_fast.rewards.pickscore:PickScore",
    "clipscore": "opd_fast.rewards.clipscore:ClipScore",
    "hps": "opd_fast.rewards.hps:HPS",
    "aesthetic": "opd_fast.rewards.aesthetic:Aesthetic",
    "image_reward": "opd_fast.rewards.image_reward:ImageReward",
    "ocr": "opd_fast.rewards.ocr:Ocr",
    "geneval": "opd_fast.rewards.geneval:GenEval",
    "geneval_strict": "opd_fast.rewards.geneval:GenEvalStrict",
    "geneval_accuracy": "opd_fast.rewards.geneval:GenEvalAccuracy",
    "unified_reward": "opd_fast.rewards.unified_reward:UnifiedReward",
    "hpsv3": "opd_fast.rewards.hpsv3:HPSv3",
}
"""The rewards that have a name of their own: name to the dotted path of a function or of a `ModelReward`."""

REPORTED: dict[str, tuple[str, ...]] = {
    "composition": ("composition_strict",),
    "geneval": ("geneval_strict", "geneval_accuracy"),
}
"""What evaluations report beside a reward."""


def get_reward(name: str, models: RewardModelsConfig | None = None) -> Reward:
    """Return the reward called `name`, or the one at the dotted path `name`; its module is imported here, not before.

    A `ModelReward` is one object for the process and `models`, so that its weights are loaded once.

    Raises ValueError for an unknown name and for a path that does not lead to a function.
    """
    if name in REWARDS or ":" in name:
        target = _imported(REWARDS.get(name, name))
        if isinstance(target, type):
            return _model_reward(target, models or RewardModelsConfig())
        return target
    close = difflib.get_close_matches(name, REWARDS, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown reward {name!r}: {hint}known are {', '.join(REWARDS)}, and package.module:function")


@dataclass(frozen=True)
class Term:
    """One summand of a task's reward."""

    factor: float
    reward: str


def reward_terms(text: str) -> list[Term]:
    """Return the summands of `REWARD` or of a weighted sum, `0.8*text + 0.2*colour`, in order.

    Raises ValueError for a text that is neither.
    """
    terms = []
    for part in text.split("+"):
        factor, star, name = part.strip().rpartition("*")
        try:
            value = float(factor) if star else 1.0
        except ValueError:
            value = math.nan
        if not name.strip() or not math.isfinite(value):
            raise ValueError(f"reward {text!r} is not a sum: write NAME, or FACTOR*NAME + FACTOR*NAME")
        terms.append(Term(value, name.strip()))
    return terms


def evaluated_rewards(task: TeacherConfig, everywhere: Sequence[str] = ()) -> list[str]:
    """Return the rewards that evaluations report of a task, each once.

    They are the terms of its own reward, each with what is reported beside it, then those of every task, `everywhere`.
    """
    own = [] if task.reward is None else [term.reward for term in reward_terms(task.reward)]
    beside = [[name, *REPORTED.get(name, ())] for name in own]
    return list(dict.fromkeys([*itertools.chain.from_iterable(beside), *everywhere]))


_MODEL_REWARDS: dict[tuple[Any, ...], ModelReward] = {}
"""The objects in use, by class and settings."""


def _model_reward(kind: type[ModelReward], models: RewardModelsConfig) -> ModelReward:
    key = (kind, *dataclasses.astuple(models))
    if key not in _MODEL_REWARDS:
        _MODEL_REWARDS[key] = kind(models)
    return _MODEL_REWARDS[key]


def _imported(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"reward {path} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    if (fault := _not_a_reward(target)) is not None:
        raise ValueError(f"reward {path} is {fault}, not a function of (images, prompts)")
    return target


def _not_a_reward(target: Any) -> str | None:
    """Return what `target` is, in words, if it cannot be called as a reward; else None."""
    if isinstance(target, type):
        return None if issubclass(target, ModelReward) and not inspect.isabstract(target) else "a class"
    if not callable(target):
        return f"a {type(target).__name__}"
    for is_one, what in (
        (inspect.iscoroutinefunction, "an async function"),
        (inspect.isasyncgenfunction, "an async generator"),
        (inspect.isgeneratorfunction, "a generator"),
    ):
        if is_one(target) or is_one(getattr(target, "__call__", None)):  # noqa: B004
            return what
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a function written in C may have none
        return None
    try:
        signature.bind(None, None)
    except TypeError:
        return f"a function of {signature}"
    return None


def prompt_groups(prompts: Sequence[Prompt]) -> Tensor:
    """Return for each prompt the number of its group of equal prompts, (B,) int64, in order of first appearance."""
    seen: dict[Prompt, int] = {}
    return torch.tensor([seen.setdefault(prompt, len(seen)) for prompt in prompts], dtype=torch.int64)
