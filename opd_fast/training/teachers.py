"""The teachers: frozen, one a task, each asked at the student's states for the samples of its task.

`engine.placement` chooses between two banks. `MergedTeachers` gives every teacher its own transformer with its LoRA
merged: plain matrix products, M copies of the weights. `SharedTeachers` keeps them as adapters beside each other on one
base: one copy, switched between tasks, or all adapters in one forward (`group`).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from opd_fast.config.paths import BASE as BASE
from opd_fast.distributed.world import World
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.engine.grouped_lora import Call, GroupedAdapters, grouped_velocities, joined
from opd_fast.engine.modulation_cache import ModulationCache, at_step
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Velocities, in_rows, predict_velocities
from opd_fast.models.lora.adapters import use_adapter
from opd_fast.models.lora.load import WeightsSource
from opd_fast.reporting.telemetry import annotate
from opd_fast.training.batch import RoundBatch

Part = tuple[int, slice, Conditioning]
"""(teacher, its rows, their text)."""


@dataclass(frozen=True)
class TeacherConditioning:
    """What the teachers need of a batch at every step, made once a round."""

    parts: tuple[Part, ...]
    """A teacher without rows that is asked all the same has the text of another sample."""
    guidance: Tensor
    """(B,) float32: g of each sample's branches, `Conditioning.branch_guidance` of its teacher."""
    calls: tuple[Call, ...] = ()
    """The forwards of grouped teachers; none where each is asked by itself."""


@dataclass(frozen=True)
class Teacher:
    name: str
    guidance: float | None
    """As it was set; `DiffusionModel.strength` says what it means, None is unguided."""
    transformer: nn.Module
    adapter: str | None
    """Its adapter on a shared base; None where the weights are merged; BASE: the shared base without any."""
    source: WeightsSource
    weight: float = 1.0
    """The factor on its task's loss, and its share of a student that starts from the teachers' mean."""


