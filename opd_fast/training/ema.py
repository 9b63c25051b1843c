"""The moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from opd_fast.distributed.world import local_tensor


class WeightAverage:
    """An exponential moving average of `parameters`, which starts at their values and may be sharded as they are."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.values = [p.detach().clone() for p in parameters]
        """The average, in the parameters' order."""

    @torch.no_grad()
    def update(self, updates: int, decay: float) -> None:
        """Move the average toward the weights after update number `updates` (from 0), by `ema_decay`."""
        # Element by element, so that each rank moves its own part of what is sharded.
        average, weights = ([local_tensor(t.detach()) for t in tensors] for tensors in (self.values, self._parameters))
        torch._foreach_lerp_(average, weights, 1 - ema_decay(updates, decay))


def ema_decay(updates: int, most: float) -> float:
    """The average's decay after update number `updates` (from 0): min((1 + n) / (10 + n), most), the warm-up of the
    published code."""
    return min((1 + updates) / (10 + updates), most)
