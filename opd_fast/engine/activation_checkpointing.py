"""Activation checkpointing of whole blocks: their inputs are kept, what is inside them is computed again.

A checkpointed block costs one more forward of its own in the backward and keeps its inputs alone. Only as many are
checkpointed as memory demands (Chen et al., arXiv 1604.06174; `opd_fast.distributed.memory` counts the bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from opd_fast.engine.patching import patch_forward


def checkpoint_blocks(blocks: Sequence[nn.Module], count: int) -> int:
    """Checkpoint the first `count` of the blocks, in place; returns how many there are.

    Call it before `block.compile()`, and before FSDP's hooks. Without gradient the blocks run as they are. No random
    state is kept, because a student has no dropout and a graph could not capture it.
    """
    chosen = list(blocks[:count])
    for block in chosen:
        patch_forward(block, _Checkpointed(block))
    return len(chosen)


class _Checkpointed:
    """A block's forward, checkpointed."""

    def __init__(self, block: nn.Module) -> None:
        self.forward = block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
