"""Rewards from anywhere, called apart: what each way of failing does to a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_fast.prompts import Prompt
from opd_fast.rewards import REWARDS, get_reward, prompt_groups
from opd_fast.rewards.judge import Jury, RewardFailure, judge

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(f"prompt {i}") for i in range(3)]

MODULE = """
import threading
import torch

calls = 0
release = threading.Event()

def brightness(images, prompts):
    return images.mean((1, 2, 3))

def raises(images, prompts):
    raise OSError("server\\n at port 18085 is gone")

def leaves(images, prompts):
    raise SystemExit(3)

def hangs(images, prompts):
    global calls
    calls += 1
    release.wait()
    return images.mean((1, 2, 3))

def half(images, prompts):
    values = images.mean((1, 2, 3))
    values[1] = float("nan")
    return values

def short(images, prompts):
    return images.mean((1, 2, 3))[:-1]

def words(images, prompts):
    return ["good"] * len(images)

number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user's module, outside the package."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield None
    if "my_rewards" in sys.modules:
        sys.modules.pop("my_rewards").release.set()


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_dotted_path_is_a_reward(timeout: float | None) -> None:
    values = judge("my_rewards:brightness", IMAGES.requires_grad_(), PROMPTS, timeout)
    assert not values.requires_grad
    torch.testing.assert_close(values, IMAGES.detach().mean((1, 2, 3)))


@pytest.mark.parametrize("name", REWARDS)
def test_bundled_rewards_are_judged(name: str) -> None:
    record = {"target": "HK", "include": [{"class": "circle", "count": 1}]}
    prompts = [Prompt("a circle", record)] * 3
    assert torch.equal(judge(name, IMAGES, prompts, 30.0), get_reward(name)(IMAGES, prompts))


def test_modules_are_imported_when_used() -> None:
    assert "my_rewards" not in sys.modules
    jury = Jury("raise")
    assert "my_rewards" not in sys.modules
    jury("my_rewards:brightness", IMAGES, PROMPTS)
    assert "my_rewards" in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colr", "did you mean 'colour'"),
        ("my_rewards:nothing", "no attribute 'nothing'"),
        ("no_such_module:score", "No module named"),
        ("broken_rewards:score", "a_library_that_is_not_there"),
        ("my_rewards:number", "is a int, no function"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_reward(name)


FAILURES = [
    ("raises", "raised", "raised OSError: server at port 18085 is gone", 3),
    ("leaves", "raised", "raised SystemExit: 3", 3),
    ("half", "not finite", "1 of 3 values NaN or infinite, first for 'prompt 1'", 1),
    ("short", "wrong shape", r"returned shape \(2,\) for 3 images", 3),
    ("words", "wrong shape", "returned list, not numbers", 3),
]


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(("function", "kind", "message", "missing"), FAILURES)
def test_failures_are_named_and_counted(
    function: str, kind: str, message: str, missing: int, timeout: float | None
) -> None:
    name = f"my_rewards:{function}"
    with pytest.raises(RewardFailure, match=rf"^reward '{name}' .*{message}"):
        judge(name, IMAGES, PROMPTS, timeout)
    with pytest.raises(RewardFailure):
        Jury("raise", timeout)(name, IMAGES, PROMPTS)
    jury = Jury("record", timeout)
    for _ in range(2):
        values = jury(name, IMAGES, PROMPTS)
        assert values.shape == (3,)
        assert int(values.isnan().sum()) == missing
    assert jury.failures == {(name, kind): 2 * missing}
    assert len(jury.messages) == 1
    assert jury("my_rewards:brightness", IMAGES, PROMPTS).isfinite().all()  # the others go on


def test_a_reward_that_hangs_is_left_behind() -> None:
    name = "my_rewards:hangs"
    jury = Jury("record", 0.2)
    begun = time.monotonic()
    assert jury(name, IMAGES, PROMPTS).isnan().all()
    assert jury(name, IMAGES, PROMPTS).isnan().all()
    assert time.monotonic() - begun < 5
    module = sys.modules["my_rewards"]
    assert module.calls == 1  # no second thread while the first hangs
    assert jury.failures == {(name, "timed out"): 6}
    assert "took longer than 0.2 s for 3 images" in jury.messages[0]
    module.release.set()
    for _ in range(100):  # it comes back, and is asked again
        values = jury(name, IMAGES, PROMPTS)
        if values.isfinite().all():
            break
        time.sleep(0.05)
    torch.testing.assert_close(values, IMAGES.detach().mean((1, 2, 3)))
    assert module.calls == 2


def test_a_function_of_its_own_name() -> None:
    def pale(images: Tensor, prompts: Any) -> Tensor:
        raise KeyError("x")

    with pytest.raises(RewardFailure, match="reward 'pale' raised KeyError"):
        judge(pale, IMAGES, PROMPTS)


def test_groups_are_those_of_equal_prompts() -> None:
    a, b = Prompt("a circle"), Prompt("a circle", {"target": "A"})
    assert prompt_groups([a, b, a, Prompt("a circle"), Prompt("x")]).tolist() == [0, 1, 0, 0, 2]
