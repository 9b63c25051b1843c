"""Ten kinds of bad input: each is one line that names the culprit and the remedy, and leaves before any training."""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_fast.models.lora.files import save_lora
from tests.runs import random_lora, write_world

# What a refusal may take at most. Nearly all of it goes into importing torch, diffusers and transformers, so that on a
# machine where those alone take longer than half of this, twice their time counts instead.
SECONDS = 10
LIBRARIES = "import torch; from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline"


def _run(command: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished process, and its processor time in seconds: unlike the clock, it is its own beside other tests."""
    # One thread: others that wait for it would count as processor time.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, check=False, env=alone)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


@functools.cache
def _limit(folder: Path) -> float:
    imported, seconds = _run([sys.executable, "-c", LIBRARIES], folder)
    imported.check_returncode()
    return max(SECONDS, 2 * seconds)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _of_another_family(folder: Path) -> None:
    save_lora(folder, {"down_blocks.0.to_q": (torch.ones(3, 8), torch.ones(8, 3))}, rank=3, alpha=3)


def _of_another_width(folder: Path) -> None:
    save_lora(folder, random_lora(0, width=48), rank=3, alpha=3)


def _overflowing(folder: Path) -> None:
    # Every weight is finite, so that only running the teacher shows what is wrong.
    file = folder / "adapter_model.safetensors"
    save_file({k: v * 1e30 for k, v in load_file(file).items()}, file)


def _refused(arguments: list[str], folder: Path) -> str:
    """The one line on stderr of a run that must fail."""
    command = [sys.executable, "-m", "opd_fast.train", *arguments]
    done, seconds = _run(command, folder)
    assert seconds < _limit(Path(__file__).parent), f"{seconds:.1f} s"
    assert done.returncode not in (0, None), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train.lrr", "0.1"], ("train.lrr", "did you mean")),
        (["--sampler.eta", "-0.5"], ("sampler.eta", "give")),
        (["--sampler.solver", "flow_sd"], ("sampler.solver", "did you mean flow_sde")),
    ],
    ids=["unknown key", "eta < 0", "unknown solver"],
)
def test_wrong_settings(world: Path, tmp_path: Path, arguments: list[str], says: tuple[str, ...]) -> None:
    line = _refused([str(world), "--run-dir", str(tmp_path / "run"), *arguments], tmp_path)
    assert all(word in line for word in says), line


def test_run_directory_that_cannot_be_written(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = _refused([str(world), "--run-dir", str(tmp_path / "file" / "run")], tmp_path)
    assert "--run-dir" in line
    assert "give a directory you may write" in line


def test_missing_teacher_and_empty_prompts(tmp_path: Path) -> None:
    path = write_world(tmp_path / "world")
    text = path.read_text()
    path.write_text(text.replace(f"weights: {path.parent / 'words'}", "weights: ./no/such/folder/at/all/"))
    line = _refused([str(path), "--run-dir", str(tmp_path / "run")], tmp_path)
    assert "teachers[0].weights" in line
    assert "give" in line

    path.write_text(text)
    (path.parent / "plain.txt").write_text("\n\n")
    line = _refused([str(path), "--run-dir", str(tmp_path / "run")], tmp_path)
    assert "plain.txt holds no prompt" in line
    assert "write one prompt on each line" in line


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut_short, ("adapter_model.safetensors", "damaged")),
        (_of_another_family, ("fits no module", "another model family")),
        (_of_another_width, ("weight is", "take the LoRA of this model")),
        (_overflowing, ("yields NaN or infinite velocities", "check its weights")),
    ],
    ids=["corrupt safetensors", "LoRA that matches nothing", "wrong width", "teacher that yields NaN"],
)
def test_teachers_that_cannot_teach(tmp_path: Path, damage: Callable[[Path], None], says: tuple[str, ...]) -> None:
    path = write_world(tmp_path / "world")
    damage(path.parent / "words")
    line = _refused([str(path), "--run-dir", str(tmp_path / "run")], tmp_path)
    assert "'words'" in line
    assert all(word in line for word in says), line


def test_a_key_of_the_wrong_type_names_itself(world: Path, tmp_path: Path) -> None:
    line = _refused([str(world), "--train.rounds", "many", "--run-dir", str(tmp_path / "run")], tmp_path)
    assert "train.rounds" in line
    assert "whole number" in line
    assert not (tmp_path / "run").exists()
    assert not os.listdir(tmp_path)