class TeacherBank(ABC):
    """The teachers of a run, in the order of the configuration."""

    offloaded = False
    """Whether they lie in CPU memory and come to the device block by block."""
    _in_step = False
    """Whether all ranks ask the same teachers in the same order, because they share the shards of the weights."""
    _grouped: GroupedAdapters | None = None
    """All adapters in one forward."""

    def __init__(self, model: DiffusionModel, teachers: Sequence[Teacher]) -> None:
        self.model, self.teachers = model, list(teachers)
        self._autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)
        self._caches: list[ModulationCache | None] = []
        """One for each forward of `velocities`, or none at all."""

    def __len__(self) -> int:
        return len(self.teachers)

    @abstractmethod
    def _switched_on(self, teacher: Teacher) -> AbstractContextManager[nn.Module]:
        """Its transformer, which computes with its weights within the block."""

    @contextlib.contextmanager
    def active(self, index: int) -> Iterator[nn.Module]:
        """The transformer of teacher `index`, switched on within the block."""
        with self._switched_on(self.teachers[index]) as transformer, self._autocast:
            yield transformer

    def own_transformers(self) -> list[nn.Module]:
        """The transformers that only teachers use and that may be changed in place."""
        return []

    def group(self) -> int:
        """Ask all adapters of one base in one forward from now on; every adapter must be in place.

        Returns the number of teachers; 0, and nothing is changed, for teachers with weights of their own.
        """
        return 0

    def distribute(self, world: World) -> None:
        """Ask every teacher on every rank where the student has sharded the base that they share."""
        self._in_step = world.sharded and all(teacher.adapter is not None for teacher in self.teachers)

    def cache_modulation(self) -> int:
        """Let `condition` compute once what depends on step and prompt alone. Returns the number of layers it keeps."""
        # Grouped teachers have at most as many forwards as there are teachers.
        transformers = [t.transformer for t in self.teachers] if self._grouped else self.own_transformers()
        self._caches = [ModulationCache.of(self.model, transformer) for transformer in transformers]
        return sum(cache.layers for cache in self._caches if cache is not None)

    def condition(self, batch: RoundBatch, sigmas: Tensor | None = None) -> TeacherConditioning:
        """The constant part of `velocities` for one batch; sigmas (N,) float32 are the levels it will be asked at."""
        guidance = torch.ones_like(batch.scale)
        parts = []
        for index, rows in batch.tasks:
            empty = rows.start == rows.stop
            if empty and not self._in_step:
                continue
            text = batch.text.index(slice(0, 1) if empty else rows)
            condition = Conditioning.build(self.model, text, batch.negative, self.teachers[index].guidance)
            guidance[rows] = condition.branch_guidance
            parts.append((index, rows, condition))
        calls = joined(parts) if self._grouped else ()
        if self._caches and sigmas is not None:
            with self._autocast:
                self._fill_caches(sigmas, parts, calls)
        return TeacherConditioning(tuple(parts), guidance, calls)

    def _fill_caches(self, sigmas: Tensor, parts: Sequence[Part], calls: Sequence[Call]) -> None:
        if self._grouped is None:
            for index, _, condition in parts:
                if (cache := self._caches[index]) is not None:
                    cache.fill(sigmas, condition)
            return
        for cache, call in zip(self._caches, calls, strict=False):
            if cache is not None:
                with self._grouped.active(call.spans):
                    cache.fill(sigmas, call.condition)

    @torch.no_grad()
    def velocities(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: TeacherConditioning,
        graphs: Graphs | None = None,
        step: Tensor | None = None,
    ) -> Velocities:
        """Each sample's velocity by its own teacher, both branches; x (B, C, H, W) float32, sigma 0-dim float32.

        Rows of unguided teachers are left unset in `uncond`: the step never reads them. With `graphs` every forward is
        one graph for each number of samples, and the result lasts until the next call. `step`, a 0-dim int64 tensor on
        the device, is the level's place among those that the condition was made for.
        """
        # Shards are gathered by hooks, which no graph records.
        call = Graphs(None).call if graphs is None or self._in_step else graphs.call
        if condition.calls:
            name = f"{len(self)} teachers on {len(x)} samples"
            return call(("teachers", id(self), len(x)), name, self._ask_together, x, sigma, condition.calls, step)
        parts = []
        for index, rows, of_rows in condition.parts:
            empty = rows.start == rows.stop
            part = x[:1] if empty else x[rows]
            name = f"teacher {self.teachers[index].name} on {len(part)} samples"
            key = ("teacher", id(self), index, len(part))
            with annotate("task"):
                v = call(key, name, partial(self._ask, index), part, sigma, of_rows, step)
            if not empty:
                parts.append((rows, v))
        return in_rows(parts)

    def _ask(self, index: int, x: Tensor, sigma: Tensor, condition: Conditioning, step: Tensor | None) -> Velocities:
        cache = self._caches[index] if self._caches else None
        with self.active(index) as transformer, at_step(cache, step):
            return predict_velocities(self.model, transformer, x, sigma, condition)

    def _ask_together(self, x: Tensor, sigma: Tensor, calls: tuple[Call, ...], step: Tensor | None) -> Velocities:
        assert self._grouped is not None
        caches: list[ModulationCache] = []
        if step is not None:
            caches = [cache for cache in self._caches[: len(calls)] if cache is not None]
            for cache in caches:
                cache.step.copy_(step.view(1))
        return grouped_velocities(self.model, self._grouped, x, sigma, calls, caches)

    @torch.no_grad()
    def check(self, x: Tensor, sigma: Tensor, condition: Conditioning) -> None:
        """Run one forward of each teacher; raises ValueError naming the teacher whose output is not finite."""
        for index, teacher in enumerate(self.teachers):
            with self.active(index) as transformer:
                v = predict_velocities(self.model, transformer, x, sigma, condition).cond
            if not bool(torch.isfinite(v).all()):
                raise ValueError(
                    f"teacher {teacher.name!r} yields NaN or infinite velocities at sigma {float(sigma):.3f}; check "
                    f"its weights, or give model.dtype float32"
                )


class MergedTeachers(TeacherBank):
    """Transformers that are the teachers' own. Every rank has them whole."""

    def __init__(self, model: DiffusionModel, teachers: Sequence[Teacher], *, offloaded: bool = False) -> None:
        super().__init__(model, teachers)
        self.offloaded = offloaded

    def _switched_on(self, teacher: Teacher) -> AbstractContextManager[nn.Module]:
        return nullcontext(teacher.transformer)

    def own_transformers(self) -> list[nn.Module]:
        return [] if self.offloaded else [teacher.transformer for teacher in self.teachers]


class SharedTeachers(TeacherBank):
    """Adapters on one base, or that base itself. Modulation is cached once they are grouped."""

    def _switched_on(self, teacher: Teacher) -> AbstractContextManager[nn.Module]:
        return use_adapter(teacher.transformer, _adapter(teacher))

    def group(self) -> int:
        if self.teachers:
            self._grouped = GroupedAdapters(self.teachers[0].transformer, [_adapter(t) for t in self.teachers])
        return len(self.teachers)


def _adapter(teacher: Teacher) -> str | None:
    """Its adapter's name on the transformer; None for the base without any."""
    return None if teacher.adapter == BASE else teacher.adapter
