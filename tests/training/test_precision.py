"""Half precision with a gradient scaler, bfloat16, and decoding in tiles: whole runs on the small pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_fast.config import Config
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training import loop
from opd_fast.training.loop import train
from tests.runs import settings, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def losses(config: Config, run_dir: Path, **options: Any) -> list[float]:
    run_dir.mkdir(exist_ok=True)
    train(config, run_dir, **options)
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_as_float32_does(world: Path, tmp_path: Path, dtype: str) -> None:
    whole = losses(settings(world, evaluation__every=0), tmp_path / "float32")
    half = losses(settings(world, evaluation__every=0, model__dtype=dtype), tmp_path / dtype)
    # A loss is the square of a small gap between two rounded numbers.
    assert half[0] == pytest.approx(whole[0], rel=0.03 if dtype == "float16" else 0.2)
    # Rounds that overflow under the scaler's opening factor are left out, so later ones may lag.
    assert all(value < 1.5 * whole[0] for value in half)


def test_the_scaler_resumes_and_an_overflow_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(torch.amp.GradScaler):
        """Opens at a factor that overflows half precision, so that the first round must be left out."""

        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=2.0**40, enabled=enabled)

    monkeypatch.setattr(loop.torch.amp, "GradScaler", Small)
    config = settings(world, evaluation__every=0, model__dtype="float16", train__rounds=4)
    losses(config, tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert "gradient_norm" not in rows[0]
    meta = loop.Checkpoints(tmp_path / "run" / "checkpoints", 3).load()[1]
    assert meta["scaler"]["scale"] < 2.0**40
    more = settings(world, evaluation__every=0, model__dtype="float16", train__rounds=5)
    assert len(losses(more, tmp_path / "run", resume=True)) == 5


def test_tiles_are_asked_of_the_vae(world: Path, tmp_path: Path) -> None:
    from opd_fast.training.setup import prepare

    assert not prepare(settings(world), log=lambda text: None).model.vae.use_tiling
    assert prepare(settings(world, evaluation__vae_tiling=True), log=lambda text: None).model.vae.use_tiling
