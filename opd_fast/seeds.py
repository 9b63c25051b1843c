"""Noise keys: a sample's noise follows from what it is, never from when or where it is drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
    indices = np.arange(samples) if isinstance(samples, int) else samples.cpu().numpy()
    with np.errstate(over="ignore"):
        key = np.zeros(1, np.uint64)
        for part in path:
            key = _mix(key + _GOLDEN * np.uint64(part + 1))
        keys = _mix(key + _GOLDEN * (indices.astype(np.uint64) + np.uint64(1)))
    return torch.from_numpy(keys.view(np.int64).copy())
