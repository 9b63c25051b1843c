"""Tasks that share a reward: each keeps its own numbers, in every file and through stops, stages and older files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import reinforcement, time_to_quality
from opd_fast.config import Config
from opd_fast.config.command_line import read_config
from opd_fast.config.serialize import from_dict, to_yaml
from opd_fast.config.stages import Stage
from opd_fast.reporting.results import gain_recovered
from opd_fast.reporting.reward_keys import key_words, reward_key, reward_keys
from opd_fast.reporting.telemetry import Telemetry, read_metrics
from opd_fast.train import main
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.evaluation import Evaluation
from opd_fast.training.evaluation import evaluate as measure
from opd_fast.training.loop import train
from opd_fast.training.stages import joined_rows
from tests.runs import settings

TASKS = ("words", "plain")
ROWS = ("base", "teacher:words", "teacher:plain", "student")


def shared(small_world: Path, **changes: Any) -> Config:
    """Two rounds of the small world, whose tasks are both judged by their colours."""
    defaults: dict[str, Any] = {
        "train__rounds": 2,
        "checkpoint__every": 1,
        "evaluation__every": 1,
        "evaluation__prompts": 3,
    }
    defaults["engine__attention"] = "native"
    config = settings(small_world, **{**defaults, **changes})
    for task in config.teachers:
        task.reward = "colour"
    return config


def run(config: Config, run_dir: Path, **options: Any) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return train(config, run_dir, **options)


def rows(run_dir: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run_dir / "results.json").read_text())["rows"]
    return found


@pytest.fixture(scope="module")
def judged(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Evaluation]]:
    """A run that was never stopped, and what it measured: base, teachers, student after either round."""
    run_dir, seen = tmp_path_factory.mktemp("runs") / "whole", []

    def evaluate(*args: Any, **options: Any) -> Evaluation:
        seen.append(measure(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd_fast.training.judging.evaluate", evaluate)
        run(shared(small_world), run_dir)
    return run_dir, seen


@pytest.fixture(scope="module")
def whole(judged: tuple[Path, list[Evaluation]]) -> Path:
    return judged[0]


def test_keys() -> None:
    keys = reward_keys([("a", "text"), ("b", "text"), ("c", "colour"), ("c", "colour")])
    assert keys == {("a", "text"): "a/text", ("b", "text"): "b/text", ("c", "colour"): "colour"}
    same_function = reward_keys([("a", "one:score"), ("b", "two:score")])
    assert list(same_function.values()) == ["one:score", "two:score"]
    sub_score = reward_keys([("a", "composition"), ("a", "composition_strict"), ("b", "composition_strict")])
    assert list(sub_score.values()) == ["composition", "a/composition_strict", "b/composition_strict"]
    assert reward_key({"a/text": 0.5, "b/text": 0.5}, "a", "text") == "a/text"
    assert reward_key({"text": 0.5}, "a", "text") == "text"  # of one task, or of an earlier version
    assert key_words("a/composition_strict") == "a: composition strict"


def test_each_task_has_its_own_numbers(judged: tuple[Path, list[Evaluation]]) -> None:
    run_dir, seen = judged
    found = rows(run_dir)
    assert list(found) == list(ROWS)
    for row, evaluation in zip(found.values(), [*seen[:3], seen[-1]], strict=True):
        assert row == {f"{task}/colour": evaluation.rewards[task]["colour"] for task in TASKS}
        assert row["words/colour"] != row["plain/colour"]
    recovered = json.loads((run_dir / "results.json").read_text())["recovered"]
    for task in TASKS:
        values = [found[row][f"{task}/colour"] for row in ("base", f"teacher:{task}", "student")]
        assert recovered[task] == gain_recovered(*values)


def test_the_record_and_the_results_agree(whole: Path) -> None:
    lines = [line for line in read_metrics(whole / "metrics.jsonl") if "evaluation" in line]
    assert [line["round"] for line in lines] == [0, 1, 2]
    for line, row in ((lines[0], "base"), (lines[-1], "student")):
        assert line["evaluation"] == {task: {"colour": rows(whole)[row][f"{task}/colour"]} for task in TASKS}


def test_the_report_names_the_task_of_each(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    for task in TASKS:
        assert f'<th scope="col">{task}: colour</th>' in page
        assert f"<td>{rows(whole)['student'][f'{task}/colour']:.3f}</td>" in page


def test_resuming_keeps_them_apart(
    small_world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0)
    run(shared(small_world), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("opd_fast.training.judging.Judging._judge_frozen", lambda self: pytest.fail("judged again"))
    run(shared(small_world), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Let a run be interrupted in its round `index`."""
    import os
    import signal

    original = Telemetry.round

    def stop(self: Telemetry, at: int, metrics: dict[str, float]) -> None:
        original(self, at, metrics)
        if at == index:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Telemetry, "round", stop)


