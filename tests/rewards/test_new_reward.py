"""A new reward is one file and one line of the registry, and every door knows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_fast.evaluate import main as evaluate
from opd_fast.rewards import REWARDS
from opd_fast.train import main as train
from tests.runs import write_world

FILE = """
calls = []


def metadata_fault(metadata):
    return None if metadata.get("wanted") in ("bright", "dark") else "names no wanted; give bright or dark"


def score(images, prompts):
    signs = images.new_tensor([1.0 if p.metadata["wanted"] == "bright" else -1.0 for p in prompts])
    values = signs * images.mean((1, 2, 3))
    calls.append((images.clone(), [p.metadata["wanted"] for p in prompts], values))
    return values
"""
PROMPTS = "prompt,wanted\na hill,bright\na cave,dark\n"


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, list[str], Tensor]]:
    """The file, the line, and what the reward is called with."""
    (tmp_path / "brightness_reward.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(REWARDS, "brightness", "brightness_reward:score")
    monkeypatch.delitem(sys.modules, "brightness_reward", raising=False)
    import brightness_reward  # type: ignore[import-not-found]

    found: list[tuple[Tensor, list[str], Tensor]] = brightness_reward.calls
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_a_new_reward_evaluates_and_trains(
    world: Path,
    tmp_path: Path,
    calls: list[tuple[Tensor, list[str], Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(PROMPTS)
    asked = ["--model", str(world.parent / "pipeline"), "--prompts", str(prompts), "--steps", "2", "--resolution", "32"]
    assert evaluate([*asked, "--rewards", "brightness", "--out", str(tmp_path / "out")]) == 0
    ((images, wanted, _),) = calls
    assert wanted == ["bright", "dark"]
    expected = float(images[0].mean() - images[1].mean()) / 2
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rewards"]
    assert found == {"prompts": {"brightness": pytest.approx(expected, abs=1e-6)}}
    assert evaluate([*asked, "--rewards", "brightnes"]) == 2
    assert "did you mean 'brightness'?" in capsys.readouterr().err

    calls.clear()
    task = f"{{name: hills, weights: base, prompts: {prompts}, eval_prompts: {prompts}, reward: brightness}}"
    argv = [str(world), "--teachers", f"[{task}]", "--train.method", "grpo", "--train.rounds", "1"]
    argv += ["--train.samples_per_task", "4", "--rl.images_per_prompt", "2", "--rl.updates", "1"]
    assert train([*argv, "--run-dir", str(tmp_path / "run"), "--evaluation.every", "0"]) == 0
    learnt = torch.cat([values for _, _, values in calls])
    assert len(learnt) == 4
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["reward/hills"] == pytest.approx(float(learnt.mean()), abs=1e-6)

    prompts.write_text(PROMPTS + "a lake,wide\n")
    assert train([*argv, "--run-dir", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert f"{prompts}, line 4, which the reward brightness judges, names no wanted" in said
    assert "give bright or dark" in said
