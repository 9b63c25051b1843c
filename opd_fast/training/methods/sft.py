"""Supervised fine-tuning on images that the teachers draw: flow matching, the cold start that Flow-OPD gives a student
before it distils on-policy (the project's page and released code).

At x_t = (1 - t) x0 + t eps, fresh noise eps on an image x0 of the teacher, the velocity is to be eps - x0 (rectified
flow, arXiv 2209.03003, equation 1). The loss of an image is

    mean((v - (eps - x0))^2) + base_weight mean((v - v_base)^2),        t logit-normal(0, 1)

with the density of t of SD3 (arXiv 2403.03206, section 3.1), not shifted as the sampler's levels are. Of several images
of one prompt the released script keeps the one of the highest reward.

The conditional branch alone is trained, because classifier-free guidance belongs to the sampler. Where guidance is an
input of the transformer (FLUX.1-dev), it is the student's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.models.guidance import Conditioning
from opd_fast.rewards.runner import submit_task
from opd_fast.seeds import SftDraw, Stream, noise_keys
from opd_fast.training.methods.image_buffer import ImageBuffer
from opd_fast.training.sampling import sample
from opd_fast.training.setup import Setup
from opd_kernels import philox_normal


def squared_gap(a: Tensor, b: Tensor) -> Tensor:
    """mean((a - b)^2) over the elements of each sample, (B,) float32; a, b (B, C, H, W) of any floating type."""
    return (a.float() - b.float()).flatten(1).square().mean(1)


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean((v - (eps - x0))^2) of each sample, (B,) float32; v, x0 and noise = eps (B, C, H, W)."""
    return squared_gap(v, noise.float() - x0.float())


class SFT(ImageBuffer):
    """The method `sft` of the training loop: the teachers draw once in `sft.updates` rounds, which share the images.

    A process keeps of its n images x0 (n, C, H, W) float32 and, where a reward chose them, reward (n,) float32.
    """

    def __init__(self, setup: Setup) -> None:
        self.sft = setup.config.sft
        self.guidance = setup.student.guidance if setup.model.guidance_kind == "embedded" else None
        super().__init__(setup, self.guidance)

    def trained_steps(self, epoch: int) -> range:
        return range(1)

    def rewards(self) -> Tensor | None:
        if "reward" not in self._drawn:
            return None
        return self.setup.world.gather_samples(self._drawn["reward"], self.images)

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """Returns the loss of the round just accumulated, whole and by task; the mean rewards of the images in hand,
        where rewards chose them; and `base_gap`, mean((v - v_base)^2), where it is in the loss."""
        owners, metrics = torch.tensor(self.owners(index // self.updates)), super().metrics(index, losses)
        for task in owners.unique().tolist():
            metrics[f"loss/task_{self.setup.config.teachers[task].name}"] = float(losses[0, owners == task].sum())
        return metrics

    # --- images ------------------------------------------------------------------------------------------------------

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        parts = {"x0": [self.no_images()]}
        if self.sft.images_per_prompt > 1:
            parts["reward"] = [torch.empty(0, device=self.setup.model.device)]
        # A task's images are judged while the next teacher draws.
        for best in [self._draw_task(epoch, task, prompts, rows) for task, prompts, _, rows in self.rank_parts(epoch)]:
            for name, tensor in best().items():
                parts[name].append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    @torch.no_grad()
    def _draw_task(
        self, epoch: int, task: int, prompts: list[Prompt], positions: Tensor
    ) -> Callable[[], dict[str, Tensor]]:
        """Draws the images of each prompt in `positions` by the task's teacher. Returns a function that waits for their
        rewards and returns what the task has for `_drawn`: the best image of each prompt."""
        setup, several = self.setup, self.sft.images_per_prompt
        train, model = setup.config.train, setup.model
        repeated = [prompts[i] for i in positions.tolist() for _ in range(several)]
        keys = noise_keys(train.seed, Stream.ROLLOUT, epoch, task, samples=len(prompts) * several)
        keys = keys.view(-1, several)[positions].flatten().to(model.device)
        at_once, guidance = train.micro_batch or train.samples_per_task, setup.teachers.teachers[task].guidance
        latents = []
        with setup.teachers.active(task) as transformer:
            for start in range(0, len(repeated), at_once):
                part = slice(start, start + at_once)
                branches = setup.text.rows([prompt.text for prompt in repeated[part]]), setup.text.negative
                latents.append(
                    sample(model, transformer, *branches, guidance, setup.table, shape=setup.shape, keys=keys[part])
                )
        x0 = torch.cat(latents)
        if several == 1:
            return lambda: {"x0": x0}
        images = torch.cat([model.decode(part) for part in latents])
        rewards = submit_task(self.reward_runner, setup.config.teachers[task], images, repeated)

        def best() -> dict[str, Tensor]:
            highest, of_prompt = rewards().view(-1, several).max(1)
            rows = of_prompt + several * torch.arange(len(positions))
            return {"x0": x0[rows.to(x0.device)], "reward": highest.to(x0.device)}

        return best

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        setup, weight = self.setup, self.sft.base_weight
        model, device = setup.model, setup.model.device
        keys = self.keys(epoch, Stream.SFT_NOISE)
        losses, gap = torch.zeros(1, self.images, device=device), torch.zeros((), device=device)
        with setup.student.merged_for_round():
            for part, share in zip(self.micro_batches(rows), self.micro_batches(shares), strict=True):
                x0 = self._drawn["x0"][self.positions(part)]
                noise = philox_normal(keys[part], setup.shape, SftDraw.NOISE)
                t = philox_normal(keys[part], (1, 1, 1), SftDraw.LEVEL).sigmoid()
                x, level = torch.lerp(x0, noise, t), t.flatten()
                condition = Conditioning.build(model, self.text(epoch, part), None, self.guidance)
                v = setup.student.velocities(model, x, level, condition).cond
                loss = flow_matching_loss(v, x0, noise)
                if weight > 0:
                    away = squared_gap(v, self.base_velocities(x, level, condition).cond)
                    loss = loss + weight * away
                    gap += (share * away.detach()).sum()
                weighed = share * loss
                scaler.scale(weighed.sum()).backward()
                losses[0, part] = weighed.detach()
        return losses, {"base_gap": gap} if weight > 0 else {}
