"""A resumed run is held to what its numbers follow from; a finished one says so at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_fast.config import Config
from opd_fast.config.command_line import read_config
from opd_fast.config.serialize import to_dict, to_yaml
from opd_fast.errors import UserError
from opd_fast.files import open_to_umask
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.train import main
from opd_fast.training import identity, loop
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.identity import compare, digest, identify, judged_otherwise
from opd_fast.training.loop import train
from opd_kernels.tuning import replace_json
from tests.runs import change, settings, write_world

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "train__schedule": "constant",
    "train__rounds": 2,
    "evaluation__every": 2,
    "evaluation__prompts": 2,
    "evaluation__steps": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a world, `world/run.yaml`, and a finished run of two rounds, `run`."""
    folder = tmp_path_factory.mktemp("whole")
    config = settings(write_world(folder / "world"), **SMALL, model__text_cache=str(folder / "text"))
    before = os.umask(0o027)  # a group that may read
    try:
        train(config, str(folder / "run"))
    finally:
        os.umask(before)
    return folder


def moved(whole: Path, folder: Path, **changes: Any) -> tuple[Config, Path]:
    """Copies of the world and the run in `folder`: the settings that name them, and the run's directory."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    text = (folder / "world" / "run.yaml").read_text().replace(str(whole), str(folder))
    (folder / "world" / "run.yaml").write_text(text)
    config = settings(folder / "world" / "run.yaml", **(SMALL | {"train__rounds": 3} | changes))
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return config, folder / "run"


def _retrained(file: Path) -> None:
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * 1.01}, file)


def _shifted(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 2.0}))


def _reversed(file: Path) -> None:
    file.write_text("".join(f"{line}\n" for line in reversed(file.read_text().splitlines())))


def _longer(file: Path) -> None:
    file.write_text(file.read_text() + "a yellow square\n")


def _spaced(file: Path) -> None:
    file.write_text(file.read_text() + " ")


EDITS: list[tuple[str, Callable[[Path], None], str]] = [
    ("pipeline/transformer/diffusion_pytorch_model.safetensors", _retrained, "model.path"),
    ("pipeline/text_encoder_2/model.safetensors", _retrained, "model.path"),
    ("pipeline/tokenizer/tokenizer.json", _spaced, "model.path"),
    ("pipeline/vae/diffusion_pytorch_model.safetensors", _retrained, "model.path"),
    ("pipeline/scheduler/scheduler_config.json", _shifted, "model.path"),
    ("words/adapter_model.safetensors", _retrained, "teachers.words.weights"),
    ("plain.txt", _reversed, "teachers.plain.prompts"),
    ("plain.txt", _longer, "teachers.plain.prompts"),
]


@pytest.mark.parametrize(("file", "edit", "key"), EDITS, ids=[f"{i}-{file}" for i, (file, _, _) in enumerate(EDITS)])
def test_an_edit_is_refused_before_anything_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, edit: Callable[[Path], None], key: str
) -> None:
    config, run = moved(whole, tmp_path)
    edit(tmp_path / "world" / file)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    def prepare(*args: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(loop, "prepare", prepare)
    with pytest.raises(
        UserError, match=r"changed since round-000002 was saved .*; put the former files back"
    ) as caught:
        train(config, run, resume=True)
    assert caught.value.key == key
    assert file.removeprefix("pipeline/").removeprefix("words/") in caught.value.problem
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_only_moved_goes_on(whole: Path, tmp_path: Path) -> None:
    """Sources count with their content: other paths, and lines that are no prompts, change nothing."""
    train(settings(whole / "world" / "run.yaml", **(SMALL | {"train__rounds": 3})), tmp_path / "never-stopped")
    config, run = moved(whole, tmp_path / "elsewhere")
    with (tmp_path / "elsewhere" / "world" / "plain.txt").open("a") as file:
        file.write("\n\n")
    train(config, run, resume=True)
    students = [load_file(path / "student" / "adapter_model.safetensors") for path in (run, tmp_path / "never-stopped")]
    assert all(torch.equal(students[0][name], tensor) for name, tensor in students[1].items())


def test_settings_are_compared_with_the_checkpoints(whole: Path, tmp_path: Path) -> None:
    """config.yaml may have been edited, and Python code may pass whatever it likes."""
    config, run = moved(whole, tmp_path)
    config.train.lr = 5e-4
    with pytest.raises(
        UserError, match=r"^train\.lr: a resumed run keeps its value \(0\.001\).*train\.rounds, model"
    ) as e:
        train(config, run, resume=True)
    assert e.value.key == "train.lr"
    config, run = moved(whole, tmp_path)
    config.teachers[0].prompts, config.teachers[1].prompts = config.teachers[1].prompts, config.teachers[0].prompts
    with pytest.raises(UserError, match=r"^teachers\.words\.prompts: changed since"):
        train(config, run, resume=True)


def recorded(config: Config) -> dict[str, Any]:
    return {"settings": to_dict(config), "sources": identify(config)}


def held(meta: dict[str, Any], config: Config, **options: Any) -> list[str]:
    return compare(Path("round-000002"), meta, config, identify(config), **options)


def test_the_vae_matters_where_images_are_looked_at(whole: Path, tmp_path: Path) -> None:
    config, _ = moved(whole, tmp_path)
    meta = recorded(config)
    _retrained(tmp_path / "world" / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors"):
        held(meta, config)
    assert held(meta, change(config, {"evaluation__every": 0})) == []


def test_held_out_prompts_matter_where_they_are_judged_on(whole: Path, tmp_path: Path) -> None:
    config, _ = moved(whole, tmp_path)
    shutil.copy(config.teachers[1].prompts, tmp_path / "held-out.txt")
    config.teachers[1].eval_prompts = str(tmp_path / "held-out.txt")
    meta = recorded(config)
    _longer(tmp_path / "held-out.txt")
    with pytest.raises(UserError, match=r"^teachers\.plain\.eval_prompts: changed since"):
        held(meta, config)
    assert held(meta, change(config, {"evaluation__every": 0})) == []


def test_a_reward_of_the_users_may_be_mended(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "held_reward.py"
    source.write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(tmp_path)
    config, _ = moved(whole, tmp_path)
    config.teachers[0].reward = "held_reward:score"
    meta = recorded(config)
    assert held(meta, config) == judged_otherwise(meta, config, identify(config)) == []
    source.write_text("def score(images, prompts):\n    return images.amax((1, 2, 3))\n")
    (line,) = held(meta, config)
    assert line.startswith("note: teachers.words.reward changed since round-000002 was saved (held_reward.py: sha256 ")
    assert judged_otherwise(meta, config, identify(config)) == ["teachers.words.reward"]


def test_a_start_that_changed_is_told(whole: Path, tmp_path: Path) -> None:
    config, _ = moved(whole, tmp_path)
    config.student.start = str(tmp_path / "run" / "student")
    meta = recorded(config)
    _retrained(tmp_path / "run" / "student" / "adapter_model.safetensors")
    (line,) = held(meta, config)
    assert line.startswith("note: student.start changed since round-000002")
    assert "goes on from its checkpoint" in line
    config.student.start = None
    with pytest.raises(UserError, match=r"^student\.start: a resumed run keeps its value"):
        held(meta, config)
    assert held(meta, config, staged=True) == []  # a stage's start lies in the run's directory, which may move


def test_other_libraries_and_precisions_are_told(whole: Path, tmp_path: Path) -> None:
    config, _ = moved(whole, tmp_path)
    meta = recorded(config)
    now = meta["sources"]["libraries"]["torch"]
    meta["sources"]["libraries"]["torch"] = "2.10.0"
    meta["sources"]["model.dtype"] = {"": "bfloat16"}
    lines = held(meta, config)
    assert f"(torch: 2.10.0 then, {now[:12]} now)" in lines[0]
    assert "note: model.dtype changed since round-000002 was saved (bfloat16 then, float32 now)" in lines[1]


def test_a_checkpoint_of_an_earlier_version_says_what_could_not_be_checked(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = moved(whole, tmp_path)
    file = run / "checkpoints" / "round-000002" / "meta.json"
    meta = json.loads(file.read_text())
    for name in ("settings", "sources", "digest"):
        del meta[name]
    from opd_fast.training.checkpoint import _digest

    file.write_text(json.dumps({**meta, "digest": _digest(meta)}))
    train(config, run, resume=True)
    said = capsys.readouterr().out
    assert (
        said.count("round-000002 was saved by a version that recorded no sources: whether model.path, the prompts") == 1
    )
    _, meta = Checkpoints(run / "checkpoints", 3).load()
    assert (meta["round"], meta["sources"]) == (3, identify(config))  # from now on it can be


def test_settings_of_another_version_are_passed_over(whole: Path, tmp_path: Path) -> None:
    config, _ = moved(whole, tmp_path)
    meta = recorded(config)
    meta["settings"]["train"]["future"] = 1
    del meta["settings"]["train"]["skip_limit"]  # it had the default
    assert held(meta, config) == []


# --- large files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A safetensors file of a small, a middle and a large tensor, none of which is hashed whole."""
    monkeypatch.setattr(identity, "WHOLE_FILE", 1000)
    monkeypatch.setattr(identity, "STRIDE", 2**18)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in (("a", 10), ("b", 3000), ("c", 2**20))}
    save_file(tensors, tmp_path / "large.safetensors")
    return tmp_path / "large.safetensors"


