"""python -m opd_fast.evaluate RUN: the run's own numbers, interruptions, several processes, several runs."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_fast import evaluate
from opd_fast.distributed.world import World
from opd_fast.evaluation import judge as judging
from opd_fast.evaluation.judgements import Judgements, read_scores
from opd_fast.evaluation.request import of_run
from opd_fast.evaluation.samplers import FamilySampler
from opd_fast.rewards.runner import RewardRunner
from opd_fast.training.evaluation import ImageSampler
from opd_fast.training.loop import train
from tests.runs import PROMPTS, settings, write_world


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four rounds."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(write_world(folder), train__rounds=4, evaluation__every=4, train__ema=0.0)
    train(config, folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def _own_judgements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))


def results_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_a_run_is_judged_as_it_judged_itself(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.main([str(run), "--out", str(out)]) == 0
    found, own = results_of(out), json.loads((run / "results.json").read_text())
    assert list(found["rows"]) == ["base", "teacher:words", "teacher:plain", "student"]
    for row, means in own["rows"].items():
        assert found["rows"][row] == pytest.approx(means, abs=1e-6), row
    assert found["drawn"] == 4 * 6
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 6
    of_student = [line["scores"]["colour"] for line in lines if (line["row"], line["task"]) == ("student", "plain")]
    assert sum(of_student) / 3 == pytest.approx(found["rows"]["student"]["colour"])
    assert lines[4]["text"] == PROMPTS["plain"][1]
    assert (out / "report.html").read_text().count("data:image/png;base64,") > 6


def test_the_command_line_comes_before_the_runs_settings(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = [str(run), "--rewards", "colour", "--limit", "2", "--steps", "2", "--guidance", "2", "--out", str(out)]
    assert evaluate.main(argv) == 0
    found = results_of(out)
    assert set(found["rows"]["student"]) == {"words/colour", "plain/colour"}
    assert (found["prompts"], found["settings"]["steps"]) == ({"words": 2, "plain": 2}, 2)
    assert found["settings"]["guidance"] == 2.0


def test_nothing_is_drawn_twice(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every image in turn, an evaluation ends with the table of one that never stopped."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv = [str(run), "--batch", "2", "--judgement-cache", "off", "--out"]
    assert evaluate.main([*argv, str(whole)]) == 0
    drawn: list[int] = []
    draw, keep = ImageSampler.draw, Judgements.keep_drawn

    def counted(sampler: ImageSampler, *arguments: Any) -> Any:
        drawn.extend(int(key) for key in arguments[2])
        return draw(sampler, *arguments)

    def kept(table: Judgements, *arguments: Any) -> None:
        keep(table, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageSampler, "draw", counted)
    monkeypatch.setattr(Judgements, "keep_drawn", kept)
    for _ in range(3):  # each is stopped once it has drawn a batch, before that is judged
        assert evaluate.main([*argv, str(out)]) == 130
    assert len(drawn) == 5  # tasks of three images, in batches of two
    monkeypatch.setattr(Judgements, "keep_drawn", keep)
    assert evaluate.main([*argv, str(out)]) == 0
    assert len(drawn) == 24
    found, expected = results_of(out), results_of(whole)
    assert found["rows"] == expected["rows"]
    assert found["intervals"] == expected["intervals"]
    assert not list(out.glob("rows/*/*/drawn/*"))
    assert evaluate.main([*argv, str(out)]) == 0
    assert len(drawn) == 24
    assert results_of(out)["drawn"] == 0


def test_lines_cut_short_are_passed_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.main([str(run), "--out", str(out)]) == 0
    before = results_of(out)
    scores = out / "rows" / "student" / "plain" / "scores.jsonl"
    scores.write_text(scores.read_text()[:-20])
    assert evaluate.main([str(run), "--out", str(out)]) == 0
    after = results_of(out)
    assert after["drawn"] == 1
    assert after["rows"]["student"] == pytest.approx(before["rows"]["student"], abs=1e-6)


def test_a_failed_reward_is_judged_again_without_drawing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "flaky_reward.py"
    module.write_text("import os\ndef score(images, prompts):\n    raise OSError('server down')\n")
    monkeypatch.syspath_prepend(tmp_path)
    argv = [str(run), "--rewards", "colour+flaky_reward:score", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 0
    first = results_of(tmp_path / "out")
    assert first["rows"]["student"]["plain/flaky_reward:score"] is None
    assert first["rows"]["student"]["plain/colour"] > 0
    assert first["failures"] == ["reward 'flaky_reward:score' raised OSError: server down"]
    shown = capsys.readouterr().out
    assert "Some rewards failed." in shown
    assert shown.count(" - │") == 8
    up = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"
    module.write_text(up)
    sys.modules.pop("flaky_reward")
    monkeypatch.setattr(FamilySampler, "__init__", lambda *a: pytest.fail("the model was loaded"))
    assert evaluate.main(argv) == 0
    second = results_of(tmp_path / "out")
    assert (second["drawn"], second["failures"]) == (0, [])
    assert second["rows"]["student"]["plain/flaky_reward:score"] > 0
    assert second["rows"]["student"]["plain/colour"] == first["rows"]["student"]["plain/colour"]
    sys.modules.pop("flaky_reward")


def test_base_and_teachers_are_kept_for_other_evaluations(run: Path, tmp_path: Path) -> None:
    assert evaluate.main([str(run), "--out", str(tmp_path / "first")]) == 0
    assert evaluate.main([str(run), "--out", str(tmp_path / "second")]) == 0
    first, second = results_of(tmp_path / "first"), results_of(tmp_path / "second")
    assert (first["drawn"], second["drawn"]) == (24, 6)  # the student alone
    assert second["rows"] == first["rows"]
    assert (tmp_path / "second" / "report.html").read_text().count("<figure>") == (
        tmp_path / "first" / "report.html"
    ).read_text().count("<figure>")
    assert evaluate.main([str(run), "--seed", "5", "--out", str(tmp_path / "third")]) == 0
    assert results_of(tmp_path / "third")["drawn"] == 24


def test_other_weights_are_drawn_anew(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, copied)
    assert evaluate.main([str(copied), "--save-images", "--out", str(out)]) == 0
    weights = next((copied / "student").glob("adapter_model.safetensors"))
    from safetensors.torch import load_file, save_file

    save_file({name: 3 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    before = results_of(out)["rows"]
    saved = {path: path.read_bytes() for path in out.glob("images/*/plain/00000/samples/0000.png")}
    assert evaluate.main([str(copied), "--save-images", "--out", str(out)]) == 0
    after = results_of(out)
    assert after["drawn"] == 6
    changed = [path.parts[-5] for path, content in saved.items() if path.read_bytes() != content]
    assert (len(saved), changed) == (4, ["student"])
    assert after["rows"]["student"] != before["student"]
    assert after["rows"]["base"] == before["base"]
    assert "the images of student were others'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(run: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "opd_fast.evaluate"]
    command += [str(run), "--judgement-cache", "off", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert evaluate.main([str(run), "--judgement-cache", "off", "--out", str(tmp_path / "one")]) == 0
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    assert two["drawn"] == one["drawn"] == 24
    for row, means in one["rows"].items():
        assert two["rows"][row] == pytest.approx(means, abs=1e-6)
    assert done.stdout.count("report.html") == 1
    # An evaluation of two processes goes on in one.
    scores = tmp_path / "two" / "rows" / "student" / "plain" / "scores.jsonl"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:1]))
    assert evaluate.main([str(run), "--judgement-cache", "off", "--out", str(tmp_path / "two")]) == 0
    assert results_of(tmp_path / "two")["drawn"] == 2


def test_several_runs_stand_in_one_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "evaluation", ignore_errors=True)
    weights = other / "student" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert evaluate.main([str(run), str(other), "--out", str(tmp_path / "both")]) == 0
    found = results_of(tmp_path / "both")
    assert list(found["rows"]) == ["base", "teacher:words", "teacher:plain", "student", "other/student"]
    assert found["average_name"] == "min-max mean over the listed rows"
    assert "min-max" in capsys.readouterr().out
    # Finished evaluations are read and not judged again.
    finished = [str(run / "evaluation"), str(other / "evaluation")]
    assert evaluate.main([*finished, "--out", str(tmp_path / "again")]) == 0
    again = results_of(tmp_path / "again")
    assert list(again["rows"].values()) == list(found["rows"].values())
    assert list(again["average"].values()) == list(found["average"].values())


NAMED = ("--prompts", "bundled/colour", "--rewards", "colour")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["absent"], "error: RUN: absent holds no config.yaml; name the folder of a run or of an evaluation"),
        (["unfinished"], "error: RUN: unfinished has not begun and has no student yet; finish it with --resume"),
        (["RUN", "--model", "bundled"], "error: model: is not read beside a run, whose settings say it"),
        (["RUN", "--guidance", "1,4"], "error: guidance: 1,4 beside a run; give one number"),
        (["--model", "bundled", "--lora", "a,a", *NAMED], "error: lora: a stands twice; name each once"),
        (["--model", "bundled", "--lora", "base,./base", *NAMED], "error: lora: base stands twice; name each once"),
        (["unfinished", "./unfinished"], "error: RUN: unfinished stands twice; name each once"),
        (["RUN", "--guidance", "much"], "error: guidance: 'much' is not a number"),
        (["RUN", "--rewards", "colr"], "unknown reward 'colr'"),
        (["RUN", "--rewards", "text"], "which the reward text judges, has no target"),
    ],
)
def test_mistakes(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "unfinished")
    assert evaluate.main([str(run) if word == "RUN" else word for word in argv]) == 2
    assert said in capsys.readouterr().err


def test_a_reward_that_lacks_something_is_told_before_the_first_image(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lacking_reward.py").write_text(
        "from opd_fast.errors import UserError\n"
        "from opd_fast.rewards import ModelReward\n"
        "class Lacking(ModelReward):\n"
        "    packages = {'no_such_package': 'ocr'}\n"
        "    def load(self, device, dtype): pass\n"
        "    def score(self, images, prompts): return images.mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    argv = [str(run), "--out", str(tmp_path / "out"), "--rewards"]
    assert evaluate.main([*argv, "lacking_reward:Lacking+colour"]) == 0
    told = 'no_such_package: is not installed; pip install "opd_fast[ocr]"'
    assert f"reward 'lacking_reward:Lacking' cannot judge: {told}; the others go on" in capsys.readouterr().err
    found = results_of(tmp_path / "out")
    assert found["failures"] == [f"reward 'lacking_reward:Lacking' cannot judge: {told}"]
    assert found["rows"]["base"]["words/colour"] > 0
    monkeypatch.setattr(FamilySampler, "__init__", lambda *a: pytest.fail("the model was loaded"))
    assert evaluate.main([*argv, "lacking_reward:Lacking"]) == 2
    assert f"error: {told}" in capsys.readouterr().err


def test_names_of_folders_are_distinct() -> None:
    names = ["base", "teacher:a", "a/b", "a_b", "..", ".", "x, guidance 4.5", "teacher-a b"]
    assert len({judging.file_name(name) for name in names}) == len(names)
    assert judging.file_name("teacher:a") == "teacher-a"
    assert all("/" not in judging.file_name(name) and not judging.file_name(name).startswith(".") for name in names)


def test_scores_of_all_processes_are_read(tmp_path: Path) -> None:
    tables = [Judgements(tmp_path / "t", "images", {"colour": "c", "text": "t"}, 4, rank) for rank in (0, 1)]
    tables[0].prepare()
    image = torch.rand(2, 3, 300, 200)
    tables[0].record([0, 2], {"colour": torch.tensor([0.1, float("nan")]), "text": torch.ones(2)}, image)
    tables[1].record([1, 3], {"colour": torch.tensor([0.2, 0.3]), "text": torch.ones(2)}, image)
    for table in tables:
        table.read()
        assert table.missing() == [2]
        assert table.lacking(2) == ["colour"]
        assert table.column("colour")[:2] == pytest.approx([0.1, 0.2])
    tables[0].finish()
    assert [p.name for p in (tmp_path / "t").glob("scores*")] == ["scores.jsonl"]
    assert read_scores(tmp_path / "t").keys() == {0, 1, 2, 3}
    again = Judgements(tmp_path / "t", "images", {"colour": "new", "text": "t"}, 4)
    assert not again.clear_others()
    again.prepare()
    again.read()
    assert again.lacking(0) == ["colour"]
    assert Judgements(tmp_path / "t", "others", {"text": "t"}, 4).clear_others()
    assert read_scores(tmp_path / "t") == {}


def test_shares_stay_apart_while_kept_images_are_judged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes go on where one stopped with images that it had drawn: each image is judged by one of them."""
    request = replace(of_run(run, batch=1, judgement_cache="off"), out=tmp_path / "out")
    keep = Judgements.keep_drawn
    kept: list[int] = []

    def keep_two(table: Judgements, indices: list[int], images: torch.Tensor) -> None:
        keep(table, indices, images)
        kept.extend(indices)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RewardRunner, "submit", lambda *a: SimpleNamespace(result=lambda: pytest.fail("judged")))
    monkeypatch.setattr(Judgements, "keep_drawn", keep_two)
    with pytest.raises(KeyboardInterrupt):
        judging.judge(request)
    monkeypatch.undo()
    tables = judging._judgements(request, World())
    shared = [{row: {task: copy.deepcopy(t) for task, t in of.items()} for row, of in tables.items()} for _ in range(2)]
    for rank, own in enumerate(shared):
        for of_row in own.values():
            for table in of_row.values():
                table.rank = rank
                table.read()
    for rank, own in enumerate(shared):
        with RewardRunner("record", ahead=0) as runner:
            judging._Work(request, own, World(rank, 2), None).run(runner)
    for row in request.rows:
        for task in request.tasks:
            by_rank = [set(own[row.name][task.name].scores) for own in shared]
            assert by_rank == [set(range(0, task.count, 2)), set(range(1, task.count, 2))]
