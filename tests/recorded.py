"""A stand-in for CUDA graphs on the CPU: operators recorded as they run, replayed on the very same memory.

What a CUDA graph does wrong or refuses, this does too. No Python runs in a replay; a tensor that the caller replaced
instead of changing keeps its old address; results are overwritten by the next replay; and reading a number back, or
making a tensor of numbers that Python knows, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::lift_fresh")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in _READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedBackend:
    """`Backend` by records."""

    def __init__(self, warm_ups: int = 2) -> None:
        self.warm_ups = warm_ups
        self.operators = 0
        """Recorded so far."""

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        for _ in range(self.warm_ups):
            work()
        with _Recorder() as recorder:
            result = work()
        self.operators += len(recorder.calls)

        def replay() -> None:
            with torch.no_grad():
                for func, args, kwargs, out in recorder.calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and not _same_memory(old, new):
                            old.copy_(new)

        return replay, result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
