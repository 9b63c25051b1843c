"""Rewards of a model on held-out prompts: images drawn, judged and averaged."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opd_fast.data.prompt_files import Prompt
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.distributed.world import World
from opd_fast.models.base import DiffusionModel
from opd_fast.solvers import SolverTable


@dataclass(frozen=True)
class EvalTask:
    """Prompts and the names of the rewards that judge their images.

    Attributes:
        images: how many are drawn; image i is of prompt i % len(prompts), with noise of its own. None: one of each.
    """

    name: str
    prompts: list[Prompt]
    rewards: list[str]
    images: int | None = None

    @property
    def count(self) -> int:
        return len(self.prompts) if self.images is None else self.images


@dataclass(frozen=True)
class Evaluation:
    """Means over each task's images.

    Attributes:
        rewards: task to reward to mean.
        images: task to the images of its first `keep_images` prompts (n, 3, H, W), float32 in [0, 1], on the CPU.
        failed: (reward, reason) to what the reward did wrong, in words. A mean is over the images that have a value;
            NaN: none has.
    """

    rewards: dict[str, dict[str, float]]
    images: dict[str, Tensor]
    failed: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[str, ...]:
        """What rewards did wrong, in words."""
        return tuple(self.failed.values())

    def unjudged(self) -> list[tuple[str, str]]:
        """(task, reward) wherever no image has a value."""
        means = ((task, name, mean) for task, own in self.rewards.items() for name, mean in own.items())
        return [(task, name) for task, name, mean in means if math.isnan(mean)]


def task_keys(seed: int, task: str, count: int) -> Tensor:
    """(count,) int64 noise keys that depend on (seed, task's name, image's index) alone, so that every model judged
    under a seed sees the same noise, in any batch and beside any other task."""
    from opd_fast.seeds import noise_keys

    name = int.from_bytes(hashlib.blake2b(task.encode(), digest_size=7).digest(), "little")
    return noise_keys(seed, name, samples=count)


def evaluate(
    model: DiffusionModel,
    transformer: nn.Module,
    tasks: Sequence[EvalTask],
    table: SolverTable,
    *,
    shape: tuple[int, int, int],
    guidance: float | None,
    seed: int,
    text: EmbeddingCache,
    batch: int = 64,
    keep_images: int = 0,
    progress: Callable[[int, int], None] | None = None,
    reward_timeout: float | None = None,
    world: World | None = None,
    told: set[tuple[str, str]] | None = None,
) -> Evaluation:
    """Draw the images of every task and average their rewards.

    Args:
        model: the frozen parts; `transformer` is the base, a teacher or a student of its architecture.
        table: the solver's rows; a stochastic one draws its noise from the same keys as the initial state.
        shape: (C, H, W) of a latent.
        guidance: as the model's pipeline takes it (`DiffusionModel.strength`); None is unguided.
        text: holds every prompt of every task.
        batch: images drawn at once on a device. It changes no result beyond rounding.
        keep_images: prompts of each task whose first image is returned.
        progress: called with (images done, images in all).
        reward_timeout: seconds that a reward may take for a batch; null: any.
        world: the processes that draw them together, each its share; all get the same result.
        told: (reward, reason) of what was printed before; what is printed here is added.

    A reward that fails is passed over. What it did is printed to stderr, unless `told` has it.

    Raises:
        ValueError: a task without prompts or with fewer images than prompts, two tasks of one name, an unknown reward
            or one named twice, or a model that yields NaN or infinite numbers.
    """

    from opd_fast.distributed.world import World
    from opd_fast.rewards.runner import Jury

    world = world or World()
    jury = Jury("record", reward_timeout)
    means: dict[str, dict[str, float]] = {}
    kept: dict[str, Tensor] = {}
    done, total = 0, sum(task.count for task in tasks)
    _check_tasks(tasks)
    for task in tasks:
        keys = task_keys(seed, task.name, task.count)
        scores: dict[str, list[Tensor]] = {name: [] for name in task.rewards}
        images_kept: list[Tensor] = []
        mine, own = world.rows(task.count)
        to_keep, _ = world.rows(keep := min(keep_images, len(task.prompts)))
        for start in range(0, len(mine), batch):
            rows = mine[start : start + batch]
            prompts = [task.prompts[i % len(task.prompts)] for i in rows]
            images = _draw(model, transformer, prompts, keys[rows], table, shape, guidance, text)
            if not bool(images.isfinite().all()):
                raise ValueError(
                    f"task {task.name!r}: the model's images hold NaN or infinite numbers; look at its weights, or set "
                    "model.dtype to float32"
                )
            judged = min(len(rows), max(own - start, 0))  # the others are drawn only to keep the ranks in step
            for name in task.rewards if judged else ():
                scores[name].append(jury(name, images[:judged], prompts[:judged]).double())
            if start < len(to_keep):
                images_kept.append(images[: len(to_keep) - start].float().cpu())
            done = min(done + len(rows) * world.size, total)
            if progress is not None:
                progress(done, total)
        none = torch.empty(0, dtype=torch.float64)  # this process may own no prompt
        everyone = {name: world.collect(torch.cat([none, *parts]), task.count) for name, parts in scores.items()}
        means[task.name] = {name: float(values.nanmean()) for name, values in everyone.items()}
        if keep:
            kept[task.name] = world.collect(torch.cat(images_kept), keep)
    told = set() if told is None else told
    failed: dict[tuple[str, str], str] = {}
    for reason, message in world.everyone(list(jury.messages.items())):
        failed.setdefault(reason, message)
        if reason not in told and world.first:
            print(f"evaluation: {message}", file=sys.stderr, flush=True)
        told.add(reason)
    return Evaluation(means, kept, failed)


def _check_tasks(tasks: Sequence[EvalTask]) -> None:
    from opd_fast.rewards import get_reward

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


def _draw(
    model: DiffusionModel,
    transformer: nn.Module,
    prompts: Sequence[Prompt],
    keys: Tensor,
    table: SolverTable,
    shape: tuple[int, int, int],
    guidance: float | None,
    text: EmbeddingCache,
) -> Tensor:
    """Images (B, 3, H, W) of the prompts."""
    from opd_fast.training.sampling import sample

    rows = text.rows([prompt.text for prompt in prompts])
    negative = text.negative if model.is_guided(guidance) else None
    keys = keys.to(model.device)
    latents = sample(model, transformer, rows, negative, guidance, table, shape=shape, keys=keys)
    # The VAE clamps to [0, 1], which would hide an infinity: look before.
    return model.decode(latents) if bool(latents.isfinite().all()) else latents.new_full((1,), float("nan"))
