"""The gradients of distillation's and reinforcement's objectives on the bundled model, at fixed states.

What the formulas say, with the transformer's own Jacobian, against what the engine accumulates. Prompts keep their
first tokens alone: any text will do, and a short one costs a fifth.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from opd_fast.config.command_line import parse
from opd_fast.data.prompt_files import Prompt
from opd_fast.models.guidance import Conditioning, Velocities
from opd_fast.models.text import TextEmbeds
from opd_fast.objectives import Surrogate, step_queries
from opd_fast.seeds import Stream
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.methods import grpo, opd
from opd_fast.training.methods.grpo import GRPO, ratio_change
from opd_fast.training.methods.nft import NFT
from opd_fast.training.methods.opd import OPD
from opd_fast.training.rollout import losses_at
from opd_fast.training.setup import Setup, prepare
from opd_kernels import log_prob_reference, philox_normal
from tests.runs import change

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

STEPS, TOKENS, GUIDANCE = 10, 12, 3.0
STEP = 5
COMMON = (
    *("bundled", "--student.rank", "4", "--student.alpha", "8", "--evaluation.every", "0"),
    *("--sampler.solver", "flow_sde", "--model.text_cache", "off", "--train.rounds", "12"),
    *("--engine.cache_modulation", "false", "--objective.kind", "kl"),
)
SCALER = torch.amp.GradScaler("cpu", enabled=False)


def bright(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return images.mean((1, 2, 3))


def loud(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """A thousand times the other, and the same for every image of the first prompt."""
    return 1000 * bright(images, prompts) * torch.tensor([float(p != prompts[0]) for p in prompts])


def ready(*argv: str) -> Setup:
    """A run of the bundled recipe before its first round, its student no longer the base."""
    setup = prepare(parse([*COMMON, *argv]).config, lambda text: None)
    cut = {name: t if name == "pooled" else t[:, :TOKENS] for name, t in setup.text._embeds.tensors.items()}
    setup.text._embeds = TextEmbeds(**cut)
    move(setup, 0.05)
    return setup


def move(setup: Setup, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in setup.student.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def varied(setup: Setup, **changes: Any) -> Setup:
    """The same parts under other settings."""
    config = change(copy.deepcopy(setup.config), changes)
    setup.student.guidance = config.student.guidance
    table = solver_table(config.sampler.solver, setup.table.sigmas, config.sampler.eta)
    return dataclasses.replace(setup, config=config, table=table)


def gradient(setup: Setup) -> Tensor:
    """(P,) of all the student's parameters, float64; they are left without any."""
    found = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in setup.student.parameters()]
    for parameter in setup.student.parameters():
        parameter.grad = None
    return torch.cat(found)


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# --- policy gradients of distillation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught() -> Setup:
    teacher = "{name: colour, weights: bundled/colour, prompts: bundled/colour}"
    return ready("--teachers", f"[{teacher}]", "--train.samples_per_task", "2", "--sampler.steps", str(STEPS))


