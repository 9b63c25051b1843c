"""Supervised fine-tuning on images that the teachers draw: flow matching, the cold start that Flow-OPD gives a student
before it distils on-policy (the project's page and released code).

At x_t = (1 - t) x0 + t eps, fresh noise eps on an image x0 of the teacher, the velocity is to be eps - x0 (rectified
flow, arXiv 2209.03003, equation 1). The loss of an image is

    mean((v - (eps - x0))^2) + base_weight mean((v - v_base)^2),        t logit-normal(0, 1)

with the density of t of SD3 (arXiv 2403.03206, section 3.1), not shifted as the sampler's levels are. Of several images
of one prompt the released script keeps the one of the highest reward.

It is the conditional branch that is trained; classifier-free guidance is the sampler's. Guidance that is an input of
the transformer (FLUX.1-dev) is the student's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.models.guidance import Conditioning, predict_velocities
from opd_fast.rewards.runner import judged
from opd_fast.seeds import noise_keys
from opd_fast.training.methods.image_buffer import ROLLOUT_STREAM, SharedImages
from opd_fast.training.sampling import sample
from opd_fast.training.setup import Setup
from opd_kernels import philox_normal

NOISE_STREAM = 7
"""Sets what an image is noised with apart from any other noise drawn from the same seed."""
NOISE, LEVEL = 0, 1
"""Draws of a key of that stream: eps and t."""


def squared_gap(a: Tensor, b: Tensor) -> Tensor:
    """mean((a - b)^2) over the elements of each sample, (B,) float32; a, b (B, C, H, W) of any floating type."""
    return (a.float() - b.float()).flatten(1).square().mean(1)


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean((v - (eps - x0))^2) of each sample, (B,) float32; v, x0 and noise = eps (B, C, H, W)."""
    return squared_gap(v, noise.float() - x0.float())


class SFT(SharedImages):
    """The method `sft` of the training loop: the teachers draw once in `sft.updates` rounds, which share the images.

    Those in hand are x0 (own, C, H, W) float32 and, where a reward chose them, reward (own,) float32.
    """

    def __init__(self, setup: Setup) -> None:
        self.sft = setup.config.sft
        self.guidance = setup.student.guidance if setup.model.guidance_kind == "embedded" else None
        super().__init__(setup, updates=self.sft.updates, repeats=1, guidance=self.guidance)

    def trained_steps(self, epoch: int) -> range:
        return range(1)

    def rewards(self) -> Tensor | None:
        if "reward" not in self._drawn:
            return None
        return self.setup.world.collect(self._drawn["reward"], self.images)

    def fault(self, index: int, losses: Tensor) -> str | None:
        """Of which task a round's loss is not finite, in words; None where all are."""
        found = self.not_finite(index, losses)
        return None if found is None else f"the loss of task {found[1]!r} is not finite"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """The loss of the round just accumulated, whole and by task; the rewards of the images in hand, where they were
        chosen by them; `base_gap`, mean((v - v_base)^2), where it is in the loss."""
        owners, found = torch.tensor(self.owners(index // self.updates)), super().metrics(index, losses)
        for task in owners.unique().tolist():
            found[f"loss/task_{self.setup.config.teachers[task].name}"] = float(losses[0, owners == task].sum())
        return found

    # --- images ------------------------------------------------------------------------------------------------------

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        found = {"x0": [self.no_images()]}
        if self.sft.images_per_prompt > 1:
            found["reward"] = [torch.empty(0, device=self.setup.model.device)]
        for task, prompts, _, places in self.own_parts(epoch):
            for name, tensor in self._draw_task(epoch, task, prompts, places).items():
                found[name].append(tensor)
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def _draw_task(self, epoch: int, task: int, prompts: list[Prompt], here: Tensor) -> dict[str, Tensor]:
        """What a task has for `_drawn`: of each prompt in `here` the best image that its teacher draws."""
        setup, several = self.setup, self.sft.images_per_prompt
        train, model = setup.config.train, setup.model
        every = [prompts[i] for i in here.tolist() for _ in range(several)]
        keys = noise_keys(train.seed, ROLLOUT_STREAM, epoch, task, samples=len(prompts) * several)
        keys = keys.view(-1, several)[here].flatten().to(model.device)
        at_once = train.micro_batch or train.samples_per_task
        latents = []
        with setup.teachers.active(task) as transformer:
            for start in range(0, len(every), at_once):
                part = slice(start, start + at_once)
                latents.append(
                    sample(
                        model,
                        transformer,
                        setup.text.rows([prompt.text for prompt in every[part]]),
                        setup.text.negative,
                        setup.teachers.teachers[task].guidance,
                        setup.table,
                        shape=setup.shape,
                        keys=keys[part],
                    )
                )
        x0 = torch.cat(latents)
        if several == 1:
            return {"x0": x0}
        images = torch.cat([model.decode(part) for part in latents])
        rewards = judged(self.jury, setup.config.teachers[task], images, every)
        best, of_prompt = rewards.view(-1, several).max(1)
        rows = of_prompt + several * torch.arange(len(here))
        return {"x0": x0[rows.to(x0.device)], "reward": best.to(x0.device)}

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        setup, weight = self.setup, self.sft.base_weight
        model, device = setup.model, setup.model.device
        keys = self.keys(epoch, NOISE_STREAM)
        losses, gap = torch.zeros(1, self.images, device=device), torch.zeros((), device=device)
        with setup.student.merged_for_round():
            for mine, share in zip(self.micro_batches(rows), self.micro_batches(shares), strict=True):
                x0, noise = self._drawn["x0"][self.places(mine)], philox_normal(keys[mine], setup.shape, NOISE)
                t = philox_normal(keys[mine], (1, 1, 1), LEVEL).sigmoid()
                x, level = torch.lerp(x0, noise, t), t.flatten()
                text = self.text(epoch, mine)
                condition = Conditioning.build(model, text, None, self.guidance)
                v = setup.student.velocities(model, x, level, condition).cond
                loss = flow_matching_loss(v, x0, noise)
                if weight > 0:
                    with torch.no_grad(), self._base.active(0) as transformer:
                        base = predict_velocities(model, transformer, x, level, condition).cond
                    away = squared_gap(v, base)
                    loss = loss + weight * away
                    gap += (share * away.detach()).sum()
                weighed = share * loss
                scaler.scale(weighed.sum()).backward()
                losses[0, mine] = weighed.detach()
        return losses, {"base_gap": gap} if weight > 0 else {}
