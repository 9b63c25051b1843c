"""A reward that raises, hangs, returns NaN or a wrong number of values, in whole runs started by the command line.

Reinforcement learning has nothing else to learn from: it ends, names the reward and its key, and goes on by --resume
once the reward is fixed. A distillation ends only where a reward has no value at all before training; later on its
evaluations say so once, and average what is left.
"""

from __future__ import annotations

import html
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd_fast.reporting.telemetry import read_metrics
from opd_fast.train import main
from opd_fast.training.checkpoint import Checkpoints
from tests.runs import PROMPTS, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = """
import threading
import torch

how, calls, failed = None, 0, 0
release = threading.Event()

def failing(values):
    global failed
    failed += 1
    if how == "raises":
        raise OSError("server gone")
    if how == "hangs":
        release.wait()
    if how == "nan":
        values[-1] = float("nan")
    if how == "short":
        values = values[:-1]
    return values

def bright(images, prompts):
    global calls
    calls += 1
    values = images[..., :16].mean((1, 2, 3))
    return failing(values) if how is not None and calls == 4 else values

def broken(images, prompts):
    if how is not None:
        raise ConnectionError("server gone, call %d" % id(images))
    return images.mean((1, 2, 3))

def letters(images, prompts):
    values = torch.tensor([float(ord(p.text[-2])) for p in prompts])
    return failing(values) if how is not None and prompts[-1].text.endswith('TE"') else values
"""
REWARD = "moody_rewards"
TIMEOUT = 2.0
SAID = {
    "raises": "raised OSError: server gone",
    "hangs": "took longer than 2 s for 2 images",
    "nan": "returned 1 of 2 values NaN or infinite",
    "short": "returned shape (1,) for 2 images, not (2,)",
}
METHODS: dict[str, tuple[str, ...]] = {"grpo": (), "nft": ("--sampler.solver", "dpm2")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module, as it is before anything is wrong with it."""
    (tmp_path / f"{REWARD}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(REWARD)
    sys.modules.pop(REWARD).release.set()


def learning(world: Path, method: str, run_dir: Path) -> list[str]:
    """Three rounds, each a rollout of two images for either task; no evaluation."""
    tasks = ", ".join(
        f"{{name: {name}, weights: base, prompts: {world.parent / name}.txt, reward: '{REWARD}:bright'}}"
        for name in PROMPTS
    )
    sizes = ("--train.samples_per_task", "2", "--rl.images_per_prompt", "2", "--rl.updates", "1", "--train.rounds", "3")
    every = ("--checkpoint.every", "1", "--evaluation.every", "0", "--evaluation.reward_timeout", str(TIMEOUT))
    return [
        *(str(world), "--run-dir", str(run_dir), "--train.method", method, "--teachers", f"[{tasks}]"),
        *(*sizes, *every, *METHODS[method]),
    ]


def student(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The students of runs whose reward never failed."""
    found = {}
    folder = tmp_path_factory.mktemp("whole")
    (folder / f"{REWARD}.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    try:
        for method in METHODS:
            assert main(learning(world, method, folder / method)) == 0
            found[method] = student(folder / method)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(REWARD)
    return found


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("method", METHODS)
def test_reinforcement_ends_and_goes_on(
    world: Path,
    whole: dict[str, dict[str, torch.Tensor]],
    reward: Any,
    tmp_path: Path,
    method: str,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second task's reward fails in the second of three rounds; mended, the run ends as if it never had."""
    reward.how = how
    run_dir = tmp_path / "run"
    assert main(learning(world, method, run_dir)) == 2
    said = capsys.readouterr().err
    assert f"teachers.plain.reward: reward '{REWARD}:bright' {SAID[how]}" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert reward.failed == 1
    folder, meta = Checkpoints(run_dir / "checkpoints", 3).find()
    assert (folder.name, meta["round"]) == ("round-000001", 1)
    assert len([line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]) == 1

    reward.how = None
    reward.release.set()
    assert main(["--resume", str(run_dir)]) == 0
    assert json.loads((run_dir / "results.json").read_text())["rounds"] == 3
    found = student(run_dir)
    assert found.keys() == whole[method].keys()
    assert all(torch.equal(found[name], value) for name, value in whole[method].items())


def distilling(world: Path, run_dir: Path, reward: str, *more: str, prompts: Path | None = None) -> list[str]:
    """Two rounds; the task `words` is judged by `reward`, the other by `colour`, on prompts in the folder `prompts`."""
    judged = {"words": f"{REWARD}:{reward}", "plain": "colour"}
    tasks = ", ".join(
        f"{{name: {name}, weights: {world.parent / name}, prompts: {world.parent / name}.txt, "
        f"eval_prompts: {(prompts or world.parent) / name}.txt, reward: '{judged[name]}'}}"
        for name in PROMPTS
    )
    argv = [str(world), "--run-dir", str(run_dir), "--teachers", f"[{tasks}]", "--train.rounds", "2", *more]
    return [*argv, "--evaluation.every", "2", "--evaluation.batch", "2", "--evaluation.reward_timeout", str(TIMEOUT)]


@pytest.mark.parametrize("how", SAID)
def test_distillation_goes_on(
    world: Path, reward: Any, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails at one of the two batches of every evaluation, whose prompts are HK, LO and HK, TE."""
    reward.how = how
    for name, lines in PROMPTS.items():  # TE is the second of its batch
        (tmp_path / f"{name}.txt").write_text("\n".join([*lines[:2], lines[0], lines[2]]) + "\n")
    run_dir = tmp_path / "run"
    assert main(distilling(world, run_dir, "letters", prompts=tmp_path)) == 0
    printed = capsys.readouterr()
    message = f"reward '{REWARD}:letters' {SAID[how]}"
    assert printed.err.count(message) == 1  # though it failed for base, two teachers and student
    assert reward.failed == 4
    known = [ord("K"), ord("O")] + ([ord("K")] if how == "nan" else [])
    results = json.loads((run_dir / "results.json").read_text())
    assert set(results["rows"]) == {"base", "teacher:words", "teacher:plain", "student"}
    for row in results["rows"].values():
        assert row[f"{REWARD}:letters"] == pytest.approx(sum(known) / len(known), rel=1e-6)
        assert row["colour"] >= 0
    assert results["rounds"] == 2
    assert len(results["failures"]) == 1
    assert results["failures"][0].startswith(message)
    assert results["failures"][0] in " ".join(printed.out.split())  # beneath the table
    assert message in html.unescape((run_dir / "report.html").read_text())
    assert student(run_dir)


def test_a_reward_without_any_value_ends_the_run_before_it_trains(
    world: Path, reward: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward.how = "gone"
    run_dir = tmp_path / "run"
    assert main(distilling(world, run_dir, "broken")) == 2
    said = capsys.readouterr().err
    assert f"error: teachers.words.reward: reward '{REWARD}:broken' raised ConnectionError: server gone" in said
    assert "no image of the first judging has a value; fix the reward and go on with --resume" in said
    assert "evaluation.reward_failure continue" in said
    assert "Traceback" not in said
    assert not [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    assert not (run_dir / "results.json").exists()

    reward.how = None
    assert main(["--resume", str(run_dir)]) == 0
    results = json.loads((run_dir / "results.json").read_text())
    assert (results["rounds"], results["failures"]) == (2, [])
    assert all(row[f"{REWARD}:broken"] > 0 for row in results["rows"].values())


def test_a_run_told_to_goes_on_without_a_reward(
    world: Path, reward: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps the reason from one resumption to the next, and does not judge the base again."""
    reward.how = "gone"
    run_dir = tmp_path / "run"
    assert main(distilling(world, run_dir, "broken", "--evaluation.reward_failure", "continue")) == 0
    printed = capsys.readouterr()
    message = f"reward '{REWARD}:broken' raised ConnectionError: server gone, call "
    assert printed.err.count(message) == 1
    results = json.loads((run_dir / "results.json").read_text())
    assert all(row[f"{REWARD}:broken"] is None and row["colour"] >= 0 for row in results["rows"].values())
    assert results["recovered"]["words"] is None
    [first] = results["failures"]
    assert first.startswith(message)
    assert first in " ".join(printed.out.split())

    reward.how = None
    assert main(["--resume", str(run_dir), "--train.rounds", "3"]) == 0
    printed = capsys.readouterr()
    assert message not in printed.err
    assert first in " ".join(printed.out.split())
    results = json.loads((run_dir / "results.json").read_text())
    assert results["failures"] == [first]
    assert results["rows"]["base"][f"{REWARD}:broken"] is None
    assert results["rows"]["student"][f"{REWARD}:broken"] > 0


def test_a_checkpoint_of_a_former_version_has_no_failures(
    world: Path, reward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoints.save

    def save(self: Checkpoints, round: int, tensors: Any, meta: dict[str, Any], **options: Any) -> Path:
        assert meta.pop("failures") == []
        return original(self, round, tensors, meta, **options)

    monkeypatch.setattr(Checkpoints, "save", save)
    run_dir = tmp_path / "run"
    argv = learning(world, "grpo", run_dir)
    assert main([*argv, "--train.rounds", "1"]) == 0
    monkeypatch.undo()
    assert main(["--resume", str(run_dir), "--train.rounds", "2"]) == 0
    assert json.loads((run_dir / "results.json").read_text())["failures"] == []


def test_stages_leave_the_failures_of_all(
    world: Path, reward: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward.how = "raises"
    data = yaml.safe_load(world.read_text())
    (tmp_path / "held-out.txt").write_text(PROMPTS["words"][2] + "\n")
    data["teachers"][0] |= {"reward": f"{REWARD}:letters", "eval_prompts": str(tmp_path / "held-out.txt")}
    data["stages"] = [{"name": name, "train": {"rounds": 1}} for name in ("one", "two")]
    data["evaluation"].update(prompts=1, reward_failure="continue")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    assert main([str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    message = f"reward '{REWARD}:letters' raised OSError: server gone"
    assert results["failures"] == [message]
    assert capsys.readouterr().err.count(message) == 1
    stage = json.loads((tmp_path / "run" / "2-two" / "results.json").read_text())
    assert stage["failures"] == results["failures"]
