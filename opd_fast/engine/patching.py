"""The one place where the forward of a single module is replaced, for a while or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


def patch_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let the module compute by `forward` from now on."""
    module.__dict__["forward"] = forward


@contextlib.contextmanager
def patched_forward(forwards: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let each module compute by the forward beside it until the block ends; then by its own again, or its class's.

    Blocks may be nested: a hook of diffusers or `MergedLayers` that set a forward of its own finds it again.
    """
    before = [(module, vars(module).get("forward")) for module, _ in forwards]
    for module, forward in forwards:
        patch_forward(module, forward)
    try:
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.__dict__["forward"]
            else:
                patch_forward(module, own)
