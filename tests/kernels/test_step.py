"""The fused step on a CPU: the twin and the operator around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd_kernels import ROW, StepOutput, fused_step, fused_step_reference, philox_normal
from tests.kernels.formula import (
    BOTH,
    DETERMINISTIC,
    HISTORY,
    ROWS,
    STOCHASTIC,
    assert_identical,
    assert_step,
    operands,
    plain_step,
)

SHAPE = (4, 3, 5, 7)
ALWAYS = {"x_next", "loss", "grad_cond"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guided", ["both", "student", "teacher", "none"])
@pytest.mark.parametrize("step", range(4))
def test_against_float64(dtype: torch.dtype, guided: str, step: int) -> None:
    o = operands(SHAPE, dtype, guided=guided, history=step in (HISTORY, BOTH))
    noise = torch.randn(SHAPE)
    wanted = plain_step(o, step, noise)
    names = ALWAYS | ({"grad_uncond"} if guided in ("both", "student") else set())
    names |= {"x0"} if step in (HISTORY, BOTH) else set()
    assert_step(fused_step(**o, step=step, noise=noise), wanted, dtype, names)
    everything = fused_step(**o, step=torch.tensor(step), noise=noise, want_x0=True, return_means=True)
    assert_step(everything, wanted, dtype, names | {"x0", "mean_s", "mean_t"})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: Any) -> None:
    o = operands(SHAPE)
    wanted = plain_step(o, STOCHASTIC, reduction=reduction)
    assert_step(fused_step(**o, step=STOCHASTIC, reduction=reduction), wanted)


def test_twin_in_float64_is_the_formula() -> None:
    o = operands(SHAPE, torch.float64, history=True)
    o |= {name: t.double() for name, t in o.items() if t is not None}
    noise = torch.randn(SHAPE, dtype=torch.float64)
    out = fused_step_reference(**o, step=BOTH, noise=noise, return_means=True)
    for name, want in plain_step(o, BOTH, noise).items():
        torch.testing.assert_close(getattr(out, name), want, rtol=1e-13, atol=1e-15)


def test_equal_guidance_for_all_samples() -> None:
    """One scale for the whole batch, and scale 1 for the whole batch, take shorter ways through the twin."""
    for scale in (4.5, 1.0):
        o = operands(SHAPE)
        for side in "st":
            o[f"guidance_{side}"] = torch.full((4,), scale)
            o[f"uncond_{side}"] = torch.randn(SHAPE) if scale != 1 else torch.full(SHAPE, float("nan"))
        assert_step(fused_step(**o, step=DETERMINISTIC), plain_step(o, DETERMINISTIC))


def test_student_equal_to_teacher_gives_zero() -> None:
    o = operands(SHAPE, torch.bfloat16, guided="both")
    o |= {"cond_t": o["cond_s"], "uncond_t": o["uncond_s"], "guidance_t": o["guidance_s"]}
    out = fused_step(**o, step=STOCHASTIC, keys=torch.arange(4))
    assert torch.equal(out.loss, torch.zeros(4))
    assert not out.grad_cond.any()
    assert out.grad_uncond is not None
    assert not out.grad_uncond.any()


def test_operands_without_a_part_in_the_row_are_not_read() -> None:
    """std = 0 ignores the noise, h = 0 the history, whatever they hold."""
    o = operands(SHAPE, history=True)
    nan = torch.full(SHAPE, float("nan"))
    out = fused_step(**(o | {"history": nan}), step=DETERMINISTIC, noise=nan)
    assert_step(out, plain_step(o, DETERMINISTIC))


def test_noise_from_keys() -> None:
    """Keys draw the public noise of the step; a sample's noise follows its key through any batch."""
    o, keys = operands(SHAPE, guided="none"), torch.tensor([5, -1, 2**50, 7])
    whole = fused_step(**o, step=BOTH, keys=keys).x_next
    noise = philox_normal(keys, SHAPE[1:], BOTH)
    assert torch.equal(whole, fused_step(**o, step=BOTH, noise=noise).x_next)
    some = [2, 0]
    part = {name: t[some] if t is not None and name != "table" else t for name, t in o.items()}
    assert torch.equal(fused_step(**part, step=BOTH, keys=keys[some]).x_next, whole[some])


def test_autograd_of_the_loss() -> None:
    o = operands(SHAPE)
    for name in ("cond_s", "uncond_s"):
        o[name].requires_grad_()
    out = fused_step(**o, step=STOCHASTIC, return_means=True, want_x0=True)
    assert [name for name, t in out._asdict().items() if t is not None and t.requires_grad] == ["loss"]
    upstream = torch.tensor([1.0, -2.0, 0.0, 0.5])
    (out.loss * upstream).sum().backward()
    wanted = plain_step(o | {"scale": o["scale"] * upstream}, STOCHASTIC)
    for name in ("cond", "uncond"):
        torch.testing.assert_close(o[f"{name}_s"].grad.double(), wanted[f"grad_{name}"], rtol=1e-6, atol=1e-8)


