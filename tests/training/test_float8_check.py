"""The check of float8's losses before a run, on a CPU where nothing is quantised: what it asks of the run's parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_fast.training.float8_check import SAMPLES, float8_loss_check
from opd_fast.training.setup import prepare
from tests.runs import settings


@pytest.mark.parametrize("tasks", [None, ["plain"]])
def test_it_measures_with_prompts_that_the_run_encodes(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: list[str] | None
) -> None:
    """Of a long file a short run meets few prompts, mostly not the first; of a task that is not trained, none."""
    config = settings(small_world, train__rounds=1, train__samples_per_task=1, evaluation__every=0)
    for teacher in config.teachers:
        lines = [f'a {teacher.name} sign, number {i}, that says "HK"' for i in range(60)]
        (tmp_path / f"{teacher.name}.txt").write_text("\n".join(lines) + "\n")
        teacher.prompts = str(tmp_path / f"{teacher.name}.txt")
    config.train.tasks = tasks
    setup = prepare(config, lambda line: None)
    met = [sum(prompt.text in setup.text for prompt in own) for own in setup.prompts]
    assert met == ([1, 1] if tasks is None else [0, 1])
    assert any(prompt.text not in setup.text for own in setup.prompts for prompt in own[:SAMPLES])
    monkeypatch.setattr("opd_fast.training.float8_check.supported", lambda device: None)
    config.engine.precision = "fp8"
    again = float8_loss_check(
        config, setup.model, setup.student, setup.teachers, setup.table, setup.text, setup.prompts
    )
    assert again is not None
    assert "precision: fp8" in again()
