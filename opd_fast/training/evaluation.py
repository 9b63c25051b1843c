"""Rewards of a model on held-out prompts: its images are drawn, and the rewards' values are averaged."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.distributed.world import World
from opd_fast.models.base import DiffusionModel
from opd_fast.rewards import get_reward
from opd_fast.rewards.runner import Pending, RewardRunner
from opd_fast.seeds import noise_keys
from opd_fast.solvers import SolverTable
from opd_fast.training.sampling import sample


@dataclass(frozen=True)
class EvalTask:
    """Prompts and the names of the rewards that judge their images.

    Attributes:
        images: how many are drawn; image i is of prompt i % len(prompts), with noise of its own. None draws one of
            each prompt.
    """

    name: str
    prompts: list[Prompt]
    rewards: list[str]
    images: int | None = None

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.prompts) if self.images is None else self.images


@dataclass(frozen=True)
class ImageSampler:
    """How an evaluation draws images. Models that are compared share all of it but the guidance.

    Attributes:
        model: the frozen parts.
        table: the solver's rows; a stochastic solver draws its noise from the same keys as the initial state.
        shape: (C, H, W) of a latent.
        guidance: as the model's pipeline takes it (`DiffusionModel.strength`); None is unguided.
        seed: decides the noise, together with a task's name and an image's index.
        text: holds every prompt that is drawn.
        batch: images drawn at once on a device. It does not change results beyond rounding.
    """

    model: DiffusionModel
    table: SolverTable
    shape: tuple[int, int, int]
    guidance: float | None
    seed: int
    text: EmbeddingCache
    batch: int = 64

    def draw(self, transformer: nn.Module, prompts: Sequence[Prompt], keys: Tensor) -> Tensor | None:
        """Return images (B, 3, H, W) of the prompts, or None where the model yields NaN or infinite numbers."""
        model, guidance, shape = self.model, self.guidance, self.shape
        rows = self.text.rows([prompt.text for prompt in prompts])
        negative = self.text.negative if model.is_guided(guidance) else None
        keys = keys.to(model.device)
        latents = sample(model, transformer, rows, negative, guidance, self.table, shape=shape, keys=keys)
        # The VAE clamps to [0, 1], which would hide an infinity, so the latents are looked at first.
        images = model.decode(latents) if bool(latents.isfinite().all()) else None
        return images if images is not None and bool(images.isfinite().all()) else None


@dataclass(frozen=True)
class Evaluation:
    """Means over each task's images.

    Attributes:
        rewards: task to reward to mean. A mean is over the images that have a value; it is NaN where none has.
        images: task to the images of its first `keep_images` prompts (n, 3, H, W), float32 in [0, 1], on the CPU.
        failed: (reward, reason) to what the reward did wrong, in words.
    """

    rewards: dict[str, dict[str, float]]
    images: dict[str, Tensor]
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[str, ...]:
        """What rewards did wrong, in words."""
        return tuple(self.failed.values())

    def unjudged(self) -> list[tuple[str, str]]:
        """Return the (task, reward) for which no image has a value."""
        means = ((task, name, mean) for task, row in self.rewards.items() for name, mean in row.items())
        return [(task, name) for task, name, mean in means if math.isnan(mean)]


def task_keys(seed: int, task: str, count: int) -> Tensor:
    """Return (count,) int64 noise keys, which depend on the seed, the task's name and an image's index alone.

    Every model that is evaluated under a seed therefore sees the same noise, in any batch and beside any other task.
    """
    name = int.from_bytes(hashlib.blake2b(task.encode(), digest_size=7).digest(), "little")
    return noise_keys(seed, name, samples=count)


def evaluate(
    sampler: ImageSampler,
    transformer: nn.Module,
    tasks: Sequence[EvalTask],
    *,
    keep_images: int = 0,
    progress: Callable[[int, int], None] | None = None,
    reward_timeout: float | None = None,
    reward_models: RewardModelsConfig | None = None,
    world: World | None = None,
    reported: set[tuple[str, str]] | None = None,
) -> Evaluation:
    """Draw the images of every task and average their rewards.

    Args:
        sampler: how the images are drawn.
        transformer: the base, a teacher or a student of the architecture of `sampler.model`.
        keep_images: prompts of each task whose first image is returned.
        progress: called with (images done, images in all).
        reward_timeout: seconds that a reward may take for a batch; None sets no limit.
        reward_models: the models and servers of the rewards that have one.
        world: the processes that draw the images together, each its share; all get the same result.
        reported: (reward, reason) of the failures printed before; those printed here are added.

    A reward that fails is passed over. What it did is printed to stderr, unless `reported` has it.

    Raises:
        ValueError: a task without prompts or with fewer images than prompts, two tasks of one name, an unknown reward
            or one named twice, or a model that yields NaN or infinite numbers.
    """
    world = world or World()
    _check_tasks(tasks)
    done, total = 0, sum(task.count for task in tasks)

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    means: dict[str, dict[str, float]] = {}
    kept: dict[str, Tensor] = {}
    with RewardRunner("record", reward_timeout, reward_models) as runner:
        # Every task is drawn before the first is read, so that its last batch is judged while the next task is drawn.
        judged: dict[str, list[Pending]] = {}
        for task in tasks:
            keep = min(keep_images, len(task.prompts))
            judged[task.name], images = _draw_task(sampler, transformer, task, runner, world, keep, advance)
            if images is not None:
                kept[task.name] = images
        for task in tasks:
            values = _values(judged[task.name], task, world)
            means[task.name] = {name: float(of_images.nanmean()) for name, of_images in values.items()}
    failed: dict[tuple[str, str], str] = {}
    reported = set() if reported is None else reported
    for reason, message in world.all_gather_objects(list(runner.messages.items())):
        failed.setdefault(reason, message)
        if reason not in reported and world.is_main:
            print(f"evaluation: {message}", file=sys.stderr, flush=True)
        reported.add(reason)
    return Evaluation(means, kept, failed)


def _draw_task(
    sampler: ImageSampler,
    transformer: nn.Module,
    task: EvalTask,
    runner: RewardRunner,
    world: World,
    keep: int,
    advance: Callable[[int], None],
) -> tuple[list[Pending], Tensor | None]:
    """Draw this process's images of a task and have each batch judged while the next is drawn.

    Returns the batches that are judged, and the images of the first `keep` prompts of all processes, if any. `advance`
    is called with the number of images of each batch.
    """
    keys = task_keys(sampler.seed, task.name, task.count)
    judged: list[Pending] = []
    kept: list[Tensor] = []
    indices, owned = world.rows(task.count)
    keep_indices, _ = world.rows(keep)
    for start in range(0, len(indices), sampler.batch):
        batch = indices[start : start + sampler.batch]
        prompts = [task.prompts[i % len(task.prompts)] for i in batch]
        images = sampler.draw(transformer, prompts, keys[batch])
        if images is None:
            raise ValueError(
                f"task {task.name!r}: the model's images hold NaN or infinite numbers; look at its weights, or set "
                "model.dtype to float32"
            )
        count = min(len(batch), max(owned - start, 0))  # the others are drawn only to keep the ranks in step
        if count:
            judged.append(runner.submit(images[:count], prompts[:count], task.rewards))
        if start < len(keep_indices):
            kept.append(images[: len(keep_indices) - start].float().cpu())
        advance(len(batch) * world.size)
    return judged, world.gather_samples(torch.cat(kept), keep) if keep else None


def _values(judged: Sequence[Pending], task: EvalTask, world: World) -> dict[str, Tensor]:
    """Return each reward's values of the images of all processes, (task.count,) float64."""
    # A process may own no image, so each list begins with a part of length 0.
    parts = {name: [torch.empty(0, dtype=torch.float64)] for name in task.rewards}
    for batch in judged:
        for name, values in batch.result().items():
            parts[name].append(values.double())
    return {name: world.gather_samples(torch.cat(of_images), task.count) for name, of_images in parts.items()}


def _check_tasks(tasks: Sequence[EvalTask]) -> None:
    for i, task in enumerate(tasks):
        if not task.prompts:
            raise ValueError(f"evaluation task {task.name!r} has no prompts; give it some or leave it out")
        if task.name in [other.name for other in tasks[:i]]:
            raise ValueError(f"two evaluation tasks are named {task.name!r}; give each a name of its own")
        if task.count < len(task.prompts):
            raise ValueError(
                f"evaluation task {task.name!r} has {task.count} images for {len(task.prompts)} prompts; give one or "
                "more for each"
            )
        if len(set(task.rewards)) < len(task.rewards):
            raise ValueError(f"evaluation task {task.name!r} names a reward twice; name each once")
        for name in task.rewards:
            get_reward(name)