def test_autograd_reaches_one_branch_alone() -> None:
    o = operands(SHAPE, torch.bfloat16)
    o["uncond_s"].requires_grad_()
    out = fused_step(**o, step=STOCHASTIC)
    out.loss.sum().backward()
    assert_identical([o["uncond_s"].grad], [out.grad_uncond])


def test_halves_of_a_batch_and_other_layouts() -> None:
    """[cond; uncond] halves, expanded and permuted operands give what contiguous ones give."""
    o = operands(SHAPE, guided="none")
    both = torch.randn(8, *SHAPE[1:])
    permuted = torch.randn(4, 5, 7, 3).permute(0, 3, 1, 2)
    o |= {"cond_s": both[:4], "uncond_s": both[4:], "guidance_s": torch.full((4,), 3.0), "x": permuted}
    noise = torch.randn(1, *SHAPE[1:]).expand(SHAPE)
    out = fused_step(**o, step=STOCHASTIC, noise=noise, want_x0=True)
    assert_step(out, plain_step(o, STOCHASTIC, noise))
    assert all(t.is_contiguous() for t in out if t is not None)


def test_repeats_bit_for_bit() -> None:
    o, keys = operands((3, 4, 33, 9)), torch.arange(3)
    first, second = (fused_step(**o, step=STOCHASTIC, keys=keys) for _ in range(2))
    assert_identical(first, second)


def test_compiles_without_a_graph_break() -> None:
    o = operands(SHAPE)
    o["cond_s"].requires_grad_()

    def run(step: torch.Tensor) -> StepOutput:
        return fused_step(**o, step=step, keys=keys)

    keys, step = torch.arange(4), torch.tensor(STOCHASTIC)
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(step)
    assert_identical(got, run(step))


@pytest.mark.parametrize("guided", ["both", "none"])
@pytest.mark.parametrize("tensor_step", [True, False])
def test_operator(guided: str, tensor_step: bool) -> None:
    o = operands(SHAPE, guided=guided, history=True)
    if guided == "both":
        o["uncond_s"] = torch.randn(SHAPE)  # comparing NaN with NaN would fail
        o["uncond_t"] = torch.randn(SHAPE)
        o["uncond_s"].requires_grad_()
    o["cond_s"].requires_grad_()
    order = ("x", "cond_s", "uncond_s", "cond_t", "uncond_t", "guidance_s", "guidance_t", "table")
    step = (0, torch.tensor(BOTH)) if tensor_step else (BOTH, None)
    arguments = (
        *(o[name] for name in order),
        *step,
        o["scale"],
        None,
        torch.arange(4),
        o["history"],
        True,
        True,
        False,
    )
    torch.library.opcheck(torch.ops.opd_kernels.fused_step.default, arguments)


def test_columns_are_the_solver_tables() -> None:
    assert ROW == ("a", "b", "h", "std", "weight", "sigma")


BAD = [
    ("x", torch.zeros(SHAPE, dtype=torch.float64), "x must be"),
    ("x", torch.zeros(4, 0, 5, 7), "x must have"),
    ("cond_s", torch.zeros(4, 3, 5, 8), "cond_s must have shape"),
    ("cond_s", torch.zeros(SHAPE, dtype=torch.float64), "cond_s must be float32 or bfloat16 or float16"),
    ("uncond_s", torch.zeros(3, 3, 5, 7), "uncond_s must have shape"),
    ("cond_t", torch.zeros(SHAPE, dtype=torch.int64), "cond_t must be"),
    ("uncond_t", torch.zeros(SHAPE, device="meta"), "uncond_t is on meta"),
    ("guidance_s", torch.ones(3), "guidance_s must have shape"),
    ("guidance_t", torch.ones(4, dtype=torch.float64), "guidance_t must be float32"),
    ("scale", torch.ones(4, 1), "scale must have shape"),
    ("table", torch.ones(3, 5), "table must be"),
    ("table", ROWS.double(), "table must be float32"),
    ("history", torch.zeros(SHAPE, dtype=torch.float16), "history must be float32"),
    ("noise", torch.zeros(2, *SHAPE[1:]), "noise must have shape"),
    ("keys", torch.zeros(4), "keys must be int64"),
    ("step", 4, "step must lie in"),
    ("step", -1, "step must lie in"),
    ("step", torch.tensor(1, dtype=torch.int32), "step must be an int or a 0-dim int64"),
    ("step", torch.tensor([1]), "step must be an int or a 0-dim int64"),
    ("reduction", "max", "reduction"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_errors_name_the_argument(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_step(**({"step": 0} | operands(SHAPE) | {name: value}))


def test_noise_and_keys_together() -> None:
    with pytest.raises(ValueError, match="noise and keys"):
        fused_step(**operands(SHAPE), step=0, noise=torch.zeros(SHAPE), keys=torch.arange(4))


@pytest.mark.parametrize("step", [4, -1])
def test_step_tensor_outside_the_table(step: int) -> None:
    with pytest.raises(IndexError, match="outside the table"):
        fused_step(**operands(SHAPE), step=torch.tensor(step))
