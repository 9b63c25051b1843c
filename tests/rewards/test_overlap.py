"""Batches that are judged while the run draws the next: the same values, in order, in bounded memory, in less time."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig, TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards import ModelReward
from opd_fast.rewards.runner import Pending, RewardFailure, RewardRunner, task_reward

PROMPTS = [Prompt(f"prompt {i}") for i in range(3)]
BATCHES = [torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(5)]
REPO = Path(__file__).parents[2]

MODULE = """
import threading
import time

import torch

release = threading.Event()
seen = []
threads = set()
pause = 0.0

def bright(images, prompts):
    threads.add(threading.current_thread().name.split()[0])
    time.sleep(pause)
    return images.mean((1, 2, 3))

def spoils(images, prompts):
    values = images.std((1, 2, 3))
    images.zero_()
    prompts.clear()
    return values

def waits(images, prompts):
    seen.append(float(images[0, 0, 0, 0]))
    if len(seen) > 1:
        release.wait()
    return images.mean((1, 2, 3))

def fails(images, prompts):
    seen.append(len(images))
    if len(seen) == 2:
        raise OSError("gone")
    values = images.mean((1, 2, 3))
    if len(seen) == 3:
        values[1] = float("nan")
    return values

def hangs(images, prompts):
    seen.append(len(images))
    if len(seen) == 2:
        release.wait()
    return images.mean((1, 2, 3))
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("first_rewards", "second_rewards"):
        (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield None
    for name in ("first_rewards", "second_rewards"):
        if name in sys.modules:
            sys.modules.pop(name).release.set()


def reward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rewards ")]


def submit_all(runner: RewardRunner, rewards: list[str]) -> list[dict[str, Tensor]]:
    return [pending.result() for pending in [runner.submit(images, PROMPTS, rewards) for images in BATCHES]]


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_values_are_those_of_one_call_after_another(timeout: float | None) -> None:
    """Rewards that spoil what they are given do it to copies, and the run may reuse its images' memory at once."""
    rewards = ["first_rewards:bright", "colour", "second_rewards:spoils", "first_rewards:spoils"]
    alone = RewardRunner("raise", timeout)
    expected = [{name: alone(name, images, PROMPTS) for name in rewards} for images in BATCHES]
    prompts = [Prompt(prompt.text, {"words": ["a"]}) for prompt in PROMPTS]
    with RewardRunner("raise", timeout) as runner:
        buffer, pending = torch.empty_like(BATCHES[0]), []
        for images in BATCHES:
            pending.append(runner.submit(buffer.copy_(images), prompts, rewards))
            assert torch.equal(buffer, images)
            buffer.fill_(9)
        found = [batch.result() for batch in pending]
        assert pending[0].result() is found[0]
    assert all(list(values) == rewards for values in found)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in rewards)
    assert prompts == [Prompt(prompt.text, {"words": ["a"]}) for prompt in PROMPTS]
    assert sys.modules["first_rewards"].threads <= {"MainThread", "rewards", "reward"}
    assert not reward_threads()