def _altered(file: Path, name: str, places: slice) -> str:
    tensors = load_file(file)
    tensors[name][places] += 1.0
    save_file(tensors, file)
    return digest(file)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("places", [slice(0, 1), slice(-1, None), slice(None)], ids=["first", "last", "all"])
def test_an_edit_of_a_large_file_is_seen(large: Path, name: str, places: slice) -> None:
    assert digest(large) != _altered(large, name, places)


def test_a_sample_in_every_stride(large: Path) -> None:
    before = digest(large)
    for begin in range(0, 2**20 - 2**17, 2**16):
        assert _altered(large, "c", slice(begin, begin + 2**17)) != before  # twice the stride, in four-byte numbers


def test_names_and_types_of_a_large_file_are_seen(large: Path) -> None:
    before, tensors = digest(large), load_file(large)
    save_file({"b2" if name == "b" else name: t for name, t in tensors.items()}, large)
    renamed = digest(large)
    save_file({name: t.view(torch.int32) for name, t in tensors.items()}, large)
    assert len({before, renamed, digest(large)}) == 3


def test_a_damaged_large_file_is_hashed_whole(large: Path) -> None:
    large.write_bytes(b"\xff" * 2000)
    before = digest(large)
    large.write_bytes(b"\xff" * 1000 + b"\xfe" + b"\xff" * 999)
    assert digest(large) != before


