"""What GRPO and DiffusionNFT share: images in groups of one prompt, their rewards, and parts of them for each update.

A rollout draws `train.samples_per_task` images for each task in its turn, `rl.images_per_prompt` of every prompt. The
task's reward judges them, and an advantage is a reward's distance from its group's mean, divided by the standard
deviation of the task's rewards, because tasks have rewards of different sizes (`rl.statistics: all` takes one for all,
as many do). The rollout serves `rl.updates` rounds, each of which learns from a random part of it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from opd_fast.config.methods.spec import method_spec
from opd_fast.models.guidance import Conditioning
from opd_fast.rewards import prompt_groups
from opd_fast.rewards.runner import submit_task
from opd_fast.training.methods.image_buffer import ImageBuffer
from opd_fast.training.setup import Setup


def varied(rewards: Tensor, groups: Tensor) -> Tensor:
    """Returns (B,) bool, whether a sample's group has different rewards; a group of equal rewards teaches nothing."""
    count = int(groups.max()) + 1 if len(groups) else 0
    highest = rewards.new_full((count,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    lowest = rewards.new_full((count,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    return (highest > lowest)[groups]


def advantages(
    rewards: Tensor, groups: Tensor, *, std: Literal["global", "group"] = "global", eps: float = 1e-4, clip: float = 5.0
) -> Tensor:
    """(reward - mean of its group) / (std + eps), clipped to [-clip, clip].

    `groups` (B,) int64 is equal for the images of one prompt, numbered from 0 (`rewards.prompt_groups`). `std` is the
    population standard deviation of all rewards (B,), Flow-GRPO's default, or of each group's. Returns (B,) float32,
    exactly 0 in groups whose rewards are all equal. Raises ValueError for a reward that is not finite, because the mean
    would spread it over its group.
    """
    if not bool(rewards.isfinite().all()):
        raise ValueError("a reward is NaN or infinite; it would spoil its group's mean: judge with policy raise")
    values = rewards.double()
    count = int(groups.max()) + 1 if len(groups) else 0
    size = torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, groups, torch.ones_like(values))
    mean = torch.zeros_like(size).index_add_(0, groups, values) / size
    gap = (values - mean[groups]).masked_fill(~varied(rewards, groups), 0.0)  # the mean of equals is rounded
    if std == "group":
        spread = (torch.zeros_like(size).index_add_(0, groups, gap.square()) / size).sqrt()[groups]
    else:
        spread = values.std(correction=0)
    return (gap / (spread + eps)).clamp(-clip, clip).float()


# --- the method -------------------------------------------------------------------------------------------------------


class Reinforcement(ImageBuffer):
    """A method of the training loop that learns from rewards: it draws images and learns from a part of them."""

    replicated = ("reward", "advantage", "task")

    def __init__(self, setup: Setup) -> None:
        self.rl = setup.config.rl
        self.kl = method_spec(setup.config).base_weight(setup.config)
        super().__init__(setup, setup.config.student.guidance)

    @abstractmethod
    def roll_out(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The final latents (n, C, H, W) of this process in rollout `epoch`, and what learning needs beside them."""

    def chosen(self, drawn: dict[str, Tensor]) -> Tensor:
        """Returns (B,) bool: the images to learn from, by default all."""
        return torch.ones_like(drawn["advantage"], dtype=torch.bool)

    def select(self, order: Tensor) -> Tensor:
        return order[self.chosen(self._drawn)[order]]

    def rewards(self) -> Tensor:
        return self._drawn["reward"]

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        losses = super().accumulate(index, scaler)
        for parameter in self.setup.student.parameters():
            if parameter.grad is None:  # no image to learn from; a gradient scaler needs a gradient, if only of zeros
                parameter.grad = torch.zeros_like(parameter)
        return losses

    def fault(self, index: int, row: int, sample: int) -> str:
        return f"{super().fault(index, row, sample)} at step {self.trained_steps(index // self.updates)[row]}"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        return super().metrics(index, losses) | {"images": float(self._learnt)}

    def condition(self, epoch: int, rows: Tensor) -> Conditioning:
        """What the transformer is given beside the states of some images, under the student's guidance."""
        setup = self.setup
        return Conditioning.build(setup.model, self.text(epoch, rows), setup.text.negative, setup.student.guidance)

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            latents, needed = self.roll_out(epoch)
            images = self.setup.model.decode(latents) if len(latents) else latents  # the VAE takes no empty batch
        rewards = self._judged(epoch, images)
        groups = [prompt_groups(prompts) for _, prompts in self.tasks(epoch)]
        drawn = {"reward": rewards, "task": torch.tensor(self.owners(epoch))}
        drawn["advantage"] = self._advantages(list(rewards.split([len(group) for group in groups])), groups)
        return {name: tensor.to(latents.device) for name, tensor in drawn.items()} | needed

    def _judged(self, epoch: int, images: Tensor) -> Tensor:
        """Returns the rewards of all images (images,) float32 on the CPU; each process judges what it drew."""
        rewards, teachers = torch.empty(len(self.rank_indices)), self.setup.config.teachers
        waiting = []
        for task, prompts, in_task, positions in self.rank_parts(epoch):  # the tasks are judged beside each other
            drawn, of_images = images[in_task.to(images.device)], [prompts[i] for i in positions.tolist()]
            waiting.append((in_task, submit_task(self.reward_runner, teachers[task], drawn, of_images)))
        for in_task, reward in waiting:
            rewards[in_task] = reward()
        device = self.setup.model.device  # where NCCL can gather
        return self.setup.world.gather_samples(rewards.to(device), self.images).cpu()

    def _advantages(self, rewards: list[Tensor], groups: list[Tensor]) -> Tensor:
        """(B,) of all tasks, by the statistics of each task or of all together."""
        if self.rl.statistics == "all":
            counts = [int(group.max()) + 1 for group in groups]
            before = [sum(counts[:i]) for i in range(len(counts))]
            groups = [torch.cat([group + start for group, start in zip(groups, before, strict=True)])]
            rewards = [torch.cat(rewards)]
        parts = [
            advantages(of_task, group, std=self.rl.std, clip=self.rl.advantage_clip)
            for of_task, group in zip(rewards, groups, strict=True)
        ]
        return torch.cat(parts)