def test_a_batch_for_no_reward() -> None:
    with RewardRunner("raise") as runner:
        assert runner.submit(BATCHES[0], PROMPTS, []).result() == {}
        with pytest.raises(ValueError, match="unknown reward 'colr'"):
            runner.submit(BATCHES[0], PROMPTS, ["colr"])


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_batches_wait_than_allowed(ahead: int) -> None:
    """The batch after them waits to be submitted, and batches that are done leave no images behind."""
    name = "first_rewards:waits"
    with RewardRunner("raise", ahead=ahead) as runner:
        runner.submit(BATCHES[0], PROMPTS, [name]).result()  # the first call is made at once
        module, pending = sys.modules["first_rewards"], []

        def submit() -> None:
            for images in BATCHES[1:]:
                pending.append(runner.submit(images, PROMPTS, [name]))

        thread = threading.Thread(target=submit, daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert len(pending) == ahead
        assert len(module.seen) == 2
        batches = [thing for thing in gc.get_objects() if type(thing).__name__ == "_Batch"]
        assert len(batches) == ahead
        held = [weakref.ref(batch) for batch in batches]
        del batches
        module.release.set()
        thread.join(30)
        found = [batch.result() for batch in pending]
        assert module.seen == [float(images[0, 0, 0, 0]) for images in BATCHES]
        for values, images in zip(found, BATCHES[1:], strict=True):
            assert torch.equal(values[name], images.mean((1, 2, 3)))
        deadline = time.monotonic() + 10
        while any(ref() is not None for ref in held) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(ref() is None for ref in held)


def test_failures_of_a_batch_are_recorded_when_it_is_read() -> None:
    name = "first_rewards:fails"
    with RewardRunner("record", 30.0) as runner:
        found = submit_all(runner, [name, "second_rewards:bright"])
    missing = [int(values[name].isnan().sum()) for values in found]
    assert missing == [0, 3, 1, 0, 0]
    assert all(bool(values["second_rewards:bright"].isfinite().all()) for values in found)
    assert runner.failures == {(name, "raised"): 3, (name, "not finite"): 1}
    assert list(runner.messages.values()) == [
        f"reward '{name}' raised OSError: gone",
        f"reward '{name}' returned 1 of 3 values NaN or infinite, first for 'prompt 1'",
    ]


def test_a_failed_batch_keeps_no_images() -> None:
    """Many batches may be read at the end, and an exception's frames would hold those of each that failed."""
    before = {id(thing) for thing in gc.get_objects() if type(thing) is Tensor}
    with RewardRunner("record") as runner:
        pending = [runner.submit(BATCHES[0], PROMPTS, ["first_rewards:fails"]) for _ in range(3)]
        while not all(batch.finished for batch in pending):
            time.sleep(0.01)
        gc.collect()
        left = [thing for thing in gc.get_objects() if type(thing) is Tensor and id(thing) not in before]
        assert not [tensor for tensor in left if tensor.dim() == 4]
        assert pending[1].result()["first_rewards:fails"].isnan().all()


def test_a_failure_is_raised_where_the_batch_is_read() -> None:
    name = "first_rewards:fails"
    with RewardRunner("raise", 30.0) as runner:
        pending = [runner.submit(images, PROMPTS, ["second_rewards:bright", name]) for images in BATCHES]
        assert pending[0].result()[name].isfinite().all()
        for _ in range(2):
            with pytest.raises(RewardFailure, match=rf"^reward '{name}' raised OSError: gone$") as error:
                pending[1].result()
        assert isinstance(error.value.__cause__, OSError)
        assert pending[4].result()[name].isfinite().all()


def test_a_hang_costs_one_timeout_and_no_other_reward() -> None:
    """The batches behind it miss the value at once; the other reward has all."""
    name = "first_rewards:hangs"
    begun = time.monotonic()
    with RewardRunner("record", 0.5) as runner:
        found = submit_all(runner, [name, "second_rewards:bright"])
        assert time.monotonic() - begun < 10
        assert [bool(values[name].isnan().all()) for values in found] == [False, True, True, True, True]
        assert all(bool(values["second_rewards:bright"].isfinite().all()) for values in found)
        assert runner.failures == {(name, "timed out"): 12}
        assert len(sys.modules["first_rewards"].seen) == 2
        sys.modules["first_rewards"].release.set()
        for _ in range(100):  # it comes back, and is asked again
            values = runner.submit(BATCHES[0], PROMPTS, [name]).result()[name]
            if values.isfinite().all():
                break
            time.sleep(0.05)
        assert torch.equal(values, BATCHES[0].mean((1, 2, 3)))


def test_a_slow_reward_does_not_hold_up_another() -> None:
    slow, quick = "first_rewards:waits", "second_rewards:bright"
    with RewardRunner("raise", ahead=3) as runner:
        runner.submit(BATCHES[0], PROMPTS, [slow, quick]).result()
        pending = runner.submit(BATCHES[1], PROMPTS, [slow])
        assert runner.submit(BATCHES[2], PROMPTS, [quick]).result()[quick].isfinite().all()
        assert not pending.finished
        sys.modules["first_rewards"].release.set()
        assert torch.equal(pending.result()[slow], BATCHES[1].mean((1, 2, 3)))


def judged_in(pause: float, beside: bool) -> float:
    """Seconds that six batches take of which each is drawn in `pause` seconds and judged in as many."""
    name = "first_rewards:bright"
    with RewardRunner("raise", 30.0) as runner:
        runner(name, BATCHES[0], PROMPTS)
        sys.modules["first_rewards"].pause = pause
        begun, pending = time.monotonic(), []
        for _ in range(6):
            time.sleep(pause)
            if beside:
                pending.append(runner.submit(BATCHES[0], PROMPTS, [name]))
            else:
                runner(name, BATCHES[0], PROMPTS)
        assert all(batch.result()[name].isfinite().all() for batch in pending)
        return time.monotonic() - begun


def test_judging_takes_the_time_of_drawing() -> None:
    """Six batches of 0.2 s each, drawn and judged: 2.4 s in turns, 1.4 s beside each other."""
    turns, beside = judged_in(0.2, False), judged_in(0.2, True)
    assert turns > 2.4
    assert beside < 0.75 * turns


class Local(ModelReward):
    """A reward that loads something; `calls` has the thread and the default dtype of each call."""

    calls: list[tuple[str, str]] = []  # noqa: RUF012

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self.calls.append(("load", threading.current_thread().name))

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        self.calls.append(("score", threading.current_thread().name))
        return images.mean((1, 2, 3))


class Remote(Local):
    remote = True
    calls: list[tuple[str, str]] = []  # noqa: RUF012


def test_local_models_share_the_cpu_in_turns_and_servers_wait_beside_it() -> None:
    for kind in (Local, Remote):
        kind.calls.clear()
        with RewardRunner("raise", models=RewardModelsConfig(batch=2)) as runner:
            found = submit_all(runner, [f"{__name__}:{kind.__name__}"])
        for values, images in zip(found, BATCHES, strict=True):
            torch.testing.assert_close(values[f"{__name__}:{kind.__name__}"], images.mean((1, 2, 3)))
        assert [what for what, _ in kind.calls] == ["load"] + ["score"] * 10
    assert {thread for _, thread in Local.calls} == {"MainThread"}
    assert {thread for _, thread in Remote.calls} == {f"rewards {__name__}:Remote"}


def test_a_closed_runner() -> None:
    name = "first_rewards:waits"
    runner = RewardRunner("raise", ahead=3)
    runner.submit(BATCHES[0], PROMPTS, [name]).result()
    pending = [runner.submit(images, PROMPTS, [name]) for images in BATCHES[1:4]]
    while len(sys.modules["first_rewards"].seen) < 2:
        time.sleep(0.01)
    begun = time.monotonic()
    runner.close()
    assert time.monotonic() - begun < 10  # though the first hangs
    sys.modules["first_rewards"].release.set()
    assert pending[0].result()[name].isfinite().all()
    for batch in pending[1:]:
        with pytest.raises(RuntimeError, match="not judged, because its RewardRunner was closed"):
            batch.result()
    with pytest.raises(RuntimeError, match="was closed"):
        runner.submit(BATCHES[0], PROMPTS, [name])
    assert runner(name, BATCHES[0], PROMPTS).isfinite().all()


def test_a_runner_that_nobody_closes_ends_its_threads() -> None:
    runner: RewardRunner | None = RewardRunner("raise")
    assert runner is not None
    last: Pending | None = [runner.submit(images, PROMPTS, ["first_rewards:bright"]) for images in BATCHES][-1]
    assert last is not None
    last.result()
    [thread] = reward_threads()
    runner = last = None
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_terms_of_a_sum_are_judged_beside_each_other() -> None:
    text = "2*first_rewards:bright + second_rewards:spoils"
    task = TeacherConfig(name="t", weights="base", prompts="p.txt", reward=text)
    runner = RewardRunner("raise", 30.0)
    for images in BATCHES:
        expected = torch.stack([2.0 * images.mean((1, 2, 3)), images.std((1, 2, 3))]).sum(0)
        assert torch.equal(task_reward(runner, task, images, PROMPTS), expected)
    runner.close()


SCRIPT = """
import os, signal, sys, threading, time
import torch
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import main_guard
from opd_fast.rewards.runner import RewardRunner

def slow(images, prompts):
    calls.append(1)
    if len(calls) > 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(600)
    return images.mean((1, 2, 3))

calls = []
sys.modules["mine"] = sys.modules["__main__"]

@main_guard
def main(argv):
    images, prompts = torch.rand(2, 3, 8, 8), [Prompt("a")] * 2
    with RewardRunner("record", TIMEOUT) as runner:
        for _ in range(2):
            pending = runner.submit(images, prompts, ["mine:slow"])
        pending.result()
    return 0

sys.exit(main([]))
"""


@pytest.mark.parametrize("timeout", ["None", "300.0"])
def test_an_interrupted_process_ends(timeout: str) -> None:
    script, begun = SCRIPT.replace("TIMEOUT", timeout), time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=REPO)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
    assert time.monotonic() - begun < 60
