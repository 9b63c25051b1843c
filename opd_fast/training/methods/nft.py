"""DiffusionNFT (arXiv 2509.16117): reinforcement learning on the forward process, by flow matching toward good samples
and away from bad ones. Neither log-probabilities nor a particular sampler are needed, only images and their rewards.

The policy in training v and the old policy v_old, which drew the images, imply two more:

    v+ = beta v + (1 - beta) v_old            v- = (1 + beta) v_old - beta v

At x_t = (1 - t) x0 + t eps, fresh noise on a drawn image, x0_hat of v+ is pulled to x0 by r and that of v- by 1 - r.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from opd_fast.seeds import Stream
from opd_fast.training.methods.image_buffer import generator
from opd_fast.training.methods.reward_learning import Reinforcement
from opd_fast.training.sampling import sample
from opd_fast.training.setup import Setup
from opd_kernels import philox_normal

SCALE = 5.0
"""Factor of the policy's loss in the released code: the advantage's clip."""


def optimality(advantage: Tensor, clip: float = 5.0) -> Tensor:
    """Returns r in 0..1 of an advantage: 1/2 at the mean of the group, 0 at -clip and 1 at clip."""
    return (advantage.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)


def _matching(x: Tensor, v: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Returns mean((x0_hat - x0)^2 / w), (B,), where w = max(mean |x0_hat - x0|, 1e-5) has no gradient."""
    error = (x - t * v - x0).flatten(1)
    return (error.square() / error.detach().abs().mean(1, keepdim=True).clamp(min=1e-5)).mean(1)


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_base: Tensor | None,
    x: Tensor,
    sigma: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    beta: float,
    kl_weight: float,
) -> Tensor:
    """The loss at one noise level of each sample, (B,) float64.

    5 (r L+ + (1 - r) L-) / beta + kl_weight mean((v - v_base)^2), with L+ and L- the self-normalised errors of v+ and
    v-. At v = v_old its gradient is -10 sigma (2 r - 1) (x0_hat - x0) / (D w), whatever beta.

    v (B, C, H, W) has a gradient, v_old and v_base none; v_base may be None where kl_weight is 0, else ValueError is
    raised. x (B, C, H, W) is the noised image at `sigma` (0-dim or (B,)), x0 the image's latent, r (B,) in 0..1.
    """
    v, v_old, x, x0, r = (each.double() for each in (v, v_old, x, x0, r))
    t = sigma.double().view(-1, *[1] * (x.dim() - 1))
    positive = _matching(x, torch.lerp(v_old, v, beta), t, x0)
    negative = _matching(x, torch.lerp(v_old, v, -beta), t, x0)
    loss = SCALE * (r * positive + (1 - r) * negative) / beta
    if kl_weight == 0:
        return loss
    if v_base is None:
        raise ValueError("a KL to the base needs the base's velocity: give v_base, or kl_weight 0")
    return loss + kl_weight * (v - v_base.double()).flatten(1).square().mean(1)


def old_policy_decay(schedule: Literal["early", "late"], updates: int) -> float:
    """Returns d of `old <- d old + (1 - d) new` after `updates` optimizer steps in all.

    early (the released code's type 1, for GenEval and the preference rewards): min(0.001 k, 0.5). late (type 2, for
    OCR): 0 before update 75, so that the old policy is the new one, then min(0.0075 (k - 75), 0.999).
    """
    if schedule == "early":
        return min(0.001 * updates, 0.5)
    return 0.0 if updates < 75 else min(0.0075 * (updates - 75), 0.999)


@torch.no_grad()
def move_old_policy(old: list[Tensor], new: list[Tensor], decay: float) -> None:
    """old <- decay old + (1 - decay) new, in place; at decay 0 the copy is exact."""
    if decay == 0:
        torch._foreach_copy_(old, new)
    else:
        torch._foreach_lerp_(old, new, 1 - decay)


# --- the method -------------------------------------------------------------------------------------------------------


