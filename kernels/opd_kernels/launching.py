"""What the launchers of the kernels share: operands in place, scratch memory, and launches bound once per kind of call.

Device work of a call is the kernel alone. Outputs are allocated, not filled; the arrival counters are left at zero by
the kernel itself (see `Scratch`); operands are read where they lie unless a sample's elements are not contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .operators import Reduction
from .tuning import Launch, Problem, tuner


def in_place(t: Tensor) -> bool:
    """Return whether each sample's elements lie one after another, so that a kernel can read `t` as it is."""
    return t[:1].is_contiguous()


def batch_stride(t: Tensor | None) -> int:
    """Return how many elements lie between two samples of `t` as the kernel gets it."""
    if t is None:
        return 0
    return t.stride(0) if in_place(t) else t[0].numel()


class Scratch:
    """Partial sums, and counters of arrived programs. The kernels leave the counters at zero, so that they are filled
    once and not at every launch.

    Launches on one stream run in order and share both. A captured launch may be replayed beside anything else, and
    replays of one graph run in order, so each captured launch has its own: counters from a reserve that was filled
    before the capture began (beginning a capture waits for the device), partial sums from the graph's memory. No two
    launches that can overlap, on two streams or in two graphs, ever share.
    """

    RESERVE = 1 << 18
    LINE = 32  # counters: one captured launch's do not share a cache line, nor their alignment, with the next one's

    def __init__(self) -> None:
        self._streams: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._reserve: dict[int, Tensor] = {}
        self._spent: list[Tensor] = []
        """Reserves that were replaced: captured launches go on counting in them, so their memory must stay."""

    def take(
        self, device: torch.device, batch: int, partials: int, wanted: bool
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return at least `partials` float32 partial sums and `batch` int32 zeros for one launch on `device`.

        A launch with one program a sample needs neither; it passes `wanted` as False.
        """
        if not wanted:
            return None, None
        if device.type != "cuda":
            return torch.empty(partials, device=device), torch.zeros(batch, dtype=torch.int32, device=device)
        index = device.index if device.index is not None else torch.cuda.current_device()
        if torch.cuda.is_current_stream_capturing():
            return torch.empty(partials, device=device), self._reserved(device, index, batch)
        if index not in self._reserve or self._reserve[index].numel() < self.RESERVE // 2:
            if index in self._reserve:
                self._spent.append(self._reserve[index])
            self._reserve[index] = torch.zeros(self.RESERVE, dtype=torch.int32, device=device)
        key = (index, torch.cuda.current_stream(device).cuda_stream)
        kept = self._streams.get(key)
        if kept is None or kept[0].numel() < partials or kept[1].numel() < batch:
            kept = self._streams[key] = (
                torch.empty(max(partials, 4096), device=device),
                torch.zeros(max(batch, 1024), dtype=torch.int32, device=device),
            )
        return kept

    def _reserved(self, device: torch.device, index: int, batch: int) -> Tensor:
        lines = -(-batch // self.LINE) * self.LINE
        reserve = self._reserve.get(index)
        if reserve is None or reserve.numel() < lines:
            return torch.zeros(batch, dtype=torch.int32, device=device)  # one more node in the graph
        self._reserve[index] = reserve[lines:]
        return reserve[:lines]


scratch = Scratch()


class BoundLaunch:
    """One kind of call of a kernel: its grid, launch parameters and constants are set, and its binary is found once.

    Triton's launcher looks at every argument of every call (dtype, alignment, whether an integer is 1 or a multiple of
    16) to find the binary. Here the caller's key stands for all of that but the alignment of pointers: a call whose
    pointers are all multiples of 16 bytes goes straight to the binary, any other through Triton's launcher.

    Args:
        kernel: Triton function whose parameters are tensors, then `step`, then the constants.
        programs: size of the grid.
        warps: warps of a program.
        constants: the values of the last parameters.
        copied: indices of the tensors that must be made contiguous first.
    """

    def __init__(
        self, kernel: Any, programs: int, warps: int, constants: tuple[Any, ...], copied: Sequence[int]
    ) -> None:
        self.kernel, self.programs, self.warps, self.constants, self.copied = kernel, programs, warps, constants, copied
        self._binary: Callable[..., object] | None = None

    def __call__(self, tensors: Sequence[Tensor | None], step: int) -> None:
        """Launch on the current stream of the current device."""
        if self.copied:
            tensors = [t.contiguous() if i in self.copied and t is not None else t for i, t in enumerate(tensors)]
        pointers = 0
        for t in tensors:
            if t is not None:
                pointers |= t.data_ptr()
        aligned = pointers & 15 == 0
        if aligned and self._binary is not None:
            self._binary(*tensors, step, *self.constants)
            return
        compiled = self.kernel[(self.programs,)](*tensors, step, *self.constants, num_warps=self.warps)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._binary = compiled[(self.programs, 1, 1)]


_bound: dict[Any, BoundLaunch] = {}
MOST_BOUND = 1024
"""Launches that are kept; a process that meets ever new shapes starts afresh now and then."""


def launch(
    kernel: Any,
    given: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    step: int | Tensor,
    reduction: Reduction,
    operands: Callable[[], str],
    *,
    states: int,
    sums: int,
    extra: tuple[float, ...] = (),
) -> None:
    """Launch a kernel on a solver's row, which fills `outputs`: one launch, no host sync (but for a launch inside
    `tuning.measuring()` that is the first of its kind). An empty batch launches nothing.

    Args:
        kernel: its parameters are `given`, `step_ptr`, `outputs`, with sums `partial_ptr` and `arrived_ptr`, then
            `step`, the strides of the states, `elements`, `blocks`, `rows`, `share`, `extra`, with sums TILES and
            PASSES, and BLOCK.
        given: the operands, of which the last is the table.
        operands: returns them as `Problem` has them.
        states: how many operands come first that have a state's shape and may have any batch stride.
        sums: how many sums over a sample the kernel forms; one that forms none takes one tile a program.
        extra: further constants.
    """
    x, table = given[0], given[-1]
    assert x is not None
    assert table is not None
    batch, elements, device = x.shape[0], math.prod(x.shape[1:]), x.device
    if batch == 0:
        return
    step_ptr, row = (step, 0) if isinstance(step, Tensor) else (None, step)
    given = (*given, step_ptr)
    layout = [None if t is None else (t.dtype, t.stride()) for t in given]
    absent = [t is None for t in outputs]
    key = (kernel.__name__, tuner.epoch, device, x.shape, table.shape[0], reduction, *absent, *layout)

    def bind(tiling: Launch) -> BoundLaunch:
        blocks, share = tiling.blocks(elements), 1.0 / elements if reduction == "mean" else 1.0
        strides = (batch_stride(t) for t in given[:states])
        sizes = (tiling.tiles, -(-blocks // tiling.block), tiling.block) if sums else (tiling.block,)
        constants = (*strides, elements, blocks, table.shape[0], share, *extra, *sizes)
        copied = [
            i for i, t in enumerate(given) if t is not None and not (in_place(t) if i < states else t.is_contiguous())
        ]
        return BoundLaunch(kernel, batch * blocks, tiling.warps, constants, copied)

    def tensors(bound: BoundLaunch) -> tuple[Tensor | None, ...]:
        partial = scratch.take(device, batch, sums * bound.programs, bound.programs > batch) if sums else ()
        return (*given, *outputs, *partial)

    def attempt(tiling: Launch) -> Callable[[], None]:
        trial = bind(tiling)
        taken = tensors(trial)
        return lambda: trial(taken, row)

    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another one
        bound = _bound.get(key)
        if bound is None:
            name = kernel.__name__.removesuffix("_kernel")
            problem = Problem(name, batch, elements, operands(), tiled=sums > 0)
            bound = bind(tuner.choose(problem, device, attempt))
            if len(_bound) >= MOST_BOUND:
                _bound.clear()
            _bound[key] = bound
        bound(tensors(bound), row)


def present(velocities: dict[str, Tensor | None], others: dict[str, bool]) -> str:
    """Return the operands of a `Problem`: each velocity that is there with its dtype, and the names that are true."""
    named = [f"{name}={str(t.dtype).removeprefix('torch.')}" for name, t in velocities.items() if t is not None]
    return " ".join((*named, *(name for name, given in others.items() if given)))
