"""Solver tables against formulas written down independently, published numbers, and diffusers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from opd_fast.solvers import SOLVERS, STOCHASTIC, sd3_sigmas, solver_table

N = 10
# Flow-SDE at eta 0.7 with ten SD3 steps: a, b, std, b^2/2g^2 (published), b^2/2std^2 (exact), D^2/2 (L2), and each
# number's printed precision.
PRINTED = """
.75500 -.03987 .70000 6.47e-5 1.62e-3 7.95e-4
.71254 -.05824 .74296 1.44e-4 3.07e-3 1.09e-3
.84263 -.06929 .53615 4.65e-4 8.35e-3 1.55e-3
.88409 -.08382 .44590 1.19e-3 1.77e-2 2.27e-3
.90289 -.10345 .39179 2.90e-3 3.49e-2 3.45e-3
.91201 -.13088 .35280 7.23e-3 6.88e-2 5.53e-3
.91546 -.17091 .31907 1.97e-2 .1435 9.42e-3
.91446 -.23260 .28201 6.35e-2 .340 1.75e-2
.90867 -.33505 .22536 .297 1.105 3.62e-2
.99779 -.01112 .00628 1.40e-2 1.568 3.99e-5
"""


def last_digit(text: str) -> float:
    mantissa, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def test_flow_sde_printed_numbers():
    sigmas = sd3_sigmas(N)
    exact = solver_table("flow_sde", sigmas, 0.7)
    published = solver_table("flow_sde", sigmas, 0.7, variance="published")
    ode = solver_table("ode", sigmas, 0.7)
    columns = (exact.a, exact.b, exact.std, published.weight, exact.weight, ode.weight)
    for j, line in enumerate(PRINTED.split("\n")[1:-1]):
        for value, text in zip([float(c[j]) for c in columns], line.split(), strict=True):
            assert abs(value - float(text)) <= 0.5001 * last_digit(text), (j, value, text)


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 1.1, 3.0])
def test_sd3_sigmas_are_those_of_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = sd3_sigmas(steps, shift)
    assert ours.dtype == torch.float64
    assert float(ours[0]) == 1.0
    assert float(ours[-1]) == 0.0
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=1.3e-7)


def prediction_form(solver: str, s: float, n: float, eta: float) -> tuple[float, float, float]:
    """(A, C, std) of mean = A*x0_hat + C*eps_hat, scalar arithmetic, written apart from the tables."""
    if solver in ("ode", "dpm1"):
        return 1 - n, n, 0.0
    if solver == "cps":
        return 1 - n, n * math.cos(eta * math.pi / 2), n * math.sin(eta * math.pi / 2)
    if solver == "ddim":
        if n == 0:
            return 1.0, 0.0, 0.0
        alpha_s, alpha_n = 1 - s, 1 - n
        # DDIM's sigma with alpha-bar = alpha^2/(alpha^2 + sigma^2) in variance-preserving form, scaled back.
        bar_s, bar_n = (a**2 / (a**2 + z**2) for a, z in ((alpha_s, s), (alpha_n, n)))
        std = eta * math.sqrt((1 - bar_n) / (1 - bar_s)) * math.sqrt(1 - bar_s / bar_n) * math.hypot(alpha_n, n)
        return 1 - n, math.sqrt(max(n**2 - std**2, 0.0)), std
    # SDE with the marginals of the flow: dx = (v - g^2/2 * score) d(sigma) + g dW, score = -eps_hat/sigma.
    star = n if (solver == "flow_sde" and s == 1) else s
    g2 = eta**2 * s / (1 - star) if solver == "flow_sde" else eta**2
    return 1 - n, n - g2 * (s - n) / (2 * s), math.sqrt(g2 * (s - n))


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "dpm2"])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("levels", ["sd3", "uneven"])
def test_rows_are_the_prediction_form(solver, eta, levels):
    sigmas = sd3_sigmas(N) if levels == "sd3" else torch.tensor([0.95, 0.9, 0.5, 0.47, 0.1, 0.02], dtype=torch.float64)
    table = solver_table(solver, sigmas, eta)
    assert all(getattr(table, k).dtype == torch.float64 for k in ("a", "b", "h", "g", "std", "weight"))
    torch.manual_seed(0)
    x, v = torch.randn(2, 16, dtype=torch.float64)
    for j, (s, n) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True)):
        big_a, big_c, std = prediction_form(solver, s, n, eta)
        mean = big_a * (x - s * v) + big_c * (x + (1 - s) * v)
        torch.testing.assert_close(table.a[j] * x + table.b[j] * v, mean, rtol=0, atol=1e-12)
        assert float(table.std[j]) == pytest.approx(std, rel=1e-12, abs=1e-14)
        assert float(table.std[j]) == pytest.approx(float(table.g[j]) * math.sqrt(s - n), rel=1e-12, abs=1e-300)
        b = float(table.b[j])
        assert float(table.weight[j]) == pytest.approx(b**2 / (2 * std**2) if std else b**2 / 2, rel=1e-9)
    assert not table.uses_history


@pytest.mark.parametrize("solver", ["cps", "ddim"])
def test_level_preserving_steps_keep_the_marginal(solver):
    """x_n must carry noise n in all: the deterministic share and the fresh share add up in variance."""
    sigmas = sd3_sigmas(N)
    table = solver_table(solver, sigmas, 0.7)
    s, n = sigmas[:-1], sigmas[1:]
    # Noise and signal parts of the mean of x = (1-s)*x0 + s*eps with the true v = eps - x0.
    torch.testing.assert_close(table.a * s + table.b, (n**2 - table.std**2).clamp(min=0).sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(table.a * (1 - s) - table.b, 1 - n, rtol=0, atol=1e-12)
    assert float(table.std[-1]) == 0.0


def test_sigma_one_uses_the_next_level_only_when_exact():
    sigmas = sd3_sigmas(N)
    table = solver_table("flow_sde", sigmas, 0.7)
    assert float(table.std[0]) == pytest.approx(0.7, rel=1e-12)
    assert float(table.a[0]) == pytest.approx(1 - 0.49 / 2, rel=1e-12)
    assert float(table.b[0]) == pytest.approx(-float(sigmas[0] - sigmas[1]), rel=1e-12)
    below = sigmas.clone()
    below[0] = 1 - 1e-6
    assert float(solver_table("flow_sde", below, 0.7).g[0]) == pytest.approx(
        0.7 * math.sqrt((1 - 1e-6) / 1e-6), rel=1e-6
    )


def test_terminal_level_zero():
    sigmas = sd3_sigmas(N)
    x, v = 0.3, -1.2
    s = float(sigmas[-2])
    for solver in ("ode", "dpm1", "dpm2", "cps", "ddim"):
        table = solver_table(solver, sigmas, 0.7)
        assert float(table.a[-1] * x + table.b[-1] * v) == pytest.approx(x - s * v, rel=1e-12), solver
        assert float(table.h[-1]) == 0.0
        assert float(table.weight[-1]) == pytest.approx(s**2 / 2, rel=1e-12)
    assert float(solver_table("flow_sde", sigmas, 0.7).std[-1]) == pytest.approx(0.00628, abs=5e-6)
    assert float(solver_table("dance_sde", sigmas, 0.7).std[-1]) == pytest.approx(0.0661, abs=5e-5)


def test_published_variance_is_g2_for_flow_sde_only():
    sigmas = sd3_sigmas(N)
    for solver in STOCHASTIC:
        exact, published = (solver_table(solver, sigmas, 0.7, variance=k) for k in ("exact", "published"))
        expected = exact.weight * (exact.std / exact.g) ** 2 if solver == "flow_sde" else exact.weight
        torch.testing.assert_close(published.weight, torch.where(exact.std > 0, expected, exact.weight))
    # Below 1e-8 the released code stops dividing further; the exact convention does not.
    faint = [solver_table("dance_sde", sigmas, 1e-5, variance=k) for k in ("published", "exact")]
    torch.testing.assert_close(faint[0].weight, faint[0].b ** 2 / 2e-8, rtol=1e-12, atol=0)
    assert bool((faint[1].weight > faint[0].weight * 10).all())


def run(table, x, velocity):
    """The deterministic trajectory by the table, x0 history included."""
    x0_prev = torch.zeros_like(x)
    for j in range(table.steps):
        v = velocity(x, table.sigmas[j])
        x0 = x - table.sigmas[j] * v
        x = table.a[j] * x + table.b[j] * v + table.h[j] * x0_prev
        x0_prev = x0
    return x


def test_euler_is_diffusers_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(N)
    table = solver_table("ode", scheduler.sigmas, 0.0)
    torch.manual_seed(0)
    start = torch.randn(64)
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + t / 1000, t, x, return_dict=False)[0]
    ours = run(table, start.double(), lambda x, s: torch.sin(3 * x) + s)
    torch.testing.assert_close(ours.float(), x, rtol=0, atol=3e-6)


@pytest.mark.parametrize(("solver", "order"), [("dpm1", 1), ("dpm2", 2)])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_dpm_is_diffusers_dpm(solver, order, steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=order,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        final_sigmas_type="zero",
    )
    # Its own flow levels start below 1; ours start at 1, where the log-SNR is infinite.
    scheduler.set_timesteps(steps)
    table_own = solver_table(solver, scheduler.sigmas, 0.0)
    ours_from_one = sd3_sigmas(steps)
    for sigmas in (table_own.sigmas, ours_from_one):
        scheduler.set_timesteps(steps)
        scheduler.sigmas = sigmas.clone()
        scheduler.timesteps = torch.arange(steps, 0, -1)
        torch.manual_seed(0)
        start = torch.randn(64, dtype=torch.float64)
        x = start
        for j, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.sin(3 * x) + sigmas[j], t, x, return_dict=False)[0]
        ours = run(solver_table(solver, sigmas, 0.0), start, lambda x, s: torch.sin(3 * x) + s)
        assert bool(ours.isfinite().all())
        torch.testing.assert_close(ours, x.double(), rtol=0, atol=2e-6)


def test_dpm2_order_and_history():
    table = solver_table("dpm2", sd3_sigmas(N), 0.7)
    assert table.uses_history
    assert (table.h != 0).tolist() == [False, False] + [True] * 7 + [False]
    k = 1 - table.sigmas[1:] / table.sigmas[:-1]
    assert float(-table.h[8] / k[8]) == pytest.approx(2.31, abs=5e-3)
    # When the prediction of x0 does not change, the order does not matter: x_n = (n/s)*x + (1 - n/s)*x0.
    x, x0 = 0.7, -0.4
    v = (x - x0) / table.sigmas[:-1]
    torch.testing.assert_close(table.a * x + table.b * v + table.h * x0, (1 - k) * x + k * x0, rtol=0, atol=1e-12)


def test_table_of_float32_levels_and_lists():
    as_list = solver_table("flow_sde", sd3_sigmas(4).tolist(), 0.7)
    as_float = solver_table("flow_sde", sd3_sigmas(4).float(), 0.7)
    assert as_list.steps == as_float.steps == 4
    torch.testing.assert_close(as_list.a, as_float.a, rtol=0, atol=1e-6)
    assert as_list.stochastic
    assert not solver_table("ode", sd3_sigmas(4), 0.7).stochastic
    assert solver_table("dpm2", sd3_sigmas(4), 0.7).eta == 0.0


def test_rows_hold_the_columns_in_order():
    table = solver_table("dpm2", sd3_sigmas(5), 0.0)
    rows = table.rows()
    assert rows.shape == (5, 6)
    assert rows.dtype == torch.float32
    for column, values in enumerate((table.a, table.b, table.h, table.std, table.weight, table.sigmas[:-1])):
        torch.testing.assert_close(rows[:, column], values.float(), rtol=0, atol=0)
    other = torch.arange(5, dtype=torch.float64)
    torch.testing.assert_close(table.rows(other)[:, 4], other.float(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="one weight per step"):
        table.rows(torch.ones(4))


def test_require_stochastic():
    sigmas = sd3_sigmas(4)
    solver_table("flow_sde", sigmas, 0.7).require_stochastic("a log-probability")
    with pytest.raises(ValueError, match=r"a log-probability needs noise.*'ode'.*all steps.*flow_sde"):
        solver_table("ode", sigmas, 0.7).require_stochastic("a log-probability")
    cps = solver_table("cps", sigmas, 0.7)
    cps.require_stochastic("a log-probability", steps=range(3))
    with pytest.raises(ValueError, match="step 3; leave these steps out"):
        cps.require_stochastic("a log-probability")


@pytest.mark.parametrize(
    ("solver", "sigmas", "eta", "said"),
    [
        ("flow-sde", [1.0, 0.0], 0.7, "flow_sde, dance_sde.*did you mean 'flow_sde'"),
        ("euler_maruyama_xyz", [1.0, 0.0], 0.7, "choose one of ode"),
        ("flow_sde", [1.0, 0.5, 0.0], 0.0, "use solver 'ode'"),
        ("ode", [1.0, 0.5, 0.0], -0.1, "eta must be"),
        ("flow_sde", [1.0, 0.5, 0.0], math.nan, "eta must be"),
        ("cps", [1.0, 0.5, 0.0], 1.2, r"eta in \(0, 1\]"),
        ("ode", [1.0, 0.5, 0.5, 0.0], 0.0, r"sigma\[1\] = 0.5"),
        ("ode", [0.0, 0.5, 1.0], 0.0, "falling order"),
        ("ode", [1000.0, 500.0, 0.0], 0.0, "divided by 1000"),
        ("ode", [1.0, 0.5, 0.0, 0.0], 0.0, "only the last may be 0"),
        ("ode", [1.0], 0.0, "at least 2"),
        ("ode", [1.0, math.nan, 0.0], 0.0, "finite"),
    ],
)
def test_mistakes_are_named(solver, sigmas, eta, said):
    with pytest.raises(ValueError, match=said):
        solver_table(solver, sigmas, eta)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="exact, published"):
        solver_table("ode", [1.0, 0.0], 0.0, variance="g2")
    with pytest.raises(ValueError, match="at least 1 step"):
        sd3_sigmas(0)
    with pytest.raises(ValueError, match="must be positive"):
        sd3_sigmas(4, shift=0.0)
