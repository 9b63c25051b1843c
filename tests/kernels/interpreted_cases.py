"""The kernels under Triton's interpreter, on small odd shapes, against float64.

Triton decides when it is imported whether it interprets, so these cases run in a process of their own, which
`test_interpreted.py` starts.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from opd_kernels import LogProb, Quantized, philox_normal, quantize_rows_reference
from opd_kernels.logprob_triton import launch_log_prob, launch_log_prob_backward
from opd_kernels.philox_triton import BLOCK, launch_normal
from opd_kernels.quantize_triton import launch_quantize_rows, quantize_rows_kernel, tiling
from opd_kernels.step_triton import launch_step
from opd_kernels.tuning import CANDIDATES, Launch, using
from tests.kernels import logprob_formula
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
from tests.kernels.quantize_formula import hard_rows, wanted_scale

assert os.environ.get("TRITON_INTERPRET") == "1"

# Less than a block; a block exactly; a ragged last block, so that partial sums meet.
SHAPES = [(3, 1, 5, 7), (2, 4, 16, 16), (4, 3, 29, 31)]
# Of the candidates' programs: a small part of one, one exactly (of the largest), a few and a ragged last one.
ODD_SHAPES = [(3, 1, 5, 7), (2, 4, 32, 32), (2, 3, 53, 37)]
# The interpreter cuts float32 to bfloat16 where a GPU rounds, so that gradients may be off by a whole unit.
ULPS = {torch.float32: 0.51, torch.bfloat16: 1.01, torch.float16: 0.51}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("guided", ["both", "student", "teacher", "none"])
def test_guidance_and_types(shape: tuple[int, ...], dtype: torch.dtype, guided: str) -> None:
    o, noise = operands(shape, dtype, guided=guided), torch.randn(shape)
    assert_step(
        launch_step(**o, step=STOCHASTIC, noise=noise), plain_step(o, STOCHASTIC, noise), dtype, ulps=ULPS[dtype]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [STOCHASTIC, DETERMINISTIC, HISTORY, BOTH])
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_noise_and_outputs(shape: tuple[int, ...], step: int, drawn: bool, reduction: Any) -> None:
    o, keys = operands(shape, history=step in (HISTORY, BOTH)), torch.arange(7, 7 + shape[0]) << 33
    noise = philox_normal(keys, shape[1:], step) if drawn else torch.randn(shape)
    given: dict[str, Any] = {"keys": keys} if drawn else {"noise": noise}
    index = torch.tensor(step) if drawn else step
    out = launch_step(**o, step=index, **given, want_x0=True, return_means=True, reduction=reduction)
    names = {"x_next", "loss", "grad_cond", "grad_uncond", "x0", "mean_s", "mean_t"}
    assert_step(out, plain_step(o, step, noise, reduction), names=names)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("launch", CANDIDATES, ids=str)
def test_every_candidate(launch: Launch, shape: tuple[int, ...]) -> None:
    """Against float64; and what is computed element by element has the same bits whatever the tiling."""
    full, keys = operands(shape, torch.bfloat16, history=True), torch.arange(shape[0])
    plain, noise = operands(shape, guided="none"), torch.randn(shape)
    ruled = launch_step(**full, step=BOTH, keys=keys, return_means=True)
    with using(launch):
        out = launch_step(**full, step=BOTH, keys=keys, return_means=True)
        again = launch_step(**full, step=BOTH, keys=keys, return_means=True)
        simple = launch_step(**plain, step=STOCHASTIC, noise=noise, reduction="sum")
    wanted = plain_step(full, BOTH, philox_normal(keys, shape[1:], BOTH))
    assert_step(out, wanted, torch.bfloat16, ulps=ULPS[torch.bfloat16])
    assert_step(simple, plain_step(plain, STOCHASTIC, noise, "sum"))
    assert_identical(out, again)
    assert_identical(out._replace(loss=None), ruled._replace(loss=None))


def test_unread_operands_may_hold_anything() -> None:
    shape = SHAPES[2]
    nan = torch.full(shape, float("nan"))
    o = operands(shape) | {"history": nan}
    assert_step(launch_step(**o, step=DETERMINISTIC, noise=nan), plain_step(o, DETERMINISTIC))


def test_batch_strides_are_read_in_place() -> None:
    """Halves of [cond; uncond], an expanded operand and an interleaved one reach the kernel as they lie."""
    shape = SHAPES[2]
    o = operands(shape, guided="student")
    both, pairs = torch.randn(8, *shape[1:]), torch.randn(4, 2, *shape[1:])
    o |= {"cond_s": both[:4], "uncond_s": both[4:], "cond_t": pairs[:, 1], "guidance_s": torch.full((4,), 2.5)}
    o["x"] = torch.randn(4, 29, 31, 3).permute(0, 3, 1, 2)  # only this one is copied
    noise = torch.randn(1, *shape[1:]).expand(shape)
    assert_step(launch_step(**o, step=STOCHASTIC, noise=noise), plain_step(o, STOCHASTIC, noise))


def test_student_equal_to_teacher_gives_zero() -> None:
    o = operands(SHAPES[2], torch.bfloat16)
    o |= {"cond_t": o["cond_s"], "uncond_t": o["uncond_s"], "guidance_t": o["guidance_s"]}
    out = launch_step(**o, step=STOCHASTIC, keys=torch.arange(4))
    assert out.grad_uncond is not None
    assert not any(t.any() for t in (out.loss, out.grad_cond, out.grad_uncond))


def test_row_outside_the_table_is_nan() -> None:
    for step in (4, -1):
        out = launch_step(**operands(SHAPES[0]), step=torch.tensor(step))
        assert out.x_next.isnan().all()
        assert out.loss.isnan().all()


def test_order_of_the_programs_does_not_matter() -> None:
    """The loss is summed by whichever program arrives last, in a fixed order: equal bits in every run, and for a sample
    alone or in a batch."""
    o, keys = operands((3, 3, 37, 41)), torch.arange(3)
    runs = [launch_step(**o, step=STOCHASTIC, keys=keys) for _ in range(2)]
    assert_identical(*runs)
    alone = {name: t[1:2] if t is not None and name != "table" else t for name, t in o.items()}
    out = launch_step(**alone, step=STOCHASTIC, keys=keys[1:2])
    assert torch.equal(out.loss, runs[0].loss[1:2])
    assert torch.equal(out.x_next, runs[0].x_next[1:2])


@pytest.mark.parametrize("elements", [1, 4, 1023, BLOCK, BLOCK + 5])
@pytest.mark.parametrize("counter", [0, 9, 2**31 - 1, 2**32 - 1])
def test_noise_is_the_twins(elements: int, counter: int) -> None:
    """Equal to float32 rounding of the largest normal: the integer part is the same bit for bit."""
    keys = torch.tensor([0, -1, 2**62 + 12345])
    wanted = philox_normal(keys, (elements,), counter)
    for got in (launch_normal(keys, elements, counter, None), launch_normal(keys, elements, 0, torch.tensor(counter))):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_words_are_the_generators() -> None:
    """uint32 words of `triton.language.philox`, as the kernel calls it, against the twin's generator."""
    import numpy as np
    import triton
    import triton.language as tl

    from tests.kernels.philox_formula import philox4x32

    @triton.jit
    def words(key_ptr, out_ptr, counter, N: tl.constexpr):  # type: ignore[no-untyped-def]
        c0 = tl.arange(0, N).to(tl.uint32)
        zero = c0 * 0
        w0, w1, w2, w3 = tl.philox(tl.load(key_ptr), c0, zero + counter.to(tl.uint32), zero, zero)
        at = out_ptr + tl.arange(0, N)
        tl.store(at, w0.to(tl.int32, bitcast=True))
        tl.store(at + N, w1.to(tl.int32, bitcast=True))
        tl.store(at + 2 * N, w2.to(tl.int32, bitcast=True))
        tl.store(at + 3 * N, w3.to(tl.int32, bitcast=True))

    for key in (0, -3, 2**40 + 99):
        out = torch.empty(4, 128, dtype=torch.int32)
        words[(1,)](torch.tensor([key]), out, 77, N=128)
        unsigned = key & (2**64 - 1)
        wanted = philox4x32((unsigned & 0xFFFFFFFF, unsigned >> 32), (np.arange(128), 77, 0, 0))
        np.testing.assert_array_equal(out.numpy().view(np.uint32), np.stack(wanted).astype(np.uint32))


