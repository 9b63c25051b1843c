"""The teachers: frozen, one a task, each asked at the student's states for the samples of its task.

Placement `merged` gives every teacher its own transformer with its LoRA merged: plain matrix products, M copies of the
weights. `shared` keeps them as adapters beside each other on one base: one copy, switched between tasks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from opd_fast.config import TeacherConfig
from opd_fast.config.paths import BASE as BASE
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.engine.grouped_lora import Call, GroupedAdapters, grouped_velocities, joined
from opd_fast.engine.modulation_cache import Remembered, recalled
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Velocities, in_rows, velocities
from opd_fast.models.lora.adapters import add_frozen, use_adapter
from opd_fast.models.lora.files import find_lora, read_lora
from opd_fast.models.lora.load import Origin, check_weights, load_with_origin
from opd_fast.reporting.telemetry import annotate

if TYPE_CHECKING:
    from opd_fast.training.batch import RoundBatch


@dataclass(frozen=True)
class Course:
    """What the teachers need of a batch at every step, made once a round."""

    parts: tuple[tuple[int, slice, Conditioning], ...]
    """(teacher, its rows, their text); the text of another sample where it has none and is asked all the same."""
    guidance: Tensor
    """(B,) float32: g of each sample's branches, `Conditioning.branch_guidance` of its teacher."""
    calls: tuple[Call, ...] = ()
    """The forwards of `grouped` teachers; none where each is asked by itself."""


@dataclass(frozen=True)
class Teacher:
    name: str
    guidance: float | None
    """As it was set; `DiffusionModel.strength` says what it means, None is unguided."""
    transformer: nn.Module
    adapter: str | None
    """Its adapter on a shared base; None where the weights are merged; BASE: the shared base without any."""
    origin: Origin
    weight: float = 1.0
    """The factor on its task's loss, and its share of a student that starts from the teachers' mean."""


