"""The samples of a round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from opd_fast.models.text import TextEmbeds


@dataclass(frozen=True)
class RoundBatch:
    """The samples of one round, task after task."""

    text: TextEmbeds
    """B rows."""
    negative: TextEmbeds | None
    """One row; needed when any guidance differs from 1."""
    tasks: tuple[tuple[int, slice], ...]
    """(teacher's index, the rows of the batch that it teaches). The slice is empty where all of the task's samples are
    on other processes."""
    keys: Tensor
    """(B,) int64 noise keys."""
    scale: Tensor
    """(B,) float32. The round's loss is the sum over samples and steps of scale * w_j * mean((v_S - v_T)^2)."""
    shape: tuple[int, int, int]
    """Latent (C, H, W)."""
    x: Tensor | None = None
    """Initial state (B, C, H, W) float32; None draws it from the keys."""
    noise: Tensor | None = None
    """Noise of each step (N, B, C, H, W) float32; None draws it from the keys."""

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, size: int | None) -> Iterator[tuple[slice, RoundBatch]]:
        """Yields micro-batches of at most `size` samples, each with its rows; None leaves the batch whole."""
        size = size or len(self)
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            tasks = []
            for teacher, task in self.tasks:
                first, end = max(task.start, rows.start) - start, min(task.stop, rows.stop) - start
                tasks.append((teacher, slice(first, max(first, end))))
            part = replace(
                self,
                text=self.text.index(rows),
                tasks=tuple(tasks),
                keys=self.keys[rows],
                scale=self.scale[rows],
                x=None if self.x is None else self.x[rows],
                noise=None if self.noise is None else self.noise[:, rows],
            )
            yield rows, part