class State:
    """The student's state at STEP of one rollout, on the way to which all samples' noise is the same."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.model, self.student, self.teachers = setup, setup.model, setup.student, setup.teachers
        self.table = setup.table
        self.first = OPD(setup).batch(0)
        batch = self.batch(1)
        _, states = losses_at(self.model, self.student, self.teachers, batch, self.table, self.table.weight)
        self.x = states[STEP]
        sigma = self.table.sigmas[STEP].float()
        self.parameters = self.student.parameters()
        with self.student.merged_for_round():
            v = self.student_velocity(self.x, STEP)
            rows = [
                torch.autograd.grad(e, self.parameters, retain_graph=True, materialize_grads=True) for e in v.flatten()
            ]
        self.jacobian = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).double()  # (D, P)
        self.v = v.detach()
        self.target = self.teachers.velocities(self.x, sigma, self.teachers.condition(batch)).cond.detach()
        # An isometry from gradients, which lie in the Jacobian's rows, to D coordinates.
        squares, axes = torch.linalg.eigh(self.jacobian @ self.jacobian.T)
        self.coordinates = axes * squares.clamp(min=0).sqrt()  # (D, D)

    def batch(self, count: int, noise: Tensor | None = None) -> RoundBatch:
        """`count` samples of the first prompt that differ, if at all, by their noise at STEP."""
        shape = self.setup.shape
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(1, *shape, generator=generator).expand(count, *shape).contiguous()
        way = torch.randn(STEPS, 1, *shape, generator=generator).expand(STEPS, count, *shape).clone()
        if noise is not None:
            way[STEP] = noise
        return dataclasses.replace(
            self.first,
            text=self.first.text.index([0] * count),
            tasks=((0, slice(0, count)),),
            keys=torch.arange(count),
            scale=torch.ones(count),
            x=x,
            noise=way,
        )

    def student_velocity(self, x: Tensor, step: int) -> Tensor:
        condition = Conditioning.build(self.model, self.first.text.index([0] * len(x)), None, 1.0)
        return self.student.velocities(self.model, x, self.table.sigmas[step].float(), condition).cond

    def method(self, kind: str, reduction: str, batch: RoundBatch, steps: Sequence[int] = (STEP,)) -> OPD:
        """The method whose rounds are `batch`, its loss that of some steps alone."""
        settings = {"objective__kind": "ppo", "objective__reward_gradient": kind, "objective__reduction": reduction}
        method = OPD(varied(self.setup, **settings))
        method.samples = len(batch)
        method.batch = lambda index: batch  # type: ignore[method-assign]
        method.weight = torch.zeros_like(self.table.weight)
        method.weight[list(steps)] = self.table.weight[list(steps)]
        return method

    def draws(self, kind: str, reduction: str, count: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        """(count, D) gradients at the velocity, one for each draw of the engine's own noise at this state.

        The velocities there are given instead of computed, which makes the draws cheap: the engine runs as ever.
        """
        leaf = self.v.expand(count, *self.v.shape[1:]).clone().requires_grad_()
        monkeypatch.setattr(self.student, "velocities", lambda *a: Velocities(leaf.clone(), None))
        monkeypatch.setattr(self.teachers, "velocities", lambda *a: Velocities(self.target.expand_as(leaf), None))
        batch = dataclasses.replace(self.batch(count), noise=None)
        self.method(kind, reduction, batch).accumulate(0, SCALER)
        monkeypatch.undo()
        assert leaf.grad is not None
        return leaf.grad.flatten(1).double()

    def kl(self, reduction: str) -> tuple[float, Tensor]:
        """The step's KL and its gradient (D,) at the velocity: the closed form's."""
        gap, w = (self.v - self.target).flatten().double(), float(self.table.weight[STEP])
        elements = len(gap) if reduction == "mean" else 1
        return w * float(gap.square().sum()) / elements, 2 * w * gap / elements


@pytest.fixture(scope="module")
def state(taught: Setup) -> State:
    return State(taught)


def within_standard_error(draws: Tensor, mean: Tensor) -> None:
    """Every coordinate within 5 standard errors, and their squares average 1. The coordinates are the Jacobian's own
    axes, along which white noise stays independent."""
    error = draws.std(0) / len(draws) ** 0.5
    keep = error > 1e-4 * error.max()  # of a Jacobian in float32
    z = ((draws.mean(0) - mean) / error)[keep]
    assert len(z) > 30
    assert float(z.abs().max()) < 5
    assert abs(float(z.square().mean()) - 1) < 5 * (2 / len(z)) ** 0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_live_mean_and_excess_variance(state: State, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form's mean; beyond it tr Cov = KL^2 |dmu/dtheta|^2 / (std D)^2, without D under sum."""
    found = state.draws("live", reduction, 4000, monkeypatch) @ state.coordinates
    kl, closed = state.kl(reduction)
    assert float(closed.norm()) > 0
    within_standard_error(found, closed @ state.coordinates)
    b, std, d = float(state.table.b[STEP]), float(state.table.std[STEP]), len(closed) if reduction == "mean" else 1
    excess = kl**2 * b**2 * float(state.jacobian.square().sum()) / (std * d) ** 2
    assert float(found.var(0).sum()) == pytest.approx(excess, rel=0.05)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_detached_mean_is_zero(state: State, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = state.draws("detached", reduction, 4000, monkeypatch) @ state.coordinates
    assert float(found.var(0).sum()) > 0
    within_standard_error(found, torch.zeros(found.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["live", "detached", "return_to_go"])
def test_accumulated_gradients_are_the_jacobian_s(state: State, kind: Any) -> None:
    """Two draws through transformer, kernel and backward: J^T (path + advantage b eps / (std D))."""
    noise = torch.randn(2, *state.setup.shape, generator=torch.Generator().manual_seed(3))
    batch = state.batch(2, noise)
    steps = (STEP, STEP + 1) if kind == "return_to_go" else (STEP,)
    losses = state.method(kind, "mean", batch, steps).accumulate(0, SCALER).double()
    found = gradient(state.setup)
    kl, closed = state.kl("mean")
    torch.testing.assert_close(losses[STEP], torch.full((2,), kl, dtype=torch.float64), rtol=1e-4, atol=0)
    eps = noise.flatten(1).double()
    advantage = {"live": losses[STEP], "detached": losses[STEP], "return_to_go": losses[STEP + 1]}[kind]
    assert float(advantage.min()) > 0
    score = advantage[:, None] * eps * float(state.table.b[STEP] / state.table.std[STEP]) / eps.shape[1]
    slopes = score + (0 if kind == "detached" else closed)
    wanted = slopes.sum(0) @ state.jacobian
    if kind == "return_to_go":  # the later step's own path, without anything after it
        x = next_states(state, noise)
        with state.student.merged_for_round():
            later_kl(state, x).mean(1).sum().backward()
        wanted = wanted + gradient(state.setup)
    assert apart(found, wanted) < 1e-4


def next_states(state: State, noise: Tensor) -> Tensor:
    a, b, std = (float(column[STEP]) for column in (state.table.a, state.table.b, state.table.std))
    return a * state.x + b * state.v + std * noise


def later_kl(state: State, x: Tensor) -> Tensor:
    """(B, D) the terms of the next step's KL at some states, differentiable in the states and the weights."""
    sigma = state.table.sigmas[STEP + 1].float()
    text = state.first.text.index([0] * len(x))
    with state.teachers.active(0) as transformer:
        target = state.model.velocity(transformer, x, sigma, text)
    return float(state.table.weight[STEP + 1]) * (state.student_velocity(x, STEP + 1) - target).flatten(1).square()


def test_return_to_go_has_the_gradient_of_what_follows(state: State) -> None:
    """E[KL' eps / std] b = E[dKL'/dx] b, which reaches the weights by the same Jacobian: the score term of the next
    step's KL is unbiased. Pairs of opposite noise, and projections on the gradient itself and on random directions."""
    pairs = 128
    noise = torch.randn(pairs, *state.setup.shape, generator=torch.Generator().manual_seed(4))
    noise = torch.cat([noise, -noise])
    x = next_states(state, noise).requires_grad_()
    kl = later_kl(state, x).sum(1)
    (slopes,) = torch.autograd.grad(kl.sum(), x)
    surrogate, ones = Surrogate("return_to_go"), torch.ones(2 * pairs)
    later = surrogate.returns(torch.stack([ones, kl.detach()]))[0]
    b, std = float(state.table.b[STEP]), float(state.table.std[STEP])
    found, _ = surrogate.gradients(
        torch.zeros_like(noise), None, kl=ones, later=later, noise=noise, score=ones * (b / std), guidance=ones
    )

    def paired(t: Tensor) -> Tensor:
        return t.flatten(1).double().view(2, pairs, -1).mean(0) @ state.coordinates

    score, truth = paired(found), paired(b * slopes)
    directions = torch.randn(score.shape[1], 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    directions[:, 0] = truth.mean(0)

    def deviation(t: Tensor) -> Tensor:
        along = t @ directions
        return along.mean(0) / (along.std(0) / pairs**0.5)

    assert float(deviation(score)[0]) > 5  # there is something to be had
    assert float(deviation(score - truth).abs().max()) < 4.5


# --- queried steps ----------------------------------------------------------------------------------------------------


def queried(setup: Setup, law: str, queries: int | None) -> OPD:
    settings: dict[str, Any] = {"objective__kind": "kl", "objective__reward_gradient": "live"}
    settings |= {"objective__reduction": "mean", "objective__queries": queries}
    if queries is not None:
        settings["objective__query_law"] = law
    return OPD(varied(setup, **settings))


@pytest.mark.parametrize(("law", "queries"), [("uniform", 1), ("uniform", 4), ("beta", 3)])
def test_queried_rounds_average_to_all_steps(
    taught: Setup, law: str, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every round that can be drawn, by its probability: the gradients sum to that of all steps."""
    whole_losses = (whole := queried(taught, law, None)).accumulate(0, SCALER)
    wanted = gradient(taught)
    method = queried(taught, law, queries)
    edges = (queries * method.law.cumsum(0)[:-1]).remainder(1).tolist()
    edges = sorted({0.0, 1.0, *(round(edge, 12) for edge in edges)})
    losses, total = torch.zeros_like(whole_losses), torch.zeros_like(wanted)
    for low, high in itertools.pairwise(edges):
        if high - low < 1e-9:
            continue
        middle = int((low + high) / 2 * 2**53) << 11
        key = middle - 2**64 if middle >= 2**63 else middle
        draw = opd.noise_keys
        monkeypatch.setattr(
            opd,
            "noise_keys",
            lambda *path, samples, key=key, draw=draw: (
                torch.tensor([key]) if path[1] == Stream.QUERY else draw(*path, samples=samples)
            ),
        )
        drawn = step_queries(method.law, queries, (low + high) / 2, "unbiased")
        torch.testing.assert_close(method.weights(0)[:-1], whole.weight[:-1] * drawn)
        losses += (high - low) * method.accumulate(0, SCALER)
        total += (high - low) * gradient(taught)
        monkeypatch.undo()
    torch.testing.assert_close(losses, whole_losses, rtol=1e-4, atol=1e-7)
    assert apart(total, wanted) < 1e-5


@pytest.mark.parametrize(("law", "queries"), [("uniform", 2), ("beta", 3)])
def test_rounds_draw_their_queries_evenly(taught: Setup, law: str, queries: int) -> None:
    """Over many rounds' numbers each step's factor averages 1, within 5 standard errors."""
    method = queried(taught, law, queries)
    factors = torch.stack([method.weights(index)[:-1] / method.weight[:-1] for index in range(2000)])
    often = method.law * queries > 0.01  # a step that is drawn once in a thousand rounds needs more of them
    assert int(often.sum()) >= 6
    error = factors.std(0) / len(factors) ** 0.5
    assert bool(((factors.mean(0) - 1).abs() <= 5 * error + 1e-12)[often].all())


# --- GRPO -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rewarded() -> Setup:
    here = __name__
    tasks = ", ".join(
        f"{{name: {task}, weights: base, prompts: bundled/{task}, reward: '{here}:{reward}'}}"
        for task, reward in (("colour", "bright"), ("text", "loud"))
    )
    sizes = (
        "--train.samples_per_task",
        "4",
        "--rl.images_per_prompt",
        "2",
        "--rl.updates",
        "1",
        "--train.rounds",
        "12",
    )
    return ready(
        *("--teachers", f"[{tasks}]", "--train.method", "grpo", "--rl.kl", "0", "--sampler.steps", "6", *sizes),
        *("--student.guidance", str(GUIDANCE)),
    )


CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "guard": {"rl__guard": True},
    "cps": {"sampler__solver": "cps"},
    "fast": {"sampler__solver": "cps", "rl__window": 2, "rl__window_range": 4, "rl__clip": 1e-5},
    "guard-window": {"rl__guard": True, "rl__window": 2, "rl__window_range": 4},
}


def ratios(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Tensor, Tensor]]:
    """(step, log-ratio, drift) of every call that learning makes from now on."""
    seen: list[tuple[int, Tensor, Tensor]] = []
    original = grpo.log_prob

    def recorded(*arguments: Any, **options: Any) -> Any:
        out = original(*arguments, **options)
        assert out.log_ratio is not None
        assert out.drift is not None
        seen.append((arguments[6], out.log_ratio.detach(), out.drift.detach()))
        return out

    monkeypatch.setattr(grpo, "log_prob", recorded)
    return seen


def epochs(method: GRPO) -> list[int]:
    """A rollout for each place that a window can have."""
    places = {method.trained_steps(epoch).start: epoch for epoch in reversed(range(12))}
    assert sorted(places) == ([0] if method.rl.window is None else [0, 1, 2])
    return sorted(places.values())


@pytest.mark.parametrize("case", CASES)
def test_ratio_is_1_before_the_first_update(rewarded: Setup, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = GRPO(varied(rewarded, **CASES[case]))
    seen = ratios(monkeypatch)
    table = method.setup.table
    for epoch in epochs(method):
        method._drawn = drawn = method._draw(epoch)
        steps, rows = method.trained_steps(epoch), torch.arange(method.images)
        assert steps == range(5) if method.rl.window is None else len(steps) == 2  # never the last, the sixth
        assert drawn["x"].shape[1] == len(steps)
        shares = torch.full((len(rows),), 1 / len(rows))
        losses, counts = method.learn(epoch, rows, shares, SCALER)
        size = gradient(method.setup)
        assert bool(size.isfinite().all())
        assert float(size.norm()) > 0
        assert [step for step, _, _ in seen] == list(steps)
        for step, log_ratio, drift in seen:
            change = ratio_change(log_ratio, drift, float(table.std[step]), guard=method.rl.guard)
            assert torch.equal(change.exp(), torch.ones(method.images))
        assert float(counts["clipped"]) == 0
        lengths = torch.stack([table.sigmas[j] - table.sigmas[j + 1] for j in steps]).float()
        wanted = -drawn["advantage"].expand(len(steps), -1) / (len(rows) * len(steps))
        wanted = wanted / lengths[:, None] if method.rl.guard else wanted
        torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
        seen.clear()


def test_nothing_is_clipped_in_a_shuffled_first_round(rewarded: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rows beside an image in its forward, in smaller parts: the ratio stays 1 to float32's last digits."""
    method = GRPO(varied(rewarded, rl__guard=True, train__micro_batch=3))
    seen = ratios(monkeypatch)
    losses = method.accumulate(0, SCALER)
    gradient(method.setup)
    assert method.metrics(0, losses)["clipped"] == 0
    for step, log_ratio, drift in seen:
        assert float(ratio_change(log_ratio, drift, float(method.setup.table.std[step]), guard=True).abs().max()) < 2e-7


def test_guard_is_the_mean_of_noise_times_change(rewarded: Setup) -> None:
    """Of the drawn steps, after the weights have moved, in float64; the noise is the one that the kernel drew."""
    method = GRPO(varied(rewarded, rl__guard=True))
    setup, table = method.setup, method.setup.table
    drawn, rows = method._draw(0), torch.arange(method.images)
    before = [p.detach().clone() for p in setup.student.parameters()]
    move(setup, 0.05)
    columns = torch.stack((table.a, table.b, table.h, table.std, table.weight, table.sigmas[:-1]), 1)
    guidance = torch.full((len(rows),), GUIDANCE, dtype=torch.float64)
    with torch.no_grad(), setup.student.merged_for_round():
        for i, j in enumerate(method.trained_steps(0)):
            x, sample, old = (drawn[name][:, i] for name in ("x", "sample", "mean"))
            v = setup.student.velocities(setup.model, x, table.sigmas[j].float(), method.condition(0, rows))
            assert v.uncond is not None
            x, sample, old, cond, uncond = (t.double() for t in (x, sample, old, v.cond, v.uncond))
            out = log_prob_reference(x, sample, cond, uncond, guidance, columns, j, mean_old=old)
            assert out.log_ratio is not None
            assert out.drift is not None
            std = float(table.std[j])
            found = ratio_change(out.log_ratio, out.drift, std, guard=True)
            mean = float(table.a[j]) * x + float(table.b[j]) * (uncond + GUIDANCE * (cond - uncond))
            noise = (sample - old) / std
            wanted = (noise * (mean - old)).flatten(1).mean(1)
            assert float(wanted.abs().max()) > 1e-4
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(noise.float(), philox_normal(method.keys(0), setup.shape, j), rtol=0, atol=1e-4)
    for parameter, value in zip(setup.student.parameters(), before, strict=True):
        parameter.data.copy_(value)


def test_steps_outside_the_window_are_euler_s(rewarded: Setup) -> None:
    method = GRPO(varied(rewarded, **CASES["fast"]))
    setup, table = method.setup, method.setup.table
    epoch = epochs(method)[0]
    latents, kept = method.roll_out(epoch)
    window, rows, keys = method.trained_steps(epoch), torch.arange(method.images), method.keys(epoch)
    x = philox_normal(keys, setup.shape, grpo.INITIAL_NOISE)
    drawn = 0
    with torch.no_grad(), setup.student.merged_for_round():
        for j in range(table.steps):
            v = setup.student.velocities(setup.model, x, table.sigmas[j].float(), method.condition(epoch, rows))
            assert v.uncond is not None
            velocity = v.uncond + GUIDANCE * (v.cond - v.uncond)
            if j in window:
                torch.testing.assert_close(kept["x"][:, drawn], x, rtol=1e-4, atol=1e-4)
                mean = float(table.a[j]) * x + float(table.b[j]) * velocity
                x, drawn = mean + float(table.std[j]) * philox_normal(keys, setup.shape, j), drawn + 1
            else:
                x = x + float(table.sigmas[j + 1] - table.sigmas[j]) * velocity
    assert drawn == 2
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)


def test_advantages_of_drawn_images(rewarded: Setup) -> None:
    """By group and by the task's own deviation; a group of equals is dropped from the round; clipped where asked."""
    method = GRPO(varied(rewarded))
    drawn = method._draw(0)
    for task in (0, 1):
        rewards = drawn["reward"][drawn["task"] == task].double().view(2, 2)
        wanted = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
        found = drawn["advantage"][drawn["task"] == task]
        torch.testing.assert_close(found.double(), wanted.flatten().clamp(-5, 5), rtol=1e-5, atol=1e-9)
    assert (drawn["advantage"] == 0).tolist() == [False] * 4 + [True, True, False, False]
    assert float(drawn["reward"][drawn["task"] == 1].std()) > 100 * float(drawn["reward"][drawn["task"] == 0].std())
    losses = method.accumulate(0, SCALER)
    whole = gradient(method.setup)
    assert method.metrics(0, losses)["images"] == 6
    assert losses[:, 4:6].abs().sum() == 0
    assert bool((losses[:, [0, 1, 2, 3, 6, 7]] != 0).all())
    method._drawn = drawn
    kept = torch.tensor([0, 1, 2, 3, 6, 7])
    method.learn(0, kept, torch.full((6,), 1 / 6), SCALER)
    assert apart(gradient(method.setup), whole) < 1e-5
    clip = float(drawn["advantage"].abs().median())
    clipped = GRPO(varied(rewarded, rl__advantage_clip=clip))._draw(0)["advantage"]
    torch.testing.assert_close(clipped, drawn["advantage"].clamp(-clip, clip))
    assert not torch.equal(clipped, drawn["advantage"])


# --- DiffusionNFT -----------------------------------------------------------------------------------------------------


def forward_process(rewarded: Setup, beta: float, kl: float) -> NFT:
    changes: dict[str, Any] = {"train__method": "nft", "sampler__solver": "dpm2", "student__guidance": 1.0}
    method = NFT(varied(rewarded, rl__beta=beta, rl__kl=kl, **changes))
    method._drawn = method._draw(0)
    return method


def learnt(method: NFT) -> Tensor:
    rows = torch.arange(method.images)
    method.learn(0, rows, torch.full((len(rows),), 1 / len(rows)), SCALER)
    return gradient(method.setup)


def points(method: NFT) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, TextEmbeds]]:
    """(sigma, x0, x, r, rows, text) at each noise level that images are trained at."""
    table, drawn, found = method.setup.table, method._drawn, []
    keys, levels = method.keys(0, Stream.NFT_NOISE), method.noise_levels(0)
    assert levels.sum(1).tolist() == [5] * method.images
    for j in range(table.steps):
        rows, t = levels[:, j].nonzero().flatten(), table.sigmas[j].float()
        x0 = drawn["x0"][rows]
        x = (1 - t) * x0 + t * philox_normal(keys[rows], method.setup.shape, j)
        r = (drawn["advantage"][rows].double() / 10 + 0.5).clamp(0, 1)
        found.append((t, x0, x, r, rows, method.text(0, rows)))
    return found


def test_nft_at_the_old_policy(rewarded: Setup) -> None:
    """-10 sigma (2 r - 1) (x0_hat - x0) / (D w), pulled back through the transformer, whatever beta."""
    method = forward_process(rewarded, 1.0, 0.0)
    setup = method.setup
    found = learnt(method)
    for t, x0, x, r, rows, text in points(method):
        if len(rows):
            v = setup.model.velocity(setup.student.transformer, x, t, text)
            error = (x - t * v.detach() - x0).flatten(1).double()
            width = error.abs().mean(1).clamp(min=1e-5)
            slope = -10 * float(t) * ((2 * r - 1) / width)[:, None] * error / error.shape[1]
            v.backward((slope / (method.images * 5)).view_as(v).float())
    wanted = gradient(setup)
    assert float(wanted.norm()) > 0
    assert apart(found, wanted) < 1e-4
    assert apart(learnt(forward_process(rewarded, 0.1, 0.0)), found) < 1e-4


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_away_from_the_old_policy(rewarded: Setup, beta: float) -> None:
    method = forward_process(rewarded, beta, 0.1)
    setup = method.setup
    at = points(method)
    with torch.no_grad():
        olds = [setup.model.velocity(setup.student.transformer, x, t, text).double() for t, _, x, _, _, text in at]
        with setup.student.base() as base:
            bases = [setup.model.velocity(base, x, t, text).double() for t, _, x, _, _, text in at]
    before = [p.detach().clone() for p in setup.student.parameters()]
    unmoved = learnt(method)
    move(setup, 0.05)
    found = learnt(method)
    total = torch.zeros((), dtype=torch.float64)
    for (t, x0, x, r, _, text), old, frozen in zip(at, olds, bases, strict=True):
        v = setup.model.velocity(setup.student.transformer, x, t, text).double()
        policy = torch.zeros(len(r), dtype=torch.float64)
        for share, implied in ((r, beta * v + (1 - beta) * old), (1 - r, (1 + beta) * old - beta * v)):
            error = (x - float(t) * implied - x0).flatten(1)
            width = error.detach().abs().mean(1).clamp(min=1e-5)
            policy = policy + share * error.square().mean(1) / width
        total = total + (5 * policy / beta + 0.1 * (v - frozen).flatten(1).square().mean(1)).sum()
    (total / (method.images * 5)).backward()
    wanted = gradient(setup)
    for parameter, value in zip(setup.student.parameters(), before, strict=True):
        parameter.data.copy_(value)
    assert apart(found, unmoved) > 0.1
    assert apart(found, wanted) < 1e-4
