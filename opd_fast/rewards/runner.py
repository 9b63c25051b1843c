"""Calls of rewards, kept apart from the run: what a reward does wrong is named and counted, and the run decides.

A reward may raise, hang, return NaN or a wrong number of values. Under the policy `raise` that ends the run, since
reinforcement learning has nothing else to learn from; under `record` the values are missing (NaN), as in evaluations of
a distillation, whose loss uses no reward.

Every call gets copies of the images and the prompts, and its values are copied out of what it returns. A reward may
therefore change what it is given, and keep it: a thread that outlives its timeout still computes on its own copies.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig, TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards import Reward, get_reward, reward_terms
from opd_fast.rewards.values import UnreadableValues, image_count, read_values

Kind = Literal["unavailable", "raised", "timed out", "not numbers", "wrong shape", "not finite"]


class RewardFailure(RuntimeError):
    """What a reward did wrong.

    Attributes:
        reward: its name.
        kind: the failure in a word or two, for counting.
        reason: the kind, and which exception was raised; failures of one reason are reported once.
        values: (B,) float32, NaN where a value is missing.
    """

    def __init__(self, reward: str, kind: Kind, detail: str, values: Tensor, reason: str | None = None) -> None:
        super().__init__(f"reward {reward!r} {detail}")
        self.reward, self.kind, self.values = reward, kind, values
        self.reason = reason or kind


def call_reward(
    reward: str | Reward,
    images: Tensor,
    prompts: Sequence[Prompt],
    timeout: float | None = None,
    *,
    name: str | None = None,
) -> Tensor:
    """Call one reward and return its values, (B,) float32 on the CPU.

    Args:
        reward: a name or dotted path (`rewards.get_reward`), or the function itself; called without gradient.
        images: (B, 3, H, W) float in 0..1, on any device; the reward gets a copy.
        prompts: one for each image; the reward gets a copy of each.
        timeout: seconds, or None for no limit. With a timeout the reward runs in a thread, which cannot be stopped: a
            reward that hangs keeps it to the end of the process, but not beyond.
        name: what messages call the reward; by default the name given, or the function's own.

    Raises:
        RewardFailure: the reward raised, took longer, or returned something other than a finite real number for each
            image (`values.read_values`).
    """
    function = get_reward(reward) if isinstance(reward, str) else reward
    default_name = reward if isinstance(reward, str) else getattr(reward, "__name__", "reward")
    return _Call(name or str(default_name), function, images, prompts).wait(timeout)


class RewardRunner:
    """Calls a run's rewards under one policy; `failures` counts the images without a value, by (reward, kind)."""

    def __init__(
        self,
        policy: Literal["raise", "record"],
        timeout: float | None = None,
        models: RewardModelsConfig | None = None,
    ) -> None:
        self.policy, self.timeout, self.models = policy, timeout, models
        self.failures: Counter[tuple[str, Kind]] = Counter()
        self.messages: dict[tuple[str, str], str] = {}
        """The first failure of each (reward, reason), in words."""
        self._hanging: dict[str, _Call] = {}

    def __call__(self, reward: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Call `reward` and return its values, (B,) float32 on the CPU; under `record`, NaN stands for a missing one.

        A reward that hung is not called again before it has come back. Raises RewardFailure under `raise`.
        """
        call = None
        try:
            stuck = self._hanging.pop(reward, None)
            if stuck is not None and stuck.running:
                self._hanging[reward] = stuck
                missing = torch.full((len(images),), float("nan"))
                raise RewardFailure(reward, "timed out", "still hangs in an earlier call", missing)
            call = _Call(reward, get_reward(reward, self.models), images, prompts)
            return call.wait(self.timeout)
        except RewardFailure as failure:
            if call is not None and call.running:
                self._hanging[reward] = call
            if self.policy == "raise":
                raise
            self.messages.setdefault((reward, failure.reason), str(failure))
            self.failures[reward, failure.kind] += int(failure.values.isnan().sum())
            return failure.values


def task_reward(runner: RewardRunner, task: TeacherConfig, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return a task's reward, the weighted sum of its terms, for a run that learns from it; (B,) float32 on the CPU.

    Raises UserError, which names the task, where a term fails and where the sum is beyond float32.
    """
    assert task.reward is not None
    key = f"teachers.{task.name}.reward"
    try:
        total = torch.stack([t.factor * runner(t.reward, images, prompts) for t in reward_terms(task.reward)]).sum(0)
    except RewardFailure as failure:
        raise UserError(key, str(failure), "fix the reward, then go on with --resume") from failure
    if not bool(total.isfinite().all()):
        raise UserError(key, f"the sum {task.reward} is beyond float32 for some images", "return smaller values")
    return total


class _Call:
    """One call of a reward, in this thread or in one of its own."""

    def __init__(self, name: str, function: Reward, images: Tensor, prompts: Sequence[Prompt]) -> None:
        self.name, self.function, self.prompts = name, function, prompts
        self.device = images.device
        # Images of one prompt share its object, so each gets a copy of its own.
        self._given: Any = (images.detach().clone(), [copy.deepcopy(prompt) for prompt in prompts])
        self._missing = torch.full((len(images),), float("nan"))
        self._thread: threading.Thread | None = None
        self._values: Tensor | None = None
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self, timeout: float | None) -> Tensor:
        """Return the values, (B,) float32 on the CPU. Raises RewardFailure."""
        if timeout is None:
            self._run()
        else:
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            self._thread = threading.Thread(target=self._run, args=(stream,), name=f"reward {self.name}", daemon=True)
            self._thread.start()
            self._thread.join(timeout)
            if self._thread.is_alive():
                detail = f"took longer than {timeout:g} s for {image_count(len(self._missing))}"
                raise RewardFailure(self.name, "timed out", detail, self._missing)
        if (error := self._error) is not None:
            if isinstance(error, KeyboardInterrupt):
                raise error
            if isinstance(error, UnreadableValues):
                raise RewardFailure(self.name, error.kind, str(error), self._missing) from error
            if isinstance(error, UserError):  # it names what is missing and the remedy
                raise RewardFailure(self.name, "unavailable", f"cannot judge: {error}", self._missing) from error
            name = type(error).__name__
            detail = f"raised {name}: {short(one_line(error))}"
            raise RewardFailure(self.name, "raised", detail, self._missing, f"raised {name}") from error
        assert self._values is not None
        return self._finite(self._values)

    def _run(self, stream: Any = None) -> None:
        """Call the reward and read what it returns.

        The gradient mode and the CUDA stream are set here because each thread has its own. The values are read here
        because a GPU may still be computing them, which counts against the timeout.
        """
        try:
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                self._values = read_values(self.function(*self._given), len(self._missing))
        except BaseException as error:  # SystemExit too: a reward does not end a run
            self._error = error
        finally:
            self._given = None

    def _finite(self, values: Tensor) -> Tensor:
        scores = values.float()
        bad = ~scores.isfinite()
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            beyond = " in float32" if bool(values.isfinite()[bad].any()) else ""
            detail = f"returned {int(bad.sum())} of {len(bad)} values NaN or infinite{beyond}, "
            detail += f"first for {short(self.prompts[first].text, 200)!r}"
            raise RewardFailure(self.name, "not finite", detail, scores.masked_fill(bad, float("nan")))
        return scores
