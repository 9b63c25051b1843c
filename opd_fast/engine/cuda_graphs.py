"""CUDA graphs: work captured once and replayed, one launch in place of thousands.

A replay runs the captured kernels on the captured addresses, and no Python. Everything here follows from that:

* The caller declares what changes between replays: a value whose tensors are copied into buffers that stay (`Static`),
  or a tensor that others change in place (weights, gradient buffers). Anything else keeps its value of the capture.
* A declared value of another shape, dtype, device or structure raises a ValueError that names it. Nothing is captured
  a second time without the caller's knowledge.
* Results lie in the graph's own memory, and the next replay of the same graph overwrites them: clone what must live
  longer. Other graphs do not overwrite them, because all graphs share one memory pool and no two are replayed at once.
* Work that cannot be captured is reported once and runs as it is. So does all work without CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from opd_fast.errors import one_line
from opd_kernels.recording import Recorder
from opd_kernels.tuning import measuring

T = TypeVar("T")
WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and blocks are compiled."""


class CudaBackend:
    """CUDA graphs in one memory pool. Our kernels measure their launches while the work warms up."""

    def __init__(self, device: torch.device, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        self.recorder = Recorder(device)

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Warm `work` up and record it; returns what replays it, and the result that replays overwrite.

        Raises RuntimeError where it cannot be recorded, and then leaves the process as it was. What `work` changes in
        place may have any value afterwards.
        """
        with measuring() as chosen:
            self.recorder.warm_up(work)
        self.recorder.warm_up(work, WARM_UPS - 1)
        for choice in chosen:
            self.say(str(choice))
        graph, result = self.recorder.record(work)
        return graph.replay, result


class Graphs:
    """The graphs of a run."""

    def __init__(self, backend: CudaBackend | None, say: Callable[[str], None] = lambda text: None) -> None:
        """`backend` None leaves all work as it is; `say` is called with what was captured and what could not be."""
        self.backend, self.say = backend, say
        self.captured, self.replays = 0, 0
        self.refused: list[str] = []
        """What could not be captured."""
        self._kept: dict[Hashable, Any] = {}

    @property
    def on(self) -> bool:
        """Whether work is captured at all."""
        return self.backend is not None

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the graphs and buffers of one shape of work, which `key` stands for; makes them at its first use."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    def capture(self, name: str, work: Callable[[], T], changes: Sequence[Tensor] = ()) -> Callable[[], T]:
        """Return a function that replays `work`, or `work` itself where it cannot be captured.

        `changes` are the tensors that it changes in place; capturing leaves them as they were. Raises
        torch.OutOfMemoryError where the work does not fit into the device's memory.
        """
        if self.backend is None:
            return work
        before = [tensor.detach().clone() for tensor in changes]
        try:
            replay, result = self.backend.capture(work)
        except torch.OutOfMemoryError:
            raise  # uncaptured, the work would need as much
        except RuntimeError as error:
            self.refused.append(name)
            self.say(f"graphs: {name} cannot be captured and runs without ({one_line(error)[:160]})")
            return work
        finally:
            with torch.no_grad():
                for tensor, value in zip(changes, before, strict=True):
                    tensor.copy_(value)
        self.captured += 1
        self.say(f"graphs: captured {name}")

        def run() -> T:
            self.replays += 1
            replay()
            return result

        return run

    def call(self, key: Hashable, name: str, function: Callable[..., T], *inputs: Any) -> T:
        """Return function(*inputs), captured at the first call with `key` and replayed at later ones.

        Raises ValueError for inputs that differ from the first call's in more than their tensors' values.
        """
        if self.backend is None:
            return function(*inputs)

        def make() -> tuple[Static[tuple[Any, ...]], Callable[[], T]]:
            static = Static(name, inputs)
            return static, self.capture(name, lambda: function(*static.value))

        static, run = self.keep(key, make)
        static.load(inputs)
        return run()


class Static(Generic[T]):
    """A value whose tensors stay where they are: dataclasses, tuples, lists, tensors, and whatever compares equal."""

    def __init__(self, name: str, value: T) -> None:
        self.name = name
        self.value: T = _cloned(value)
        self._loaded: dict[str, tuple[Tensor, int]] = {}

    def load(self, value: T) -> None:
        """Copy the tensors of `value` here. Raises ValueError for one of another form, before anything is copied."""
        leaves, own = list(_leaves(value)), list(_leaves(self.value))
        for (path, new), (own_path, old) in zip(leaves, own, strict=False):
            if path != own_path or _form(new) != _form(old):
                raise ValueError(self._refusal(path, _form(new), own_path, _form(old)))
        if len(leaves) != len(own):
            raise ValueError(self._refusal("it", f"{len(leaves)} parts", "it", f"{len(own)} parts"))
        for (path, new), (_, old) in zip(leaves, own, strict=True):
            if isinstance(new, Tensor) and new is not old:
                source, version = self._loaded.get(path, (None, 0))
                if source is not new or version != new._version:  # text, for example, is the same at every step
                    old.copy_(new)
                    self._loaded[path] = (new, new._version)

    def _refusal(self, path: str, new: str, own_path: str, old: str) -> str:
        here = path if path == own_path else f"{path} (for {own_path})"
        return (
            f"{self.name} was captured with {here} {old}, and is given {new}; a graph takes one form of input: "
            f"keep batches alike, or set engine.graphs off"
        )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parts of a nested value that are not containers, with their names."""
    if is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, tuple | list):
        yield f"{path}.length", len(value)
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}[{i}]")
    else:
        yield path, value


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _cloned(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple | list):
        return type(value)(_cloned(part) for part in value)
    return value


def _form(value: Any) -> str:
    """Say what must not change between replays."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return repr(value)
