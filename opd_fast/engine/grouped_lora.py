"""Several teachers in one forward: their LoRAs sit beside each other on one base, and each row has its own.

The base is computed once for all rows. Every LoRA layer then adds its own low-rank product to the rows of teacher t
(LoRA, arXiv 2106.09685, equation 3):

    y = x W^T + bias        y[rows of t] += s_t (x[rows of t] A_t^T) B_t^T

Where every group is one of the batch's equal parts, or a few of them (a guided teacher has two branches), two batched
products serve all groups. Other groups are computed one after the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.engine.modulation_cache import ModulationCache
from opd_fast.engine.patching import patched_forward
from opd_fast.errors import UserError
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Guidance, Velocities, combined, in_rows
from opd_fast.models.lora.adapters import injected
from opd_fast.models.text import TextEmbeds

Span = tuple[int | None, slice]
"""An adapter's place among those given, None for the bare base, and its rows."""
_Forward = Callable[..., Tensor]

_RANKS = 8  # stacked ranks are a multiple of it: half-precision products on a GPU want rows of 16 bytes


class GroupedAdapters:
    """The frozen adapters `adapters` of an injected transformer, stacked once; None among them is the bare base.

    Make it when every adapter, the student's too, is in place. The stacked factors have each base weight's dtype, in
    which the layers compute. The scale is multiplied into B in float32, and both are rounded once.

    Raises UserError for an adapter that the transformer does not have or that is trained.
    """

    def __init__(self, transformer: nn.Module, adapters: Sequence[str | None]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.transformer, self.adapters = transformer, tuple(adapters)
        self._injected = injected(transformer)
        tuned: list[Any] = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        for name in self.adapters:
            if name is not None and not any(name in layer.lora_A for layer in tuned):
                known = ", ".join(self._injected) or "none"
                raise UserError("teachers", f"no adapter {name} on the transformer", f"there are: {known}")
        self._layers = [_Layer.of(layer, self.adapters) for layer in tuned]
        self._plans: dict[tuple[tuple[int | None, int, int], ...], list[tuple[nn.Module, _Forward]]] = {}

    @contextlib.contextmanager
    def active(self, spans: Sequence[Span]) -> Iterator[nn.Module]:
        """Within the block the transformer computes each span's rows with its adapter, and the rest with the base.

        Spans are of the rows of the batch (dimension 0 of every layer's input), disjoint, in any order; an adapter may
        have several and an empty one has no effect. The batch must end where the last span ends. Which adapter is
        switched on does not matter meanwhile, and the student's adds nothing. No gradient reaches the factors.

        Raises UserError for spans that overlap or have a step, RuntimeError where adapters were added meanwhile.
        """
        if injected(self.transformer) != self._injected:
            raise RuntimeError("adapters were added or removed since GroupedAdapters was made; make it afterwards")
        groups = _groups(spans, len(self.adapters))
        if groups not in self._plans:
            self._plans[groups] = [(layer.module, layer.forward(groups)) for layer in self._layers]
        with patched_forward(self._plans[groups]):
            yield self.transformer


@dataclass
class _Layer:
    """One PEFT layer; `a` (T, R, in) and `b` (T, out, R) with the scale in it, zero where a teacher has no such layer.

    R is the layer's largest rank, rounded up. None in place of both: no teacher has it.
    """

    module: Any
    ranks: tuple[int, ...]
    """The rank of each teacher's LoRA; 0 for a teacher without this layer."""
    factors: tuple[Tensor, Tensor] | None
    gathered: dict[tuple[int | None, ...], tuple[Tensor, Tensor]]
    """The factors in the order of a batch's equal parts."""

    @classmethod
    @torch.no_grad()
    def of(cls, module: Any, adapters: tuple[str | None, ...]) -> _Layer:
        loras = {
            t: (module.lora_A[name].weight, module.lora_B[name].weight)
            for t, name in enumerate(adapters)
            if name in module.lora_A
        }
        ranks = tuple(len(loras[t][0]) if t in loras else 0 for t in range(len(adapters)))
        if not loras:
            return cls(module, ranks, None, {})
        base = module.get_base_layer().weight
        rank = math.ceil(max(ranks) / _RANKS) * _RANKS
        a = base.new_zeros(len(adapters), rank, module.in_features)
        b = base.new_zeros(len(adapters), module.out_features, rank)
        for t, (down, up) in loras.items():
            if down.requires_grad or up.requires_grad:
                raise UserError("teachers", f"adapter {adapters[t]} is trained", "only frozen adapters can be grouped")
            a[t, : ranks[t]] = down
            b[t, :, : ranks[t]] = up.float() * module.scaling[adapters[t]]
        return cls(module, ranks, (a, b), {})

    def forward(self, groups: tuple[tuple[int | None, int, int], ...]) -> _Forward:
        """Return the layer's forward for a batch of `groups`, which are in order and leave no row out."""
        base, rows = self.module.get_base_layer(), groups[-1][2]
        adapted = [(t, start, stop) for t, start, stop in groups if t is not None and self.ranks[t]]
        if self.factors is None or not adapted:
            return lambda x, *args, **kwargs: base(x)
        unit = math.gcd(*(stop for _, _, stop in groups))
        if rows // unit <= 2 * len(groups):
            order = tuple(t for t, start, stop in groups for _ in range((stop - start) // unit))
            return _batched(base, *self._in_order(order), rows)
        a, b = self.factors
        return _sliced(base, [(start, stop, a[t], b[t]) for t, start, stop in adapted], a.dtype, rows)

    def _in_order(self, order: tuple[int | None, ...]) -> tuple[Tensor, Tensor]:
        assert self.factors is not None
        if order == tuple(range(len(self.ranks))):
            return self.factors
        if order not in self.gathered:
            a, b = (
                torch.stack([torch.zeros_like(half[0]) if t is None else half[t] for t in order])
                for half in self.factors
            )
            self.gathered[order] = a, b
        return self.gathered[order]


def _batched(base: nn.Module, a: Tensor, b: Tensor, rows: int) -> _Forward:
    """Return a forward for equal parts; a (G, R, in) and b (G, out, R) are those of each."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_rows(x, rows)
        parts = x.to(a.dtype).reshape(len(a), -1, x.shape[-1])
        y = base(parts)
        return y.baddbmm_(torch.bmm(parts, a.mT), b.mT).view(*x.shape[:-1], y.shape[-1])

    return forward


def _sliced(base: nn.Module, slices: list[tuple[int, int, Tensor, Tensor]], dtype: torch.dtype, rows: int) -> _Forward:
    """Return a forward for parts of any size; `slices` has (first row, last row + 1, a (R, in), b (out, R)) of each."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _check_rows(x, rows)
        parts = x.to(dtype).reshape(len(x), -1, x.shape[-1])
        y = base(parts)
        for start, stop, a, b in slices:
            part = parts[start:stop].flatten(0, 1)
            y[start:stop].view(-1, y.shape[-1]).addmm_(part @ a.mT, b.mT)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


def _check_rows(x: Tensor, rows: int) -> None:
    # Compiled, it would make every batch size a compilation of its own.
    if not torch.compiler.is_compiling() and x.shape[0] != rows:
        raise ValueError(f"the spans are of {rows} rows and the batch has {x.shape[0]}; give spans of the whole batch")


def _groups(spans: Sequence[Span], adapters: int) -> tuple[tuple[int | None, int, int], ...]:
    """Return (adapter, start, stop) in the order of rows; gaps are the base's, neighbours of one adapter are joined."""
    groups: list[tuple[int | None, int, int]] = []
    end = 0
    for index, rows in sorted((span for span in spans if span[1].start != span[1].stop), key=lambda s: s[1].start):
        if index is not None and not 0 <= index < adapters:
            raise UserError("teachers", f"a span of adapter {index}", f"there are {adapters}, counted from 0")
        if rows.step not in (None, 1) or rows.start < end or rows.stop < rows.start:
            raise UserError("teachers", f"the span {rows} overlaps another or runs backwards", "give disjoint rows")
        for t, start, stop in ((None, end, rows.start), (index, rows.start, rows.stop)):
            if groups and groups[-1][0] == t:
                groups[-1] = (t, groups[-1][1], stop)
            elif start < stop:
                groups.append((t, start, stop))
        end = rows.stop
    if not groups:
        raise UserError("teachers", "no span has a row", "give at least one")
    return tuple(groups)


# --- the teachers' velocities ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One forward for the rows of several teachers."""

    parts: tuple[tuple[slice, Guidance | None], ...]
    """(rows of the batch, the guidance of them; None where no negative branch follows theirs), in the order of the
    forward's rows."""
    spans: tuple[Span, ...]
    condition: Conditioning
    """Text of all rows of the forward: of each part its prompts and, where it is guided, the negative ones."""


def joined(parts: Sequence[tuple[int, slice, Conditioning]]) -> tuple[Call, ...]:
    """Return the forwards for `TeacherConditioning.parts`: one, or one for each value of an embedded guidance.

    The guidance of such families is one number of a call. Parts without rows are left out.
    """
    calls = []
    filled = [part for part in parts if part[1].start < part[1].stop]
    for embedded in dict.fromkeys(condition.embedded for _, _, condition in filled):
        together = [part for part in filled if part[2].embedded == embedded]
        spans, end = [], 0
        for index, _, condition in together:
            spans.append((index, slice(end, end + len(condition.text))))
            end += len(condition.text)
        text = TextEmbeds.cat([condition.text for _, _, condition in together])
        rows = tuple((rows, condition.guidance) for _, rows, condition in together)
        calls.append(Call(rows, tuple(spans), Conditioning(text, embedded=embedded)))
    return tuple(calls)


@torch.no_grad()
def grouped_velocities(
    model: DiffusionModel,
    grouped: GroupedAdapters,
    x: Tensor,
    sigma: Tensor,
    calls: Sequence[Call],
    tables: Sequence[ModulationCache] = (),
) -> Velocities:
    """Predict each sample's velocity by its own teacher, both branches, as `TeacherBank.velocities` does.

    x (B, C, H, W) float32, sigma 0-dim float32; calls are those of `joined`, and `grouped.adapters` are in the order of
    the teachers. Rows of unguided teachers are left unset in `uncond`, which is None where none is guided. `tables` has
    one for each call, filled with its condition while its spans were active and set to the step; or none at all.
    """
    found: list[tuple[slice, Velocities]] = []
    for i, call in enumerate(calls):
        state = torch.cat([x[rows] for rows, guidance in call.parts for _ in range(1 if guidance is None else 2)])
        autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)
        table = tables[i].active() if tables else contextlib.nullcontext()
        with grouped.active(call.spans) as transformer, autocast, table:
            v = model.velocity(transformer, state, sigma, call.condition.text, call.condition.embedded)
        for (rows, guidance), (_, span) in zip(call.parts, call.spans, strict=True):
            if guidance is None:
                found.append((rows, Velocities(v[span], None)))
            else:
                found.append((rows, combined(model, guidance, *v[span].chunk(2))))
    return in_rows(sorted(found, key=lambda part: part[0].start))
