"""The engine's techniques, put to work on a run's models in the one order that is right, and what of them is at work.

What a technique needs to know stands in its own module. Here: the order. Frozen weights are changed first, then blocks
are checkpointed, then compiled, and only then may FSDP's hooks go around them; graphs are captured when a round first
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from opd_fast.config import EngineConfig
from opd_fast.graphs import CudaBackend, Graphs
from opd_fast.models.base import DiffusionModel
from opd_fast.recompute import recompute_blocks
from opd_fast.student import Student
from opd_fast.teachers import TeacherBank


@dataclass
class Engaged:
    """What is at work, counted: 0 and empty names stand for techniques that are off or do not fit the model."""

    merged_teachers: int = 0
    """Teachers with weights of their own, their LoRA merged."""
    merged_layers: int = 0
    """The student's LoRA layers that are merged for a round."""
    recomputed: int = 0
    """Blocks of the student that compute their activations again in the backward."""
    compiled: int = 0
    """Blocks under torch.compile."""
    graphs: Graphs = field(default_factory=lambda: Graphs(None))
    """What was captured and replayed so far."""


def engage(
    settings: EngineConfig,
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    anchor: TeacherBank | None = None,
    *,
    compiled: bool,
    graphed: bool,
    recompute: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Engaged:
    """Put the techniques of `settings` to work, in place; `compiled`, `graphed` and `recompute` are what
    engine.compile, engine.graphs and engine.recompute came to."""
    engaged = Engaged(merged_teachers=sum(teacher.adapter is None for teacher in teachers.teachers))
    engaged.merged_layers = student.merge_in_rounds(settings.merge_student)
    engaged.recomputed = recompute_blocks(model.blocks(student.transformer), recompute)
    if compiled:
        engaged.compiled = compile_blocks(model, student, teachers, anchor)
    if graphed:
        engaged.graphs = _graphs(model, teachers, say)
    return engaged


def _graphs(model: DiffusionModel, teachers: TeacherBank, say: Callable[[str], None]) -> Graphs:
    """The graphs of a run, or none, with the reason."""
    why = None
    if model.device.type != "cuda":
        why = "there is no CUDA device"
    elif teachers.offloaded:
        why = "teachers come from the CPU's memory block by block (parallel.offload_teachers)"
    if why is None:
        return Graphs(CudaBackend(model.device), say)
    say(f"graphs: off, {why}; every step is launched from Python")
    return Graphs(None)


def compile_blocks(
    model: DiffusionModel, student: Student, teachers: TeacherBank, anchor: TeacherBank | None = None
) -> int:
    """torch.compile of each repeated block, in place: one compilation serves all blocks of a kind. Their number."""
    frozen = [*teachers.teachers, *(anchor.teachers if anchor is not None else [])]
    transformers: dict[int, nn.Module] = {
        id(t): t for t in [student.transformer, *(teacher.transformer for teacher in frozen)]
    }
    blocks = [block for transformer in transformers.values() for block in model.blocks(transformer)]
    for block in blocks:
        block.compile()
    return len(blocks)
