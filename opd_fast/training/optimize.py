"""The engine's techniques, applied to a run's models in the one order that is right, and a count of what is at work.

What a technique does stands in its own module, and what it needs to know of a transformer is asked of the family. This
module holds the order: frozen weights are changed first, then blocks are checkpointed, then compiled, and only then may
FSDP's hooks go around them. Graphs are captured when a round first runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from opd_fast.config import EngineConfig
from opd_fast.distributed.world import World
from opd_fast.engine import attention, attention_choice
from opd_fast.engine import float8 as fp8
from opd_fast.engine.activation_checkpointing import checkpoint_blocks
from opd_fast.engine.attention_choice import Case
from opd_fast.engine.cuda_graphs import CudaBackend, Graphs
from opd_fast.engine.fused_qkv import fuse_projections
from opd_fast.models.base import DiffusionModel
from opd_fast.training.student import Student
from opd_fast.training.teachers import TeacherBank

COMPILATIONS = 64
"""Forms of a block that may be compiled: kinds of block, adapters on or off, gradient or not, numbers of rows."""


@dataclass
class ActiveTechniques:
    """Counts of what is at work; 0 and empty names stand for techniques that are off or do not fit the model."""

    merged_teachers: int = 0
    """Teachers with weights of their own, their LoRA merged."""
    grouped_teachers: int = 0
    """Teachers on one base that are asked in one forward."""
    merged_layers: int = 0
    """The student's LoRA layers that are merged for a round."""
    fused: int = 0
    """Attention modules of the teachers whose projections are one product."""
    modulation: int = 0
    """Layers of student and teachers that are computed once a round, for all of its steps."""
    backends: tuple[str, ...] = ()
    """The implementations of attention that were set: the student's and, where they have weights, the teachers'."""
    fp8: int = 0
    """Layers of student and teachers in float8."""
    checkpointed: int = 0
    """Blocks of the student that compute their activations again in the backward."""
    compiled: int = 0
    """Blocks under torch.compile."""
    graphs: Graphs = field(default_factory=lambda: Graphs(None))
    """What was captured and replayed so far."""


@dataclass(frozen=True)
class ForwardSizes:
    """The sizes of a round's forwards; rows count the branches of guidance."""

    student_rows: int
    teacher_rows: int
    resolution: int


@dataclass(frozen=True)
class ResolvedSettings:
    """What the settings that depend on the machine or on an earlier run came to."""

    compiled: bool = False
    """Whether blocks are compiled (engine.compile)."""
    graphed: bool = False
    """Whether steps are captured (engine.graphs)."""
    checkpointed: int = 0
    """How many of the student's blocks are checkpointed (engine.recompute)."""
    backends: Sequence[str] = ()
    """The implementations of attention that the run had before, which are not measured again."""


