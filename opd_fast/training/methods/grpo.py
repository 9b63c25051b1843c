"""GRPO for flow-matching models (Flow-GRPO, arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319).

The log-probability of a drawn step, mean over the elements, and its ratio to the policy that drew come from
`opd_kernels.log_prob`, which `rl.log_prob: published` scales to the released code's under CPS; the KL to the base,
mean((mu - mu_base)^2) / (2 g^2), is the loss of `opd_kernels.fused_step` with the base for a teacher and the
`published` weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_fast.seeds import Stream, noise_keys
from opd_fast.solvers import SolverTable, solver_table
from opd_fast.training.guided_step import Prediction, guided_step
from opd_fast.training.methods.reward_learning import Reinforcement
from opd_fast.training.setup import Setup
from opd_kernels import log_prob, philox_normal
from opd_kernels.philox import INITIAL_NOISE

CLIP = {False: 1e-4, True: 2e-6}
"""The range of the ratio around 1, without and with Guard."""
KEPT = ("x", "sample", "mean")
"""What a rollout keeps of every trained step: state, next state and mean."""

# --- losses -----------------------------------------------------------------------------------------------------------


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's max(-A rho, -A clip(rho, 1 +- clip)), rho = exp(log_ratio); all (B,)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def ratio_change(
    log_ratio: Tensor,
    drift: Tensor,
    std: float,
    *,
    guard: bool = False,
    log_prob: Literal["exact", "published"] = "exact",
) -> Tensor:
    """Returns the log-ratio that is clipped, (B,), of a step drawn with `std`.

    `log_ratio` and `drift` (B,) are those of `opd_kernels.log_prob` under reduction mean. GRPO-Guard's is
    std * (log_ratio + drift) = mean(eps * (mu - mu_old)), where eps is the noise that was drawn. Its mean is 0 and its
    size does not depend on the step's noise, so that one clip range suits all steps. Each sample has its own drift.
    The `published` one under CPS is that of -mean((x - mu)^2), without 1 / (2 std^2).
    """
    if guard:
        return std * (log_ratio + drift)
    return 2 * std**2 * log_ratio if log_prob == "published" else log_ratio


def policy_loss(
    change: Tensor, advantage: Tensor, table: SolverTable, step: int, *, guard: bool, clip: float
) -> Tensor:
    """The loss of one drawn step, (B,), from its `ratio_change`: the clipped surrogate.

    Guard divides it by the step length sigma_j - sigma_{j+1}, which evens out the gradients of the steps.
    """
    loss = clipped_surrogate(change, advantage, clip)
    return loss / float(table.sigmas[step] - table.sigmas[step + 1]) if guard else loss


# --- the method -------------------------------------------------------------------------------------------------------


class GRPO(Reinforcement):
    """The method `grpo` of the training loop.

    The student draws with noise at every step that will be trained: all but the last, or those of a window whose place
    is drawn for each rollout, the other steps being ODE steps (Flow-GRPO-Fast).
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        device = setup.model.device
        self.drawing = setup.table.rows(device=device)
        sigmas = setup.table.sigmas
        self.still = solver_table("ode", sigmas, 0.0).rows(device=device)
        published = solver_table(setup.table.solver, sigmas, setup.config.sampler.eta, variance="published")
        self.kl_rows = published.rows(device=device)
        self.clip = CLIP[self.rl.guard] if self.rl.clip is None else self.rl.clip

    def trained_steps(self, epoch: int) -> range:
        """Returns the steps of rollout `epoch` that draw noise and are trained."""
        steps, window = self.setup.table.steps, self.rl.window
        if window is None:
            return range(steps - 1)
        starts = (steps // 2 if self.rl.window_range is None else self.rl.window_range) - window + 1
        start = int(noise_keys(self.setup.config.train.seed, Stream.WINDOW, epoch, samples=1)) % starts
        return range(start, start + window)

    def rows(self, epoch: int) -> Tensor:
        """Returns the rollout's solver rows (N, 6). Without a window the last draws too, as published, untrained."""
        if self.rl.window is None:
            return self.drawing
        rows, steps = self.still.clone(), self.trained_steps(epoch)
        rows[steps.start : steps.stop] = self.drawing[steps.start : steps.stop]
        return rows

    def chosen(self, drawn: dict[str, Tensor]) -> Tensor:
        return drawn["advantage"] != 0  # so groups of equal rewards are dropped

    def roll_out(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        setup, trained = self.setup, self.trained_steps(epoch)
        rows, keys = self.rows(epoch), self.keys(epoch)
        kept = {name: [self.no_images(len(trained))] for name in KEPT}
        latents = [self.no_images()]
        with torch.no_grad(), setup.student.merged_for_round():
            for part in self.micro_batches(self.rank_indices):
                condition, part_keys = self.condition(epoch, part), keys[part.to(keys.device)]
                guidance = torch.full((len(part),), condition.branch_guidance, device=keys.device)
                x = philox_normal(part_keys, setup.shape, INITIAL_NOISE)
                path = []
                for j in range(setup.table.steps):
                    v = Prediction(setup.student.velocities(setup.model, x, rows[j, -1], condition), guidance)
                    scale = torch.ones_like(guidance)
                    step = guided_step(x, v, v, rows, j, scale, keys=part_keys, return_means=True)
                    if j in trained and step.mean_s is not None:
                        path.append((x, step.x_next, step.mean_s))
                    x = step.x_next
                latents.append(x)
                for name, tensors in zip(KEPT, zip(*path, strict=True), strict=True):
                    kept[name].append(torch.stack(tensors, 1))
        return torch.cat(latents), {name: torch.cat(parts) for name, parts in kept.items()}

    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        setup, steps, drawn = self.setup, self.trained_steps(epoch), self._drawn
        losses = torch.zeros(len(steps), self.images, device=rows.device)
        counts = {name: torch.zeros((), device=rows.device) for name in ("kl", "clipped")}
        with setup.student.merged_for_round():
            for part, share in zip(self.micro_batches(rows), self.micro_batches(shares), strict=True):
                condition = self.condition(epoch, part)
                guidance = torch.full((len(part),), condition.branch_guidance, device=rows.device)
                advantage = drawn["advantage"][part]
                for i, j in enumerate(steps):
                    x, sample, mean = (drawn[name][self.positions(part), i] for name in KEPT)
                    sigma = self.drawing[j, -1]
                    v = setup.student.velocities(setup.model, x, sigma, condition)
                    out = log_prob(x, sample, v.cond, v.uncond, guidance, self.drawing, j, mean_old=mean)
                    assert out.log_ratio is not None
                    assert out.drift is not None
                    std, guard = float(setup.table.std[j]), self.rl.guard
                    change = ratio_change(out.log_ratio, out.drift, std, guard=guard, log_prob=self.rl.log_prob)
                    loss = policy_loss(change, advantage, setup.table, j, guard=guard, clip=self.clip)
                    if self.kl > 0:
                        base = Prediction(self.base_velocities(x, sigma, condition), guidance)
                        scale = torch.full_like(guidance, self.kl)
                        pull = guided_step(x, Prediction(v, guidance), base, self.kl_rows, j, scale)
                        loss = loss + pull.loss
                        counts["kl"] += (share * pull.loss.detach()).sum() / (self.kl * len(steps))
                    weighed = share * loss / len(steps)
                    scaler.scale(weighed.sum()).backward()
                    losses[i, part] = weighed.detach()
                    beyond = (change.detach().exp() - 1).abs() > self.clip
                    counts["clipped"] += (share * beyond).sum() / len(steps)
        return losses, counts
