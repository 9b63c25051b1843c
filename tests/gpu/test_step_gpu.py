"""The fused step and the noise on a CUDA device: kernel against twin and float64, graphs, no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_kernels import fused_step, fused_step_reference, philox_normal
from opd_kernels.recording import Recorder
from tests.kernels.formula import (
    BOTH,
    DETERMINISTIC,
    HISTORY,
    STOCHASTIC,
    assert_identical,
    assert_step,
    operands,
    plain_step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Ragged, a latent of SD3 at 512 pixels, and one that takes several tiles a program.
SHAPES = [(3, 1, 5, 7), (9, 16, 64, 64), (6, 16, 256, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def no_sync() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", ["both", "student", "teacher", "none"])
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, guided: str) -> None:
    o, noise = operands(shape, dtype, guided=guided, device="cuda"), torch.randn(shape, device="cuda")
    assert_step(fused_step(**o, step=STOCHASTIC, noise=noise), plain_step(o, STOCHASTIC, noise), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [STOCHASTIC, DETERMINISTIC, HISTORY, BOTH])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_noise_and_outputs(shape: tuple[int, ...], step: int, drawn: bool, reduction: Any) -> None:
    o = operands(shape, torch.bfloat16, history=step in (HISTORY, BOTH), device="cuda")
    keys = torch.arange(7, 7 + shape[0], device="cuda") << 33
    noise = philox_normal(keys, shape[1:], step) if drawn else torch.randn(shape, device="cuda")
    given: dict[str, Any] = {"keys": keys} if drawn else {"noise": noise}
    index = torch.tensor(step, device="cuda") if drawn else step
    out = fused_step(**o, step=index, **given, want_x0=True, return_means=True, reduction=reduction)
    assert_step(out, plain_step(o, step, noise, reduction), torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_twin_on_the_cpu(shape: tuple[int, ...]) -> None:
    here = operands(shape, torch.bfloat16, device="cuda")
    there: dict[str, Any] = {name: None if t is None else t.cpu() for name, t in here.items()}
    keys = torch.arange(shape[0])
    kernel = fused_step(**here, step=STOCHASTIC, keys=keys.cuda())
    twin = fused_step_reference(**there, step=STOCHASTIC, keys=keys)
    torch.testing.assert_close(kernel.x_next.cpu(), twin.x_next, rtol=0, atol=4e-6)
    torch.testing.assert_close(kernel.loss.cpu(), twin.loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("counter", [0, 9, 2**31 - 1, 2**32 - 1])
def test_noise_is_the_cpus(counter: int) -> None:
    keys = torch.tensor([0, -1, 2**62 + 12345])
    wanted = philox_normal(keys, (3, 41, 29), counter)
    on_device = torch.tensor(counter, device="cuda")
    for got in (philox_normal(keys.cuda(), (3, 41, 29), counter), philox_normal(keys.cuda(), (3, 41, 29), on_device)):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=2e-6)


def test_the_key_decides_not_the_batch() -> None:
    shape, keys = (5, 16, 32, 32), torch.arange(5, device="cuda")
    o = operands(shape, guided="none", device="cuda")
    whole = fused_step(**o, step=STOCHASTIC, keys=keys)
    part = {name: t[3:4] if t is not None and name != "table" else t for name, t in o.items()}
    assert torch.equal(fused_step(**part, step=STOCHASTIC, keys=keys[3:4]).x_next, whole.x_next[3:4])


def test_repeats_bit_for_bit() -> None:
    o, keys = operands(SHAPES[2], torch.bfloat16, device="cuda"), torch.arange(6, device="cuda")
    first = fused_step(**o, step=STOCHASTIC, keys=keys)
    for _ in range(20):
        assert_identical(first, fused_step(**o, step=STOCHASTIC, keys=keys))


def test_halves_of_a_batch() -> None:
    shape = SHAPES[1]
    o = operands(shape, torch.bfloat16, guided="student", device="cuda")
    both = torch.randn(18, *shape[1:], device="cuda", dtype=torch.bfloat16)
    o |= {"cond_s": both[:9], "uncond_s": both[9:], "guidance_s": torch.full((9,), 2.5, device="cuda")}
    assert_step(fused_step(**o, step=DETERMINISTIC), plain_step(o, DETERMINISTIC), torch.bfloat16)


def test_autograd_of_the_loss() -> None:
    o = operands(SHAPES[1], device="cuda")
    for name in ("cond_s", "uncond_s"):
        o[name].requires_grad_()
    upstream = torch.linspace(-1, 2, 9, device="cuda")
    (fused_step(**o, step=STOCHASTIC).loss * upstream).sum().backward()
    wanted = plain_step(o | {"scale": o["scale"] * upstream}, STOCHASTIC)
    for name in ("cond", "uncond"):
        torch.testing.assert_close(o[f"{name}_s"].grad.cpu().double(), wanted[f"grad_{name}"], rtol=1e-5, atol=1e-9)


def test_nothing_waits_for_the_device() -> None:
    o, keys = operands(SHAPES[1], torch.bfloat16, device="cuda"), torch.arange(9, device="cuda")
    step = torch.tensor(STOCHASTIC, device="cuda")
    o["cond_s"].requires_grad_()
    with no_sync():
        for index in (step, STOCHASTIC):
            fused_step(**o, step=index, keys=keys).loss.sum().backward()
        philox_normal(keys, (16, 64, 64), step)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_graph_advances_the_step(shape: tuple[int, ...]) -> None:
    """One capture, replayed for every row: the graph reads the step, the row and the keys on the device."""
    o = operands(shape, torch.bfloat16, device="cuda")
    keys, step = torch.arange(shape[0], device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")

    def run() -> tuple[Tensor | None, ...]:
        return fused_step(**o, step=step, keys=keys)

    def twice() -> tuple[tuple[Tensor | None, ...], ...]:
        first = run()
        step.add_(1)
        second = run()
        step.add_(1)
        return first, second

    recorder = Recorder(torch.device("cuda"))
    recorder.warm_up(run)
    graph, (first, second) = recorder.record(twice)
    for _ in range(3):  # the arrival counters must be back at zero after every replay
        step.zero_()
        for row in (0, 2):
            graph.replay()
            for offset, captured in enumerate((first, second)):
                assert_identical(captured, fused_step(**o, step=row + offset, keys=keys))


def test_streams_do_not_share_counters() -> None:
    """Launches that overlap on two streams, and a replay beside them, give what one alone gives."""
    o, keys = operands(SHAPES[2], torch.bfloat16, device="cuda"), torch.arange(6, device="cuda")
    wanted = fused_step(**o, step=STOCHASTIC, keys=keys).loss
    graph, captured = Recorder(torch.device("cuda")).record(lambda: fused_step(**o, step=STOCHASTIC, keys=keys).loss)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    losses = []
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(fused_step(**o, step=STOCHASTIC, keys=keys).loss)
    torch.cuda.synchronize()
    assert all(torch.equal(loss, wanted) for loss in (*losses, captured))


def test_row_outside_the_table_is_nan() -> None:
    o = operands(SHAPES[0], device="cuda")
    for step in (4, -1):
        out = fused_step(**o, step=torch.tensor(step, device="cuda"))
        assert out.x_next.isnan().all()
        assert out.loss.isnan().all()


def test_operator() -> None:
    o = operands((3, 4, 16, 16), guided="none", device="cuda")
    o["cond_s"].requires_grad_()
    order = ("x", "cond_s", "uncond_s", "cond_t", "uncond_t", "guidance_s", "guidance_t", "table")
    step = (0, torch.tensor(STOCHASTIC, device="cuda"))
    arguments = (*(o[name] for name in order), *step, o["scale"], None, torch.arange(3, device="cuda"), None)
    torch.library.opcheck(torch.ops.opd_kernels.fused_step.default, (*arguments, True, True, False))


def test_compiles_without_a_graph_break() -> None:
    o, keys = operands(SHAPES[1], torch.bfloat16, device="cuda"), torch.arange(9, device="cuda")
    step = torch.tensor(STOCHASTIC, device="cuda")

    def run(step: Tensor) -> tuple[Tensor | None, ...]:
        return fused_step(**o, step=step, keys=keys)

    assert_identical(torch.compile(run, fullgraph=True)(step), run(step))


def test_operands_on_two_devices() -> None:
    o = operands(SHAPES[0], device="cuda")
    with pytest.raises(ValueError, match="scale is on cpu"):
        fused_step(**(o | {"scale": o["scale"].cpu()}), step=0)
    with pytest.raises(ValueError, match="step must be"):
        fused_step(**o, step=torch.tensor(0))
