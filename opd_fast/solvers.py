"""Samplers as tables: every supported step is ``mean = a*x + b*v + h*x0_prev``, ``sample = mean + std*noise``.

Notation, for flow matching with x_sigma = (1 - sigma)*x0 + sigma*eps and v = eps - x0:

    s = sigma_j          n = sigma_{j+1}          D = s - n > 0
    x0_hat = x - s*v     eps_hat = x + (1 - s)*v

A step whose mean is A*x0_hat + C*eps_hat has a = A + C and b = (1 - s)*C - s*A.  The rows are computed once, in float64
on the CPU; the loop indexes them by step number, so no scheduler object and no host sync is left in a round.

Student and teacher share the row, so mu_S - mu_T = b*(v_S - v_T), and the loss of a step is weight*mean((v_S - v_T)^2).

Sources: Flow-SDE from Flow-GRPO (https://arxiv.org/abs/2505.05470), Dance-SDE from DanceGRPO
(https://arxiv.org/abs/2505.07818), CPS, coefficients-preserving sampling (https://arxiv.org/abs/2509.05952), DDIM
(https://arxiv.org/abs/2010.02502), DPM-Solver++ (https://arxiv.org/abs/2211.01095); the losses from DiffusionOPD
(https://arxiv.org/abs/2605.15055).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SOLVERS = ("ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm1", "dpm2")
STOCHASTIC = ("flow_sde", "dance_sde", "cps", "ddim")
VARIANCES = ("exact", "published")

# The released DiffusionOPD code clamps the variance it divides by from below at this value.
_PUBLISHED_MIN_VARIANCE = 1e-8


@dataclass(frozen=True)
class SolverTable:
    """One row per sampler step, float64 on the CPU.

    ``sigmas`` is (N+1,) and falls from at most 1 to at least 0; the other tensors are (N,).

    ``a``, ``b``, ``h``: coefficients of x, of the velocity, and of the previous step's x0_hat (0 but for ``dpm2``).
    ``std``: standard deviation of the sample around the mean.  ``g``: the diffusion coefficient, ``std = g*sqrt(D)`` in
    every row (for ``cps`` and ``ddim``, which are not written with a diffusion coefficient, g is std/sqrt(D)).
    ``weight``: factor of mean((v_S - v_T)^2) in the step's loss, under the convention named by ``variance``.
    ``eta`` is 0 for the deterministic solvers, whatever was asked.
    """

    solver: str
    eta: float
    variance: str
    sigmas: Tensor
    a: Tensor
    b: Tensor
    h: Tensor
    g: Tensor
    std: Tensor
    weight: Tensor

    @property
    def steps(self) -> int:
        """The number of sampler steps N."""
        return self.a.shape[0]

    @cached_property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool((self.std > 0).any())

    @cached_property
    def uses_history(self) -> bool:
        """Whether any step reads the previous step's x0_hat."""
        return bool((self.h != 0).any())

    def rows(self, weight: Tensor | None = None, device: torch.device | str | None = None) -> Tensor:
        """Return the rows that the fused step reads: (N, 6) float32 on ``device``, columns a, b, h, std, weight, sigma.

        ``weight`` (N,) replaces the table's own (another objective's step weights).
        Raises ValueError if it has another shape.
        """
        weight = self.weight if weight is None else weight
        if weight.shape != self.a.shape:
            raise ValueError(
                f"step weights have shape {tuple(weight.shape)}, the table has {self.steps} steps; "
                f"give one weight per step, shape ({self.steps},)"
            )
        columns = (self.a, self.b, self.h, self.std, weight.detach().to("cpu", torch.float64), self.sigmas[:-1])
        return torch.stack(columns, dim=1).to(torch.float32).to(device)

    def require_stochastic(self, purpose: str, steps: Sequence[int] | None = None) -> None:
        """Raise ValueError if one of ``steps`` (all, if None) has std == 0: a point has no log-probability."""
        chosen = range(self.steps) if steps is None else steps
        points = [j for j in chosen if float(self.std[j]) == 0.0]
        if not points:
            return
        if not self.stochastic:
            remedy = f"use one of the stochastic solvers {', '.join(STOCHASTIC)} with eta > 0"
        else:
            remedy = "leave these steps out (under cps and ddim the step to sigma = 0 adds no noise)"
        raise ValueError(
            f"{purpose} needs noise in every step it reads, but solver {self.solver!r} has std = 0 at "
            f"{'all steps' if len(points) == self.steps else 'step ' + ', '.join(map(str, points))}; {remedy}"
        )


