"""Log-probability and ratio on a CPU: the twin and the operators around it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_kernels import log_prob, log_prob_reference
from tests.kernels.formula import BOTH, DETERMINISTIC, ROWS, STOCHASTIC, assert_identical
from tests.kernels.logprob_formula import assert_log_prob, operands, plain_log_prob

SHAPE = (4, 3, 5, 7)
ARGUMENTS = ("x", "sample", "cond", "uncond", "guidance", "table")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("compared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_against_float64(dtype: torch.dtype, guided: bool, compared: bool, reduction: Any) -> None:
    o = operands(SHAPE, dtype, guided=guided, compared=compared)
    wanted = plain_log_prob(o, STOCHASTIC, reduction)
    for step in (STOCHASTIC, torch.tensor(STOCHASTIC)):
        assert_log_prob(o, wanted, dtype, step=step, reduction=reduction)


def test_twin_in_float64_is_the_formula() -> None:
    o = operands(SHAPE, torch.float64)
    o |= {name: t.double() for name, t in o.items() if t is not None}
    out = log_prob_reference(**o, step=STOCHASTIC, return_mean=True)
    wanted = plain_log_prob(o, STOCHASTIC)
    for name in ("logp", "log_ratio", "drift", "mean"):
        torch.testing.assert_close(getattr(out, name), wanted[name], rtol=1e-12, atol=1e-15)


def test_ratio_is_1_before_the_first_update() -> None:
    """The mean that drew is the mean of the same weights, bit for bit, so that log_ratio and drift are 0 exactly."""
    o = operands(SHAPE, torch.bfloat16, compared=False)
    mean = log_prob(**o, step=STOCHASTIC, return_mean=True).mean
    out = log_prob(**(o | {"mean_old": mean}), step=STOCHASTIC)
    assert out.log_ratio is not None
    assert torch.equal(out.log_ratio.exp(), torch.ones(4))
    assert torch.equal(out.drift, torch.zeros(4))


def test_guard_s_log_ratio_is_the_noise_times_the_change() -> None:
    """std (log_ratio + drift) = mean(eps * (mu - mu_old)), in float64 to its last digits."""
    o = operands(SHAPE, torch.float64)
    o |= {name: t.double() for name, t in o.items() if t is not None}
    std = float(o["table"][STOCHASTIC, 3])
    out = log_prob_reference(**o, step=STOCHASTIC, return_mean=True)
    assert out.mean is not None
    assert out.log_ratio is not None
    noise = (o["sample"] - o["mean_old"]) / std
    wanted = (noise * (out.mean - o["mean_old"])).flatten(1).mean(1)
    torch.testing.assert_close(std * (out.log_ratio + out.drift), wanted, rtol=1e-13, atol=1e-16)


def test_small_ratios_keep_their_digits() -> None:
    """A change of the mean by 1e-6 of the noise: the difference of two log-probabilities in float32 would be lost."""
    o = operands((4, 16, 32, 32), compared=False)
    mean = log_prob(**o, step=STOCHASTIC, return_mean=True).mean
    assert mean is not None
    std = float(o["table"][STOCHASTIC, 3])
    o["sample"] = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    old = {**o, "mean_old": mean + 1e-6 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))}
    found = log_prob(**old, step=STOCHASTIC).log_ratio
    wanted = plain_log_prob(old, STOCHASTIC)["log_ratio"]
    assert found is not None
    assert float((found.double() - wanted).abs().max()) < 2e-9
    assert float(wanted.abs().max()) > 5e-9


def test_no_mean_given_by_a_gradient() -> None:
    """The mean that is returned carries no graph; the scalars do, and reach one branch alone as well."""
    o = operands(SHAPE, torch.bfloat16)
    o["uncond"].requires_grad_()
    out = log_prob(**o, step=STOCHASTIC, return_mean=True)
    assert out.mean is not None
    assert not out.mean.requires_grad
    assert out.drift is not None
    out.drift.sum().backward()
    assert o["uncond"].grad is not None
    assert o["uncond"].grad.dtype == torch.bfloat16


def test_a_row_without_noise_has_none() -> None:
    for step in (DETERMINISTIC, BOTH):
        with pytest.raises(ValueError, match="draws nothing around its mean"):
            log_prob(**operands(SHAPE), step=step)
    with pytest.raises(IndexError, match="outside the table"):
        log_prob(**operands(SHAPE), step=torch.tensor(-1))


def test_normal_density() -> None:
    """Reduction sum is the log-density of the normal distribution."""
    o = operands(SHAPE)
    out = log_prob(**o, step=STOCHASTIC, return_mean=True, reduction="sum")
    assert out.mean is not None
    normal = torch.distributions.Normal(out.mean.double(), float(o["table"][STOCHASTIC, 3]))
    torch.testing.assert_close(
        out.logp.double(), normal.log_prob(o["sample"].double()).flatten(1).sum(1), rtol=1e-5, atol=0
    )


def test_compiles_without_a_graph_break() -> None:
    o = operands(SHAPE)
    o["cond"].requires_grad_()

    def run(step: Tensor) -> Any:
        return log_prob(**o, step=step, return_mean=True)

    step = torch.tensor(STOCHASTIC)
    assert_identical(torch.compile(run, backend="aot_eager", fullgraph=True)(step), run(step))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("compared", [True, False])
@pytest.mark.parametrize("tensor_step", [True, False])
def test_operators(guided: bool, compared: bool, tensor_step: bool) -> None:
    o = operands(SHAPE, guided=guided, compared=compared)
    if guided:
        o["uncond"] = torch.randn(SHAPE, requires_grad=True)  # comparing NaN with NaN would fail
    o["cond"].requires_grad_()
    step = (0, torch.tensor(STOCHASTIC)) if tensor_step else (STOCHASTIC, None)
    shared = (*(o[name] for name in ARGUMENTS), *step, o["mean_old"])
    torch.library.opcheck(torch.ops.opd_kernels.log_prob.default, (*shared, True, False))
    upstream = torch.ones(4), torch.ones(4) if compared else None
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in shared)
    torch.library.opcheck(torch.ops.opd_kernels.log_prob_backward.default, (*upstream, *plain, False))


def test_empty_batch() -> None:
    o = operands(SHAPE)
    o = {name: t[:0] if t is not None and name != "table" else t for name, t in o.items()}
    assert log_prob(**o, step=STOCHASTIC).logp.shape == (0,)


BAD = [
    ("x", torch.zeros(SHAPE, dtype=torch.float64), "x must be"),
    ("sample", torch.zeros(4, 3, 5, 8), "sample must have shape"),
    ("sample", torch.zeros(SHAPE, dtype=torch.float16), "sample must be float32"),
    ("cond", torch.zeros(SHAPE, dtype=torch.float64), "cond must be float32 or bfloat16 or float16"),
    ("uncond", torch.zeros(3, 3, 5, 7), "uncond must have shape"),
    ("guidance", torch.ones(3), "guidance must have shape"),
    ("mean_old", torch.zeros(SHAPE, device="meta"), "mean_old is on meta"),
    ("table", torch.ones(3, 5), "table must be"),
    ("table", ROWS.double(), "table must be float32"),
    ("step", 4, "step must lie in"),
    ("step", torch.tensor(1, dtype=torch.int32), "step must be an int or a 0-dim int64"),
    ("reduction", "max", "reduction"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_errors_name_the_argument(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_prob(**({"step": 0} | operands(SHAPE) | {name: value}))


def test_logarithm_of_the_constant() -> None:
    """A sample at its mean has the density's peak."""
    o = operands(SHAPE, compared=False)
    mean = log_prob(**o, step=STOCHASTIC, return_mean=True).mean
    out = log_prob(**(o | {"sample": mean}), step=STOCHASTIC)
    peak = -math.log(float(o["table"][STOCHASTIC, 3])) - 0.5 * math.log(2 * math.pi)
    assert out.logp.tolist() == pytest.approx([peak] * 4)
