"""What a run refuses before its first round, `--dry-run` refuses in the same words; neither loads a weight for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from opd_fast import train
from opd_fast.models.lora.files import save_lora
from opd_fast.training import setup
from tests.family_checks import edit
from tests.runs import random_lora, write_world
from tests.tiny import tiny_pipeline
from tests.tiny_flux import save_tiny_flux

Change = Callable[[Path], list[str]]
"""Puts a fault into a world; the options that go with it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world without a fault."""
    return write_world(tmp_path_factory.mktemp("world")).parent


@pytest.fixture
def world(whole: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(whole, tmp_path / "world"))
    yaml = folder / "run.yaml"
    yaml.write_text(yaml.read_text().replace(str(whole), str(folder)))
    return folder


def ended(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(status, the one line on stderr, what was printed)."""
    capsys.readouterr()
    status = train.main(argv)
    said = capsys.readouterr()
    return status, said.err.strip(), said.out


def refusal(
    world: Path, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """(the line of the run and of the dry run, what the dry run printed)."""

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(setup, "load_model", load)
    monkeypatch.setattr(ModelMixin, "from_pretrained", load)
    argv = [str(world / "run.yaml"), *options]
    run_dir = world / "run"
    status, line, out = ended([*argv, "--run-dir", str(run_dir), "--dry-run"], capsys)
    assert status == 2, out
    assert not run_dir.exists()
    assert ended([*argv, "--run-dir", str(run_dir)], capsys)[:2] == (2, line)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line, out


def component(name: str, **changes: Any) -> Change:
    def change(world: Path) -> list[str]:
        edit(world / "pipeline" / name / "config.json", **changes)
        return []

    return change


def file_of(name: str, change: Callable[[Path], Any]) -> Change:
    def apply(world: Path) -> list[str]:
        change(next((world / "pipeline" / name).glob("*.safetensors")))
        return []

    return apply


def without(file: Path) -> None:
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file, metadata={"format": "pt"})


def text(name: str, content: str) -> Change:
    """Another file of prompts for the task `plain`."""

    def change(world: Path) -> list[str]:
        (world / name).write_text(content)
        yaml = world / "run.yaml"
        yaml.write_text(yaml.read_text().replace(f"prompts: {world / 'plain.txt'}", f"prompts: {world / name}", 1))
        return []

    return change


def adapter(**changes: Any) -> Change:
    def change(world: Path) -> list[str]:
        edit(world / "words" / "adapter_config.json", **changes)
        return []

    return change


def flux_base(world: Path) -> list[str]:
    return ["--model.path", str(save_tiny_flux(world / "flux"))]


def whole_teacher(world: Path) -> list[str]:
    shutil.rmtree(world / "words")
    shutil.copytree(world / "pipeline" / "transformer", world / "words")
    without(next((world / "words").glob("*.safetensors")))
    return []


def start(**options: Any) -> Change:
    def change(world: Path) -> list[str]:
        rank = options.get("rank", 3)
        modules = {m: (torch.ones(rank, a.shape[1]), torch.ones(len(b), rank)) for m, (a, b) in random_lora(0).items()}
        if name := options.get("more"):
            modules[name] = (torch.ones(3, 32), torch.ones(64, 3))
        save_lora(world / "start", modules, rank=rank, alpha=3)
        return ["--student.start", str(world / "start")]

    return change


