"""Calls of rewards, kept apart from the run: what a reward does wrong is named and counted, and the run decides.

A reward may raise, hang, return NaN or a wrong number of values. Under the policy `raise` that ends the run, since
reinforcement learning has nothing else to learn from; under `record` the values are missing (NaN), as in evaluations of
a distillation, whose loss uses no reward.

Every call gets copies of the images and the prompts, and its values are copied out of what it returns. A reward may
therefore change what it is given, and keep it: a thread that outlives its timeout still computes on its own copies.

`RewardRunner.submit` judges a batch beside the run, which draws the next one meanwhile:

    with RewardRunner("record", timeout, models, ahead=2) as runner:
        pending = [runner.submit(images, prompts, ["text", "unified_reward"]) for images, prompts in batches]
        values = [batch.result() for batch in pending]  # each a dict of (B,) float32 on the CPU by reward
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig, TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards import REWARDS, ModelReward, Reward, get_reward, reward_terms
from opd_fast.rewards.values import MissingValues, UnreadableValues, image_count, read_values
from opd_fast.rewards.workers import Job, Workers

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
    """Calls a run's rewards under one policy, at once or in threads of its own (`submit`).

    Calls of one reward come one after the other, in the order of the batches. Used as a context manager it ends its
    threads, as `close` does.

    Args:
        policy: what a failure does, as this file's beginning says.
        timeout: seconds that one call of a reward may take, whenever it begins; None sets no limit.
        models: the models and servers of the rewards that have one.
        ahead: batches given to `submit` that may be unfinished; the next one waits. Each is held once, and once more
            by every call that is at work on it.

    Attributes:
        failures: the images without a value, by (reward, kind).
        messages: the first failure of each (reward, reason), in words.
    """

    def __init__(
        self,
        policy: Literal["raise", "record"],
        timeout: float | None = None,
        models: RewardModelsConfig | None = None,
        ahead: int = 2,
    ) -> None:
        self.policy, self.timeout, self.models, self.ahead = policy, timeout, models, ahead
        self.failures: Counter[tuple[str, Kind]] = Counter()
        self.messages: dict[tuple[str, str], str] = {}
        self._hanging: dict[str, _Call] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._called: set[str] = set()
        """The rewards that have come back from a call."""
        self._workers = Workers(ahead)
        self._streams: dict[tuple[str, torch.device], Any] = {}

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads of `submit`. What nobody has begun to judge is left; a call at work gets a moment to end."""
        self._workers.close()

    def __call__(self, reward: str, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Call `reward` and return its values, (B,) float32 on the CPU; under `record`, NaN stands for a missing one.

        A reward that hung is not called again before it has come back. Raises RewardFailure under `raise`.
        """
        found = self._judge(reward, get_reward(reward, self.models), images, prompts)
        return self._decide(reward, found)

    def submit(self, images: Tensor, prompts: Sequence[Prompt], rewards: Sequence[str]) -> Pending:
        """Have a batch judged by several rewards while the caller goes on.

        The values are those of `__call__`, to the bit. Rewards that ask a server, and those of the user's own files,
        are called in threads of their own, so that a slow one does not hold up another. All the others share one
        thread, since they share the device: two at once would need the memory of both. Where that device is the CPU
        the drawing needs its cores too, and they are called before this returns. The same goes for a reward's first
        call, other than a server's: loading a model changes settings of the process, such as torch's default dtype,
        that the drawing would see.

        Args:
            images: (B, 3, H, W) float in 0..1; copied before this returns.
            prompts: one for each image.
            rewards: names or dotted paths; none is called twice for the batch.

        Raises:
            ValueError: an unknown reward.
            RuntimeError: the runner was closed.
        """
        functions = {name: get_reward(name, self.models) for name in rewards}
        lines = {name: self._line(name, function, images.device) for name, function in functions.items()}
        beside = {name: line for name, line in lines.items() if line is not None}
        jobs: dict[str, Job[Tensor | RewardFailure]] = {}
        if beside:
            self._workers.reserve()
            try:
                batch = _Batch(images, prompts, alone=len(beside) == 1)
                for name, line in beside.items():
                    jobs[name] = Job(functools.partial(self._judge_beside, line, name, functions[name], batch))
                self._workers.start([(line, jobs[name]) for name, line in beside.items()])
            except BaseException:
                self._workers.release()
                raise
            del batch
        for name in (name for name in functions if name not in beside):
            jobs[name] = Job(functools.partial(self._judge, name, functions[name], images, prompts))
            jobs[name].run_here()
        return Pending(self, {name: jobs[name] for name in functions})

    def _line(self, name: str, function: Reward, device: torch.device) -> str | None:
        """Return the line of the thread that calls a reward; None where the caller's own thread does."""
        if isinstance(function, ModelReward) and function.remote:
            return name
        if name not in self._called and not (isinstance(function, ModelReward) and function.is_loaded(device)):
            return None
        if isinstance(function, ModelReward) or name in REWARDS:
            return None if device.type == "cpu" else "models"
        return name.partition(":")[0]  # the functions of one file may share a model

    def _judge_beside(self, line: str, name: str, function: Reward, batch: _Batch) -> Tensor | RewardFailure:
        """Judge in a worker; on a GPU with a stream of the worker's own."""
        device = batch.images.device
        if device.type == "cuda" and (line, device) not in self._streams:
            self._streams[line, device] = torch.cuda.Stream(device)
        with batch.on(self._streams.get((line, device))):
            return self._judge(name, function, batch.images, batch.prompts, copied=batch.alone)

    def _judge(
        self, name: str, function: Reward, images: Tensor, prompts: Sequence[Prompt], *, copied: bool = False
    ) -> Tensor | RewardFailure:
        """Call a reward when it is its turn. Returns its values, or under `record` the failure.

        `copied` says that the images are the call's own already. Raises RewardFailure under `raise`.
        """
        with self._turns.setdefault(name, threading.Lock()):
            call = None
            try:
                stuck = self._hanging.pop(name, None)
                if stuck is not None and stuck.running:
                    self._hanging[name] = stuck
                    missing = torch.full((len(images),), float("nan"))
                    raise RewardFailure(name, "timed out", "still hangs in an earlier call", missing)
                call = _Call(name, function, images, prompts, copied=copied)
                values = call.wait(self.timeout)
                self._called.add(name)
                return values
            except RewardFailure as failure:
                if call is not None and call.running:
                    self._hanging[name] = call
                if self.policy == "raise":
                    raise
                # Its frames hold the images, and a batch waits for its turn to be read.
                failure.__cause__ = failure.__context__ = None
                return failure.with_traceback(None)

    def _decide(self, reward: str, found: Tensor | RewardFailure) -> Tensor:
        """Count and report a failure, in the caller's thread, so that the order does not depend on the threads."""
        if isinstance(found, Tensor):
            return found
        self.messages.setdefault((reward, found.reason), str(found))
        self.failures[reward, found.kind] += int(found.values.isnan().sum())
        return found.values


class Pending:
    """A batch that is being judged."""

    def __init__(self, runner: RewardRunner, jobs: dict[str, Job[Tensor | RewardFailure]]) -> None:
        self._runner, self._jobs = runner, jobs
        self._values: dict[str, Tensor] | None = None

    @property
    def finished(self) -> bool:
        """Whether `result` would return at once."""
        return all(job.finished for job in self._jobs.values())

    def result(self) -> dict[str, Tensor]:
        """Wait for the batch; returns reward to values, (B,) float32 on the CPU, in the order given to `submit`.

        Under `record` a value that is missing is NaN, and the runner counts it now. Raises RewardFailure under `raise`,
        for the first of the rewards that failed, and RuntimeError where the runner was closed before.
        """
        if self._values is None:
            found = {name: job.result() for name, job in self._jobs.items()}
            self._values = {name: self._runner._decide(name, value) for name, value in found.items()}
            self._jobs = {}
        return self._values


class _Batch:
    """A copy of a batch's images, and what a thread needs to read it.

    Args:
        alone: whether a single call gets it, which may then have the copy itself.
    """

    def __init__(self, images: Tensor, prompts: Sequence[Prompt], *, alone: bool) -> None:
        self.images, self.prompts, self.alone = images.detach().clone(), list(prompts), alone
        self._copied = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Work on a CUDA stream once the copy is made; None, with images on a CPU, changes nothing."""
        if self._copied is None:
            yield
            return
        stream.wait_event(self._copied)
        self.images.record_stream(stream)  # its memory belongs to the stream that drew
        with torch.cuda.stream(stream):
            yield


def submit_task(
    runner: RewardRunner, task: TeacherConfig, images: Tensor, prompts: Sequence[Prompt]
) -> Callable[[], Tensor]:
    """Have a task's images judged while the caller goes on; returns a function that waits for the task's reward.

    The terms of a sum are judged beside each other, as `RewardRunner.submit` says. The function returns what
    `task_reward` does, and raises as it does.
    """
    assert task.reward is not None
    key, reward, terms = f"teachers.{task.name}.reward", task.reward, reward_terms(task.reward)
    pending = runner.submit(images, prompts, [term.reward for term in terms])

    def wait() -> Tensor:
        try:
            values = pending.result()
        except RewardFailure as failure:
            raise UserError(key, str(failure), "fix the reward, then go on with --resume") from failure
        total = torch.stack([term.factor * values[term.reward] for term in terms]).sum(0)
        if not bool(total.isfinite().all()):
            raise UserError(key, f"the sum {reward} is beyond float32 for some images", "return smaller values")
        return total

    return wait


def task_reward(runner: RewardRunner, task: TeacherConfig, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return a task's reward, the weighted sum of its terms, for a run that learns from it; (B,) float32 on the CPU.

    Raises UserError, which names the task, where a term fails and where the sum is beyond float32.
    """
    return submit_task(runner, task, images, prompts)()


class _Call:
    """One call of a reward, in this thread or in one of its own."""

    def __init__(
        self, name: str, function: Reward, images: Tensor, prompts: Sequence[Prompt], *, copied: bool = False
    ) -> None:
        self.name, self.function, self.prompts = name, function, prompts
        self.device = images.device
        # Images of one prompt share its object, so each gets a copy of its own.
        self._given: Any = (
            images if copied else images.detach().clone(),
            [copy.deepcopy(prompt) for prompt in prompts],
        )
        self._missing = torch.full((len(images),), float("nan"))
        self._thread: threading.Thread | None = None
        self._values: Tensor | None = None
        self._error: BaseException | None = None
        self._why: str | None = None
        """Why some values are missing, where the reward says so."""

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
        if self._why is not None:
            values = self._values.float()
            lacks = int((~values.isfinite()).sum())
            detail = f"has no value for {lacks} of {image_count(len(values))}: {short(self._why)}"
            raise RewardFailure(self.name, "not finite", detail, values.masked_fill(~values.isfinite(), float("nan")))
        return self._finite(self._values)

    def _run(self, stream: Any = None) -> None:
        """Call the reward and read what it returns.

        The gradient mode and the CUDA stream are set here because each thread has its own. The values are read here
        because a GPU may still be computing them, which counts against the timeout.
        """
        try:
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                try:
                    returned = self.function(*self._given)
                except MissingValues as some:
                    returned, self._why = some.values, one_line(some)
                self._values = read_values(returned, len(self._missing))
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
