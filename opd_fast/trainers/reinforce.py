"""What GRPO and DiffusionNFT share: images in groups of one prompt, their rewards, and parts of them for each update.

A rollout draws `train.samples_per_task` images for each task in its turn, `rl.images_per_prompt` of every prompt. The
task's reward judges them, and an advantage is a reward's distance from its group's mean, over a standard deviation of
the task's own, since tasks have rewards of different sizes (`rl.statistics: all` takes one for all, as many do). The
rollout serves `rl.updates` rounds, a random part of it each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from opd_fast.models.base import TextEmbeds
from opd_fast.prompts import Prompt
from opd_fast.rewards import prompt_groups
from opd_fast.rewards.judge import Jury, judged
from opd_fast.seeds import noise_keys
from opd_fast.teachers import Course, TeacherBank
from opd_fast.trainers.advantages import advantages
from opd_fast.trainers.setup import Setup, prompts_per_turn
from opd_fast.velocity import Conditioning, Velocities

ROLLOUT_STREAM, ORDER_STREAM = 1, 3
"""Set apart what is drawn from one seed."""
EVERYWHERE = ("reward", "advantage", "task")
"""What every process knows of all images."""


class Reinforcement(ABC):
    """A method of the training loop that learns from rewards: it draws images and learns from a part of them."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.config
        self.rl = config.rl
        self.images = config.train.samples_per_task * setup.schedule.per_round
        """Of a rollout, on all devices."""
        mine, own = setup.world.rows(self.images)
        self.mine = torch.tensor(mine[:own], dtype=torch.int64)
        """Which of them this process draws and learns from."""
        self.samples = self.images / self.rl.updates
        """Images that a round learns from."""
        self.kl = config.base_weight
        self.jury = Jury("raise", config.evaluation.reward_timeout)
        self._base = TeacherBank.of_base(setup.model, config.student.guidance)
        self._drawn: dict[str, Tensor] = {}
        """The rollout in hand: of all images reward, advantage and task, (images,); of this process's own, in the order
        of `mine`, what `roll_out` found."""
        self._counts: dict[str, Tensor] = {}
        """What the last round has for its metrics beside the loss, each 0-dim."""

    @abstractmethod
    def roll_out(self, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The final latents (own images, C, H, W) of rollout `epoch`, and what learning needs of it."""

    @abstractmethod
    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of the loss of `rows` (n,), some of `mine`, weighed by `shares` (n,).

        Returns the weighed losses (steps, images) float32, 0 for images that are not in `rows`, and counts for the
        metrics, weighed alike.
        """

    @abstractmethod
    def trained_steps(self, epoch: int) -> range:
        """The solver steps at which rollout `epoch` is learnt from, as `learn` orders them."""

    @abstractmethod
    def chosen(self, drawn: dict[str, Tensor]) -> Tensor:
        """(B,) bool: images worth learning from."""

    # --- the loop's side ---------------------------------------------------------------------------------------------

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        """Add the gradient of round `index`, times the scaler's factor, to the student's parameters.

        Returns the loss of every image of the rollout at every trained step (steps, images), unscaled, 0 for images
        that the round does not learn from.
        """
        epoch, part = divmod(index, self.rl.updates)
        if part == 0:
            self._drawn = self._draw(epoch)
        drawn = self._drawn
        order = torch.randperm(self.images, generator=generator(self.setup.config.train.seed, ORDER_STREAM, epoch))
        device, world = drawn["advantage"].device, self.setup.world
        order = order.to(device)
        rows = order[self.chosen(drawn)[order]][part :: self.rl.updates]
        weights = torch.tensor([teacher.weight for teacher in self.setup.config.teachers], device=device)
        shares = weights[drawn["task"]] / weights[drawn["task"][rows]].sum() * world.size  # gradients are averaged
        own = rows[rows % world.size == world.rank]
        losses, self._counts = torch.zeros(len(self.trained_steps(epoch)), self.images, device=device), {}
        if len(rows):
            losses, counts = self.learn(epoch, own, shares[own], scaler)
            self._counts = {name: world.mean(value) for name, value in counts.items()}
        self.setup.student.average_gradients()
        for parameter in self.setup.student.parameters():
            if parameter.grad is None:  # nothing to learn from: a step of zero, which a gradient scaler can judge
                parameter.grad = torch.zeros_like(parameter)
        self._counts["images"] = torch.tensor(len(rows))
        for task in drawn["task"].unique().tolist():
            name = self.setup.config.teachers[task].name
            self._counts[f"reward/{name}"] = drawn["reward"][drawn["task"] == task].mean()
        if part == self.rl.updates - 1:
            self._drawn = {}
        return world.mean(losses)

    def fault(self, index: int, losses: Tensor) -> str | None:
        """Where a round's losses first cease to be finite, in words; None where all are."""
        bad = torch.nonzero(~torch.isfinite(losses))
        if not len(bad):
            return None
        row, image = bad[0].tolist()
        epoch = index // self.rl.updates
        owners = [task for task, prompts in self.tasks(epoch) for _ in prompts]
        name = self.setup.config.teachers[owners[image]].name
        return f"the loss of task {name!r} is not finite at step {self.trained_steps(epoch)[row]}"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """The loss of the round just accumulated, its rewards, and what the method counts."""
        return {"loss": float(losses.sum())} | {name: float(value) for name, value in self._counts.items()}

    def state(self) -> dict[str, Tensor]:
        """The rollout in hand, whole, where a checkpoint falls between two of its updates."""
        collect = self.setup.world.collect
        return {
            f"drawn.{name}": tensor if name in EVERYWHERE else collect(tensor, self.images)
            for name, tensor in self._drawn.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, on however many processes."""
        prefix, device = "drawn.", self.setup.model.device
        drawn = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self._drawn = {k: (v if k in EVERYWHERE else v[self.mine]).to(device) for k, v in drawn.items()}

    # --- the methods' side -------------------------------------------------------------------------------------------

    def tasks(self, epoch: int) -> list[tuple[int, list[Prompt]]]:
        """(task, the prompts of its images) of rollout `epoch`, the images of a prompt beside each other."""
        setup, found = self.setup, []
        for task, turns in setup.schedule.round(epoch):
            indices = [i for turn in turns for i in setup.sources[task].batch(turn, prompts_per_turn(setup.config))]
            prompts = [setup.prompts[task][i] for i in indices for _ in range(self.rl.images_per_prompt)]
            found.append((task, prompts))
        return found

    def places(self, rows: Tensor) -> Tensor:
        """Where images of this process lie among `mine`."""
        return rows // self.setup.world.size

    def keys(self, epoch: int, stream: int = ROLLOUT_STREAM) -> Tensor:
        """(B,) int64 noise keys of the rollout's images."""
        seed = self.setup.config.train.seed
        parts = [noise_keys(seed, stream, epoch, task, samples=len(p)) for task, p in self.tasks(epoch)]
        return torch.cat(parts).to(self.setup.model.device)

    def text(self, epoch: int, rows: Tensor) -> TextEmbeds:
        """The prompts of some images, embedded."""
        prompts = [prompt.text for _, prompts in self.tasks(epoch) for prompt in prompts]
        return self.setup.text.rows([prompts[i] for i in rows.tolist()])

    def condition(self, epoch: int, rows: Tensor) -> Conditioning:
        """What the transformer is told of some images, under the student's guidance."""
        setup = self.setup
        return Conditioning.build(setup.model, self.text(epoch, rows), setup.text.negative, setup.student.guidance)

    def base_velocities(self, x: Tensor, sigma: Tensor, condition: Conditioning) -> Velocities:
        """The base's, without gradient."""
        guidance = torch.full((len(x),), self.setup.student.guidance, device=x.device)
        course = Course(((0, slice(0, len(x)), condition),), guidance)
        return self._base.velocities(x, sigma, course)

    def micro_batches(self, rows: Tensor) -> Iterator[Tensor]:
        if len(rows):  # a process may have none
            yield from rows.split(self.setup.config.train.micro_batch or len(rows))

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        with torch.no_grad():
            latents, needed = self.roll_out(epoch)
            images = self.setup.model.decode(latents)
        rewards = self._rewards(epoch, images)
        groups = [prompt_groups(prompts) for _, prompts in self.tasks(epoch)]
        owners = [torch.full((len(prompts),), task) for task, prompts in self.tasks(epoch)]
        found = {"reward": rewards, "task": torch.cat(owners)}
        found["advantage"] = self._advantages(list(rewards.split([len(own) for own in groups])), groups)
        return {name: tensor.to(latents.device) for name, tensor in found.items()} | needed

    def _rewards(self, epoch: int, images: Tensor) -> Tensor:
        """(images,) float32 on the CPU, of all processes; each judges what it drew."""
        mine, first, teachers = torch.empty(len(self.mine)), 0, self.setup.config.teachers
        for task, prompts in self.tasks(epoch):
            here = (self.mine >= first) & (self.mine < first + len(prompts))
            if bool(here.any()):
                asked = [prompts[i - first] for i in self.mine[here].tolist()]
                mine[here] = judged(self.jury, teachers[task], images[here.to(images.device)], asked)
            first += len(prompts)
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


def generator(*path: int) -> torch.Generator:
    """A generator that follows from a path such as seed, stream, rollout."""
    return torch.Generator().manual_seed(int(noise_keys(*path, samples=1)) % 2**63)