# --- finished runs ----------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_without_torch(whole: Path) -> None:
    run = whole / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code = f"import sys; from opd_fast.train import main; code = main(['--resume', {str(run)!r}]); "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(code or 'torch' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{run} is finished: all of its 2 rounds are done; go on with --resume {run} --train.rounds N" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_python_is_told_as_well(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "prepare", None)
    config = settings(whole / "world" / "run.yaml", **SMALL)
    assert train(config, whole / "run", resume=True) == json.loads((whole / "run" / "results.json").read_text())


def test_fewer_rounds_than_were_done_are_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole / "run"
    before = (run / "config.yaml").read_text()
    assert main(["--resume", str(run), "--train.rounds", "1"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"error: train.rounds: 1 is below the 2 rounds that {run} has done; give 2 to end there, or more to go on\n"
    )
    assert (run / "config.yaml").read_text() == before
    with pytest.raises(UserError, match=r"^train\.rounds: 1 is below the 2 rounds"):
        train(settings(whole / "world" / "run.yaml", **(SMALL | {"train__rounds": 1})), run, resume=True)


def test_an_end_without_results_is_reached_again(whole: Path, tmp_path: Path) -> None:
    config, run = moved(whole, tmp_path, train__rounds=2)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    assert train(config, run, resume=True)["rows"] == results["rows"]
    assert (run / "results.json").is_file()


def test_base_and_teachers_are_judged_again_where_evaluations_changed(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the student's rewards on one set of prompts would stand beside the base's on another."""
    options = SMALL | {"evaluation__prompts": 3}
    anew = train(settings(whole / "world" / "run.yaml", **options), tmp_path / "anew")
    config, run = moved(whole, tmp_path / "moved", evaluation__prompts=3, train__rounds=2)
    results = train(config, run, resume=True)
    assert results["rows"] == anew["rows"]
    assert "judging the base and the teachers again, since evaluation.prompts changed" in capsys.readouterr().err
    rounds = [line["round"] for line in read_metrics(run / "metrics.jsonl") if "evaluation" in line]
    assert rounds == sorted(rounds)


# --- what others may do with it ---------------------------------------------------------------------------------------


def test_the_umask_decides_who_may_read_a_run(whole: Path) -> None:
    written = [*(whole / "run").rglob("*"), *(whole / "text").rglob("*")]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".jsonl", ".yaml", ".html", ".png"}
    modes = {path: oct(path.stat().st_mode & 0o777) for path in written}
    assert modes == {path: "0o750" if path.is_dir() else "0o640" for path in written}


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_permissions_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    file, cache = tmp_path / "a.safetensors", tmp_path / "cache" / "b.json"
    before = os.umask(umask)
    try:
        save_file({"x": torch.zeros(1)}, file)
        open_to_umask(file)
        replace_json(cache, {})
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777, cache.stat().st_mode & 0o777] == [mode, mode]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.safetensors", "b.json", "cache"]


# --- from Python ------------------------------------------------------------------------------------------------------


def test_a_run_from_python_needs_no_folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (whole / "run" / "config.yaml").is_file()  # which --resume reads; the fixture gave a text for the folder
    monkeypatch.chdir(tmp_path)
    config = settings(whole / "world" / "run.yaml", **(SMALL | {"train__rounds": 1, "evaluation__every": 0}))
    assert train(config, "runs/py")["rounds"] == 1
    assert read_config("runs/py/config.yaml") == config
    assert main(["--resume", "runs/py", "--train.rounds", "2"]) == 0
    assert Checkpoints(tmp_path / "runs" / "py" / "checkpoints", 3).load()[1]["round"] == 2
    with pytest.raises(UserError, match=r"^run_dir: runs/py holds the checkpoints of a run; give another folder"):
        train(config, "runs/py")


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (lambda config: setattr(config.train, "lr", -1.0), "train.lr"),
        (lambda config: setattr(config.teachers[0], "prompts", "/absent.txt"), "teachers[0].prompts"),
        (lambda config: setattr(config.model, "path", "/absent"), "model.path"),
    ],
)
def test_python_is_refused_before_anything_is_loaded(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Config], None], key: str
) -> None:
    monkeypatch.setattr(loop, "prepare", None)
    config = settings(whole / "world" / "run.yaml")
    spoil(config)
    with pytest.raises(UserError) as caught:
        train(config, tmp_path / "run")
    assert caught.value.key == key
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^run_dir: .*file/run cannot be written"):
        train(settings(whole / "world" / "run.yaml"), tmp_path / "file" / "run")