class NFT(Reinforcement):
    """The method `nft` of the training loop. The old policy draws without guidance; published runs use solver dpm2."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.old = [p.detach().clone() for p in setup.student.parameters()]

    def roll_out(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        setup, keys, latents = self.setup, self.keys(epoch), [self.no_images()]
        if epoch:
            decay = old_policy_decay(self.rl.decay, epoch * self.rl.updates)
            move_old_policy(self.old, [p.detach() for p in setup.student.parameters()], decay)
        with setup.student.with_weights(self.old) as transformer:
            for part in self.micro_batches(self.rank_indices):
                text, of_part = self.text(epoch, part), keys[part.to(keys.device)]
                x0 = sample(setup.model, transformer, text, None, None, setup.table, shape=setup.shape, keys=of_part)
                latents.append(x0)
        x0 = torch.cat(latents)
        return x0, {"x0": x0}

    def noise_levels(self, epoch: int) -> Tensor:
        """Returns (B, N) bool: at the noise levels of which steps each image of rollout `epoch` is trained."""
        steps, chance = self.setup.table.steps, generator(self.setup.config.train.seed, Stream.NFT_LEVELS, epoch)
        order = torch.rand(self.images, steps, generator=chance)
        return order.argsort(1) < int(steps * self.rl.timestep_fraction)

    def trained_steps(self, epoch: int) -> range:
        return range(self.setup.table.steps)

    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        setup, drawn = self.setup, self._drawn
        levels = self.noise_levels(epoch)
        count = int(levels[0].sum())
        sigmas = setup.table.sigmas[:-1].float().to(rows.device)
        keys = self.keys(epoch, Stream.NFT_NOISE)
        points: list[tuple[int, Tensor, Tensor, Tensor | None]] = []
        """(step, rows, shares, old policy's velocity or None where it is the student's own)"""

        def noised(j: int, part: Tensor) -> Tensor:
            return torch.lerp(drawn["x0"][self.positions(part)], philox_normal(keys[part], setup.shape, j), sigmas[j])

        def velocity(j: int, part: Tensor) -> Tensor:
            return setup.student.velocities(setup.model, noised(j, part), sigmas[j], self.condition(epoch, part)).cond

        moved = any(not torch.equal(old, p) for old, p in zip(self.old, setup.student.parameters(), strict=True))
        with torch.no_grad(), setup.student.with_weights(self.old) if moved else nullcontext():
            for part, share in zip(self.micro_batches(rows), self.micro_batches(shares), strict=True):
                for j in range(setup.table.steps):
                    here = levels[part.cpu(), j].to(part.device)
                    if bool(here.any()):
                        some = part[here]
                        points.append((j, some, share[here], velocity(j, some) if moved else None))
        losses = torch.zeros(setup.table.steps, self.images, device=rows.device)
        change = torch.zeros((), device=rows.device)
        with setup.student.merged_for_round():
            for j, part, share, before in points:
                x = noised(j, part)
                base = self.base_velocities(x, sigmas[j], self.condition(epoch, part)).cond if self.kl > 0 else None
                v = velocity(j, part)
                old = v.detach() if before is None else before
                r = optimality(drawn["advantage"][part], self.rl.advantage_clip)
                x0 = drawn["x0"][self.positions(part)]
                loss = nft_loss(v, old, base, x, sigmas[j], x0, r, beta=self.rl.beta, kl_weight=self.kl)
                weighed = (share * loss).float() / count
                scaler.scale(weighed.sum()).backward()
                losses[j, part] = weighed.detach()
                change += (share * (v.detach() - old).float().flatten(1).square().mean(1)).sum() / count
        decay = old_policy_decay(self.rl.decay, epoch * self.rl.updates)
        return losses, {"change": change, "old_policy_decay": torch.tensor(decay)}

    def state(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.setup.student.named_parameters()]
        return super().state() | {f"old.{name}": old for name, old in zip(names, self.old, strict=True)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        for old, (name, _) in zip(self.old, self.setup.student.named_parameters(), strict=True):
            old.copy_(tensors[f"old.{name}"])
