"""Rewards from anywhere, called apart: what each way of failing does to a run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_fast.config import TeacherConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import REWARDS, ModelReward, Reward, get_reward, prompt_groups
from opd_fast.rewards.runner import RewardFailure, RewardRunner, call_reward, task_reward

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

async def later(images, prompts):
    return images.mean((1, 2, 3))

def one_by_one(images, prompts):
    yield from images.mean((1, 2, 3))

def alone(images):
    return images.mean((1, 2, 3))

class Model:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

model = Model()

def rescales(images, prompts):
    images.mul_(2).sub_(1).numpy()[:] *= 0.5
    return images.mean((1, 2, 3))

def renames(images, prompts):
    names = [prompt.metadata.pop("name") for prompt in prompts]
    prompts[0].metadata["words"].append("x")
    prompts.clear()
    return [len(name) for name in names]

def hangs_and_rescales(images, prompts):
    release.wait()
    rescales(images, prompts)
    renames(images, prompts)

shared = torch.zeros(3)

def fills(images, prompts):
    return shared.copy_(images.mean((1, 2, 3)))

def huge(images, prompts):
    return [3e38] * len(images)
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
    values = call_reward("my_rewards:brightness", IMAGES.requires_grad_(), PROMPTS, timeout)
    assert not values.requires_grad
    torch.testing.assert_close(values, IMAGES.detach().mean((1, 2, 3)))


@pytest.mark.parametrize("name", [name for name in REWARDS if not isinstance(get_reward(name), ModelReward)])
def test_bundled_rewards_are_judged(name: str) -> None:
    record = {"target": "HK", "include": [{"class": "circle", "count": 1}]}
    prompts = [Prompt("a circle", record)] * 3
    assert torch.equal(call_reward(name, IMAGES, prompts, 30.0), get_reward(name)(IMAGES, prompts))


def test_modules_are_imported_when_used() -> None:
    assert "my_rewards" not in sys.modules
    runner = RewardRunner("raise")
    assert "my_rewards" not in sys.modules
    runner("my_rewards:brightness", IMAGES, PROMPTS)
    assert "my_rewards" in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("colr", "did you mean 'colour'"),
        ("my_rewards:nothing", "no attribute 'nothing'"),
        ("no_such_module:score", "No module named"),
        ("broken_rewards:score", "a_library_that_is_not_there"),
        ("my_rewards:number", "is a int, not a function"),
        ("my_rewards:Model", "is a class, not a function"),
        ("my_rewards:later", "is an async function, not a function"),
        ("my_rewards:one_by_one", "is a generator, not a function"),
        ("my_rewards:alone", r"is a function of \(images\), not a function of \(images, prompts\)"),
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
    ("words", "not numbers", r"returned a list that holds a str \('good'\), not a number", 3),
]


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(("function", "kind", "message", "missing"), FAILURES)
def test_failures_are_named_and_counted(
    function: str, kind: str, message: str, missing: int, timeout: float | None
) -> None:
    name = f"my_rewards:{function}"
    with pytest.raises(RewardFailure, match=rf"^reward '{name}' .*{message}"):
        call_reward(name, IMAGES, PROMPTS, timeout)
    with pytest.raises(RewardFailure):
        RewardRunner("raise", timeout)(name, IMAGES, PROMPTS)
    runner = RewardRunner("record", timeout)
    for _ in range(2):
        values = runner(name, IMAGES, PROMPTS)
        assert values.shape == (3,)
        assert int(values.isnan().sum()) == missing
    assert runner.failures == {(name, kind): 2 * missing}
    assert len(runner.messages) == 1
    assert runner("my_rewards:brightness", IMAGES, PROMPTS).isfinite().all()  # the others go on


def test_a_reward_that_hangs_is_left_behind() -> None:
    name = "my_rewards:hangs"
    runner = RewardRunner("record", 0.2)
    begun = time.monotonic()
    assert runner(name, IMAGES, PROMPTS).isnan().all()
    assert runner(name, IMAGES, PROMPTS).isnan().all()
    assert time.monotonic() - begun < 5
    module = sys.modules["my_rewards"]
    assert module.calls == 1  # no second thread while the first hangs
    assert runner.failures == {(name, "timed out"): 6}
    assert "took longer than 0.2 s for 3 images" in runner.messages[name, "timed out"]
    module.release.set()
    for _ in range(100):  # it comes back, and is asked again
        values = runner(name, IMAGES, PROMPTS)
        if values.isfinite().all():
            break
        time.sleep(0.05)
    torch.testing.assert_close(values, IMAGES.detach().mean((1, 2, 3)))
    assert module.calls == 2


def test_an_object_that_is_called_is_a_reward() -> None:
    torch.testing.assert_close(call_reward("my_rewards:model", IMAGES, PROMPTS), IMAGES.detach().mean((1, 2, 3)))


# --- what is shared --------------------------------------------------------------------------------------------------


def named() -> list[Prompt]:
    """Three prompts, two of which are one object, as those of a group of images are."""
    first = Prompt("one", {"name": "ab", "words": ["a"]})
    return [first, first, Prompt("two", {"name": "abc", "words": ["a"]})]


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_reward_may_change_what_it_is_given(timeout: float | None) -> None:
    images, prompts = IMAGES.detach().clone(), named()
    runner = RewardRunner("raise", timeout)
    assert runner("my_rewards:renames", images, prompts).tolist() == [2, 2, 3]
    torch.testing.assert_close(
        runner("my_rewards:rescales", images, prompts), (IMAGES.detach() - 0.5).mean((1, 2, 3)), rtol=0, atol=1e-6
    )
    assert torch.equal(images, IMAGES)
    assert prompts == named()
    assert runner("my_rewards:renames", images, prompts).tolist() == [2, 2, 3]


@pytest.mark.parametrize(
    "text", ["2*my_rewards:rescales + my_rewards:brightness", "my_rewards:brightness + 2*my_rewards:rescales"]
)
def test_a_sum_does_not_depend_on_the_order_of_its_terms(text: str) -> None:
    task = TeacherConfig(name="t", weights="base", prompts="p.txt", reward=text)
    brightness = IMAGES.detach().mean((1, 2, 3))
    found = task_reward(RewardRunner("raise"), task, IMAGES.detach().clone(), PROMPTS)
    torch.testing.assert_close(found, 3 * brightness - 1, rtol=0, atol=1e-6)


def test_a_sum_beyond_float32_is_refused() -> None:
    task = TeacherConfig(name="t", weights="base", prompts="p.txt", reward="my_rewards:huge + my_rewards:huge")
    with pytest.raises(UserError, match=r"^teachers\.t\.reward: the sum .* is beyond float32.*; return smaller"):
        task_reward(RewardRunner("raise"), task, IMAGES, PROMPTS)


def test_a_thread_that_outlives_its_timeout_has_its_own_images() -> None:
    images, prompts = IMAGES.detach().clone(), named()
    runner = RewardRunner("record", 0.1)
    assert runner("my_rewards:hangs_and_rescales", images, prompts).isnan().all()
    call = runner._hanging["my_rewards:hangs_and_rescales"]
    sys.modules["my_rewards"].release.set()
    assert call._thread is not None
    call._thread.join(30)
    assert call._values is None
    assert "returned None" in str(call._error)  # it ran to its end
    assert torch.equal(images, IMAGES)
    assert prompts == named()


def test_values_share_no_memory_with_what_was_returned() -> None:
    first = call_reward("my_rewards:fills", IMAGES, PROMPTS)
    expected = first.clone()
    assert not torch.equal(call_reward("my_rewards:fills", IMAGES.flip(0), PROMPTS), expected)
    assert torch.equal(first, expected)
    given: list[Tensor] = []

    def view(images: Tensor, prompts: Any) -> Tensor:
        given.append(images)
        return images[:, 0, 0, 0]

    corner = call_reward(view, IMAGES, PROMPTS)
    assert not given[0].requires_grad
    given[0].zero_()
    assert torch.equal(corner, IMAGES.detach()[:, 0, 0, 0])


def test_the_timeout_covers_values_that_are_still_being_computed() -> None:
    class Slow:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            time.sleep(30)

    begun = time.monotonic()
    with pytest.raises(RewardFailure, match=r"'mine' took longer than 0\.2 s for 3 images") as error:
        call_reward(lambda images, prompts: Slow(), IMAGES, PROMPTS, 0.2, name="mine")
    assert time.monotonic() - begun < 10
    assert error.value.kind == "timed out"


def test_a_reward_may_ask_for_gradients() -> None:
    def gradient(images: Tensor, prompts: Any) -> Tensor:
        with torch.enable_grad():
            images = images.requires_grad_()
            (images.square().sum()).backward()
            assert images.grad is not None
            return images.grad.mean((1, 2, 3)) + 0 * images.mean((1, 2, 3))

    mine: Reward = gradient
    images = IMAGES.detach().clone()
    values = call_reward(mine, images, PROMPTS)
    assert not values.requires_grad
    torch.testing.assert_close(values, 2 * images.mean((1, 2, 3)))
    assert images.grad is None


def test_a_function_of_its_own_name() -> None:
    def pale(images: Tensor, prompts: Any) -> Tensor:
        raise KeyError("x")

    with pytest.raises(RewardFailure, match="reward 'pale' raised KeyError"):
        call_reward(pale, IMAGES, PROMPTS)


def test_reasons_are_told_once_each() -> None:
    def moody(images: Tensor, prompts: Any) -> Tensor:
        raise errors.pop(0)

    sys.modules["moody"] = type(sys)("moody")
    sys.modules["moody"].score = moody
    errors = [OSError("port 1"), OSError("port 2"), KeyError("colour"), OSError("x" * 5000)]
    runner = RewardRunner("record")
    try:
        for _ in range(4):
            runner("moody:score", IMAGES, PROMPTS)
    finally:
        del sys.modules["moody"]
    assert runner.messages == {
        ("moody:score", "raised OSError"): "reward 'moody:score' raised OSError: port 1",
        ("moody:score", "raised KeyError"): "reward 'moody:score' raised KeyError: 'colour'",
    }
    assert runner.failures == {("moody:score", "raised"): 12}
    with pytest.raises(RewardFailure) as error:
        call_reward(lambda images, prompts: 1 / 0 if errors else images.new_tensor("x" * 5000), IMAGES, PROMPTS)
    assert len(str(error.value)) < 800


def test_groups_are_those_of_equal_prompts() -> None:
    a, b = Prompt("a circle"), Prompt("a circle", {"target": "A"})
    assert prompt_groups([a, b, a, Prompt("a circle"), Prompt("x")]).tolist() == [0, 1, 0, 0, 2]