class TeacherBank:
    """The teachers in the order of the configuration."""

    def __init__(self, model: DiffusionModel, teachers: Sequence[Teacher], *, offloaded: bool = False) -> None:
        self.model, self.teachers = model, list(teachers)
        self.offloaded = offloaded
        """Whether they lie in CPU memory and come to the device block by block."""
        self.together = False
        """Whether all ranks ask the same teachers in the same order, as weights they share the shards of need."""
        self._autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)
        self._grouped: GroupedAdapters | None = None
        self._remembering = False
        self._remembered: dict[int, Remembered | None] = {}
        """Of each teacher, or of each of the calls of `_grouped`."""

    @classmethod
    def load(
        cls,
        model: DiffusionModel,
        configs: Sequence[TeacherConfig],
        placement: Literal["merged", "shared"] = "merged",
        *,
        offload: bool = False,
    ) -> TeacherBank:
        """Load and check every teacher; `offload` keeps merged ones in CPU memory, their blocks on the GPU while asked.

        Raises ValueError, naming the teacher, for weights that are missing, damaged, not finite or of another shape,
        for a LoRA of which only a part fits unless the teacher is `partial`, and for what is no LoRA under `shared`.
        """
        teachers = []
        for config in configs:
            with _naming(config):
                if placement == "merged":
                    transformer, origin = load_with_origin(
                        model, config.weights, what="weights", partial=config.partial
                    )
                    adapter = None
                    if offload:
                        transformer.enable_group_offload(  # type: ignore[operator]
                            onload_device=model.device,
                            offload_device=torch.device("cpu"),
                            offload_type="block_level",
                            num_blocks_per_group=1,
                            use_stream=model.device.type == "cuda",
                        )
                    else:
                        transformer.to(model.device)
                else:
                    transformer = model.transformer
                    adapter, origin = _add(model, config)
            teachers.append(Teacher(config.name, config.guidance, transformer, adapter, origin, config.weight))
        return cls(model, teachers, offloaded=offload and placement == "merged")

    @classmethod
    def of_base(cls, model: DiffusionModel, guidance: float | None) -> TeacherBank:
        """A bank of one: the base itself, whatever adapters sit on it. It takes no memory of its own."""
        origin = Origin(BASE, "transformer", 0, 0, 0, (), "")
        return cls(model, [Teacher(BASE, guidance, model.transformer, BASE, origin)])

    def __len__(self) -> int:
        return len(self.teachers)

    @contextlib.contextmanager
    def active(self, index: int) -> Iterator[nn.Module]:
        """The transformer of teacher `index`, switched on."""
        teacher = self.teachers[index]
        with contextlib.ExitStack() as stack:
            if teacher.adapter is not None:
                name = None if teacher.adapter == BASE else teacher.adapter
                stack.enter_context(use_adapter(teacher.transformer, name))
            stack.enter_context(self._autocast)
            yield teacher.transformer

    @property
    def own(self) -> list[nn.Module]:
        """The transformers that are the teachers' own, where they may be changed: neither shared nor offloaded."""
        return [] if self.offloaded else [teacher.transformer for teacher in self.teachers if teacher.adapter is None]

    def group(self) -> int:
        """Ask adapters on one base in one forward from now on, all adapters being in place; how many teachers that are.

        0, and nothing changed, where the teachers have weights of their own.
        """
        names = [teacher.adapter for teacher in self.teachers]
        if not names or None in names:
            return 0
        adapters = [None if name == BASE else name for name in names]
        self._grouped = GroupedAdapters(self.teachers[0].transformer, adapters)
        return len(adapters)

    def remember_modulation(self) -> int:
        """Let `course` compute once what depends on step and prompt alone; of how many layers."""
        self._remembering = self._grouped is not None or bool(self.own)
        if not self._remembering:
            return 0
        return sum(r.layers for i in range(len(self)) if (r := self._memory(i)) is not None)

    def _memory(self, index: int) -> Remembered | None:
        """That of a teacher, or of a grouped call."""
        if index not in self._remembered:
            transformer = self.teachers[0 if self._grouped is not None else index].transformer
            self._remembered[index] = Remembered.of(self.model, transformer)
        return self._remembered[index]

    def course(self, batch: RoundBatch, sigmas: Tensor | None = None) -> Course:
        """The constant part of `velocities` for one batch; sigmas (N,) float32 are the levels it will be asked at."""
        guidance = torch.ones_like(batch.scale)
        parts = []
        for index, rows in batch.tasks:
            none = rows.start == rows.stop
            if none and not self.together:
                continue
            text = batch.text.index(slice(0, 1) if none else rows)
            condition = Conditioning.build(self.model, text, batch.negative, self.teachers[index].guidance)
            guidance[rows] = condition.branch_guidance
            parts.append((index, rows, condition))
        calls = () if self._grouped is None or self.together else joined(parts)
        if self._remembering and sigmas is not None:
            with self._autocast:
                self._fill(sigmas, parts, calls)
        return Course(tuple(parts), guidance, calls)

    def _fill(self, sigmas: Tensor, parts: Sequence[tuple[int, slice, Conditioning]], calls: Sequence[Call]) -> None:
        for i, call in enumerate(calls):
            if self._grouped is not None and (memory := self._memory(i)) is not None:
                with self._grouped.active(call.spans):
                    memory.fill(sigmas, call.condition)
        for index, _, condition in () if calls else parts:
            if (memory := self._memory(index)) is not None:
                memory.fill(sigmas, condition)

    @torch.no_grad()
    def velocities(
        self,
        x: Tensor,
        sigma: Tensor,
        course: Course,
        graphs: Graphs | None = None,
        step: Tensor | None = None,
    ) -> Velocities:
        """Each sample's velocity by its own teacher, both branches; x (B, C, H, W) float32, sigma 0-dim float32.

        Rows of unguided teachers are left unset in `uncond`: the step never reads them. With `graphs` every teacher's
        forward is one graph for each number of samples, and the result lasts until the next call. `step`, a 0-dim int64
        tensor on the device: the level's place among those that the course was made for.
        """
        if course.calls:
            return self._ask_grouped(x, sigma, course.calls, graphs, step)
        found = []
        for index, rows, condition in course.parts:
            none = rows.start == rows.stop
            with annotate("task"):
                v = self._ask(index, x[:1] if none else x[rows], sigma, condition, graphs, step)
            if not none:
                found.append((rows, v))
        return in_rows(found)

    def _ask(
        self,
        index: int,
        x: Tensor,
        sigma: Tensor,
        condition: Conditioning,
        graphs: Graphs | None,
        step: Tensor | None,
    ) -> Velocities:
        memory = self._memory(index) if self._remembering else None

        def forward(x: Tensor, sigma: Tensor, condition: Conditioning, step: Tensor | None) -> Velocities:
            with self.active(index) as transformer, recalled(memory, step):
                return velocities(self.model, transformer, x, sigma, condition)

        if graphs is None or self.together:  # shards are gathered by hooks, which no graph records
            return forward(x, sigma, condition, step)
        name = f"teacher {self.teachers[index].name} on {len(x)} samples"
        return graphs.call(("teacher", id(self), index, len(x)), name, forward, x, sigma, condition, step)

    def _ask_grouped(
        self, x: Tensor, sigma: Tensor, calls: tuple[Call, ...], graphs: Graphs | None, step: Tensor | None
    ) -> Velocities:
        grouped = self._grouped
        assert grouped is not None
        memories = [self._memory(i) for i in range(len(calls))] if self._remembering and step is not None else []

        def forward(x: Tensor, sigma: Tensor, calls: tuple[Call, ...], step: Tensor | None) -> Velocities:
            tables = [memory for memory in memories if memory is not None]
            for table in tables:
                assert step is not None
                table.step.copy_(step.view(1))
            return grouped_velocities(self.model, grouped, x, sigma, calls, tables)

        if graphs is None:
            return forward(x, sigma, calls, step)
        name = f"{len(self)} teachers on {len(x)} samples"
        return graphs.call(("teachers", id(self), len(x)), name, forward, x, sigma, calls, step)

    @torch.no_grad()
    def check(self, x: Tensor, sigma: Tensor, condition: Conditioning) -> None:
        """One forward of each teacher; raises ValueError naming the teacher whose output is not finite."""
        for index, teacher in enumerate(self.teachers):
            with self.active(index) as transformer:
                v = velocities(self.model, transformer, x, sigma, condition).cond
            if not bool(torch.isfinite(v).all()):
                raise ValueError(
                    f"teacher {teacher.name!r} yields NaN or infinite velocities at sigma {float(sigma):.3f}; check "
                    f"its weights, or give model.dtype float32"
                )


def check_teachers(
    outline: DiffusionModel, configs: Sequence[TeacherConfig], placement: Literal["merged", "shared"] = "merged"
) -> None:
    """Raise what `TeacherBank.load` would for names and shapes, on a model without weights."""
    for config in configs:
        with _naming(config):
            if placement == "shared":
                _need_lora(config)
            check_weights(outline, config.weights, what="weights", partial=config.partial)


@contextlib.contextmanager
def _naming(config: TeacherConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"teacher {config.name!r}: {error}") from error


def _need_lora(config: TeacherConfig) -> None:
    if find_lora(config.weights) is None:
        raise ValueError(
            f"{config.weights} is no LoRA, and engine.placement shared keeps teachers as adapters; use merged"
        )


def _add(model: DiffusionModel, config: TeacherConfig) -> tuple[str, Origin]:
    """Put a LoRA beside others on the base as a frozen adapter; its name there."""
    _need_lora(config)
    name = f"teacher_{config.name}".replace(".", "_")
    lora = read_lora(config.weights, model)
    modules = add_frozen(model.transformer, name, lora, allow_partial=config.partial)
    return name, Origin.of_lora(config.weights, lora, modules)
