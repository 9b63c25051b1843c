"""GRPO's and GRPO-Guard's mathematics against what their definitions say, in float64 where it can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_fast.solvers import SolverTable, sd3_sigmas, solver_table
from opd_fast.training.methods.grpo import clipped_surrogate, policy_loss, ratio_change
from opd_fast.training.methods.reward_learning import advantages, varied
from opd_kernels import fused_step, log_prob, log_prob_reference

TABLE = solver_table("flow_sde", sd3_sigmas(10), 0.7)
CPS = solver_table("cps", sd3_sigmas(10), 0.8)  # of Flow-GRPO-Fast's recipe
GROUPS = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2])
REWARDS = torch.tensor([0.1, 0.4, 0.7, 0.3, 0.9, 0.7, 0.3, 0.3])


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", ["global", "group"])
def test_advantages_are_the_definition(std: Any) -> None:
    found = advantages(REWARDS, GROUPS, std=std)
    rewards = REWARDS.double().tolist()
    overall = torch.tensor(rewards, dtype=torch.float64).std(correction=0).item()
    for i, group in enumerate(GROUPS.tolist()):
        mine = [r for r, g in zip(rewards, GROUPS.tolist(), strict=True) if g == group]
        mean = sum(mine) / len(mine)
        spread = overall if std == "global" else math.sqrt(sum((r - mean) ** 2 for r in mine) / len(mine))
        assert float(found[i]) == pytest.approx((rewards[i] - mean) / (spread + 1e-4), rel=1e-6, abs=1e-12)


def test_groups_without_variance_are_dropped_and_worth_nothing() -> None:
    """0.3 three times: its mean in floating point need not be 0.3."""
    assert varied(REWARDS, GROUPS).tolist() == [g == 0 for g in GROUPS.tolist()]
    assert advantages(REWARDS, GROUPS)[GROUPS > 0].tolist() == [0.0] * 5
    assert advantages(torch.full((4,), 0.7), torch.zeros(4, dtype=torch.int64)).tolist() == [0.0] * 4


def test_large_advantages_are_clipped() -> None:
    rewards = torch.zeros(101)
    rewards[0] = 1.0
    found = advantages(rewards, torch.zeros(101, dtype=torch.int64))
    assert float(found[0]) == 5.0
    assert float(advantages(rewards, torch.zeros(101, dtype=torch.int64), clip=20.0)[0]) == pytest.approx(
        9.95, rel=0.01
    )


def test_a_reward_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="policy raise"):
        advantages(torch.tensor([0.0, float("nan")]), torch.zeros(2, dtype=torch.int64))


# --- ratios and losses ------------------------------------------------------------------------------------------------


def drawn(
    step: int, change: float = 0.0, dtype: torch.dtype = torch.float64, solver: SolverTable = TABLE
) -> dict[str, Any]:
    """A step drawn under one velocity, seen under another that lies `change` away."""
    generator = torch.Generator().manual_seed(step)
    x, old, other, noise = (torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    a, b, std = (float(column[step]) for column in (solver.a, solver.b, solver.std))
    mean_old = a * x + b * old
    found = {"x": x, "sample": mean_old + std * noise, "cond": old + change * other, "mean_old": mean_old}
    found = {name: t.to(dtype) for name, t in found.items()}
    table = solver.rows().to(dtype)
    if dtype == torch.float64:
        columns = (solver.a, solver.b, solver.h, solver.std, solver.weight, solver.sigmas[:-1])
        table = torch.stack(columns, 1)
    return {**found, "uncond": None, "guidance": torch.ones(6, dtype=dtype), "table": table, "step": step}


def test_the_ratio_is_1_before_the_first_update() -> None:
    """The rollout's own kernel gives the mean; the same weights give the same mean, and ratio 1 to the last bit."""
    for step in range(9):
        o = drawn(step, dtype=torch.float32)
        rolled = fused_step(
            *(o["x"], o["cond"], None, o["cond"], None, o["guidance"], o["guidance"], o["table"], step),
            torch.ones(6),
            keys=torch.arange(6),
            return_means=True,
        )
        out = log_prob(**(o | {"sample": rolled.x_next, "mean_old": rolled.mean_s}))
        assert out.log_ratio is not None
        assert out.drift is not None
        assert torch.equal(out.log_ratio.exp(), torch.ones(6))
        assert torch.equal(
            ratio_change(out.log_ratio, out.drift, float(TABLE.std[step]), guard=True).exp(), torch.ones(6)
        )


@pytest.mark.parametrize("step", range(10))
def test_guard_s_log_ratio_is_the_mean_of_noise_times_change(step: int) -> None:
    o = drawn(step, change=0.3)
    std = float(TABLE.std[step])
    out = log_prob_reference(**o, return_mean=True)
    assert out.mean is not None
    assert out.log_ratio is not None
    assert out.drift is not None
    noise = (o["sample"] - o["mean_old"]) / std
    wanted = (noise * (out.mean - o["mean_old"])).flatten(1).mean(1)
    torch.testing.assert_close(ratio_change(out.log_ratio, out.drift, std, guard=True), wanted, rtol=1e-11, atol=1e-15)


def test_guard_s_bias_is_each_sample_s_own() -> None:
    """A sample's ratio does not depend on its neighbours."""
    o = drawn(3, change=0.3)
    whole = log_prob_reference(**o)
    alone = log_prob_reference(**{k: v[2:3] if torch.is_tensor(v) and k != "table" else v for k, v in o.items()})
    assert alone.drift is not None
    assert whole.drift is not None
    assert float(alone.drift) == pytest.approx(float(whole.drift[2]), rel=1e-12)