def sd3_sigmas(steps: int, shift: float = 3.0, *, num_train_timesteps: int = 1000) -> Tensor:
    """Return SD3's noise levels as diffusers makes them: (steps+1,) float64 from 1 to 0.

    With S(u) = shift*u / (1 + (shift - 1)*u): sigma = S(linspace(1, S(1/num_train_timesteps), steps)), then a 0.  The
    shift is applied twice, since the scheduler already shifts its own range when it is built.  diffusers computes the
    range's end in float32, so the two agree to about 3e-8.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    if not shift > 0:
        raise ValueError(f"the scheduler's shift must be positive, got {shift}")

    def shifted(u: Tensor) -> Tensor:
        return shift * u / (1 + (shift - 1) * u)

    first = torch.ones((), dtype=torch.float64)
    last = shifted(first / num_train_timesteps)
    sigmas = shifted(torch.linspace(1.0, last.item(), steps, dtype=torch.float64))
    # S(1) is 1; not every shift gives it back exactly in floating point, and the solvers treat sigma == 1 apart.
    sigmas[0] = 1.0
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def solver_table(solver: str, sigmas: Tensor | Sequence[float], eta: float, *, variance: str = "exact") -> SolverTable:
    """Return the table of ``solver`` over ``sigmas``: N+1 levels, strictly falling within (0, 1]; the last may be 0.

    ``eta`` scales the noise of flow_sde, dance_sde, cps and ddim; the deterministic solvers do not read it.

    ``dpm2`` (DPM-Solver++ 2M, midpoint) is first order at its first and its last step.  When the previous level was
    sigma = 1, its log-SNR is infinite and the second-order correction q is exactly 0: DiffusionNFT's (and diffusers')
    choice; the published OPD code clamps the signal level at 1e-30 instead and gets a small q.

    ``variance`` names what the KL of a noisy step divides by: ``exact`` std^2 (the paper), ``published`` g^2 without
    the step length for flow_sde and std^2 for the others, both at least 1e-8 (the released code).  Steps without
    noise have the L2 weight b^2/2 under either.

    Raises ValueError for an unknown solver or convention, for sigmas that are not such a sequence, and for an eta the
    solver cannot use.
    """
    if solver not in SOLVERS:
        guess = difflib.get_close_matches(str(solver), SOLVERS, n=1, cutoff=0.4)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}{hint}")
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance convention {variance!r}; choose one of {', '.join(VARIANCES)}")
    sigmas = _checked_sigmas(sigmas)
    eta = _checked_eta(solver, eta)

    s, n = sigmas[:-1], sigmas[1:]
    if solver in ("ode", "dpm1"):
        a, b, h, g = _euler(s, n)
    elif solver == "dpm2":
        a, b, h, g = _dpm2(s, n)
    else:
        a, b, h, g = _STOCHASTIC_ROWS[solver](s, n, eta)
    std = g * (s - n).sqrt()

    divisor = g**2 if variance == "published" and solver == "flow_sde" else std**2
    if variance == "published":
        divisor = divisor.clamp(min=_PUBLISHED_MIN_VARIANCE)
    # Division by zero in the branch not taken is harmless: nothing here is differentiated.
    weight = torch.where(std > 0, b**2 / (2 * divisor), b**2 / 2)
    return SolverTable(solver, eta, variance, sigmas, a, b, h, g, std, weight)


Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # a, b, h, g


def _euler(s: Tensor, n: Tensor) -> Rows:
    """x + (n - s)*v.  DPM-Solver++ of first order is the same step for flow matching."""
    return torch.ones_like(s), n - s, torch.zeros_like(s), torch.zeros_like(s)


def _dpm2(s: Tensor, n: Tensor) -> Rows:
    """DPM-Solver++(2M), midpoint: (n/s)*x + k*((1 + q)*x0_hat - q*x0_prev), k = 1 - n/s, q = h_j / (2 h_{j-1}).

    h_j = lambda(n) - lambda(s) with lambda(z) = log((1 - z)/z).  arXiv 2211.01095, algorithm 2.
    """
    q = torch.zeros_like(s)
    if len(s) > 2:
        log_snr = torch.log1p(-s) - s.log()  # -inf at s = 1, hence h_0 = inf and q_1 = 0
        step = log_snr.diff()
        q[1:-1] = step[1:] / (2 * step[:-1])
    k = 1 - n / s
    return 1 + k * q, -(s - n) * (1 + q), -k * q, torch.zeros_like(s)


def _sde(s: Tensor, n: Tensor, g: Tensor) -> Rows:
    """Euler-Maruyama of dx = [v + g^2/(2s) * (x + (1 - s)*v)] dsigma + g dW, run from s down to n."""
    pull = g**2 * (s - n) / (2 * s)
    return 1 - pull, -(s - n) - pull * (1 - s), torch.zeros_like(s), g


def _flow_sde(s: Tensor, n: Tensor, eta: float) -> Rows:
    """Flow-GRPO: g = eta*sqrt(s / (1 - s)); at s = 1 exactly the next level stands in for s inside 1 - s only."""
    return _sde(s, n, eta * (s / (1 - torch.where(s == 1, n, s))).sqrt())


def _dance_sde(s: Tensor, n: Tensor, eta: float) -> Rows:
    """DanceGRPO: constant g = eta."""
    return _sde(s, n, torch.full_like(s, eta))


def _from_prediction(s: Tensor, n: Tensor, std: Tensor, eps: Tensor) -> Rows:
    """mean = (1 - n)*x0_hat + eps*eps_hat."""
    return (1 - n) + eps, (1 - s) * eps - s * (1 - n), torch.zeros_like(s), std / (s - n).sqrt()


def _cps(s: Tensor, n: Tensor, eta: float) -> Rows:
    """Coefficients-preserving sampling: the noise level n is split as n*sin and n*cos of eta*pi/2."""
    angle = eta * math.pi / 2
    # cos(pi/2) is 6e-17 in floating point; at eta = 1 all noise is fresh.
    return _from_prediction(s, n, n * math.sin(angle), n * (math.cos(angle) if eta < 1 else 0.0))


def _ddim(s: Tensor, n: Tensor, eta: float) -> Rows:
    """DDIM with eta (arXiv 2010.02502, eq. 16) in the flow's alpha = 1 - sigma."""
    ratio = n * (1 - s) / (s * (1 - n))
    std = eta * n * (1 - ratio**2).clamp(min=0).sqrt()
    return _from_prediction(s, n, std, (n**2 - std**2).clamp(min=0).sqrt())


