"""The images of a draw, from which several rounds learn: which process has which, and which round learns from which.

The images of a draw are numbered over all tasks, those of a prompt beside each other. Image i belongs to process
i % size: it is drawn, kept and learnt from there. A round takes a random part of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from opd_fast.config.methods.spec import method_spec
from opd_fast.data.prompt_files import Prompt
from opd_fast.models.guidance import Conditioning, Velocities, predict_velocities
from opd_fast.models.text import TextEmbeds
from opd_fast.rewards.runner import RewardRunner
from opd_fast.seeds import Stream, noise_keys
from opd_fast.training.methods.base import Method
from opd_fast.training.setup import Setup
from opd_fast.training.teacher_loading import base_teacher


class ImageBuffer(Method):
    """A method of the training loop whose rounds share images. `guidance` is that of the base's velocities."""

    replicated: tuple[str, ...] = ()
    """The names in `_drawn` of what every process keeps of all images."""

    def __init__(self, setup: Setup, guidance: float | None) -> None:
        super().__init__(setup)
        config, spec = setup.config, method_spec(setup.config)
        self.updates, self.prompts_per_turn = spec.updates(config), spec.prompts_per_turn(config)
        """Rounds that learn from one draw, and distinct prompts of a task in its turn."""
        self.images = config.train.samples_per_task * setup.schedule.per_round
        """Images of a draw, on all devices."""
        indices, count = setup.world.rows(self.images)
        self.rank_indices = torch.tensor(indices[:count], dtype=torch.int64)
        """Which of the images this process draws and learns from."""
        self.samples = self.images / self.updates
        """Images that a round learns from, on average."""
        self.reward_runner = RewardRunner("raise", config.evaluation.reward_timeout, config.reward_models)
        self._base = base_teacher(setup.model, guidance)
        self._drawn: dict[str, Tensor] = {}
        """The images in hand: a tensor's first dimension counts those of this process, in the order of `rank_indices`,
        or all images where its name is in `replicated`."""
        self._counts: dict[str, Tensor] = {}
        """What the last round adds to its metrics beside the loss, each 0-dim."""
        self._learnt = 0
        """Images that the last round learnt from, on all devices."""

    @abstractmethod
    def _draw(self, epoch: int) -> dict[str, Tensor]:
        """The images of draw `epoch`, for `_drawn`."""

    @abstractmethod
    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of the loss of `rows` (n,), some of `rank_indices`, weighed by `shares` (n,).

        Returns the weighed losses (steps, images) float32, 0 for images that are not in `rows`, and counts for the
        metrics, weighed alike.
        """

    @abstractmethod
    def trained_steps(self, epoch: int) -> range:
        """The steps at which draw `epoch` is learnt from, as `learn` orders them."""

    @abstractmethod
    def rewards(self) -> Tensor | None:
        """(images,) of all processes' images in hand; None where nothing was judged."""

    def select(self, order: Tensor) -> Tensor:
        """Returns those of the images `order` (images,) that are learnt from."""
        return order

    # --- the loop's side ---------------------------------------------------------------------------------------------

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        """As the loop asks for it; the losses (steps, images) are 0 for images that the round does not learn from."""
        config, world, device = self.setup.config, self.setup.world, self.setup.model.device
        epoch, part = divmod(index, self.updates)
        if part == 0:
            self._drawn = self._draw(epoch)
        order = torch.randperm(self.images, generator=generator(config.train.seed, Stream.ORDER, epoch)).to(device)
        rows = self.select(order)[part :: self.updates]
        owners = torch.tensor(self.owners(epoch))
        weights = torch.tensor([teacher.weight for teacher in config.teachers])[owners].to(device)
        shares = weights / weights[rows].sum() * world.size  # gradients are averaged
        rank_rows = rows[rows % world.size == world.rank]
        losses, self._counts = torch.zeros(len(self.trained_steps(epoch)), self.images, device=device), {}
        self._learnt = len(rows)
        if len(rows):
            losses, counts = self.learn(epoch, rank_rows, shares[rank_rows], scaler)
            self._counts = {name: world.mean(value) for name, value in counts.items()}
        self.setup.student.average_gradients()
        if (rewards := self.rewards()) is not None:
            for task in owners.unique().tolist():
                self._counts[f"reward/{config.teachers[task].name}"] = rewards.cpu()[owners == task].mean()
        if part == self.updates - 1:
            self._drawn = {}
        return world.mean(losses)

    def fault(self, index: int, row: int, sample: int) -> str:
        task = self.owners(index // self.updates)[sample]
        return f"the loss of task {self.setup.config.teachers[task].name!r} is not finite"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """The loss of the round just accumulated, its rewards, and what the method counts."""
        return {"loss": float(losses.sum())} | {name: float(value) for name, value in self._counts.items()}

    def state(self) -> dict[str, Tensor]:
        """The images in hand, whole, where a checkpoint falls between two of their rounds."""
        collect = self.setup.world.gather_samples
        return {
            f"drawn.{name}": tensor if name in self.replicated else collect(tensor, self.images)
            for name, tensor in self._drawn.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        device = self.setup.model.device
        drawn = {k.removeprefix("drawn."): v for k, v in tensors.items() if k.startswith("drawn.")}
        self._drawn = {k: (v if k in self.replicated else v[self.rank_indices]).to(device) for k, v in drawn.items()}

    # --- the methods' side -------------------------------------------------------------------------------------------

    def tasks(self, epoch: int) -> list[tuple[int, list[Prompt]]]:
        """(task, the prompts of its images) of draw `epoch`, the images of a prompt beside each other."""
        setup, tasks, count = self.setup, [], self.prompts_per_turn
        repeats = setup.config.train.samples_per_task // count
        for task, turns in setup.schedule.round(epoch):
            indices = [i for turn in turns for i in setup.sources[task].batch(turn, count)]
            tasks.append((task, [setup.prompts[task][i] for i in indices for _ in range(repeats)]))
        return tasks

    def no_images(self, *each: int) -> Tensor:
        """(0, *each, C, H, W) float32: what a process has before its first image. Gathering takes all processes, so one
        without images has it as well."""
        return torch.empty(0, *each, *self.setup.shape, device=self.setup.model.device)

    def rank_parts(self, epoch: int) -> Iterator[tuple[int, list[Prompt], Tensor, Tensor]]:
        """(task, its prompts, which of `rank_indices` are its images, their positions among its prompts) of the tasks
        that have images on this process."""
        first = 0
        for task, prompts in self.tasks(epoch):
            in_task = (self.rank_indices >= first) & (self.rank_indices < first + len(prompts))
            if bool(in_task.any()):
                yield task, prompts, in_task, self.rank_indices[in_task] - first
            first += len(prompts)

    def owners(self, epoch: int) -> list[int]:
        """Returns the task of each image of draw `epoch`."""
        return [task for task, prompts in self.tasks(epoch) for _ in prompts]

    def positions(self, rows: Tensor) -> Tensor:
        """Where images of this process stand in `rank_indices`."""
        return rows // self.setup.world.size

    def keys(self, epoch: int, stream: Stream = Stream.ROLLOUT) -> Tensor:
        """Returns (images,) int64 noise keys."""
        seed = self.setup.config.train.seed
        parts = [noise_keys(seed, stream, epoch, task, samples=len(p)) for task, p in self.tasks(epoch)]
        return torch.cat(parts).to(self.setup.model.device)

    def text(self, epoch: int, rows: Tensor) -> TextEmbeds:
        """Returns the embedded prompts of some images."""
        prompts = [prompt.text for _, prompts in self.tasks(epoch) for prompt in prompts]
        return self.setup.text.rows([prompts[i] for i in rows.tolist()])

    @torch.no_grad()
    def base_velocities(self, x: Tensor, sigma: Tensor, condition: Conditioning) -> Velocities:
        """Returns the base's velocities, without gradient."""
        with self._base.active(0) as transformer:
            return predict_velocities(self.setup.model, transformer, x, sigma, condition)

    def micro_batches(self, rows: Tensor) -> Iterator[Tensor]:
        if len(rows):  # a process may have none
            yield from rows.split(self.setup.config.train.micro_batch or len(rows))


def generator(*path: int) -> torch.Generator:
    """Returns a generator that follows from a path such as seed, stream, draw."""
    return torch.Generator().manual_seed(int(noise_keys(*path, samples=1)) % 2**63)
