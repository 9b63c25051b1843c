"""Activation checkpointing of whole blocks: their inputs are kept, what is inside them is computed again.

A block that recomputes costs one more forward of its own in the backward and keeps its inputs alone, so that only as
many do as memory demands (Chen et al., arXiv 1604.06174; `opd_fast.distributed.memory` counts the bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[nn.Module], count: int) -> int:
    """Let the first `count` of the blocks recompute, in place; how many do.

    Before `block.compile()`, and before FSDP's hooks. Without gradient the blocks run as they are. There is no dropout
    in a student, so that no random state is kept: a graph could not capture that.
    """
    chosen: list[Any] = list(blocks[:count])
    for block in chosen:
        block.forward = _Recomputed(block)
    return len(chosen)


class _Recomputed:
    """A block's forward, checkpointed."""

    def __init__(self, block: nn.Module) -> None:
        self.forward = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
