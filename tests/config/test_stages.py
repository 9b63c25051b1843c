"""Runs in stages: what they hand on, what they leave, how they go on, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd_fast.config.command_line import Command, parse
from opd_fast.config.run_dir import prepare_run_dir
from opd_fast.errors import UserError
from opd_fast.reporting.telemetry import Telemetry, read_metrics
from opd_fast.train import main
from opd_fast.training.stages import train_stages
from tests.runs import write_world

STAGES = [
    {"name": "words", "train": {"tasks": ["words"], "rounds": 3}},
    {"name": "plain", "train": {"tasks": ["plain"], "rounds": 2, "lr": 5e-4}, "sampler": {"solver": "ode"}},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def written(world: Path, folder: Path, stages: Any = STAGES, **sections: Any) -> Path:
    """The small world's settings with stages, as a file."""
    data = yaml.safe_load(world.read_text())
    path = folder / "cascade.yaml"
    path.write_text(yaml.safe_dump({**data, **sections, "stages": stages}))
    return path


def student(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(written(world, folder)), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_stage_trains_its_tasks_from_where_the_one_before_it_ended(whole: Path) -> None:
    first, second = whole / "1-words", whole / "2-plain"
    rounds = [[line for line in read_metrics(run / "metrics.jsonl") if "loss" in line] for run in (first, second)]
    assert [len(lines) for lines in rounds] == [3, 2]
    assert all("loss/task_words" in line and "loss/task_plain" not in line for line in rounds[0])
    assert all("loss/task_plain" in line and "loss/task_words" not in line for line in rounds[1])
    began = yaml.safe_load((second / "config.yaml").read_text())["student"]["start"]
    assert Path(began) == first / "student"
    # Of the same rank, the second stage's adapter is the first one's: what differs is two small steps.
    before, after = student(first), student(second)
    moved = [(after[name] - value).abs().max().item() for name, value in before.items()]
    assert 0 < max(moved) < 2.5 * 5e-4 * 2


def test_it_leaves_what_a_run_leaves(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    stages = [json.loads((whole / name / "results.json").read_text()) for name in ("1-words", "2-plain")]
    assert list(results["rows"]) == [
        *("base", "teacher:words", "teacher:plain", "stage:words", "stage:plain", "student"),
    ]
    assert all(set(row) == {"text", "colour"} for row in results["rows"].values())
    assert results["rows"]["stage:words"] == stages[0]["rows"]["student"]
    assert results["rows"]["student"] == stages[1]["rows"]["student"]
    assert results["rounds"] == 5
    assert results["seconds"]["train"] == pytest.approx(sum(s["seconds"]["train"] for s in stages), abs=0.02)
    assert results["config_hash"] not in {s["config_hash"] for s in stages}
    assert same(student(whole), student(whole / "2-plain"))
    page = (whole / "report.html").read_text()
    assert "after stage words" in page
    assert {path.name for path in (whole / "samples").iterdir()} == {
        path.name for path in (whole / "2-plain" / "samples").glob("*-round-0002.png")
    }


def interrupted(world: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> Path:
    """A run that got Ctrl-C in its round `place`, counted through the stages."""
    original, seen = Telemetry.round, [0]

    def stop(self: Telemetry, index: int, metrics: dict[str, float]) -> None:
        original(self, index, metrics)
        seen[0] += 1
        if seen[0] == place:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Telemetry, "round", stop)
    assert main([str(written(world, folder)), "--run-dir", str(folder / "run")]) == 0
    monkeypatch.undo()
    return folder / "run"


@pytest.mark.parametrize("place", [2, 4])
def test_resuming_equals_not_having_stopped(
    world: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: int,
) -> None:
    run = interrupted(world, tmp_path, monkeypatch, place)
    assert not (run / "results.json").exists()
    assert f"go on with --resume {run}\n" in capsys.readouterr().out
    assert main(["--resume", str(run)]) == 0
    assert same(student(run), student(whole))
    ends = [json.loads((folder / "results.json").read_text())["rows"] for folder in (run, whole)]
    assert ends[0] == ends[1]
    # A run that is whole is told again, not trained again.
    before = (run / "2-plain" / "metrics.jsonl").stat().st_mtime_ns
    assert main(["--resume", str(run)]) == 0
    assert (run / "2-plain" / "metrics.jsonl").stat().st_mtime_ns == before
    assert f"{run} is finished: all of its 5 rounds are done; its stages keep their rounds" in capsys.readouterr().out
    # Python may give the folder as a text; where the door did not look, each stage says that it is whole.
    stages = parse(["--resume", str(run)]).stages
    assert train_stages(stages, str(run), resume=True)["rows"] == ends[0]
    assert (run / "2-plain" / "metrics.jsonl").stat().st_mtime_ns == before


def test_the_command_line_lies_over_every_stage(world: Path, tmp_path: Path) -> None:
    path = str(written(world, tmp_path))
    assert [c.train.rounds for c in parse([path]).configs] == [3, 2]
    assert [c.train.rounds for c in parse([path, "--train.rounds", "7"]).configs] == [7, 7]
    assert [c.sampler.solver for c in parse([path]).configs] == ["flow_sde", "ode"]


def test_its_settings_are_read_again_as_they_were(world: Path, tmp_path: Path) -> None:
    command = parse([str(written(world, tmp_path)), "--run-dir", str(tmp_path / "run")])
    prepare_run_dir(command)
    again: Command = parse(["--resume", str(tmp_path / "run")])
    assert again.stages == command.stages
    with pytest.raises(UserError, match=r"train.rounds: a resumed run keeps its value \(3\)"):
        parse(["--resume", str(tmp_path / "run"), "--train.rounds", "9"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages: is a list of stages"),
        ({"name": "a"}, "stages: is a list of stages"),
        ([{"train": {"rounds": 2}}], r"stages\[0\].name: None is not a name"),
        ([{"name": "a/b"}], r"stages\[0\].name: 'a/b' is not a name"),
        ([{"name": "a"}, {"name": "a"}], r"stages\[1\].name: 'a' is used twice"),
        ([{"name": "a"}, {"name": "b", "student": {"rank": 2}}], r"stages\[1\].student.rank: 2 differs from the .* 4"),
        ([{"name": "a"}, {"name": "b", "student": {"start": "c"}}], r"stages\[1\].student.start: is the student of"),
        ([{"name": "a"}, {"name": "b", "train": {"rounds": -1}}], "stage b: train.rounds: -1 is below 0"),
        ([{"name": "a", "train": {"round": 1}}], "train.round: unknown key"),
        (
            [{"name": "a", "train": {"tasks": ["wrods"]}}],
            "stage a: train.tasks: 'wrods' is not a task; did you mean",
        ),
        ([{"name": "a", "train": {"tasks": []}}], "stage a: train.tasks: is empty"),
        ([{"name": "a", "rl": {"beta": 0.5}}], "stage a: rl.beta: is not read under train.method opd"),
        (
            [{"name": "a"}, {"name": "b", "evaluation": {"steps": 9}}],
            r"stages\[1\].evaluation.steps: 9 differs from the 3 of an earlier stage, .*; set it once, outside stages",
        ),
    ],
)
def test_mistakes_are_named(world: Path, tmp_path: Path, stages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([str(written(world, tmp_path, stages))])


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("eval_prompts", {}, r"are not those of 'words' in an earlier stage, .*; give one of the two another name"),
        ("weights", {}, "base is not the .*/words of 'words' in an earlier stage"),
        ("guidance", {}, "3.0 is not the null of 'words' in an earlier stage"),
        ("eval_prompts", {"name": "other"}, None),  # another task
        ("weights", {"reward": None}, None),  # has no row
        ("prompts", {}, None),  # a curriculum: judged on the same ones
    ],
)
def test_a_name_means_one_task_in_all_stages(
    world: Path, tmp_path: Path, key: str, changes: dict[str, Any], message: str | None
) -> None:
    teachers = yaml.safe_load(world.read_text())["teachers"]
    other = {"weights": "base", "guidance": 3.0}.get(key, str(world.parent / "plain.txt"))
    second = [teachers[0] | {key: other} | changes, teachers[1]]
    path = str(written(world, tmp_path, [{"name": "a"}, {"name": "b", "teachers": second}]))
    if message is None:
        assert len(parse([path]).configs) == 2
        return
    with pytest.raises(UserError, match=rf"stages\[1\]\.teachers\[0\]\.{key}: {message}"):
        parse([path])


def test_a_cascade_of_rewards(world: Path, tmp_path: Path) -> None:
    """Two tasks learnt one after the other by reinforcement, over one LoRA."""
    teachers = yaml.safe_load(world.read_text())["teachers"]
    tasks = [{**teacher, "weights": "base", "reward": "colour"} for teacher in teachers]
    path = written(
        world,
        tmp_path,
        [{"name": name, "train": {"tasks": [name]}} for name in ("words", "plain")],
        teachers=tasks,
        sampler={"solver": "dpm2", "steps": 4},
        train={"method": "nft", "rounds": 2, "samples_per_task": 4},
        rl={"images_per_prompt": 2, "updates": 1},
        evaluation={"every": 2, "prompts": 2, "steps": 2},
    )
    command = parse([str(path), "--run-dir", str(tmp_path / "run")])
    results = train_stages(command.stages, prepare_run_dir(command))
    assert list(results["rows"]) == ["base", "stage:words", "stage:plain", "student"]
    assert results["recovered"] == {}
    for name, other in (("1-words", "plain"), ("2-plain", "words")):
        lines = [line for line in read_metrics(tmp_path / "run" / name / "metrics.jsonl") if "loss" in line]
        assert len(lines) == 2
        assert all(f"reward/{name[2:]}" in line and f"reward/{other}" not in line for line in lines)
