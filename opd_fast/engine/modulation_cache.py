"""A cache of what a transformer computes from noise level and prompt alone: once a round, for all of its steps.

In SD3 (arXiv 2403.03206) and FLUX every block scales, shifts and gates its tokens by linear functions of one vector,
the sum of the embedded level, pooled prompt and guidance (adaLN-zero, DiT, arXiv 2212.09748, section 3.2): a third of
SD3.5-Medium's weights. None of it depends on the state. Because the weights are frozen, a round knows all of these
numbers when it begins: one product of each layer makes them for every step, and a forward reads its step's row of one
table. Which modules these are is asked of the family (`DiffusionModel.modulation`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_fast.engine.patching import patched_forward
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning
from opd_fast.models.lora.adapters import injected
from opd_fast.models.techniques import Modulation


@dataclass(eq=False)
class _Table:
    """The cached numbers of N steps for one set of rows, at fixed addresses."""

    steps: Tensor | None
    """(N, U, F): the embedding and then every layer's output, for each step and distinct row; None: only text is
    cached."""
    rows: Tensor | None
    """(B,) int64: the distinct row of each row of the batch; None where all are distinct."""
    context: Tensor | None
    """(B, L, D): the text tokens as the blocks take them, the same at every step."""
    batch: int


class _Slot:
    """Where a layer finds its output while a forward runs: a view (B, out) of the step's row."""

    now: Tensor