_STOCHASTIC_ROWS: dict[str, Callable[[Tensor, Tensor, float], Rows]] = {
    "flow_sde": _flow_sde,
    "dance_sde": _dance_sde,
    "cps": _cps,
    "ddim": _ddim,
}


def _checked_sigmas(sigmas: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(
            f"sigmas must be a list of at least 2 noise levels (N steps have N+1), got shape {tuple(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ValueError("sigmas must be finite numbers")
    if float(values[0]) > 1 or float(values[-2]) <= 0 or float(values[-1]) < 0:
        raise ValueError(
            f"sigmas must lie in (0, 1], only the last may be 0; got {values[0]:.6g} ... {values[-1]:.6g}. "
            "Flow matching's noise levels are timesteps divided by 1000"
        )
    if not bool((values.diff() < 0).all()):
        j = int((values.diff() >= 0).nonzero()[0])
        raise ValueError(
            f"sigmas must strictly fall from noise to image, but sigma[{j}] = {values[j]:.6g} is followed by "
            f"{values[j + 1]:.6g}; sort them in falling order and drop repeated levels"
        )
    return values


def _checked_eta(solver: str, eta: float) -> float:
    if not math.isfinite(eta) or eta < 0:
        raise ValueError(f"eta must be a finite number >= 0, got {eta}")
    if solver not in STOCHASTIC:
        return 0.0
    if eta == 0:
        raise ValueError(f"solver {solver!r} with eta = 0 adds no noise: use solver 'ode', or give eta > 0")
    if solver in ("cps", "ddim") and eta > 1:
        raise ValueError(f"solver {solver!r} needs eta in (0, 1] (1 replaces all of the noise), got {eta}")
    return float(eta)
