"""The loss of a step, for every objective of on-policy distillation: its weight, its gradient, and the steps it is at.

Student and teacher share the solver's row, so mu_S - mu_T = b (v_S - v_T), and most objectives are a weight on the
squared velocity gap, w_j * (v_S - v_T)^2 (arXiv 2605.15055):

* kl: KL(N(mu_S, std^2) || N(mu_T, std^2)) = |mu_S - mu_T|^2 / (2 std^2), hence w = b^2 / (2 std^2); on a row without
  noise the L2 of the means, 1/2 |mu_S - mu_T|^2. The table holds these weights, in its `exact` or `published` variance.
* l2: w = b^2 / 2 on every row, whatever the noise.
* velocity: w = 1 (DanceOPD).

`ppo` makes the same KL the dense reward of a policy gradient instead of differentiating it alone: `Surrogate`.
`step_queries` trains a few steps of a rollout in place of all (DanceOPD). DanceOPD also absorbs guidance into the
student, for which two settings are enough: teachers[].guidance above 1 and student.guidance 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opd_fast.solvers import SolverTable

RewardGradient = Literal["live", "detached", "return_to_go"]


def step_weights(table: SolverTable, kind: Literal["kl", "l2", "velocity", "ppo"]) -> Tensor:
    """Returns the weight w_j of each step, (N,) float64 on the CPU. Raises ValueError for an unknown objective."""
    if kind in ("kl", "ppo"):
        return table.weight
    if kind == "l2":
        return table.b.square() / 2
    if kind == "velocity":
        return torch.ones_like(table.b)
    raise ValueError(f"unknown objective {kind!r}: choose kl, l2, velocity or ppo")


# --- policy gradient --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surrogate:
    """The step's KL as the reward of a PPO surrogate, max(-A rho, -A clip(rho)) with A_j = -R_j.

    R_j = min(kl_scale * KL_j, clamp) and rho_j = exp(logp_j - logp_old_j), logp_j being the log-probability of the
    drawn x_next = mu + std * eps, held fixed. A rollout that trains as it goes has rho = 1: no clip of the ratio can
    act, both arms of the max have the same gradient, and with M = 1/D (reduction mean, of KL and log-probability alike)
    or 1 (sum)

        d(rho_j R_j)/dv_S = dR_j/dv_S + R_j * dlogp_j/dv_S,        dlogp_j/dv_S = M * b * eps / std.

    The first term is pathwise, the closed form's gradient; the second, the score function, has mean zero at a fixed
    state, since R_j does not depend on eps_j. `reward_gradient` says which terms there are:

    * live: both. R is not detached (DiffusionOPD's PPO baseline; Flow-OPD's code, with published variance, clamp 5).
    * detached: the score term alone. Its mean is zero, so that it teaches nothing; it serves as a control.
    * return_to_go: the pathwise term, and the score times what follows, sum over k > j of R_k. Under reduction sum that
      is the whole gradient of E[sum_j R_j] in the law of the rollout, part of which the other objectives leave out;
      under mean its score term is weighed 1/D, as the published mean log-probability weighs it.
    """

    reward_gradient: RewardGradient = "live"
    kl_scale: float = 1.0
    clamp: float | None = None
    """Largest reward; a step beyond it has no pathwise term. Flow-OPD: 5."""
    log_prob: Literal["exact", "published"] = "exact"
    """published: log-probability -mean((x - mu)^2) of the released code under CPS, without 1 / (2 std^2)."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a step's gradient needs the rewards of later steps."""
        return self.reward_gradient == "return_to_go"

    def reward(self, kl: Tensor) -> Tensor:
        """Returns R of a step's KL, of any shape."""
        return (self.kl_scale * kl).clamp(max=self.clamp) if self.clamp is not None else self.kl_scale * kl

    def returns(self, kl: Tensor) -> Tensor:
        """Returns the sum over k > j of R_k; kl and the result are (steps, B)."""
        reward = self.reward(kl)
        return reward.flip(0).cumsum(0).flip(0) - reward

    def gradients(
        self,
        grad_cond: Tensor,
        grad_uncond: Tensor | None,
        *,
        kl: Tensor,
        later: Tensor | None,
        noise: Tensor,
        score: Tensor,
        guidance: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the surrogate's gradient at the velocity branches, from the closed form's.

        Args:
            grad_cond, grad_uncond: (B, C, H, W), the gradient of scale_i * KL_i.
            kl: (B,), KL_i itself; later: (B,), its row of `returns`, for return_to_go.
            noise: (B, C, H, W), eps of the step.
            score: (B,), scale_i * M * b / std.
            guidance: (B,), the student's; v = u + g (c - u).
        """

        def spread(t: Tensor) -> Tensor:
            return t.view(-1, *[1] * (noise.dim() - 1))

        if self.looks_ahead:
            if later is None:
                raise ValueError("return_to_go needs the rewards of later steps: give later")
            advantage = later
        else:
            advantage = self.reward(kl)
        path = torch.full_like(kl, 0.0 if self.reward_gradient == "detached" else self.kl_scale)
        if self.clamp is not None:
            path = path * (self.kl_scale * kl <= self.clamp)
        slope = spread(score * advantage) * noise
        cond = spread(path) * grad_cond + spread(guidance) * slope
        if grad_uncond is None:
            return cond.to(grad_cond.dtype), None
        uncond = spread(path) * grad_uncond + spread(1 - guidance) * slope
        return cond.to(grad_cond.dtype), uncond.to(grad_uncond.dtype)


def score_factors(table: SolverTable, log_prob: Literal["exact", "published"] = "exact") -> Tensor:
    """Returns dlogp/dv of each step for unit noise, before the reduction, (N,) float64; 0 where there is no noise.

    It is b / std under the normal law, and 2 b std where the published log-probability of CPS drops 1 / (2 std^2).
    """
    if log_prob == "published":
        return 2 * table.b * table.std
    return torch.where(table.std > 0, table.b / table.std, 0.0)


# --- queried steps ----------------------------------------------------------------------------------------------------


def query_law(steps: int, law: Literal["uniform", "beta"], alpha: float, beta: float) -> Tensor:
    """Returns the probability of each of `steps` trained steps to be queried, (steps,) float64, sum 1.

    Under the law beta, the step is floor(steps * z) with z ~ Beta(alpha, beta). The steps run from noise to image, so
    that alpha > beta queries more often near the image (DanceOPD: Beta(5, 2)).
    """
    if law == "uniform":
        return torch.full((steps,), 1 / steps, dtype=torch.float64)
    from scipy.special import betainc

    return torch.from_numpy(np.diff(betainc(alpha, beta, np.linspace(0.0, 1.0, steps + 1))))


def step_queries(law: Tensor, queries: int, u: float, weights: Literal["unbiased", "law"]) -> Tensor:
    """Returns factors on the step weights of a round with `queries` queried steps, (steps,) float64, most of them 0.

    Step j is drawn c_j times by systematic sampling: c_j counts the points (u + i) / queries, i < queries, in its share
    of the cumulated law. With u uniform in [0, 1), E[c_j] = queries * law_j; a step is drawn twice only where
    queries * law_j exceeds 1, and all steps under a uniform law are each drawn once.

    `unbiased` gives c_j / (queries * law_j), whose mean is 1 at every step, so that the loss and its gradient have
    those of all steps for their means. `law` gives c_j * steps / queries: drawn steps count alike, and the law is a
    weight (DanceOPD's own loss). Under a uniform law both are the same.
    """
    points = (u + torch.arange(queries, dtype=torch.float64)) / queries
    drawn = torch.searchsorted(law.cumsum(0), points, right=True).clamp(max=len(law) - 1)
    counts = torch.bincount(drawn, minlength=len(law)).double()
    if weights == "law":
        return counts * (len(law) / queries)
    return torch.where(counts > 0, counts / (queries * law), 0.0)