class ModulationCache:
    """The frozen modules of `transformer` that see only the level, the prompt and the guidance, and their outputs.

    Make it by `of` when every adapter is in place. A round fills it; within `active()` the modules return the row
    `step` of what was filled instead of computing.

    `step` is an int64 tensor of one element on the model's device: fill it (`step.fill_(j)`) or copy to it before a
    forward. It is read on the device, so that a compiled block serves all steps, and so does a captured graph.
    """

    def __init__(self, model: DiffusionModel, transformer: nn.Module, modulation: Modulation) -> None:
        """`modulation`: what is cached of the transformer; without layers, the embedding is not cached either."""
        self.transformer: Any = transformer
        self.step = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._model, self._modulation = model, modulation
        self._injected = injected(transformer)
        self._linears: list[Any] = [linear for _, linear in modulation.layers]
        self._slots = [_Slot() for _ in self._linears]
        self._tables: dict[tuple[int, ...], _Table] = {}
        self._table: _Table | None = None
        self._on = False
        self._sizes = [int(linear.in_features) for linear in self._linears[:1]]
        self._sizes += [int(linear.out_features) for linear in self._linears]
        self._forwards = self._replacements()

    @classmethod
    def of(cls, model: DiffusionModel, transformer: nn.Module) -> Self | None:
        """Make the cache of what can be cached of `transformer`; returns None where that is nothing.

        A module with a trainable weight, a LoRA's included, is left out, and with the embedding all that follows from
        it. Nothing can be cached of families without `DiffusionModel.modulation`, nor of weights that are sharded or
        wait on another device.
        """
        parts = model.modulation(transformer)
        if parts is None:
            return None
        embedded = _fixed(parts.embedder, model.device)
        layers = [pair for pair in parts.layers if embedded and _fixed(pair[1], model.device)]
        text = parts.text if parts.text is not None and _fixed(parts.text, model.device) else None
        return cls(model, transformer, replace(parts, layers=layers, text=text)) if layers or text is not None else None

    @property
    def layers(self) -> int:
        """How many layers are not computed at each step."""
        return len(self._linears) + bool(self._linears) + (self._modulation.text is not None)

    @torch.no_grad()
    def fill(self, sigmas: Tensor, condition: Conditioning) -> None:
        """Compute the tables for the levels `sigmas` (N,) float32 and the rows that the coming forwards will have.

        With adapters on these modules the ones switched on now are the ones cached. Tables of the same numbers of
        steps, rows and tokens are filled in place, and none is given up, so that graphs may go on reading them: a
        micro-batch of another size has its own.
        """
        if self._on:
            raise RuntimeError("the modules return what was filled before; fill outside of active()")
        text, parts = condition.text.to(dtype=self._modulation.dtype), self._modulation
        batch, tokens = text.sequence.shape[:2]
        key = (len(sigmas), batch, tokens, condition.guided)
        before, steps, context, rows = self._tables.get(key), None, None, None
        with torch.autocast(self.step.device.type, self._model.dtype, enabled=self._model.dtype != torch.float32):
            if self._linears:
                # The negative prompt is the same in all rows of its branch.
                distinct = batch // 2 + 1 if condition.guided else batch
                embedding = parts.embed(sigmas, text.index(slice(distinct)), condition.embedded)
                steps = None if before is None else before.steps
                if steps is None:
                    steps = embedding.new_empty(len(sigmas), distinct, sum(self._sizes))
                pieces = steps.split(self._sizes, dim=-1)
                pieces[0].copy_(embedding.transpose(0, 1))
                # A layer at a time, so that little memory is in use besides the table.
                for piece, (activation, linear) in zip(pieces[1:], parts.layers, strict=True):
                    piece.copy_(linear(embedding if activation is None else activation(embedding)).transpose(0, 1))
                if condition.guided:
                    rows = torch.arange(batch, device=steps.device).clamp_(max=batch // 2)
            if parts.text is not None:
                context = parts.text(text.sequence)
        self._table = self._tables.setdefault(key, _Table(steps, rows, context, batch))
        if self._table.context is not None and context is not None and self._table.context is not context:
            self._table.context.copy_(context)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the modules return what was filled last; the text that a forward is given is not read.

        A forward must have the rows of that `fill`, in its order. Other blocks that replace forwards of the same
        modules, as `GroupedAdapters.active` does, are entered before this one. Raises RuntimeError before the first
        `fill` and where adapters were added since this was made.
        """
        if self._table is None:
            raise RuntimeError("nothing is cached yet; fill first")
        if injected(self.transformer) != self._injected:
            raise RuntimeError("adapters were added or removed since ModulationCache was made; make it afterwards")
        self._on = True
        try:
            with patched_forward(self._forwards):
                yield
        finally:
            self._on = False
            for slot in self._slots:
                vars(slot).clear()

    def _replacements(self) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
        parts = self._modulation
        forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        if self._linears:
            forwards.append((parts.embedder, self._read_embedding))
        for (activation, linear), slot in zip(parts.layers, self._slots, strict=True):
            forwards += [] if activation is None else [(activation, lambda hidden: hidden)]
            forwards.append((linear, _reading(slot)))
        if parts.text is not None:
            forwards.append((parts.text, self._read_context))
        return forwards

    def _read_embedding(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Replace the embedding, with which every forward begins: set the step's row for the layers that follow."""
        table = self._of_batch([*inputs, *named.values()][-1])
        assert table.steps is not None
        if any(vars(module).get("forward") is not forward for module, forward in self._forwards):
            raise RuntimeError("another block replaced forwards that are cached; enter active() inside of it")
        rows = table.rows
        row = table.steps.index_select(0, self.step)[0] if rows is None else table.steps[self.step, rows]
        first, *pieces = row.split(self._sizes, dim=-1)
        for slot, piece in zip(self._slots, pieces, strict=True):
            # Blocks of several kinds have outputs of several widths, which is no reason to compile for any width.
            torch._dynamo.mark_static(piece, 1)
            slot.now = piece
        return first

    def _read_context(self, tokens: Tensor) -> Tensor:
        table = self._of_batch(tokens)
        assert table.context is not None
        return table.context

    def _of_batch(self, given: Tensor) -> _Table:
        table = self._table
        assert table is not None
        if given.shape[0] != table.batch:
            raise ValueError(f"filled for {table.batch} rows and asked for {given.shape[0]}; fill for these rows first")
        return table


@contextlib.contextmanager
def at_step(cache: ModulationCache | None, step: Tensor | None) -> Iterator[None]:
    """Enter `cache.active()` at the step (0-dim int64, on the device); nothing happens where either is None."""
    if cache is None or step is None:
        yield
        return
    cache.step.copy_(step.view(1))
    with cache.active():
        yield


def _reading(slot: _Slot) -> Callable[[Tensor], Tensor]:
    return lambda hidden: slot.now


def _fixed(module: nn.Module, device: torch.device) -> bool:
    """Return whether the module's weights are frozen, unsharded and on the device where the model computes."""
    return all(
        not p.requires_grad and p.device.type == device.type and not isinstance(p, DTensor) for p in module.parameters()
    )
