"""The rival objectives: their gradients against autograd of the losses written out, their means and variances.

The statistics are taken at a fixed state of a small model in float64, the whole rounds in float32.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import NANO, gradients, random_model, random_text, relative_error, write_random_lora
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.models.guidance import Conditioning, Velocities
from opd_fast.models.sd3 import SD3
from opd_fast.objectives import Surrogate, query_law, score_factors, step_queries, step_weights
from opd_fast.solvers import SolverTable, sd3_sigmas, solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.methods.opd import OPD
from opd_fast.training.rollout import one_pass
from opd_fast.training.setup import prepare
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import base_teacher, load_teachers
from opd_fast.training.teachers import TeacherBank
from tests.runs import settings
from tests.tiny import tiny_transformer

TABLE = solver_table("flow_sde", sd3_sigmas(10), 0.7)
STEP = 5
KINDS = ("live", "detached", "return_to_go")


# --- the rule, at the velocities --------------------------------------------------------------------------------------


def written_loss(kind: str, kl: Tensor, logp: Tensor, later: Tensor, scale: float, clamp: float | None) -> Tensor:
    """(B,) of Flow-OPD's clipped surrogate: A = -scale * KL clamped, max(-A rho, -A clip(rho, 1 +- 1e-4))."""
    reward = scale * kl if clamp is None else (scale * kl).clamp(-clamp, clamp)
    if kind == "return_to_go":
        return reward + later * logp
    advantage = -(reward.detach() if kind == "detached" else reward)
    ratio = (logp - logp.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4))


