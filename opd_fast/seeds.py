"""Random streams and noise keys: a sample's noise follows from what it is, never from when or where it is drawn."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Stream(IntEnum):
    """The number that sets each use of randomness apart from the others that follow from the same `train.seed`.

    It comes second in a path of `noise_keys`, after the seed. A resumed run draws again what the numbers say, so that
    none of them may change. Two uses of randomness stand outside this list: `evaluation.task_keys` puts a hash of the
    task's name here, and the student's LoRA is drawn by a generator that takes the seed itself.
    """

    ROLLOUT = 1
    """Initial and step noise of the images of a rollout. The path goes on with round or rollout, then task."""
    QUERY = 2
    """The steps that a round of distillation queries. The path goes on with the round."""
    ORDER = 3
    """The order in which a rollout's images come to its rounds. The path goes on with the rollout."""
    FLOAT8_CHECK = 3
    """Noise of the losses that float8 is checked by. It has had the number of `ORDER` from the start and keeps it; the
    keys differ, because its path ends here."""
    WINDOW = 4
    """The place of GRPO's window. The path goes on with the rollout."""
    NFT_NOISE = 5
    """What DiffusionNFT noises an image with. The path goes on with rollout and task."""
    NFT_LEVELS = 6
    """The noise levels at which DiffusionNFT trains an image. The path goes on with the rollout."""
    SFT_NOISE = 7
    """What fine-tuning noises an image with. The path goes on with draw and task."""
    MERGE = 8
    """The random masks of DARE. The path goes on with a hash of the parameter's name."""
    TASK_SCHEDULE = 2**32 - 1
    """Which tasks a round takes. NumPy's generator is seeded by it, as by the task's index for the order of prompts."""


class SftDraw(IntEnum):
    """Which draw of a key of `Stream.SFT_NOISE`: the counter of `opd_kernels.philox_normal`.

    The counters of every other stream are solver steps from 0, and `opd_kernels`' INITIAL_NOISE for the initial state.
    """

    NOISE = 0
    LEVEL = 1


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def noise_keys(*path: int, samples: int | Tensor) -> Tensor:
    """64-bit Philox keys (n,) int64 of samples 0..n-1 (or of the given indices) under a path such as seed, round, task.

    Keys depend on the path and the index alone, so that the noise is the same in any batch and on any world size.
    """
    import torch  # the streams are for modules without torch as well

    indices = np.arange(samples) if isinstance(samples, int) else samples.cpu().numpy()
    with np.errstate(over="ignore"):
        key = np.zeros(1, np.uint64)
        for part in path:
            key = _mix(key + _GOLDEN * np.uint64(part + 1))
        keys = _mix(key + _GOLDEN * (indices.astype(np.uint64) + np.uint64(1)))
    return torch.from_numpy(keys.view(np.int64).copy())