# --- log-probability and ratio ----------------------------------------------------------------------------------------


def through_kernels(**o: Any) -> LogProb:
    """`log_prob` as on CUDA: the launchers in place of the twins."""
    step, mean_old, mean = o["step"], o["mean_old"], o.pop("return_mean")
    reduction = o.get("reduction", "mean")

    class Kernels(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, cond: torch.Tensor, uncond: torch.Tensor | None) -> Any:
            ctx.save_for_backward(cond, uncond)
            out = launch_log_prob(**(o | {"cond": cond, "uncond": uncond}), return_mean=mean)
            ctx.set_materialize_grads(False)
            return tuple(out)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            cond, uncond = ctx.saved_tensors
            zero = torch.zeros(len(cond))
            logp, ratio, drift = (zero if g is None else g for g in grads[:3])
            rest = (o["x"], o["sample"], cond, uncond, o["guidance"], o["table"], step)
            drifting = None if mean_old is None else drift
            return launch_log_prob_backward(logp + ratio, drifting, *rest, mean_old=mean_old, reduction=reduction)

    return LogProb(*Kernels.apply(o["cond"], o["uncond"]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("compared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob(shape: tuple[int, ...], dtype: torch.dtype, guided: bool, compared: bool, reduction: Any) -> None:
    o = logprob_formula.operands(shape, dtype, guided=guided, compared=compared)
    wanted = logprob_formula.plain_log_prob(o, STOCHASTIC, reduction)
    step = torch.tensor(STOCHASTIC) if guided else STOCHASTIC
    run = through_kernels
    logprob_formula.assert_log_prob(o, wanted, dtype, run, ULPS[dtype], step=step, reduction=reduction)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("launch", CANDIDATES, ids=str)
def test_log_prob_of_every_candidate(launch: Launch, shape: tuple[int, ...]) -> None:
    o = logprob_formula.operands(shape)
    wanted = logprob_formula.plain_log_prob(o, STOCHASTIC)
    with using(launch):
        logprob_formula.assert_log_prob(o, wanted, torch.float32, through_kernels, step=STOCHASTIC)


def test_log_prob_strides_and_unread_operands() -> None:
    """Halves of [cond; uncond] and a permuted state; uncond is NaN where the guidance is 1."""
    o = logprob_formula.operands(SHAPES[2])
    both = torch.randn(8, *SHAPES[2][1:])
    both[4::2] = float("nan")
    o |= {"cond": both[:4], "uncond": both[4:], "x": torch.randn(4, 29, 31, 3).permute(0, 3, 1, 2)}
    wanted = logprob_formula.plain_log_prob(o, STOCHASTIC)
    out = launch_log_prob(**o, step=STOCHASTIC)
    for name in ("logp", "log_ratio", "drift"):
        torch.testing.assert_close(getattr(out, name).double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_rows_without_a_log_probability_are_nan() -> None:
    o = logprob_formula.operands(SHAPES[0])
    for step in (DETERMINISTIC, HISTORY, BOTH, torch.tensor(4), torch.tensor(-1)):
        assert all(t.isnan().all() for t in launch_log_prob(**o, step=step) if t is not None), step


def test_log_prob_repeats_and_is_0_at_the_mean_that_drew() -> None:
    o = logprob_formula.operands(SHAPES[2])
    first, second = (launch_log_prob(**o, step=STOCHASTIC, return_mean=True) for _ in range(2))
    assert_identical(first, second)
    same = launch_log_prob(**(o | {"mean_old": first.mean}), step=STOCHASTIC)
    assert same.log_ratio is not None
    assert torch.equal(same.log_ratio, torch.zeros(4))
    assert torch.equal(same.drift, torch.zeros(4))


# --- row-wise float8 --------------------------------------------------------------------------------------------------

# A column; several rows a program, ragged; a row a program, a whole power of two; more than ELEMENTS.
ROWS = [(5, 1), (7, 31), (131, 48), (4, 2048), (4, 3001)]


def before_rounding(x: torch.Tensor) -> Quantized:
    """What the kernel rounds, kept in float32: the interpreter's own rounding to float8 is not to be trusted."""
    rows, block, _ = tiling(x.shape[1])
    q, scale = torch.full(x.shape, 1e9), torch.full(x.shape[:1], 1e9)
    quantize_rows_kernel[(-(-len(x) // rows),)](x, q, scale, x.stride(0), *x.shape, ROWS=rows, BLOCK=block)
    return Quantized(q, scale)


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("dtype", ULPS)
def test_quantize_before_its_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = hard_rows(*shape, dtype)
    q, scale = before_rounding(x)
    exact = wanted_scale(x)
    torch.testing.assert_close(scale.double(), exact, rtol=2**-23, atol=0)
    torch.testing.assert_close(q.double(), x.double() / exact[:, None], rtol=2**-21, atol=1e-30)
    assert bool((q.abs() <= 448).all())


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("dtype", ULPS)
def test_quantize_rounds_as_the_twin_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bit for bit, but where the interpreter errs: it cuts what is subnormal, rounds ties away from zero, and loses the
    carry of a mantissa that is rounded up to the next power of two."""
    x = hard_rows(*shape, dtype)
    (q, scale), wanted = launch_quantize_rows(x), quantize_rows_reference(x)
    assert torch.equal(scale, wanted.scale)
    mantissa, exponent = torch.frexp(wanted.q.float())
    exact = x.float() * wanted.scale.reciprocal()[:, None]
    tie = torch.frexp(exact)[0].abs().mul(32).frac() == 0
    sound = (mantissa.abs() != 0.5) & (exponent > -6) & (mantissa != 0) & ~tie
    assert torch.equal(q.float()[sound], wanted.q.float()[sound])
    assert shape[1] < 1000 or float(sound[0].float().mean()) > 0.7  # a row of plain normals


def test_quantize_reads_strides_and_shows_what_is_not_finite() -> None:
    wide = torch.randn(6, 40)
    for x in (wide[:, 8:24], wide[::2], wide.T):
        assert torch.equal(launch_quantize_rows(x).q.float(), launch_quantize_rows(x.contiguous()).q.float())
    for bad in (float("nan"), float("inf")):
        wide[2, 5] = bad
        assert before_rounding(wide).q.isnan().any(1).tolist() == [False, False, True, False, False, False]