def given(*options: str) -> Change:
    return lambda world: [option.replace("WORLD", str(world)) for option in options]


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FAULTS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "nf4 base": (component("transformer", quantization_config=NF4), ("quantised by bitsandbytes (nf4",)),
    "nf4 text encoder": (
        component("text_encoder", quantization_config=NF4),
        ("'text_encoder'", "install bitsandbytes"),
    ),
    "no text encoder": (
        lambda world: shutil.rmtree(world / "pipeline" / "text_encoder") or [],  # type: ignore[func-returns-value]
        ("lacks its component 'text_encoder'",),
    ),
    "pickled weights": (file_of("vae", lambda f: f.rename(f.with_suffix(".bin"))), ("'vae'", "pickles")),
    "cut short": (file_of("text_encoder", lambda f: f.write_bytes(f.read_bytes()[:-9])), ("damaged or cut short",)),
    "keys of the base": (file_of("transformer", without), ("component 'transformer'", "1 missing keys")),
    "keys of the VAE": (file_of("vae", without), ("component 'vae'", "1 missing keys")),
    "DoRA": (adapter(use_dora=True), ("teacher 'words'", "use_dora is set, which is not a plain LoRA")),
    "another rank": (adapter(r=5), ("teacher 'words'", "rank 5, its lora_A has 3 rows")),
    "no rank": (adapter(r=None), ("teacher 'words'", "no rank r and lora_alpha")),
    "FLUX under SD3's teachers": (flux_base, ("teacher 'words'", "fits 3 of its 6 modules")),
    "keys of a whole teacher": (whole_teacher, ("teacher 'words'", "1 missing keys")),
    "no prompts": (lambda world: (world / "plain.txt").unlink() or [], ("plain.txt does not exist",)),  # type: ignore[func-returns-value]
    "no JSON": (text("more.jsonl", "{}\nnothing\n"), ("more.jsonl, line 1", "lacks the text")),
    "no column": (text("more.csv", "a,b\n1,2\n"), ("more.csv has no column for the prompts",)),
    "a reward of no module": (
        lambda world: _replace(world / "run.yaml", "reward: colour", 'reward: "no_such_module:score"'),
        ("teachers[1].reward", "cannot be imported"),
    ),
    "start of a higher rank": (start(rank=6), ("student.start has rank 6, the student 4",)),
    "start beyond the targets": (
        start(more="norm_out.linear"),
        ("student.start changes norm_out.linear, which student.targets leave out",),
    ),
    "start that is not a LoRA": (given("--student.start", "WORLD/pipeline"), ("student.start", "is not a LoRA")),
    "mean of nothing": (
        given("--student.start", "merged", "--student.targets", '["attn.to_out.0"]'),
        ("change nothing in student.targets",),
    ),
    "anchor that is not a LoRA": (
        given("--objective.anchor", "WORLD/pipeline", "--engine.placement", "shared"),
        ("'the anchor'", "is not a LoRA, and engine.placement shared"),
    ),
    "offloaded to no GPU": (
        given("--parallel.offload_teachers", "true"),
        ("parallel.offload_teachers: there is no GPU",),
    ),
    "a cache in a file": (given("--model.text_cache", "WORLD/plain.txt/cache"), ("model.text_cache", "cannot be made")),
    "several devices alone": (
        given("--parallel.strategy", "ddp"),
        ("parallel.strategy: ddp in a process started alone",),
    ),
}


def _replace(file: Path, old: str, new: str) -> list[str]:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    return []


@pytest.mark.parametrize("fault", FAULTS)
def test_the_dry_run_refuses_what_the_run_does(
    fault: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "offloaded to no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    change, says = FAULTS[fault]
    line, _ = refusal(world, change(world), capsys, monkeypatch)
    for words in says:
        assert words in line, line


def test_a_world_without_a_fault_is_taken(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line, out = ended([str(world / "run.yaml"), "--run-dir", str(world / "run"), "--dry-run"], capsys)
    assert (status, line) == (0, "")
    assert "refused" not in out
    tiny_pipeline().save_pretrained(world / "pipeline", variant="fp16")
    for file in (world / "pipeline").glob("*/*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    assert ended([str(world / "run.yaml"), "--dry-run"], capsys)[:2] == (0, "")


def test_everything_is_told_at_once(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below the plan; the first of it is the error."""
    adapter(use_dora=True)(world)
    (world / "words.txt").unlink()
    taken = world / "taken"
    taken.mkdir()
    (taken / "metrics.jsonl").touch()
    status, line, out = ended([str(world / "run.yaml"), "--dry-run", "--run-dir", str(taken)], capsys)
    assert status == 2
    assert f"error: --run-dir: {taken} is not empty" in line
    told = out[out.index("a run would be refused") :].replace("\n", " ")
    assert [words in told for words in ("is not empty", "words.txt does not exist", "use_dora is set")] == [True] * 3
    assert "parameters" in out
    assert list(taken.iterdir()) == [taken / "metrics.jsonl"]


def test_nothing_of_the_hub_is_fetched(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    _replace(world / "run.yaml", f"weights: {world / 'words'}", "weights: owner/lora/folder")
    options = ["--objective.anchor", "owner/anchor", "--student.start", "owner/start", "--dry-run"]
    status, line, out = ended([str(world / "run.yaml"), *options], capsys)
    assert (status, line) == (0, "")
    assert out.split("when a run begins")[1].replace("─", " ").split() == [
        "owner/start",
        "owner/anchor",
        "owner/lora/folder",
    ]


def test_stages_are_checked_each(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = world / "run.yaml"
    other = json.dumps(str(world / "nowhere.txt"))
    teachers = [f"{{name: late, weights: {world / 'plain'}, prompts: {other}}}"]
    yaml.write_text(yaml.read_text() + f"stages:\n  - name: one\n  - {{name: two, teachers: [{teachers[0]}]}}\n")
    status, line, _ = ended([str(yaml), "--dry-run"], capsys)
    assert status == 2
    assert "nowhere.txt does not exist" in line
