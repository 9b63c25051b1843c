"""Activation checkpointing of whole blocks: their inputs are kept, and what is inside them is computed again.

A checkpointed block keeps nothing but its inputs and costs one more forward of its own in the backward. Only as many
blocks are checkpointed as memory demands (`opd_fast.distributed.memory` counts the bytes). Source: Chen et al., arXiv
1604.06174.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from opd_fast.engine.patching import patch_forward


def checkpoint_blocks(blocks: Sequence[nn.Module], count: int) -> int:
    """Checkpoint the first `count` of the blocks, in place; returns how many there are.

    Call it before `block.compile()`, and before FSDP's hooks. Without gradient the blocks run as they are. No random
    state is kept, because a student has no dropout and a graph could not capture it.
    """
    chosen = blocks[:count]
    for block in chosen:
        patch_forward(block, partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False))
    return len(chosen)