def apply_techniques(
    settings: EngineConfig,
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    forwards: ForwardSizes,
    *,
    anchor: TeacherBank | None = None,
    resolved: ResolvedSettings | None = None,
    world: World | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ActiveTechniques:
    """Put the techniques of `settings` to work, in place; what does not fit model or machine is left out and said.

    `world` is the one that the student will be distributed in. Raises UserError for an unknown name of a setting.
    """
    world, resolved = world or World(), resolved or ResolvedSettings()
    banks = [bank for bank in (teachers, anchor) if bank is not None]
    own = list({id(t): t for bank in banks for t in bank.own_transformers()}.values())
    active = ActiveTechniques(merged_teachers=sum(teacher.adapter is None for teacher in teachers.teachers))
    active.merged_layers = student.merge_in_rounds(settings.merge_student)
    if settings.fuse_projections:
        active.fused = sum(fuse_projections(net, model.attentions(net)) for net in own)
    if settings.attention != "native":  # as diffusers has it
        active.backends = _attention(settings.attention, resolved.backends, model, student, own, forwards, world, say)
    if settings.precision == "fp8":
        active.fp8 = _float8(model, student, own, world, say)
    if settings.group_teachers and not world.sharded:
        active.grouped_teachers = teachers.group()
    if settings.cache_modulation and not world.sharded:
        active.modulation = student.cache_modulation() + sum(bank.cache_modulation() for bank in banks)
    active.checkpointed = checkpoint_blocks(model.blocks(student.transformer), resolved.checkpointed)
    if resolved.compiled:
        active.compiled = compile_blocks(model, student, *banks)
    if resolved.graphed:
        active.graphs = _graphs(model, banks, say)
    return active


def _attention(
    setting: str,
    before: Sequence[str],
    model: DiffusionModel,
    student: Student,
    own: Sequence[nn.Module],
    forwards: ForwardSizes,
    world: World,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """Choose and set the implementation of student and base, which need a gradient, and that of the teachers."""
    tokens, mask = model.image_tokens(forwards.resolution) + model.text_tokens, model.masks_text
    chosen = []
    trained = [student.transformer, model.transformer]
    groups = ("student", trained, forwards.student_rows), ("teachers", own, forwards.teacher_rows)
    for i, (who, transformers, rows) in enumerate(groups):
        if not transformers:
            continue
        if setting == attention.AUTO and i < len(before):
            name = before[i]
        else:
            try:
                sites, grad = model.attentions(transformers[0]), who == "student"
                case = Case.of(
                    sites, device=model.device, dtype=model.dtype, rows=rows, tokens=tokens, mask=mask, needs_grad=grad
                )
            except ValueError as error:  # a family of the user's own
                say(f"attention: {error}; it stays as it is")
                return ()
            # One rank measures for all: what they compute must not depend on whose clock was disturbed.
            name = world.on_first(partial(_backend, setting, case, who, say))
        for transformer in {id(t): t for t in transformers}.values():
            attention.route(model.attentions(transformer), name)
        chosen.append(name)
    return tuple(chosen)


def _backend(setting: str, case: Case, of: str, say: Callable[[str], None]) -> str:
    choice = attention_choice.choose(setting, case)
    say(choice.line.replace("attention:", f"attention of the {of}:", 1))
    return choice.backend


def _float8(
    model: DiffusionModel, student: Student, own: Sequence[nn.Module], world: World, say: Callable[[str], None]
) -> int:
    """Keep frozen weights in float8 where the machine computes in it; returns how many layers are."""
    why = fp8.supported(model.device)
    if why is not None:
        say(f"precision: fp8 {why}; frozen weights stay in {model.dtype}".replace("torch.", ""))
        return 0
    layers = sum(fp8.quantize_frozen(net, model.token_layers(net)) for net in own)
    return layers if world.sharded else layers + student.merge_in_float8()


def _graphs(model: DiffusionModel, banks: Sequence[TeacherBank], say: Callable[[str], None]) -> Graphs:
    """The graphs of a run; where there can be none, `say` gets the reason."""
    if model.device.type != "cuda":
        why = "there is no CUDA device"
    elif any(bank.offloaded for bank in banks):
        why = "teachers come from the CPU's memory block by block (parallel.offload_teachers)"
    else:
        return Graphs(CudaBackend(model.device, say), say)
    say(f"graphs: off, {why}; every step is launched from Python")
    return Graphs(None)


def compile_blocks(model: DiffusionModel, student: Student, *banks: TeacherBank) -> int:
    """Compile each repeated block, in place; returns how many there are. Blocks of a kind share one compilation."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)  # beyond it blocks would run uncompiled
    transformers = [student.transformer, *(teacher.transformer for bank in banks for teacher in bank.teachers)]
    blocks = {id(block): block for transformer in transformers for block in model.blocks(transformer)}
    for block in blocks.values():
        # A round has few forms of batch, and each gets kernels of its own: a second number of rows, such as that of
        # a teacher without guidance, would otherwise be compiled with symbolic sizes, whose kernels are slower.
        block.compile(dynamic=False)
    return len(blocks)