def log_probability(sample: Tensor, mean: Tensor, std: float, reduction: str) -> Tensor:
    """(B,) of N(mean, std^2) at the sample, mean or sum over the elements."""
    terms = -((sample - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).mean(1) if reduction == "mean" else terms.flatten(1).sum(1)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rule_is_autograd_of_the_written_loss(kind: Any, clamped: bool, reduction: str, guided: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 2, 3, 4)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, std, w = (float(column[STEP]) for column in (TABLE.a, TABLE.b, TABLE.std, TABLE.weight))
    x, cond, uncond, target, noise = (draw() for _ in range(5))
    scale = torch.rand(5, generator=generator, dtype=torch.float64) + 0.5
    g = torch.full((5,), 3.5 if guided else 1.0, dtype=torch.float64)
    cond.requires_grad_()
    uncond.requires_grad_()
    v = uncond + 3.5 * (cond - uncond) if guided else cond
    count = x[0].numel() if reduction == "mean" else 1
    kl = w * (v - target).square().flatten(1).sum(1) / count
    later = torch.rand(5, generator=generator, dtype=torch.float64)
    # Between the samples' rewards, so that the clamp takes some and leaves some.
    clamp = 1.5 * float(kl.detach().median()) if clamped else None
    leaves = [cond, uncond] if guided else [cond]
    closed = torch.autograd.grad((scale * kl).sum(), leaves, retain_graph=True)
    mean = a * x + b * v
    logp = log_probability((mean + std * noise).detach(), mean, std, reduction)
    truth = torch.autograd.grad((scale * written_loss(kind, kl, logp, later, 1.5, clamp)).sum(), leaves)
    if clamp is not None:
        assert 0 < int((1.5 * kl > clamp).sum()) < 5

    found = Surrogate(kind, 1.5, clamp).gradients(
        closed[0],
        closed[1] if guided else None,
        kl=kl.detach(),
        later=later,
        noise=noise,
        score=scale * float(score_factors(TABLE)[STEP]) / count,
        guidance=g,
    )
    for got, want in zip([t for t in found if t is not None], truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_returns_leave_out_the_step_itself() -> None:
    kl = torch.tensor([[1.0], [2.0], [4.0]])
    assert Surrogate("return_to_go", 2.0, 6.0).returns(kl).flatten().tolist() == [10.0, 6.0, 0.0]


# --- means and variances at a fixed state -----------------------------------------------------------------------------


class FixedState:
    """One state of a small transformer in float64: velocities, and the Jacobian of v with respect to some weights."""

    def __init__(self) -> None:
        student, teacher = tiny_transformer(0).double(), tiny_transformer(0).double()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
        x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
        text = {
            "encoder_hidden_states": torch.randn(1, 5, 32, dtype=torch.float64),
            "pooled_projections": torch.randn(1, 32, dtype=torch.float64),
            "timestep": 1000 * TABLE.sigmas[STEP : STEP + 1],
        }
        weights = student.transformer_blocks[0].attn.to_v.weight
        self.v = student(hidden_states=x, **text, return_dict=False)[0]
        self.target = teacher(hidden_states=x, **text, return_dict=False)[0].detach()
        rows = [torch.autograd.grad(e, weights, retain_graph=True)[0].flatten() for e in self.v.flatten()]
        self.jacobian = torch.stack(rows)  # (D, P)
        self.v = self.v.detach()

    def draws(self, kind: Any, reduction: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count, P) gradients over as many noises, (P,) the closed form's, and the step's KL."""
        b, std, w = (float(column[STEP]) for column in (TABLE.b, TABLE.std, TABLE.weight))
        gap = self.v - self.target
        elements = gap.numel() if reduction == "mean" else 1
        kl, closed = w * gap.square().sum() / elements, 2 * w * gap / elements
        noise = torch.randn(count, *gap.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ones = torch.ones(count, dtype=torch.float64)
        found, _ = Surrogate(kind).gradients(
            closed.expand_as(noise),
            None,
            kl=kl * ones,
            later=None,
            noise=noise,
            score=ones * (b / std / elements),
            guidance=ones,
        )
        return found.flatten(1) @ self.jacobian, closed.flatten() @ self.jacobian, kl


@pytest.fixture(scope="module")
def state() -> FixedState:
    return FixedState()


def within_standard_error(draws: Tensor, mean: Tensor) -> None:
    """Every coordinate, along the principal axes of the draws so that they are independent, within 5 standard errors;
    and their squares, in units of the standard error, average 1."""
    count = len(draws)
    _, sizes, axes = torch.linalg.svd(draws - draws.mean(0), full_matrices=False)
    keep = sizes > 1e-9 * sizes[0]
    z = (axes[keep] @ (draws.mean(0) - mean)) / (sizes[keep] / count)
    assert float(z.abs().max()) < 5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / len(z)) ** 0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_live_surrogate_has_the_closed_form_for_its_mean(state: FixedState, reduction: str) -> None:
    draws, closed, _ = state.draws("live", reduction, 4000)
    assert float(closed.norm()) > 0
    within_standard_error(draws, closed)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_live_surrogate_has_the_analytic_excess_variance(state: FixedState, reduction: str) -> None:
    """tr Cov = KL^2 |J|^2 / std^2, J = dmu/dtheta, times 1/D^2 under mean; the closed form has none here."""
    draws, _, kl = state.draws("live", reduction, 4000)
    jacobian = float(TABLE.b[STEP]) * state.jacobian
    elements = len(jacobian) if reduction == "mean" else 1
    excess = float(kl**2 * jacobian.square().sum() / (TABLE.std[STEP] ** 2 * elements**2))
    assert float(draws.var(0).sum()) == pytest.approx(excess, rel=0.05)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_detached_surrogate_teaches_nothing(state: FixedState, reduction: str) -> None:
    draws, closed, _ = state.draws("detached", reduction, 4000)
    within_standard_error(draws, torch.zeros_like(closed))


def test_return_to_go_is_the_whole_gradient() -> None:
    """v = theta x in one dimension: E[sum KL] follows from the second moments, which obey a recursion."""
    theta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    target, steps, count = 0.4, 6, 200_000
    table = solver_table("flow_sde", sd3_sigmas(steps), 0.7)
    a, b, std, w = (column.tolist() for column in (table.a, table.b, table.std, table.weight))

    square = torch.ones((), dtype=torch.float64)  # E[x_j^2] under the law of theta
    expected = torch.zeros((), dtype=torch.float64)
    for j in range(steps - 1):
        expected = expected + w[j] * (theta - target) ** 2 * square
        square = (a[j] + b[j] * theta) ** 2 * square + std[j] ** 2
    (truth,) = torch.autograd.grad(expected, theta)

    t = theta.item()
    x = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(steps, count, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states = []
    for j in range(steps - 1):
        states.append(x)
        x = (a[j] + b[j] * t) * x + std[j] * noise[j]
    kl = torch.stack([w[j] * ((t - target) * s.squeeze(1)) ** 2 for j, s in enumerate(states)])
    ones = torch.ones(count, dtype=torch.float64)

    def estimate(kind: Any) -> tuple[float, float]:
        """Mean and its standard error."""
        surrogate = Surrogate(kind)
        later, total = surrogate.returns(kl), torch.zeros(count, dtype=torch.float64)
        for j, s in enumerate(states):
            closed = 2 * w[j] * (t - target) * s
            gradient, _ = surrogate.gradients(
                closed, None, kl=kl[j], later=later[j], noise=noise[j], score=ones * (b[j] / std[j]), guidance=ones
            )
            total += (gradient * s).squeeze(1)  # dv/dtheta = x
        return float(total.mean()), float(total.std()) / count**0.5

    mean, error = estimate("return_to_go")
    assert abs(mean - float(truth)) < 4.5 * error
    assert error < 0.02 * abs(float(truth))
    mean, error = estimate("live")
    assert abs(mean - float(truth)) > 10 * error  # the part that distillation leaves out


# --- one pass against the losses written out --------------------------------------------------------------------------


class World:
    """A student, a teacher and an anchor on one random model, three samples of two tasks, noise given."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = random_model(NANO)
        targets = self.base.targets("attention")
        self.folders = [
            write_random_lora(self.base.transformer, folder / name, rank=2, alpha=4.0, targets=targets, std=0.5)
            for name in ("first", "second", "anchor")
        ]
        shape = self.base.latent_shape(NANO.resolution)
        self.table = solver_table("flow_sde", self.base.sigmas(5, NANO.resolution), 0.7, variance="published")
        self.batch = RoundBatch(
            text=random_text(3, NANO),
            negative=random_text(1, NANO),
            tasks=((0, slice(0, 2)), (1, slice(2, 3))),
            keys=torch.arange(3),
            scale=torch.tensor([0.5, 0.25, 1.5]),
            shape=shape,
            x=torch.randn(3, *shape),
            noise=torch.randn(5, 3, *shape),
        )

    def team(self, guidance: float, teachers: float, anchor: str | None) -> tuple[SD3, Student, TeacherBank, Any]:
        model = copy.copy(self.base)
        model.transformer = copy.deepcopy(self.base.transformer)

        def bank(names: list[int], guidance: float) -> TeacherBank:
            configs = [
                TeacherConfig(name=f"t{i}", weights=str(self.folders[i]), prompts="", guidance=guidance) for i in names
            ]
            return load_teachers(model, configs)

        taught = bank([0, 1], teachers)
        held = None
        if anchor is not None:
            held = base_teacher(model, guidance) if anchor == "base" else bank([2], guidance)
        student = Student.build(model, StudentConfig(rank=4, alpha=8.0, guidance=guidance))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return model, student, taught, held


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("policy_gradient"))


def written_round(
    world: World,
    team: tuple[SD3, Student, TeacherBank, Any],
    table: SolverTable,
    weight: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    anchor_weight: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """All steps kept alive, one loss, one backward. `loss` maps the (steps, B) KLs, log-probabilities and the KLs that
    follow each step to (steps, B)."""
    model, student, teachers, anchor = team
    batch = world.batch
    assert batch.x is not None
    assert batch.noise is not None
    condition = Conditioning.build(model, batch.text, batch.negative, student.guidance)
    teacher_condition = teachers.condition(batch)
    whole = dataclasses.replace(batch, tasks=((0, slice(0, len(batch))),))
    anchored = None if anchor is None else anchor.condition(whole)

    def mix(v: Velocities, guidance: Tensor) -> Tensor:
        if v.uncond is None:
            return v.cond
        g = guidance.view(-1, 1, 1, 1)
        return torch.where(g == 1, v.cond, v.uncond.nan_to_num() + g * (v.cond - v.uncond.nan_to_num()))

    def over(t: Tensor) -> Tensor:
        return t.flatten(1).mean(1) if reduction == "mean" else t.flatten(1).sum(1)

    x, gaps, logps, held = batch.x, [], [], []
    guidance = torch.full_like(batch.scale, student.guidance)
    for j in range(table.steps - 1):
        sigma = table.sigmas[j].float()
        v = mix(student.velocities(model, x, sigma, condition), guidance)
        gaps.append(
            weight[j].float()
            * over((v - mix(teachers.velocities(x, sigma, teacher_condition), teacher_condition.guidance)) ** 2)
        )
        if anchored is not None:
            a = mix(anchor.velocities(x, sigma, anchored), anchored.guidance)
            held.append(weight[j].float() * over((v - a) ** 2))
        mean = float(table.a[j]) * x + float(table.b[j]) * v
        following = (mean + float(table.std[j]) * batch.noise[j]).detach()
        if table.stochastic:
            logps.append(log_probability(following, mean, float(table.std[j]), reduction))
        x = following
    kl = torch.stack(gaps)
    logp = torch.stack(logps) if logps else torch.zeros_like(kl)
    later = (kl.flip(0).cumsum(0).flip(0) - kl).detach()
    pull = anchor_weight * torch.stack(held) if held else torch.zeros_like(kl)
    (batch.scale * (loss(kl, logp, later) + pull)).sum().backward()
    return (batch.scale * (kl + pull)).detach(), gradients(dict(student.named_parameters()))


def engine_round(
    world: World, team: tuple[SD3, Student, TeacherBank, Any], table: SolverTable, weight: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model, student, teachers, _ = team
    out = one_pass(model, student, teachers, world.batch, table, weight, **options)
    return out.losses, gradients(dict(student.named_parameters()))


def assert_equal(found: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], truth[0], rtol=1e-4, atol=0.0)
    assert float(truth[0].min()) > 0
    assert relative_error(found[1], truth[1]) <= 1e-5


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_is_autograd_of_the_surrogate(
    world: World, kind: Any, reduction: Any, micro_batch: int | None
) -> None:
    team = world.team(4.5, 1.0, None)
    table = world.table
    surrogate = Surrogate(kind)
    found = engine_round(
        world, team, table, table.weight, reduction=reduction, surrogate=surrogate, micro_batch=micro_batch
    )
    truth = written_round(
        world,
        team,
        table,
        table.weight,
        lambda kl, logp, later: written_loss(kind, kl, logp, later, 1.0, None),
        reduction=reduction,
    )
    assert_equal(found, truth)


@pytest.mark.parametrize("log_prob", ["exact", "published"])
def test_the_score_under_cps_is_that_of_the_named_log_probability(world: World, log_prob: Any) -> None:
    """The released code's, -mean((x - mu)^2), has 2 std^2 times the exact one's gradient."""
    team, table = world.team(4.5, 1.0, None), solver_table("cps", world.table.sigmas, 0.8)
    found = engine_round(world, team, table, table.weight, surrogate=Surrogate("live", log_prob=log_prob))
    factor = 2 * table.std[:-1, None].float().square() if log_prob == "published" else torch.ones(4, 1)
    truth = written_round(
        world,
        team,
        table,
        table.weight,
        lambda kl, logp, later: written_loss("live", kl, factor * logp, later, 1.0, None),
    )
    assert_equal(found, truth)
    other = engine_round(world, team, table, table.weight, surrogate=Surrogate("live"))
    assert (relative_error(found[1], other[1]) > 0.01) == (log_prob == "published")


def test_a_run_takes_the_log_probability_that_its_settings_name(small_world: Path) -> None:
    changes = {"objective__kind": "ppo", "objective__log_prob": "published", "sampler__solver": "cps"}
    method = OPD(prepare(settings(small_world, evaluation__every=0, **changes), log=lambda text: None))
    assert method.surrogate == Surrogate(log_prob="published")


@pytest.mark.parametrize("anchor", ["weights", "base"])
def test_flow_opd_at_ratio_1_is_its_formula(world: World, anchor: str) -> None:
    """A = -kl_scale KL clamped at 5, KL over g^2, ratio clipped at 1e-4, 0.04 KL to the anchor; guided throughout."""
    team = world.team(4.5, 4.5, anchor)
    table, kl_scale = world.table, 40.0
    options = {"surrogate": Surrogate("live", kl_scale, 5.0), "anchor": (team[3], 0.04)}
    found = engine_round(world, team, table, table.weight, **options)
    clamped: list[int] = []

    def loss(kl: Tensor, logp: Tensor, later: Tensor) -> Tensor:
        clamped.append(int((kl_scale * kl > 5).sum()))
        return written_loss("live", kl, logp, later, kl_scale, 5.0)

    truth = written_round(world, team, table, table.weight, loss, anchor_weight=0.04)
    assert 0 < clamped[0] < truth[0].numel()
    assert_equal(found, truth)


@pytest.mark.parametrize("objective", ["kl", "velocity"])
def test_anchor_beside_the_closed_forms(world: World, objective: Any) -> None:
    team, table = world.team(1.0, 4.5, "weights"), solver_table("ode", world.table.sigmas, 0.0)
    weight = step_weights(table, objective)
    found = engine_round(world, team, table, weight, anchor=(team[3], 0.3))
    assert_equal(found, written_round(world, team, table, weight, lambda kl, *_: kl, anchor_weight=0.3))


def test_a_student_without_guidance_absorbs_the_teacher_s(world: World) -> None:
    """DanceOPD's absorption: mean((v_S - (u + g (c - u)))^2) with an unguided student is what the guidances say."""
    team, table = world.team(1.0, 3.5, None), solver_table("ode", world.table.sigmas, 0.0)
    weight = step_weights(table, "velocity")
    found = engine_round(world, team, table, weight)
    assert_equal(found, written_round(world, team, table, weight, lambda kl, *_: kl))
    plain = engine_round(world, world.team(1.0, 1.0, None), table, weight)
    assert relative_error(found[1], plain[1]) > 0.1  # the guidance is no small part of it


def test_no_log_probability_without_noise(world: World) -> None:
    table = solver_table("cps", world.table.sigmas, 0.7)
    with pytest.raises(ValueError, match="std = 0 at step 4"):
        engine_round(world, world.team(1.0, 1.0, None), table, table.weight, surrogate=Surrogate(), train_last=True)


# --- queried steps ----------------------------------------------------------------------------------------------------

LAWS = [query_law(9, "uniform", 5.0, 2.0), query_law(9, "beta", 5.0, 2.0), query_law(9, "beta", 0.5, 0.5)]


def test_laws() -> None:
    for law in LAWS:
        assert float(law.sum()) == pytest.approx(1, abs=1e-12)
        assert bool((law > 0).all())
    z = torch.distributions.Beta(5.0, 2.0).sample((200_000,))
    share = torch.bincount((9 * z).long().clamp(max=8), minlength=9) / len(z)
    torch.testing.assert_close(share.double(), LAWS[1], rtol=0, atol=0.006)


@pytest.mark.parametrize("queries", [1, 2, 5, 9])
@pytest.mark.parametrize("law", LAWS)
def test_drawn_factors_average_to_all_steps(law: Tensor, queries: int) -> None:
    """The average over u is an integral of a step function: a fine grid gives it to the width of its cells."""
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    unbiased = torch.stack([step_queries(law, queries, float(u), "unbiased") for u in grid])
    error = 2 / (len(grid) * queries * law)  # one cell at either end of a step's share
    assert bool(((unbiased.mean(0) - 1).abs() <= error).all())
    by_law = torch.stack([step_queries(law, queries, float(u), "law") for u in grid[::10]])
    assert by_law.sum(1).tolist() == pytest.approx([9.0] * 2000)
    torch.testing.assert_close(by_law.mean(0), 9 * law, rtol=0, atol=9 * 20 / len(grid))


def test_all_steps_under_a_uniform_law_are_all_steps() -> None:
    for u in (0.01, 0.5, 0.99):
        assert step_queries(LAWS[0], 9, u, "unbiased").tolist() == pytest.approx([1.0] * 9)


def test_queried_rounds_average_to_the_whole_round(world: World) -> None:
    """One query: the gradients of the four possible rounds, by their probabilities, sum to that of all steps."""
    table = solver_table("ode", world.table.sigmas, 0.0)
    weight, law = step_weights(table, "velocity"), query_law(4, "beta", 2.0, 1.5)
    team = world.team(4.5, 1.0, None)
    whole_losses, whole = engine_round(world, team, table, weight)
    asked = _count_calls(team[2])
    losses, total = torch.zeros_like(whole_losses), {name: torch.zeros_like(g) for name, g in whole.items()}
    for j, u in enumerate((law.cumsum(0) - law / 2).tolist()):
        factors = step_queries(law, 1, u, "unbiased")
        assert factors.nonzero().flatten().tolist() == [j]
        part_losses, part = engine_round(world, team, table, weight * torch.cat([factors, torch.zeros(1)]))
        assert part_losses.nonzero()[:, 0].unique().tolist() == [j]
        losses += law[j].float() * part_losses
        total = {name: g + law[j].float() * part[name] for name, g in total.items()}
    assert next(asked) == 4  # a teacher is asked at the queried steps alone
    torch.testing.assert_close(losses, whole_losses, rtol=1e-4, atol=0.0)
    assert relative_error(total, whole) <= 1e-5


def _count_calls(bank: Any) -> itertools.count[int]:
    """Counts the calls of the bank's velocities: the next value is their number."""
    calls, original = itertools.count(), bank.velocities

    def counted(*arguments: Any) -> Velocities:
        next(calls)
        found: Velocities = original(*arguments)
        return found

    bank.velocities = counted
    return calls
