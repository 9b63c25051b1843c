"""What GRPO and DiffusionNFT share: images in groups of one prompt, their rewards, and parts of them for each update.

A rollout draws `train.samples_per_task` images for each task in its turn, `rl.images_per_prompt` of every prompt. The
task's reward judges them, and an advantage is a reward's distance from its group's mean, over a standard deviation of
the task's own, since tasks have rewards of different sizes (`rl.statistics: all` takes one for all, as many do). The
rollout serves `rl.updates` rounds, a random part of it each.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from opd_fast.models.guidance import Conditioning, Velocities
from opd_fast.rewards import prompt_groups
from opd_fast.rewards.runner import judged
from opd_fast.training.methods.advantages import advantages
from opd_fast.training.methods.image_buffer import SharedImages
from opd_fast.training.setup import Setup
from opd_fast.training.teachers import TeacherConditioning


class Reinforcement(SharedImages):
    """A method of the training loop that learns from rewards: it draws images and learns from a part of them."""

    everywhere = ("reward", "advantage", "task")

    def __init__(self, setup: Setup) -> None:
        self.rl = setup.config.rl
        self.kl = setup.config.base_weight
        repeats, guidance = self.rl.images_per_prompt, setup.config.student.guidance
        super().__init__(setup, updates=self.rl.updates, repeats=repeats, guidance=guidance)

    @abstractmethod
    def roll_out(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The final latents (own images, C, H, W) of rollout `epoch`, and what learning needs of it."""

    @abstractmethod
    def chosen(self, drawn: dict[str, Tensor]) -> Tensor:
        """(B,) bool: images worth learning from."""

    def worthy(self, order: Tensor) -> Tensor:
        return order[self.chosen(self._drawn)[order]]

    def rewards(self) -> Tensor:
        return self._drawn["reward"]

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        losses = super().accumulate(index, scaler)
        for parameter in self.setup.student.parameters():
            if parameter.grad is None:  # nothing to learn from: a step of zero, which a gradient scaler can judge
                parameter.grad = torch.zeros_like(parameter)
        return losses

    def fault(self, index: int, losses: Tensor) -> str | None:
        """Where a round's losses first cease to be finite, in words; None where all are."""
        if (found := self.not_finite(index, losses)) is None:
            return None
        row, task = found
        return f"the loss of task {task!r} is not finite at step {self.trained_steps(index // self.updates)[row]}"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        return super().metrics(index, losses) | {"images": float(self._learnt)}

    def condition(self, epoch: int, rows: Tensor) -> Conditioning:
        """What the transformer is told of some images, under the student's guidance."""
        setup = self.setup
        return Conditioning.build(setup.model, self.text(epoch, rows), setup.text.negative, setup.student.guidance)

    def base_velocities(self, x: Tensor, sigma: Tensor, condition: Conditioning) -> Velocities:
        """The base's, without gradient."""
        guidance = torch.full((len(x),), condition.branch_guidance, device=x.device)
        teacher_condition = TeacherConditioning(((0, slice(0, len(x)), condition),), guidance)
        return self._base.velocities(x, sigma, teacher_condition)

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            latents, needed = self.roll_out(epoch)
            images = self.setup.model.decode(latents) if len(latents) else latents  # the VAE takes no empty batch
        rewards = self._judged(epoch, images)
        groups = [prompt_groups(prompts) for _, prompts in self.tasks(epoch)]
        found = {"reward": rewards, "task": torch.tensor(self.owners(epoch))}
        found["advantage"] = self._advantages(list(rewards.split([len(own) for own in groups])), groups)
        return {name: tensor.to(latents.device) for name, tensor in found.items()} | needed

    def _judged(self, epoch: int, images: Tensor) -> Tensor:
        """(images,) float32 on the CPU, of all processes; each judges what it drew."""
        mine, teachers = torch.empty(len(self.mine)), self.setup.config.teachers
        for task, prompts, here, places in self.own_parts(epoch):
            asked = [prompts[i] for i in places.tolist()]
            mine[here] = judged(self.jury, teachers[task], images[here.to(images.device)], asked)
        device = self.setup.model.device  # where NCCL can gather
        return self.setup.world.collect(mine.to(device), self.images).cpu()

    def _advantages(self, rewards: list[Tensor], groups: list[Tensor]) -> Tensor:
        """(B,) of all tasks; each task has statistics of its own, or they are thrown together."""
        if self.rl.statistics == "all":
            counts = [int(own.max()) + 1 for own in groups]
            before = [sum(counts[:i]) for i in range(len(counts))]
            groups = [torch.cat([own + start for own, start in zip(groups, before, strict=True)])]
            rewards = [torch.cat(rewards)]
        parts = [
            advantages(mine, own, std=self.rl.std, clip=self.rl.advantage_clip)
            for mine, own in zip(rewards, groups, strict=True)
        ]
        return torch.cat(parts)
