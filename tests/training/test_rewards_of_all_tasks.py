"""`evaluation.rewards` are reported of every task, of those too that have no reward of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_fast.config import Config
from opd_fast.train import main
from opd_fast.training.loop import train
from opd_fast.training.problems import problems
from tests.runs import settings


def distillation(small_world: Path, rewards: list[str], **changes: Any) -> Config:
    """Two rounds of the small world, whose task `plain` has no reward."""
    defaults = {"train__rounds": 2, "evaluation__every": 2, "evaluation__prompts": 3, "checkpoint__every": 1}
    config = settings(small_world, **(defaults | changes))
    config.teachers[1].reward = None
    config.evaluation.rewards = rewards
    return config


def test_they_stand_beside_the_tasks_own(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redness.py").write_text("def score(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = train(distillation(small_world, ["colour", "redness:score"]), tmp_path / "run")
    keys = {"text", "words/colour", "plain/colour", "words/redness:score", "plain/redness:score"}
    assert all(set(row) == keys for row in found["rows"].values())
    assert 0 < found["rows"]["student"]["plain/redness:score"] < 1
    assert set(found["recovered"]) <= {"words", "plain"}
    assert "plain: redness:score" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_goes_on_with_others(small_world: Path, tmp_path: Path) -> None:
    """What base and teachers lack is judged when the run goes on."""
    run_dir = tmp_path / "run"
    options = ["--train.rounds", "2", "--evaluation.every", "2", "--evaluation.prompts", "3", "--checkpoint.every", "1"]
    assert main([str(small_world), *options, "--run-dir", str(run_dir)]) == 0
    assert set(json.loads((run_dir / "results.json").read_text())["rows"]["base"]) == {"text", "colour"}
    more = ["--train.rounds", "3", "--evaluation.rewards", "[colour]"]
    assert main(["--resume", str(run_dir), *more]) == 0
    rows = json.loads((run_dir / "results.json").read_text())["rows"]
    assert all(set(row) == {"text", "words/colour", "plain/colour"} for row in rows.values())


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (["colr"], "evaluation.rewards[0]: unknown reward 'colr'; did you mean colour?"),
        (["colour + text"], "evaluation.rewards[0]: colour + text is a sum; list its rewards one by one"),
        (["text"], "which the reward text judges, has no target"),
        (["no_such_module:score"], "evaluation.rewards[0]: reward no_such_module:score cannot be imported"),
    ],
)
def test_mistakes_are_told_before_the_run(small_world: Path, rewards: list[str], said: str) -> None:
    found = [str(error) for error in problems(distillation(small_world, rewards))]
    assert len(found) == 1
    assert said in found[0]
