"""Whole runs: what they leave, that they repeat, resume and stop as promised."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_fast.config import Config
from opd_fast.config.serialize import to_yaml
from opd_fast.reporting.telemetry import Telemetry, read_metrics
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.loop import train
from opd_fast.training.methods.opd import OPD
from opd_fast.training.optimizer import learning_rate
from tests.runs import settings, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _start(config: Config, run_dir: Path, **options: Any) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return train(config, run_dir, **options)


def _student(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "adapter_model.safetensors")


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six rounds that was never stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    _start(settings(world), run_dir)
    return run_dir


def test_a_run_leaves_its_directory(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert set(results["rows"]) == {"base", "teacher:words", "teacher:plain", "student"}
    assert set(results["rows"]["student"]) == {"text", "colour"}
    assert set(results["recovered"]) == {"words", "plain"}
    assert results["rounds"] == 6
    assert results["seconds"]["total"] >= results["seconds"]["train"] > 0
    assert (whole / "report.html").stat().st_size > 10_000
    assert {p.name for p in (whole / "samples").iterdir()} == {
        f"{task}-round-{index:04d}.png" for task in ("words", "plain") for index in (3, 6)
    }
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [f"round-{i:06d}" for i in (2, 4, 6)]
    lines = read_metrics(whole / "metrics.jsonl")
    rounds = [line for line in lines if "loss" in line]
    assert [line["round"] for line in rounds] == list(range(6))
    for line in rounds:
        steps = [value for key, value in line.items() if key.startswith("loss/step_")]
        tasks = [value for key, value in line.items() if key.startswith("loss/task_")]
        assert len(steps) == 3  # four steps, the last untrained
        assert sum(steps) == pytest.approx(line["loss"])
        assert sum(tasks) == pytest.approx(line["loss"])
    assert [line["round"] for line in lines if "evaluation" in line] == [0, 3, 6]


def test_training_lowers_the_loss(world: Path, tmp_path: Path) -> None:
    config = settings(world, train__rounds=80, train__lr=5e-3, evaluation__every=0, checkpoint__every=0)
    _start(config, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_same_seed_same_run(world: Path, whole: Path, tmp_path: Path) -> None:
    _start(settings(world), tmp_path / "again")
    assert _same(_student(tmp_path / "again"), _student(whole))
    _start(settings(world, train__seed=1), tmp_path / "other")
    assert not _same(_student(tmp_path / "other"), _student(whole))


def test_resuming_equals_not_having_stopped(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tmp_path / "stopped"
    original = Telemetry.round

    def stop_in_round_four(self: Telemetry, index: int, metrics: dict[str, float]) -> None:
        original(self, index, metrics)
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Telemetry, "round", stop_in_round_four)
    results = _start(settings(world), stopped)
    monkeypatch.undo()
    assert results["rounds"] == 4
    assert not (stopped / "results.json").exists()
    assert (stopped / "student" / "adapter_model.safetensors").is_file()

    _start(settings(world), stopped, resume=True)
    assert _same(_student(stopped), _student(whole))
    tensors, meta = Checkpoints(stopped / "checkpoints", 3).load()
    expected, _ = Checkpoints(whole / "checkpoints", 3).load()
    assert meta["round"] == 6
    assert _same(tensors, expected)
    ends = [json.loads((run / "results.json").read_text())["rows"] for run in (stopped, whole)]
    assert ends[0] == ends[1]
    assert [line["round"] for line in read_metrics(stopped / "metrics.jsonl") if "loss" in line] == list(range(6))


def _poison(monkeypatch: pytest.MonkeyPatch, rounds: set[int]) -> None:
    """Let a round's loss be NaN where the second task's first sample is at step 1."""
    original = OPD.accumulate

    def poisoned(self: Any, index: int, scaler: Any) -> Any:
        losses = original(self, index, scaler)
        if index in rounds:
            losses[1, 2] = float("nan")
        return losses

    monkeypatch.setattr(OPD, "accumulate", poisoned)


def test_a_round_that_is_not_finite_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(world, evaluation__every=0, train__schedule="constant")
    _poison(monkeypatch, {1, 3})
    _start(config, tmp_path / "run")
    assert "round 3: the loss of task 'plain' is not finite at step 1; left out, 2 so far" in capsys.readouterr().err
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["round"] for line in lines if line.get("skipped")] == [1, 3]
    steps = [v for k, v in Checkpoints(tmp_path / "run" / "checkpoints", 3).load()[0].items() if k.endswith(".step")]
    assert all(step == 4 for step in steps)  # AdamW took four of the six


def test_too_many_in_a_row_end_the_run_before_they_reach_the_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(world, evaluation__every=0, train__skip_limit=2)
    with monkeypatch.context() as patch:
        _poison(patch, {2, 3})
        with pytest.raises(ValueError, match=r"round 3: the loss of task 'plain' is not finite at step 1.*2 rounds in"):
            _start(config, tmp_path / "run")
    tensors, meta = Checkpoints(tmp_path / "run" / "checkpoints", 3).load()
    assert meta["round"] == 2
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_gradient_that_is_not_finite_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = OPD.accumulate

    def poisoned(self: Any, index: int, scaler: Any) -> Any:
        losses = original(self, index, scaler)
        if index == 1:
            self.setup.student.parameters()[3].grad[0, 0] = float("inf")
        return losses

    monkeypatch.setattr(OPD, "accumulate", poisoned)
    _start(settings(world, evaluation__every=0, train__rounds=2), tmp_path / "run")
    assert "round 1: its gradient is not finite, though its loss is; left out" in capsys.readouterr().err
    assert all(bool(t.isfinite().all()) for t in _student(tmp_path / "run").values())


def test_resuming_before_the_first_checkpoint_starts_over(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _start(settings(world), tmp_path / "run", resume=True)
    assert "no checkpoint in" in capsys.readouterr().err
    assert _same(_student(tmp_path / "run"), _student(whole))


def test_a_teacher_that_changed_is_told_on_resume(world: Path, tmp_path: Path) -> None:
    from opd_fast.models.lora.files import save_lora
    from tests.runs import random_lora

    save_lora(tmp_path / "words", random_lora(0), rank=3, alpha=6)
    config = settings(world, evaluation__every=0, train__rounds=2)
    config.teachers[0].weights = str(tmp_path / "words")
    _start(config, tmp_path / "run")
    save_lora(tmp_path / "words", random_lora(5), rank=3, alpha=6)
    config.train.rounds = 3
    before = sorted((tmp_path / "run" / "checkpoints").rglob("*"))
    with pytest.raises(ValueError, match=r"teachers\.words\.weights: changed since round-000002 .*put the former"):
        _start(config, tmp_path / "run", resume=True)
    assert sorted((tmp_path / "run" / "checkpoints").rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"student__kind": "full", "train__lr": 1e-4},
        {"engine__placement": "shared", "student__guidance": 3.0},
        {"sampler__solver": "ode", "train__micro_batch": 3, "sampler__train_last": True},
        {"sampler__solver": "dpm2", "objective__kind": "velocity"},
        {"objective__kind": "ppo", "objective__reward_gradient": "return_to_go", "student__guidance": 3.0},
        {"objective__kind": "ppo", "objective__clamp": 5.0, "objective__anchor": "base", "engine__placement": "shared"},
        {"sampler__solver": "ode", "objective__kind": "velocity", "objective__queries": 1},
    ],
    ids=["full", "shared-guided", "ode-micro", "dpm2-velocity", "return-to-go", "flow-opd", "one-query"],
)
def test_other_ways_to_run(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    results = _start(settings(world, train__rounds=2, evaluation__every=2, **changes), tmp_path / "run")
    assert results["rounds"] == 2
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert all(loss > 0 for loss in losses)
    if changes.get("student__kind") == "full":
        from diffusers import SD3Transformer2DModel

        assert SD3Transformer2DModel.from_pretrained(tmp_path / "run" / "student" / "transformer")
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "student" / "transformer").iterdir()}
        assert modes == {(tmp_path / "run" / "config.yaml").stat().st_mode & 0o777}  # as any file that is written there


def test_a_reward_that_fails_ends_no_distillation(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone.py").write_text("def score(images, prompts):\n    raise OSError('server gone')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(world, train__rounds=2, evaluation__every=1, evaluation__reward_failure="continue")
    config.teachers[0].reward = "gone:score"
    _start(config, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(row["gone:score"] is None for row in results["rows"].values())
    assert results["recovered"]["words"] is None
    assert results["rows"]["student"]["colour"] > 0
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert "gone:score" not in line.get("evaluation", {}).get("words", {})


def test_anchor_holds_the_student(world: Path, tmp_path: Path) -> None:
    """A strong anchor at a LoRA, in either placement: the same student, and not the one without anchor."""
    students = []
    for name, changes in {
        "free": {},
        "merged": {"objective__anchor": str(world.parent / "words"), "objective__anchor_weight": 10.0},
        "shared": {
            "objective__anchor": str(world.parent / "words"),
            "objective__anchor_weight": 10.0,
            "engine__placement": "shared",
        },
    }.items():
        _start(settings(world, train__rounds=2, evaluation__every=0, **changes), tmp_path / name)
        students.append(_student(tmp_path / name))
    free, merged, shared = students
    assert not _same(free, merged)
    for key, value in merged.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-5)


def test_another_anchor_is_not_resumed_with(world: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    shutil.copytree(world.parent / "words", anchor)
    changes = {"objective__anchor": str(anchor), "evaluation__every": 0}
    _start(settings(world, train__rounds=1, **changes), tmp_path / "run")
    shutil.rmtree(anchor)
    shutil.copytree(world.parent / "plain", anchor)
    with pytest.raises(ValueError, match=r"^objective\.anchor: changed since round-000001"):
        _start(settings(world, train__rounds=2, **changes), tmp_path / "run", resume=True)


def test_queried_steps_differ_from_round_to_round(world: Path, tmp_path: Path) -> None:
    config = settings(world, objective__queries=1, sampler__steps=6, evaluation__every=0)
    _start(config, tmp_path / "run")
    asked = []
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        steps = [key for key, value in line.items() if key.startswith("loss/step_") and value > 0]
        assert len(steps) == 1
        asked += steps
    assert len(set(asked)) > 1


def test_micro_batches_change_no_gradient(world: Path, whole: Path, tmp_path: Path) -> None:
    _start(settings(world, train__micro_batch=1), tmp_path / "run")
    mine, theirs = _student(tmp_path / "run"), _student(whole)
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5)


def test_student_starts_from_a_lora(world: Path, whole: Path, tmp_path: Path) -> None:
    config = settings(
        world, student__start=str(whole / "student"), student__rank=6, student__alpha=6.0, train__lr=1e-12
    )
    _start(config, tmp_path / "run")
    mine, theirs = _student(tmp_path / "run"), _student(whole)
    for key in theirs:
        if ".lora_A." in key:
            other = key.replace("lora_A", "lora_B")
            expected = theirs[other] @ theirs[key] * (8 / 4)
            torch.testing.assert_close(mine[other] @ mine[key] * (6 / 6), expected, rtol=1e-4, atol=1e-6)


def test_learning_rate_schedules(world: Path) -> None:
    config = settings(world, train__rounds=10, train__warmup=2, train__lr=1.0)
    assert [learning_rate(config, i) for i in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(config, 6) == pytest.approx(0.5)
    config.train.schedule = "linear"
    assert learning_rate(config, 6) == pytest.approx(0.5)
    config.train.schedule = "constant"
    assert learning_rate(config, 9) == 1.0


def test_a_resumed_run_has_the_attention_it_had(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured anew, another implementation might win, and round otherwise."""
    _start(settings(world, train__rounds=2, evaluation__every=0), tmp_path / "run")
    assert "attention of the student" in capsys.readouterr().out

    def measure(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("opd_fast.engine.attention_choice.choose", measure)
    _start(settings(world, train__rounds=3, evaluation__every=0), tmp_path / "run", resume=True)
    assert [row["round"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


def test_profile(world: Path, tmp_path: Path) -> None:
    _start(settings(world, train__rounds=4, evaluation__every=0), tmp_path / "run", profile=True)
    trace = gzip.decompress((tmp_path / "run" / "profile" / "trace.json.gz").read_bytes()).decode()
    assert all(f'"{name}"' in trace for name in ("aten::addmm", "round", "student.forward", "teacher.forward", "step"))
    assert "aten::addmm" in (tmp_path / "run" / "profile" / "operators.txt").read_text()


@pytest.mark.parametrize(
    "engine",
    [
        {"merge_student": False, "cache_modulation": False, "fuse_projections": False, "attention": "native"},
        {"placement": "shared"},
        {"recompute": 2, "graphs": "on", "precision": "fp8"},
    ],
    ids=["off", "shared", "recompute"],
)
def test_techniques_change_no_run(world: Path, whole: Path, tmp_path: Path, engine: dict[str, Any]) -> None:
    changes = {f"engine__{key}": value for key, value in engine.items()}
    _start(settings(world, **changes), tmp_path / "run")
    mine, theirs = _student(tmp_path / "run"), _student(whole)
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((mine[name] - weight).norm()) <= 1e-3 * float(weight.norm()), name
