"""Launch parameters and bound launches on a CUDA device: every candidate, what a call launches, measuring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_kernels import fused_step, fused_step_reference, log_prob, philox_normal
from opd_kernels.recording import Recorder
from tests.kernels import logprob_formula
from tests.kernels.formula import BOTH, STOCHASTIC, assert_identical, assert_step, operands, plain_step

tuning = pytest.importorskip("opd_kernels.tuning")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Less than any program, a ragged few of the largest, a latent of SD3 at 512 pixels.
SHAPES = [(3, 1, 5, 7), (5, 3, 53, 37), (9, 16, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("launch", tuning.CANDIDATES, ids=str)
def test_every_candidate(launch: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Against float64 and the twin; the same bits in every repeat; and, but for the loss, whatever the tiling."""
    o, keys = operands(shape, dtype, history=True, device="cuda"), torch.arange(shape[0], device="cuda")
    ruled = fused_step(**o, step=BOTH, keys=keys, return_means=True)
    with tuning.using(launch):
        out = fused_step(**o, step=BOTH, keys=keys, return_means=True)
        for _ in range(10):
            assert_identical(out, fused_step(**o, step=BOTH, keys=keys, return_means=True))
    noise = philox_normal(keys, shape[1:], BOTH)
    assert_step(out, plain_step(o, BOTH, noise), dtype)
    twin = fused_step_reference(**o, step=BOTH, noise=noise, return_means=True)
    torch.testing.assert_close(out.loss, twin.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.x_next, twin.x_next, rtol=0, atol=8e-6)
    assert_identical(out._replace(loss=None), ruled._replace(loss=None))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("launch", tuning.CANDIDATES, ids=str)
def test_log_prob_of_every_candidate(launch: Any, shape: tuple[int, ...]) -> None:
    o = logprob_formula.operands(shape, torch.bfloat16, device="cuda")
    wanted = logprob_formula.plain_log_prob(o, STOCHASTIC)
    with tuning.using(launch):
        logprob_formula.assert_log_prob(o, wanted, torch.bfloat16, step=STOCHASTIC)


def device_work(run: Callable[[], object]) -> list[str]:
    """Names of what the device did, kernels, copies and fills, sorted."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sorted(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_is_one_kernel(shape: tuple[int, ...]) -> None:
    """Eagerly after the first call, and as a graph: no fill, no copy, no second launch."""
    o, keys = operands(shape, torch.bfloat16, history=True, device="cuda"), torch.arange(shape[0], device="cuda")
    p = logprob_formula.operands(shape, device="cuda")
    step = torch.tensor(STOCHASTIC, device="cuda")

    def run() -> tuple[Tensor | None, ...]:
        return (*fused_step(**o, step=step, keys=keys, return_means=True), *log_prob(**p, step=step, return_mean=True))

    device_work(run)  # the first use of the profiler costs launches of its own
    assert device_work(run) == ["log_prob_kernel", "step_kernel"]
    graph, captured = Recorder(torch.device("cuda")).record(lambda: [run() for _ in range(3)])
    graph.replay()
    assert device_work(graph.replay) == ["log_prob_kernel"] * 3 + ["step_kernel"] * 3
    for outputs in captured:
        assert_identical(outputs, run())


def test_two_graphs_at_once() -> None:
    """Graphs of several launches replayed on two streams beside eager launches: each has its own scratch memory."""
    shape = (9, 16, 64, 64)
    o, keys = operands(shape, torch.bfloat16, device="cuda"), torch.arange(9, device="cuda")
    wanted = fused_step(**o, step=STOCHASTIC, keys=keys).loss
    graphs: list[torch.cuda.CUDAGraph] = []
    losses: list[Tensor] = []
    for _ in range(2):
        # A recorder for each graph: graphs of one share memory, and must not be replayed side by side.
        graph, found = Recorder(torch.device("cuda")).record(
            lambda: [fused_step(**o, step=STOCHASTIC, keys=keys).loss for _ in range(20)]
        )
        graphs.append(graph)
        losses += found
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10):
        for loss in losses:
            loss.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [fused_step(**o, step=STOCHASTIC, keys=keys).loss for _ in range(20)]
        torch.cuda.synchronize()
        assert all(torch.equal(loss, wanted) for loss in (*losses, *eager))


def test_measured_once_then_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("OPD_FAST_TUNE", raising=False)
    fresh = tuning.Tuner()
    monkeypatch.setattr("opd_kernels.launching.tuner", fresh)
    monkeypatch.setattr("opd_kernels.launching._bound", {})
    o, keys = operands(SHAPES[2], torch.bfloat16, device="cuda"), torch.arange(9, device="cuda")
    step = torch.tensor(STOCHASTIC, device="cuda")
    before = {name: None if t is None else t.clone() for name, t in o.items()}
    ruled = fused_step(**o, step=step, keys=keys)
    with fresh.measuring() as chosen:
        out = fused_step(**o, step=step, keys=keys)
    (choice,) = chosen
    assert choice.source == "measured"
    assert str(choice.launch) in choice.microseconds
    assert len(choice.microseconds) > 3
    assert all(0.5 < time < 1000 for time in choice.microseconds.values()), str(choice)
    assert_identical(out._replace(loss=None), ruled._replace(loss=None))
    torch.testing.assert_close(out.loss, ruled.loss, rtol=2e-6, atol=0)
    for name, t in o.items():  # the trial launches wrote nothing but outputs
        assert t is None or torch.equal(t.nan_to_num(), before[name].nan_to_num()), name  # type: ignore[union-attr]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert_identical(out, fused_step(**o, step=step, keys=keys))
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph, captured = Recorder(torch.device("cuda")).record(lambda: fused_step(**o, step=step, keys=keys))
    graph.replay()
    assert_identical(out, captured)
    (entries,) = json.loads((tmp_path / "kernels.json").read_text()).values()
    assert entries[choice.problem]["launch"] == str(choice.launch)
    again = tuning.Tuner()
    monkeypatch.setattr("opd_kernels.launching.tuner", again)
    monkeypatch.setattr("opd_kernels.launching._bound", {})
    assert_identical(out, fused_step(**o, step=step, keys=keys))
    assert [kept.source for kept in again.choices()] == ["kept"]


def test_a_capture_takes_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is measured while capturing, where waiting for the device would break the graph."""
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path))
    fresh = tuning.Tuner()
    o = operands((7, 16, 64, 64), torch.bfloat16, device="cuda")
    wanted = fused_step(**o, step=STOCHASTIC)
    monkeypatch.setattr("opd_kernels.launching.tuner", fresh)
    monkeypatch.setattr("opd_kernels.launching._bound", {})
    with fresh.measuring() as chosen:
        graph, captured = Recorder(torch.device("cuda")).record(lambda: fused_step(**o, step=STOCHASTIC))
    graph.replay()
    assert [choice.source for choice in chosen] == ["rule"]
    torch.testing.assert_close(captured.loss, wanted.loss, rtol=2e-6, atol=0)
