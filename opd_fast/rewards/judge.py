"""Rewards called apart from the run: whatever one of them does wrong is named and counted, and the run decides.

A reward may raise, hang, return NaN or a wrong number of values. Under the policy `raise` that ends the run, since
reinforcement learning has nothing else to learn from; under `record` the values are missing (NaN), as in evaluations of
a distillation, whose loss uses no reward.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opd_fast.config import TeacherConfig
from opd_fast.errors import UserError, one_line
from opd_fast.prompts import Prompt
from opd_fast.rewards import Reward, get_reward, reward_terms

Kind = Literal["raised", "timed out", "wrong shape", "not finite"]


class RewardFailure(RuntimeError):
    """What a reward did wrong.

    Attributes:
        reward: its name. kind: in a word or two, for counting.
        values: (B,) float32, NaN where a value is missing.
    """

    def __init__(self, reward: str, kind: Kind, detail: str, values: Tensor) -> None:
        super().__init__(f"reward {reward!r} {detail}")
        self.reward, self.kind, self.values = reward, kind, values


def judge(
    reward: str | Reward,
    images: Tensor,
    prompts: Sequence[Prompt],
    timeout: float | None = None,
    *,
    name: str | None = None,
) -> Tensor:
    """The values of one reward, (B,) float32 on the CPU.

    Args:
        reward: a name or dotted path (`rewards.get_reward`), or the function itself; called without gradient.
        images: (B, 3, H, W) float in 0..1, on any device; the reward gets them as they are.
        prompts: one for each image.
        timeout: seconds; null: none. With one the reward runs in a thread, which cannot be stopped: a reward that
            hangs keeps it to the end of the process, but not beyond.
        name: in messages; the function's own where a function is given.

    Raises:
        RewardFailure: the reward raised, took longer, or returned something else than a finite number for each image.
    """
    function = get_reward(reward) if isinstance(reward, str) else reward
    own = reward if isinstance(reward, str) else getattr(reward, "__name__", "reward")
    return _Call(name or str(own), function, images, prompts).wait(timeout)


class Jury:
    """The rewards of a run under one policy; `failures` counts (reward, kind) to the images without a value."""

    def __init__(self, policy: Literal["raise", "record"], timeout: float | None = None) -> None:
        self.policy, self.timeout = policy, timeout
        self.failures: Counter[tuple[str, Kind]] = Counter()
        self.messages: list[str] = []
        """The first failure of each (reward, kind), in words."""
        self._hanging: dict[str, _Call] = {}

    def __call__(self, reward: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32 on the CPU, NaN where a value is missing under `record`.

        A reward that hung is not called again before it has come back. Raises RewardFailure under `raise`.
        """
        try:
            stuck = self._hanging.get(reward)
            if stuck is not None and stuck.running:
                missing = torch.full((len(images),), float("nan"))
                raise RewardFailure(reward, "timed out", "still hangs in an earlier call", missing)
            call = _Call(reward, get_reward(reward), images, prompts)
            self._hanging[reward] = call
            return call.wait(self.timeout)
        except RewardFailure as failure:
            if self.policy == "raise":
                raise
            if (reward, failure.kind) not in self.failures:
                self.messages.append(str(failure))
            self.failures[reward, failure.kind] += int(failure.values.isnan().sum())
            return failure.values


def judged(jury: Jury, task: TeacherConfig, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """(B,) float32 on the CPU: a task's reward, the weighted sum of its terms, for a run that learns from it.

    Raises UserError that names the task where one fails.
    """
    assert task.reward is not None
    try:
        return torch.stack([t.factor * jury(t.reward, images, prompts) for t in reward_terms(task.reward)]).sum(0)
    except RewardFailure as failure:
        raise UserError(f"teachers.{task.name}.reward", str(failure), "mend it, then go on with --resume") from failure


class _Call:
    """One call of a reward, in this thread or in one of its own."""

    def __init__(self, name: str, function: Reward, images: Tensor, prompts: Sequence[Prompt]) -> None:
        self.name, self.function, self.images, self.prompts = name, function, images, prompts
        self._missing = torch.full((len(images),), float("nan"))
        self._thread: threading.Thread | None = None
        self._returned: Any = None
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None) -> Tensor:
        if timeout is None:
            self._run()
        else:
            stream = torch.cuda.current_stream(self.images.device) if self.images.is_cuda else None
            self._thread = threading.Thread(target=self._run, args=(stream,), name=f"reward {self.name}", daemon=True)
            self._thread.start()
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise self._failure("timed out", f"took longer than {timeout:g} s for {len(self.images)} images")
        if self._error is not None:
            error = self._error
            if isinstance(error, KeyboardInterrupt):
                raise error
            raise self._failure("raised", f"raised {type(error).__name__}: {one_line(error)}") from error
        return self._checked(self._returned)

    def _run(self, stream: Any = None) -> None:
        """The gradient mode and the CUDA stream are a thread's own."""
        try:
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                self._returned = self.function(self.images, self.prompts)
        except BaseException as error:  # SystemExit too: a reward does not end a run
            self._error = error

    def _checked(self, values: Any) -> Tensor:
        try:
            scores = torch.as_tensor(values).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._failure("wrong shape", f"returned {type(values).__name__}, not numbers") from error
        count = len(self.images)
        if scores.shape != (count,):
            shape = tuple(scores.shape)
            raise self._failure("wrong shape", f"returned shape {shape} for {count} images, not ({count},)")
        bad = ~scores.isfinite()
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            at = f"first for {self.prompts[first].text!r}"
            detail = f"returned {int(bad.sum())} of {count} values NaN or infinite, {at}"
            raise self._failure("not finite", detail, scores.masked_fill(bad, float("nan")))
        return scores

    def _failure(self, kind: Kind, detail: str, values: Tensor | None = None) -> RewardFailure:
        return RewardFailure(self.name, kind, detail, self._missing if values is None else values)
