"""A small share of `python -m tests.fuzz`, and the defects that it has found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from opd_fast import train
from opd_fast.config.command_line import parse
from opd_fast.config.serialize import leaves
from opd_fast.errors import UserError
from opd_fast.models.lora.files import match, read_lora
from opd_fast.models.lora.load import load_with_source
from tests import fuzz, fuzz_inputs, fuzz_prompts

SEED = 7


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    fuzz.prepare()


def test_settings() -> None:
    tally = fuzz.fuzz_configs(60, SEED)
    assert not tally.faults, "\n\n".join(tally.faults)
    # Neither is everything refused nor everything taken, or the cases would say little.
    assert tally.counts["config: refused"] > 10
    assert tally.counts["config: taken"] > 10


def test_files() -> None:
    tally = fuzz.fuzz_files(40, SEED)
    assert not tally.faults, "\n\n".join(tally.faults)
    assert sum(count for name, count in tally.counts.items() if name.endswith("refused")) > 20


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (fuzz_prompts.fuzz_prompts, 120),
        (fuzz_inputs.fuzz_weights, 40),
        (fuzz_inputs.fuzz_rewards, 120),
        (fuzz_inputs.fuzz_draws, 6),
    ],
)
def test_inputs(run: Callable[[int, int], fuzz.Tally], count: int) -> None:
    tally = run(count, SEED)
    assert not tally.faults, "\n\n".join(tally.faults)
    for outcome, least in (("refused", count // 6), ("taken", count // 6)):
        assert sum(n for name, n in tally.counts.items() if name.endswith(outcome)) >= least, tally.counts


def test_a_fault_of_prompts_is_seen(tmp_path: Path) -> None:
    """One giant prompt for several, and a refusal that leaves the file out."""
    (tmp_path / "case.txt").write_text("one\vtwo\nthree\n")
    assert "are not the file's prompts" in fuzz_prompts.check_prompts(tmp_path / "case.txt", ["one", "two", "three"])
    assert fuzz_prompts.check_prompts(tmp_path / "case.txt", ["one\vtwo", "three"]) == "taken"
    with pytest.raises(ValueError, match="does not exist"):
        fuzz_prompts.check_prompts(tmp_path / "absent.txt", None)


def test_a_fault_is_seen() -> None:
    """The fuzz itself: what it must not let pass."""

    def leave() -> str:
        raise SystemExit(3)

    def stumble() -> str:
        return str({}["absent"])

    def library() -> str:
        return str(int("x"))  # a ValueError that this project did not raise

    for run, outcome in ((leave, "left without a word"), (stumble, "traceback"), (library, "traceback")):
        tally = fuzz.Tally()
        tally.add("config", *fuzz.outcome_of(run)[:1], "case")
        assert tally.faults, outcome
        assert tally.counts == {f"config: {outcome}": 1}
    assert fuzz.run_config(["bundled", "--dry-run"], False, {"train.lr": 5.0}) == "train.lr became 0.002, not 5.0"
    assert fuzz.run_config(["bundled", "--dry-run"], True, {}) == "unknown key taken"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.clip", "x" * 5000], "train.clip: "),
        (["--model.path", "x" * 5000], "longer than a file's name"),
        (["--model.path", "a\x00b"], "characters that cannot be printed"),
        (["--model.path", "~no-such-user/x"], "has no home here"),
        (["x" * 5000], "RECIPE: "),
        (["--train.rounds", "1" + "0" * 30], "train.rounds: "),
        (["--sampler.steps", str(10**12)], "is above 10000"),
    ],
)
def test_values_of_no_use(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*argv, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert len(error) < 2000


def test_brackets_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 3000)
    assert train.main([str(tmp_path / "deep.yaml"), "--dry-run"]) == 2
    assert "is not valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize("key", [key for key, (hint, _, _) in leaves().items() if type(None) not in get_args(hint)])
def test_null_is_no_value(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    file = tmp_path / "null.yaml"
    file.write_text(yaml.safe_dump({section: {name: None}, "teachers": list(fuzz.TEACHERS)}))
    with pytest.raises(UserError, match=re.escape(key)):
        parse([str(file)])


def test_null_in_a_teacher(tmp_path: Path) -> None:
    file = tmp_path / "null.yaml"
    file.write_text(yaml.safe_dump({"teachers": [{**fuzz.TEACHERS[0], "weight": None}]}))
    with pytest.raises(UserError, match=r"teachers\[0\]\.weight: null is not a number"):
        parse([str(file)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> fuzz.World:
    return fuzz.World.make(tmp_path_factory.mktemp("fuzz"))


def copied(world: fuzz.World, source: str, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], Path]:
    folder = tmp_path / source
    shutil.copytree(world.folder / source, folder)
    file = next(folder.glob("*.safetensors"))
    return folder, load_file(file), file


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int32)


def too_large(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() * 1e300


@pytest.mark.parametrize(
    ("change", "words"), [(as_integers, "not a floating-point number"), (too_large, "NaN or infinite")]
)
def test_lora_of_other_numbers(
    world: fuzz.World, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    folder, tensors, file = copied(world, "peft", tmp_path)
    save_file({name: change(tensor) for name, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match=words):
        read_lora(folder)


def test_lora_in_eight_bits_is_read_as_it_stands(world: fuzz.World, tmp_path: Path) -> None:
    folder, tensors, file = copied(world, "peft", tmp_path)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file)
    assert len(match(read_lora(folder), world.model.transformer)) == len(world.tensors)


def test_alpha_of_several_numbers(world: fuzz.World, tmp_path: Path) -> None:
    folder, tensors, file = copied(world, "diffusers", tmp_path)
    module = next(iter(world.tensors))
    save_file({**tensors, f"transformer.{module}.alpha": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="is not a single number"):
        read_lora(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, name: {**tensors, "x": torch.ones(1)}, "holds x, which the base does not have"),
        (lambda tensors, name: {**tensors, name: tensors[name].to(torch.int32)}, "not a floating-point number"),
        (lambda tensors, name: {**tensors, name: tensors[name] * torch.inf}, "NaN or infinite"),
    ],
)
def test_transformer_of_other_tensors(world: fuzz.World, tmp_path: Path, change: Any, words: str) -> None:
    folder, tensors, file = copied(world, "whole", tmp_path)
    save_file(change(tensors, "proj_out.bias"), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_with_source(world.model, str(folder), what="weights")


def test_results_in_the_repository_have_no_fault() -> None:
    results = json.loads((Path(__file__).resolve().parent.parent / "docs" / "fuzz.json").read_text())
    cases = {part: counts["cases"] for part, counts in results.items() if part != "seed"}
    assert cases == {"files": 500, "prompts": 1000, "weights": 300, "rewards": 500, "draws": 50, "configs": 2000}
    for part in cases:
        assert {name.split(": ")[1] for name in results[part]["outcomes"]} <= set(fuzz.GOOD)
        assert sum(results[part]["outcomes"].values()) == results[part]["cases"]
