"""Teachers grouped on one base and modulation from tables, on a CUDA device: compiled, captured, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_fast.engine.grouped_lora import Call, GroupedAdapters, grouped_velocities, joined
from opd_fast.engine.modulation_cache import ModulationCache
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning
from opd_fast.models.lora.adapters import use_adapter
from opd_kernels.recording import Recorder
from tests.grouping import FAMILIES, add_all, states, text
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIGMAS = torch.tensor([1.0, 0.81, 0.37, 0.06])
ROWS = 6


@contextmanager
def no_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DiffusionModel:
    save = {"sd3": save_tiny, "flux": save_tiny_flux}[request.param]
    built = load_model(save(tmp_path), device="cuda", dtype=torch.float32)
    add_all(built)
    built.transformer.to("cuda")
    return built


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def one_call(model: DiffusionModel, seed: int) -> Call:
    """Three guided teachers with two samples each."""
    parts = []
    for t in range(3):
        embeds = text(model, 2, seed + t).to("cuda")
        asked = Conditioning.build(model, embeds, text(model, 1, 9).to("cuda"), 2.0)
        parts.append((t, slice(2 * t, 2 * t + 2), asked))
    (call,) = joined(parts)
    return call


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-5 * float(truth.abs().max()))


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    recorder = Recorder(torch.device("cuda"))
    recorder.warm_up(run, 2)
    return recorder.record(run)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_graph_for_all_steps_and_rounds(model: DiffusionModel, compiled: bool) -> None:
    """Captured once, the forward follows the step and a refill of the tables."""
    grouped = GroupedAdapters(model.transformer, ["first", "second", "third"])
    tables = ModulationCache.of(model, model.transformer)
    assert tables is not None
    sigmas, x = SIGMAS.cuda(), states(ROWS).cuda()
    calls = [one_call(model, seed) for seed in (0, 20)]
    plain = [[grouped_velocities(model, grouped, x, sigma, [call]).cond.clone() for sigma in sigmas] for call in calls]
    assert (plain[0][0] - plain[1][0]).abs().max() > 1e-3
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks(model.transformer):
            block.compile()
    with grouped.active(calls[0].spans):
        tables.fill(sigmas, calls[0].condition)
    graph, out = captured(lambda: grouped_velocities(model, grouped, x, sigmas[0], calls[:1], [tables]).cond)
    for call, wanted in zip(calls, plain, strict=True):
        with grouped.active(call.spans):
            tables.fill(sigmas, call.condition)
        for j in range(len(sigmas)):
            tables.step.fill_(j)
            graph.replay()
            close(out, wanted[j])


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_nothing_waits_for_the_device(model: DiffusionModel, guidance: float) -> None:
    grouped = GroupedAdapters(model.transformer, ["first", "second", "third"])
    sigmas, x, call = SIGMAS.cuda(), states(ROWS).cuda(), one_call(model, 0)
    tables = ModulationCache.of(model, model.transformer)
    assert tables is not None
    asked = Conditioning.build(model, text(model, ROWS).to("cuda"), text(model, 1, 9).to("cuda"), guidance)
    j = torch.tensor(2, device="cuda")

    def round_() -> None:
        grouped_velocities(model, grouped, x, sigmas[0], [call])
        with torch.no_grad(), use_adapter(model.transformer, None):
            tables.fill(sigmas, asked)
            tables.step.copy_(j)
            with tables.active():
                state = x if len(asked.text) == ROWS else torch.cat([x, x])
                model.velocity(model.transformer, state, sigmas[2], asked.text, asked.embedded)

    round_()  # positions and stacks are made
    with no_sync():
        round_()


def test_half_precision_under_autocast(tmp_path: Path) -> None:
    built = load_model(save_tiny(tmp_path), device="cuda", dtype=torch.bfloat16)
    add_all(built)
    built.transformer.to("cuda")
    grouped, call = GroupedAdapters(built.transformer, ["first", "second", "third"]), one_call(built, 0)
    tables = ModulationCache.of(built, built.transformer)
    assert tables is not None
    sigmas, x = SIGMAS.cuda(), states(ROWS).cuda()
    plain = grouped_velocities(built, grouped, x, sigmas[1], [call]).cond
    with grouped.active(call.spans):
        tables.fill(sigmas, call.condition)
    tables.step.fill_(1)
    found = grouped_velocities(built, grouped, x, sigmas[1], [call], [tables]).cond
    assert plain.dtype == found.dtype == torch.bfloat16
    assert (found - plain).norm() < 0.02 * plain.norm()
