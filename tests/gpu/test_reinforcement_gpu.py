"""Learning from rewards, or from the teachers' images, on a CUDA device: the CPU's rounds, and half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import relative_error
from opd_fast.config import Config
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training.loop import train
from opd_fast.training.methods.base import make_method
from opd_fast.training.setup import prepare
from tests.runs import reinforced, settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "guard": {"rl__guard": True, "rl__kl": 0.0, "student__guidance": 2.0, "train__micro_batch": 3},
    "fast": {"sampler__solver": "cps", "rl__window": 2, "rl__window_range": 3},
    "nft": {"rl__kl": 0.1},
    "sft": {"sft__images_per_prompt": 2, "sft__base_weight": 0.5},
}


def configured(world: Path, case: str, **changes: Any) -> Config:
    changes = {"model__dtype": "float32", **CASES[case], **changes}
    if case == "sft":
        config = settings(world, train__method="sft", **changes)
        for teacher in config.teachers:
            teacher.reward = "colour"
        return config
    return reinforced(world, "nft" if case == "nft" else "grpo", "colour", **changes)


def gradient(config: Config) -> dict[str, Tensor]:
    setup = prepare(config, lambda text: None)
    make_method(setup).accumulate(0, torch.amp.GradScaler(setup.model.device.type, enabled=False))
    return {name: p.grad.double().cpu() for name, p in setup.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_cpu_s(small_world: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is keyed, so that both draw the same images, judge them alike and learn alike."""
    config = configured(small_world, case)
    found = gradient(config)
    monkeypatch.setattr("opd_fast.distributed.resolve.pick_device", lambda: torch.device("cpu"))
    expected = gradient(config)
    assert found.keys() == expected.keys()
    assert 0 < relative_error(found, expected) < 0.02


@pytest.mark.parametrize("case", CASES)
def test_a_run_in_bfloat16(small_world: Path, case: str, tmp_path: Path) -> None:
    config = configured(small_world, case, model__dtype="bfloat16", train__rounds=3)
    results = train(config, tmp_path)
    assert results["rounds"] == 3
    losses = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3
    assert all(line["gradient_norm"] >= 0 and "skipped" not in line for line in losses)
    if case in ("grpo", "guard", "fast"):
        assert losses[0]["clipped"] == 0  # the policy that drew is the one that is asked