@pytest.mark.parametrize("step", range(9))
def test_published_log_ratio_is_that_of_the_written_log_probability(step: int) -> None:
    """-mean((x - mu)^2), as Flow-GRPO's code has it under CPS, at the new mean and at the old one; the exact one's
    shares of it are those that outside code gave (ALGORITHMS, section 13), in the window's range."""
    o = drawn(step, change=0.3, solver=CPS)
    out = log_prob_reference(**o, return_mean=True)
    assert out.mean is not None
    assert out.log_ratio is not None
    new, old = (-((o["sample"] - mean) ** 2).flatten(1).mean(1) for mean in (out.mean, o["mean_old"]))
    assert out.drift is not None
    found = ratio_change(out.log_ratio, out.drift, float(CPS.std[step]), log_prob="published")
    assert float(found.abs().min()) > 1e-6
    torch.testing.assert_close(found, new - old, rtol=1e-10, atol=1e-15)
    share = float((out.log_ratio / found)[0])
    assert step > 4 or round(share, 2) == [0.60, 0.66, 0.75, 0.88, 1.11][step]
    same = drawn(step, dtype=torch.float32, solver=CPS)
    out = log_prob(**(same | {"mean_old": log_prob(**same, return_mean=True).mean}))
    assert out.log_ratio is not None
    assert out.drift is not None
    change = ratio_change(out.log_ratio, out.drift, float(CPS.std[step]), log_prob="published")
    assert torch.equal(change.exp(), torch.ones(6))


@pytest.mark.parametrize("step", [0, 4, 8])
def test_gradient_of_the_published_ratio(step: int) -> None:
    """That of the written loss, past the clip for some of the samples."""
    o, advantage = drawn(step, change=0.02, dtype=torch.float32, solver=CPS), torch.linspace(-2, 2, 6)
    o["cond"].requires_grad_()
    out = log_prob(**o)
    assert out.log_ratio is not None
    assert out.drift is not None
    change = ratio_change(out.log_ratio, out.drift, float(CPS.std[step]), log_prob="published")
    small = float(change.detach().abs().median())
    loss = policy_loss(change, advantage, CPS, step, guard=False, clip=small)
    loss.sum().backward()
    found, o["cond"].grad = o["cond"].grad, None
    a, b = float(CPS.a[step]), float(CPS.b[step])
    means = [(a * o["x"] + b * o["cond"]).double(), o["mean_old"].double()]
    new, old = (-((o["sample"].double() - mean) ** 2).flatten(1).mean(1) for mean in means)
    ratio = (new - old).exp()
    written = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - small, 1 + small))
    written.sum().backward()
    assert 0 < int(o["cond"].grad.flatten(1).any(1).sum()) < 6
    torch.testing.assert_close(found, o["cond"].grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss.double(), written, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [-0.3, -0.05, 0.05, 0.3])
def test_clipped_surrogate_stops_where_it_has_gone_far_enough(advantage: float, log_ratio: float) -> None:
    value = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(value, torch.tensor([advantage], dtype=torch.float64), 0.1)
    loss.sum().backward()
    ratio = math.exp(log_ratio)
    assert loss.item() == pytest.approx(max(-advantage * ratio, -advantage * min(max(ratio, 0.9), 1.1)))
    too_far = (ratio > 1.1 and advantage > 0) or (ratio < 0.9 and advantage < 0)
    assert value.grad is not None
    assert float(value.grad) == pytest.approx(0.0 if too_far else -advantage * ratio)


@pytest.mark.parametrize("guard", [False, True])
def test_gradient_of_the_first_update(guard: bool) -> None:
    """At ratio 1: -A M (sample - mu)/std^2 dmu; under Guard -A M eps dmu, over the step's length."""
    step = 5
    o = drawn(step, dtype=torch.float32)
    o["cond"].requires_grad_()
    advantage = torch.linspace(-2, 2, 6)
    mean = log_prob(**o, return_mean=True).mean
    out = log_prob(**(o | {"mean_old": mean}))
    assert out.log_ratio is not None
    assert out.drift is not None
    change = ratio_change(out.log_ratio, out.drift, float(TABLE.std[step]), guard=guard)
    policy_loss(change, advantage, TABLE, step, guard=guard, clip=1e-4).sum().backward()
    std, b = float(TABLE.std[step]), float(TABLE.b[step])
    assert mean is not None
    noise = (o["sample"] - mean) / std
    wanted = -advantage.view(-1, 1, 1, 1) * noise * b / 64
    wanted = wanted / float(TABLE.sigmas[step] - TABLE.sigmas[step + 1]) if guard else wanted / std
    torch.testing.assert_close(o["cond"].grad, wanted, rtol=1e-4, atol=1e-7)


def test_guard_evens_out_the_steps() -> None:
    """Gradients per unit of velocity: b/length is much the same at every step, b/std is not."""
    sizes: dict[bool, list[Tensor]] = {True: [], False: []}
    for guard, found in sizes.items():
        for step in range(1, 9):
            o = drawn(step, dtype=torch.float32)
            o["cond"].requires_grad_()
            out = log_prob(**o)
            assert out.log_ratio is not None
            assert out.drift is not None
            change = ratio_change(out.log_ratio, out.drift, float(TABLE.std[step]), guard=guard)
            policy_loss(change, torch.ones(6), TABLE, step, guard=guard, clip=1e-4).sum().backward()
            found.append(o["cond"].grad.norm())
    spread = {guard: float(max(found) / min(found)) for guard, found in sizes.items()}
    assert spread[True] < 1.2
    assert spread[False] > 5
