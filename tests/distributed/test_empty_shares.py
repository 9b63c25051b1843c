"""Fewer samples or held-out prompts than processes (gloo): what one process alone computes, by every method."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.distributed.plan import make_plan
from opd_fast.distributed.plan_table import print_plan
from opd_fast.distributed.world import World
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.loop import train
from tests.empty_shares import RESUMED, ROUNDS, SIZES, cases
from tests.runs import reinforced, settings, write_world

PAIRS = [(size, name, strategy) for size in SIZES for name, strategy in cases(size) if name != "grpo-half"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = write_world(tmp_path_factory.mktemp("world")).parent, tmp_path_factory.mktemp("out")
    done = subprocess.run(
        [sys.executable, "-m", "tests.empty_shares", str(folder), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum(float((found[k] - expected[k]).double().square().sum()) for k in expected)
    return float((error / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5)


def saved(directory: Path, rounds: int = ROUNDS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student and its average; the images in hand and those of the first evaluations."""
    tensors, meta = Checkpoints(directory / "checkpoints", 1).load()
    assert meta["round"] == rounds
    parts = ("student.", "ema."), ("method.", "images.")
    student, images = ({k: v for k, v in tensors.items() if k.startswith(names)} for names in parts)
    return student, images


def rewards(directory: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((directory / "rows.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name", "strategy"), PAIRS)
def test_a_process_without_samples_changes_nothing(out: Path, size: int, name: str, strategy: str) -> None:
    found, expected = out / str(size) / f"{name}-{strategy}", out / "alone" / f"{name}-one"
    gradients = [load_file(directory / "gradient.safetensors") for directory in (found, expected)]
    (student, images), (student_alone, images_alone) = saved(found), saved(expected)
    assert relative(*gradients) <= 1e-5
    assert relative(student, student_alone) <= 1e-5
    assert not images_alone or relative(images, images_alone) <= 1e-5
    assert bool(images_alone) == (name not in ("lora-shared", "lora-returns"))
    assert rewards(found) == {row: pytest.approx(means, abs=1e-5) for row, means in rewards(expected).items()}


@pytest.mark.slow
def test_half_precision_scales_its_gradients_on_every_process(out: Path) -> None:
    """What was learnt lies in LoRA's second halves, which begin at zero. Losses are weighed by the number of processes,
    and float16 rounds them otherwise under each."""
    directories = out / "3" / "grpo-half-ddp", out / "alone" / "grpo-half-one"
    found, expected = ({k: v for k, v in saved(d)[0].items() if ".lora_B." in k} for d in directories)
    assert relative(found, expected) <= 2e-2
    assert (
        Checkpoints(directories[0] / "checkpoints", 1).find()[1]["scaler"]["_growth_tracker"] == ROUNDS
    )  # none left out


@pytest.mark.slow
@pytest.mark.parametrize("name", [each.rsplit("-", 1)[0] for each in RESUMED])
def test_five_processes_save_and_three_go_on(out: Path, name: str) -> None:
    found, expected = (saved(out / where / f"resumed-{name}", ROUNDS + 1) for where in ("3", "alone"))
    assert relative(found[0], expected[0]) <= 1e-5


@pytest.mark.slow
def test_a_process_without_prompts_judges_nothing(out: Path) -> None:
    """The reward fails on the second of three processes, which owns none of one prompt."""
    for rank in range(3):
        found = json.loads((out / "3" / "judged" / f"{rank}.json").read_text())
        assert found["rewards"] == {"words": {"tests.parallel_cases:gone_on_rank_1": 1.0}}
        assert found["failures"] == []


@pytest.mark.slow
def test_a_process_that_keeps_no_text_holds_up_no_other(out: Path) -> None:
    """The first encodes and keeps, the second encodes for itself, the third reads."""
    first, second, third = (int((out / "3" / f"encoded-{rank}").read_text()) for rank in range(3))
    assert first == second > 0
    assert third == 0


def test_what_no_sample_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes with two samples: the third gives its padding, or nothing at all."""
    for mine in (torch.full((2, 1), 9.0), torch.empty(2, 0)):
        summed = []
        monkeypatch.setattr("torch.distributed.all_reduce", summed.append)
        assert World(2, 3).gather_samples(mine, 2, dim=1).tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert len(summed) == 1
    assert World(1, 3).gather_samples(torch.full((2, 1), 9.0), 2, dim=1).tolist() == [[0.0, 9.0], [0.0, 9.0]]


def alike(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A reward that teaches nothing."""
    return torch.ones(len(images))


def test_half_precision_takes_a_first_round_with_nothing_to_learn(small_world: Path, tmp_path: Path) -> None:
    config = reinforced(
        small_world, "grpo", "tests.distributed.test_empty_shares:alike", model__dtype="float16", evaluation__every=0
    )
    assert train(config, tmp_path)["rounds"] == 2
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["images"] for line in metrics] == [0, 0]
    assert [line["gradient_norm"] for line in metrics] == [0, 0]


@pytest.mark.parametrize(("samples", "idle"), [(1, 3), (2, 1), (3, 0)])
def test_a_plan_counts_the_devices_without_a_sample(
    small_world: Path, samples: int, idle: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(small_world, train__samples_per_task=samples)
    plan = make_plan(config, 5)
    print_plan(plan, config, small_world)
    found = re.findall(r"(\d+) of the devices have no sample", capsys.readouterr().out)
    assert found == ([str(idle)] if idle else [])
