"""A whole round on a CUDA device: it asks the device nothing, and its techniques are at work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.ladder import BARE
from benchmarks.models import NANO
from benchmarks.rounds import Recipe, random_work
from opd_fast.config import EngineConfig
from tests.gpu.test_step_gpu import no_sync

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GUIDED = Recipe(
    steps=4, samples_per_task=2, guidance=4.5, teacher_guidance=(4.5, 4.5, 1.0), rank=4, resolution=NANO.resolution
)
PLAIN = Recipe(steps=4, samples_per_task=2, micro_batch=3, rank=4, resolution=NANO.resolution)
MERGED = EngineConfig(compile="off", graphs="off")
SETTINGS = {"bare": BARE, "merged": MERGED, "graphs": EngineConfig(compile="off"), "default": EngineConfig()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("recipe", [GUIDED, PLAIN], ids=["guided", "micro-batches"])
def test_a_round_does_not_wait_for_the_device(settings: EngineConfig, recipe: Recipe, tmp_path: Path) -> None:
    """One pass, clipping and optimizer step, after two rounds of warm-up."""
    device = torch.device("cuda", 0)
    work = random_work(device, NANO, recipe, tmp_path)
    side = work.engine(settings)
    for _ in range(2):
        side.round(work.batch)
    before = [p.detach().clone() for p in side.parameters.values()]
    torch.cuda.synchronize()
    with no_sync():
        side.update(work.batch)
    torch.cuda.synchronize()
    assert all(bool(p.isfinite().all()) for p in side.parameters.values())
    assert any(not torch.equal(p, b) for p, b in zip(side.parameters.values(), before, strict=True))


def test_the_mode_catches_a_question() -> None:
    flag = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_sync():
        flag.item()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_on_is_at_work_and_right(settings: EngineConfig, tmp_path: Path) -> None:
    """The gradient lies as close to the float32 reference as bfloat16 allows, whatever is switched on."""
    work = random_work(torch.device("cuda", 0), NANO, GUIDED, tmp_path)
    loop, reference = work.published()
    truth = work.truth(loop, reference)
    side = work.engine(settings)
    for _ in range(2):
        side.round(work.batch)
    assert side.active is not None
    assert bool(side.active.compiled) == (settings.compile != "off")
    assert bool(side.active.graphs.replays) == (settings.graphs != "off")
    assert not side.active.graphs.refused
    bare = work.errors(work.engine(BARE), truth)
    found = work.errors(side, truth)
    assert found["gradient_error"] < max(2 * bare["gradient_error"], 0.02)
    assert found["loss_error"] < max(2 * bare["loss_error"], 0.01)