def earlier_version(run_dir: Path, keys: dict[str, str]) -> None:
    """Rewrite a run's last checkpoint as the version before wrote it: rows under `keys`, images joined by a point."""
    checkpoints = Checkpoints(run_dir / "checkpoints", 3)
    tensors, meta = checkpoints.load()
    meta = {key: value for key, value in meta.items() if key not in ("version", "round", "sha256", "digest")}
    del meta["settings"], meta["sources"]
    meta["rows"] = {name: {keys[key]: mean for key, mean in row.items()} for name, row in meta["rows"].items()}
    tensors = {n.replace("/", ".") if n.startswith("images.") else n: tensor for n, tensor in tensors.items()}
    checkpoints.save(1, tensors, meta)
    checkpoints.wait()


def test_a_checkpoint_with_one_mean_for_both_is_judged_again(
    small_world: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(monkeypatch, 0)
    run(shared(small_world), tmp_path / "run")
    monkeypatch.undo()
    earlier_version(tmp_path / "run", {"words/colour": "colour", "plain/colour": "colour"})
    run(shared(small_world), tmp_path / "run", resume=True)
    assert "again, since round-000001 has rewards of another evaluation" in capsys.readouterr().err
    assert rows(tmp_path / "run") == rows(whole)


def test_an_earlier_checkpoint_that_is_right_is_kept(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tasks with rewards of their own, and with names that have points or are those of rows."""

    def own() -> Config:
        config = settings(small_world, train__rounds=2, checkpoint__every=1, evaluation__prompts=3)
        config.teachers[0].name, config.teachers[1].name = "v1.5", "student"
        return config

    labels: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr("opd_fast.training.judging.image_grid", lambda images, *rest: labels.append(list(images)))
        run(own(), tmp_path / "whole")
    assert labels == [["base", "v1.5", "teacher student", "student"]] * 2
    stop_after(monkeypatch, 0)
    run(own(), tmp_path / "run")
    monkeypatch.undo()
    before = {n: t for n, t in Checkpoints(tmp_path / "run" / "checkpoints", 3).load()[0].items() if "images." in n}
    assert len(before) == 3 * 2
    earlier_version(tmp_path / "run", {"text": "text", "colour": "colour"})
    monkeypatch.setattr("opd_fast.training.judging.Judging._judge_frozen", lambda self: pytest.fail("judged again"))
    run(own(), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    after = Checkpoints(tmp_path / "run" / "checkpoints", 3).load()[0]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "changes",
    [{"evaluation__prompts": 2}, pytest.param({"evaluation__steps": 2}, marks=pytest.mark.slow)],
    ids=["prompts", "steps"],
)
def test_another_evaluation_on_resume_judges_the_frozen_again(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    """All rows of a table are judged alike."""
    run(shared(small_world, **changes), tmp_path / "whole")
    stop_after(monkeypatch, 0)
    run(shared(small_world), tmp_path / "run")
    monkeypatch.undo()
    run(shared(small_world, **changes), tmp_path / "run", resume=True)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# --- stages ----------------------------------------------------------------------------------------------------------


def staged(*tasks: list[str]) -> list[Stage]:
    """Stages whose tasks are all judged by `text`."""
    return [
        Stage(f"s{i}", from_dict({"teachers": [{"name": n, "weights": n, "prompts": n, "reward": "text"} for n in of]}))
        for i, of in enumerate(tasks)
    ]


def test_stages_with_tasks_of_their_own_share_no_column() -> None:
    tables = [
        {"base": {"text": 0.1}, "teacher:a": {"text": 0.5}, "student": {"text": 0.4}},
        {"base": {"text": 0.2}, "teacher:b": {"text": 0.9}, "student": {"text": 0.8}},
    ]
    assert joined_rows(staged(["a"], ["b"]), tables) == {
        "base": {"a/text": 0.1, "b/text": 0.2},
        "teacher:a": {"a/text": 0.5},
        "teacher:b": {"b/text": 0.9},
        "stage:s0": {"a/text": 0.4},
        "stage:s1": {"b/text": 0.8},
        "student": {"b/text": 0.8},
    }


def test_a_stage_of_an_earlier_version_with_one_mean_for_both_has_none() -> None:
    """Whose it was is not known."""
    old = {"base": {"text": 0.1}, "student": {"text": 0.4}}
    new = {"base": {"a/text": 0.1, "b/text": 0.2}, "student": {"a/text": 0.3, "b/text": 0.4}}
    found = joined_rows(staged(["a", "b"], ["a", "b"]), [old, new])
    assert found["stage:s0"] == {}
    assert found["stage:s1"] == found["student"] == new["student"]
    assert found["base"] == new["base"]
    assert joined_rows(staged(["a"], ["a"]), [old, old])["stage:s0"] == {"text": 0.4}


def cascade(small_world: Path, folder: Path, *stages: dict[str, Any]) -> Path:
    data = yaml.safe_load(small_world.read_text())
    teachers = [task | {"reward": "colour"} for task in data.pop("teachers")]
    every = {"train": {"rounds": 2, "samples_per_task": 2}, "evaluation": {"every": 2, "prompts": 3, "steps": 3}}
    of = [{"name": f"s{i}", "teachers": [teachers[i]], **stage} for i, stage in enumerate(stages)]
    path = folder / "cascade.yaml"
    path.write_text(yaml.safe_dump({**data, **every, "stages": of}))
    return path


def test_a_cascade_of_tasks_with_one_reward(small_world: Path, tmp_path: Path) -> None:
    assert main([str(cascade(small_world, tmp_path, {}, {})), "--run-dir", str(tmp_path / "run")]) == 0
    first, second = (rows(tmp_path / "run" / name) for name in ("1-s0", "2-s1"))
    assert rows(tmp_path / "run") == {
        "base": {"words/colour": first["base"]["colour"], "plain/colour": second["base"]["colour"]},
        "teacher:words": {"words/colour": first["teacher:words"]["colour"]},
        "teacher:plain": {"plain/colour": second["teacher:plain"]["colour"]},
        "stage:s0": {"words/colour": first["student"]["colour"]},
        "stage:s1": {"plain/colour": second["student"]["colour"]},
        "student": {"plain/colour": second["student"]["colour"]},
    }
    # What a stage starts from is the student before it, not the base.
    lines = [line for line in read_metrics(tmp_path / "run" / "2-s1" / "metrics.jsonl") if "evaluation" in line]
    assert [line["round"] for line in lines] == [0, 2]
    assert lines[0]["evaluation"]["plain"]["colour"] != second["base"]["colour"]


# --- benchmarks that read results ------------------------------------------------------------------------------------


def test_benchmarks_read_the_tasks_apart(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reinforcement.told("teacher-text", 0, whole)
    assert set(found["gain"]) == {"words/colour", "plain/colour"}
    assert [set(point) for point in found["curve"]] == [{"round", "words/colour", "plain/colour"}] * 3
    assert {key: found["curve"][-1][key] - found["curve"][0][key] for key in found["gain"]} == found["gain"]

    monkeypatch.setattr(time_to_quality, "train", lambda config, run_dir: None)  # it has been trained
    config = read_config(whole / "config.yaml")
    goal, curve = time_to_quality.run_engine(config, whole, 0.9)
    means = rows(whole)
    assert goal.base == {task: means["base"][f"{task}/colour"] for task in TASKS}
    assert goal.teachers == {task: means[f"teacher:{task}"][f"{task}/colour"] for task in TASKS}
    assert curve[-1].rewards == {task: means["student"][f"{task}/colour"] for task in TASKS}
