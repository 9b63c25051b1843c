"""Float8 on a CUDA device: the quantisation against its formula and twin, products against the emulation, graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opd_fast.engine.float8 import Float8Linear, quantize_weight, requantize, supported
from opd_fast.engine.merged_lora import merged_linear
from opd_kernels import quantize_rows, quantize_rows_reference
from opd_kernels.recording import Recorder
from tests.gpu.test_step_gpu import no_sync
from tests.kernels.quantize_formula import assert_quantized, hard_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A column; ragged; several rows a program; tokens of SD3.5 Medium, its feed-forward, and the longest row.
SHAPES = [(5, 1), (7, 31), (131, 48), (1229, 1536), (1000, 6144), (9, 32768)]


@pytest.fixture
def units() -> None:
    """Matrix units for float8, or the test is not for this device."""
    why = supported("cuda")
    if why is not None:
        pytest.skip(why)


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu().double() - truth.cpu().double()).norm() / truth.cpu().double().norm())


def replayed(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`run` captured after a warm-up on a side stream, and the tensor that replays fill."""
    recorder = Recorder(torch.device("cuda"))
    recorder.warm_up(run, 2)
    return recorder.record(run)


# --- quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisation_is_the_formulas_and_the_twins(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = hard_rows(*shape, dtype)
    out, twin = quantize_rows(x.cuda()), quantize_rows_reference(x)
    assert_quantized(out, x.cuda())
    assert torch.equal(out.scale.cpu(), twin.scale)
    assert torch.equal(out.q.cpu().view(torch.uint8), twin.q.view(torch.uint8))


def test_quantisation_reads_rows_where_they_lie_and_shows_what_is_not_finite() -> None:
    wide = torch.randn(6, 64, device="cuda")
    for x in (wide[:, 16:48], wide[:, 1:33], wide[::2], wide.T):
        assert torch.equal(quantize_rows(x).q.float(), quantize_rows(x.contiguous()).q.float())
    for bad in (float("nan"), float("inf")):
        wide[2, 5] = bad
        q, scale = quantize_rows(wide)
        assert (q.float() * scale[:, None]).isnan().any(1).tolist() == [False, False, True, False, False, False]


def test_quantisation_operator() -> None:
    x = hard_rows(5, 32, torch.bfloat16, "cuda")
    torch.library.opcheck(torch.ops.opd_kernels.quantize_rows.default, (x,))


# --- products ---------------------------------------------------------------------------------------------------------


def layers(
    inside: int, outside: int, dtype: torch.dtype, *, transposed: bool, bias: bool = True
) -> tuple[Float8Linear, Float8Linear]:
    """A layer on the device, and the same one on the CPU, where it is emulated."""
    torch.manual_seed(0)
    plain = nn.Linear(inside, outside, bias=bias).to(dtype).requires_grad_(False)
    here = Float8Linear(plain, transposed=transposed)
    there = Float8Linear(plain, transposed=transposed)
    return there.to("cuda"), here


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("shape", [(64, 48), (1536, 6144), (6144, 1536), (3072, 3072)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_emulations(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    there, here = layers(*shape, dtype, transposed=False, bias=bias)
    for rows in ((2, 77), (333,)):  # no multiples of anything
        x = torch.randn(*rows, shape[0]).to(dtype)
        y = there(x.cuda())
        assert y.dtype == dtype
        assert y.shape == (*rows, shape[1])
        # The result is rounded to bfloat16 whatever the type; the units' own sums are some 14 bits wide.
        assert relative(y, here(x)) < 5e-3


@pytest.mark.usefixtures("units")
def test_a_single_row_is_the_emulations() -> None:
    """Apart: no layer in float8 has so few rows in a round, and libraries treat one row as a case of its own."""
    there, here = layers(1536, 1536, torch.bfloat16, transposed=False)
    x = torch.randn(1, 1536).to(torch.bfloat16)
    assert relative(there(x.cuda()), here(x)) < 5e-3


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_gradient_is_the_emulations(transposed: bool, dtype: torch.dtype) -> None:
    there, here = layers(1536, 6144, dtype, transposed=transposed)
    x, dy = torch.randn(2, 77, 1536).to(dtype), torch.randn(2, 77, 6144).to(dtype)
    slopes = []
    for layer in (there, here):
        leaf = x.to(layer.q.device).requires_grad_()
        layer(leaf).backward(dy.to(layer.q.device))
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    assert relative(*slopes) < 1e-2


@pytest.mark.usefixtures("units")
def test_merged_product_is_the_emulations() -> None:
    merged, bias = torch.randn(1536, 1536) / 40, torch.randn(1536).bfloat16()
    x, a, b = torch.randn(333, 1536).bfloat16(), torch.randn(32, 1536) / 40, torch.randn(1536, 32) / 6
    dy, found = torch.randn(333, 1536).bfloat16(), []
    for device in ("cuda", "cpu"):
        weight = quantize_weight(merged.to(device), transposed=True)
        leaves = [t.to(device).requires_grad_() for t in (x, a, b)]
        y = merged_linear(leaves[0], weight, bias.to(device), *leaves[1:], 2.0)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(device))])
    for there, here in zip(*found, strict=True):
        assert relative(there, here) < 1e-2


@pytest.mark.usefixtures("units")
def test_nothing_waits_for_the_device() -> None:
    there, _ = layers(64, 48, torch.bfloat16, transposed=True)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, merged = quantize_weight(torch.randn(48, 64, device="cuda"), transposed=True), torch.randn(48, 64).cuda()
    there(x)  # Triton compiles at the first call
    with no_sync():
        there(x).sum().backward()
        requantize(merged, weight)


@pytest.mark.usefixtures("units")
def test_a_captured_round_follows_the_weights_and_the_inputs() -> None:
    """A forward and backward captured once: new activations and requantised weights reach the replays."""
    a, b = torch.randn(4, 64, device="cuda"), torch.randn(48, 4, device="cuda")
    first, second = (torch.randn(48, 64, device="cuda") for _ in range(2))
    weight = quantize_weight(first, transposed=True)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(32, 48, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        y = merged_linear(x, weight, None, a, b, 2.0)
        (dx,) = torch.autograd.grad(y, x, dy)
        return torch.cat([y.detach(), dx], 1)

    graph, out = replayed(run)
    for merged in (second, first):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        requantize(merged, weight)
        graph.replay()
        assert torch.equal(out, run())


@pytest.mark.usefixtures("units")
def test_compiles_whole() -> None:
    there, _ = layers(64, 48, torch.bfloat16, transposed=True)
    module = nn.Sequential(nn.LayerNorm(64), there, nn.GELU()).to("cuda", torch.bfloat16)
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = module(x)
    (slope,) = torch.autograd.grad(wanted.float().square().mean(), x)
    module.compile(fullgraph=True)
    found = module(x)
    (theirs,) = torch.autograd.grad(found.float().square().mean(), x)
    # Fused, the norm may round other numbers to other neighbours.
    assert relative(found.detach(), wanted.detach()) < 2e-2
    assert relative(theirs, slope) < 5e-2


@pytest.mark.usefixtures("units")
def test_bytes_on_the_device() -> None:
    torch.cuda.synchronize()
    plain = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    before = torch.cuda.memory_allocated()
    layer = Float8Linear(plain)
    del plain
    assert before - torch.cuda.memory_allocated() == pytest.approx(4096 * 4096, rel=0.01)
    assert layer.q.nbytes == 4096 * 4096
