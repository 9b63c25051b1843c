"""Everything a run needs before its first round: model, text, teachers, student, prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from opd_fast.config import Config
from opd_fast.config.methods.spec import method_spec
from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.data.schedule import PromptSource, TaskSchedule
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.data.text_store import TextStore
from opd_fast.distributed.plan import Planner, branches, rollout_solver, task_schedule
from opd_fast.distributed.resolve import Resolved
from opd_fast.distributed.world import World
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning
from opd_fast.reporting.progress import progress_of
from opd_fast.seeds import noise_keys
from opd_fast.solvers import SolverTable
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.float8_check import float8_loss_check
from opd_fast.training.optimize import ActiveTechniques, ForwardSizes, ResolvedSettings, apply_techniques
from opd_fast.training.preflight import anchor_teacher, evaluation_solver, evaluation_task, frozen_teachers, refusals
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import base_teacher, load_teachers
from opd_fast.training.teachers import BASE, TeacherBank
from opd_kernels.philox import INITIAL_NOISE, philox_normal


@dataclass(frozen=True)
class Setup:
    """A run's parts, loaded and checked."""

    config: Config
    model: DiffusionModel
    student: Student
    teachers: TeacherBank
    table: SolverTable
    """The rollout's solver."""
    evaluation_table: SolverTable
    shape: tuple[int, int, int]
    """(C, H, W) of a latent."""
    prompts: list[list[Prompt]]
    """The training prompts of each teacher's task."""
    sources: list[PromptSource]
    """The choice of the prompts that a task's turn takes."""
    schedule: TaskSchedule
    """The choice of the tasks that a round takes."""
    tasks: list[EvalTask]
    """Held-out prompts with their rewards, for the tasks that have both."""
    text: EmbeddingCache
    world: World
    active: ActiveTechniques
    """The engine's techniques that are at work."""
    anchor: TeacherBank | None
    """A bank with the one model that the objective holds the student to."""


def prepare(
    config: Config,
    log: Callable[[str], None],
    world: World | None = None,
    backends: Sequence[str] = (),
    planner: Planner | None = None,
) -> Setup:
    """Check what `config` names, load it, and put the engine's techniques to work.

    `backends` of attention are those that a resumed run had; `planner` is that of `config`, where the caller has one.
    Raises ValueError, which names the setting, where something is missing or does not fit.
    """
    world = world or World()
    planner = planner or Planner(config, world.size)
    resolved = planner.resolved
    for error in refusals(planner, sharded=world.sharded, fetches=True):
        raise error
    prompts = [load_prompts(teacher.prompts) for teacher in config.teachers]
    sources = [PromptSource(len(p), config.train.seed, stream) for stream, p in enumerate(prompts)]
    schedule = task_schedule(config)
    tasks = [task for teacher in config.teachers if (task := evaluation_task(teacher, config, log)) is not None]

    model = _load_model(config, resolved, world, log)
    table = rollout_solver(config, model)
    # Files hold many times as many prompts as a run meets, and the T5 embedding of each is large.
    met = zip(prompts, sources, schedule.turns(config.train.rounds), strict=True)
    count = method_spec(config).prompts_per_turn(config)
    texts = [of_task[i].text for of_task, source, turns in met for i in source.seen(turns, count)]
    texts += [prompt.text for task in tasks for prompt in task.prompts]
    text = _encode(model, config, texts, world, log)

    load = partial(load_teachers, model, placement=config.engine.placement, offload=config.parallel.offload_teachers)
    teachers, anchor = load(frozen_teachers(config)), None  # both before the student's adapters lie on the base
    for teacher in teachers.teachers:
        log(f"teacher {teacher.name}: {teacher.source}")
    if config.objective.anchor == BASE:
        anchor = base_teacher(model, config.student.guidance)
    elif (weights := anchor_teacher(config)) is not None:
        anchor = load([weights])
    student = Student.build(model, config.student, seed=config.train.seed, teachers=teachers)
    loss_check = None
    if not world.sharded:
        loss_check = float8_loss_check(config, model, student, teachers, table, text, prompts)
    sizes = forwards(config, model, world)
    switches = ResolvedSettings(resolved.compile, resolved.graphs, checkpointed_blocks(planner), backends)
    active = apply_techniques(
        config.engine, model, student, teachers, sizes, anchor=anchor, resolved=switches, world=world, say=log
    )
    if active.fp8:
        log(loss_check() if loss_check is not None else "precision: fp8, its change of the losses not measured")
    student.distribute(world)  # after compiling: FSDP's hooks stay outside the compiled blocks
    teachers.distribute(world)
    if anchor is not None:
        anchor.distribute(world)
    shape = model.latent_shape(model.resolution(config.model.resolution))
    sigma = table.sigmas[0].float().to(resolved.device)
    probe = philox_normal(noise_keys(config.train.seed, samples=1).to(resolved.device), shape, INITIAL_NOISE)
    teachers.check(probe, sigma, Conditioning.build(model, text.negative, None, None))
    trainable = sum(p.numel() for p in student.parameters())
    log(f"student starts from {student.began}")
    log(f"student trains {trainable:,} parameters in {resolved.dtype}".replace("torch.", "") + f" on {resolved.device}")
    return Setup(
        config=config,
        model=model,
        student=student,
        teachers=teachers,
        table=table,
        evaluation_table=evaluation_solver(config, model),
        shape=shape,
        prompts=prompts,
        sources=sources,
        schedule=schedule,
        tasks=tasks,
        text=text,
        world=world,
        active=active,
        anchor=anchor,
    )


def _load_model(config: Config, resolved: Resolved, world: World, log: Callable[[str], None]) -> DiffusionModel:
    settings = config.model
    torch.backends.cuda.matmul.allow_tf32 = resolved.tf32
    model = load_model(
        settings.path,
        settings.family,
        device="cpu" if world.sharded else resolved.device,  # sharded weights go to the device block by block
        dtype=resolved.dtype,
        max_sequence_length=settings.max_sequence_length,
        text_device="cpu" if settings.text_device == "cpu" else None,
        guidance_convention=settings.guidance_convention,
    )
    if world.sharded:
        model.device = resolved.device
        model.vae.to(resolved.device)
    guidances = [config.student.guidance, config.evaluation.guidance, *(t.guidance for t in config.teachers)]
    if any(guidance is not None for guidance in guidances):
        log(f"guidance: {model.guidance_meaning}")
    if config.evaluation.vae_tiling:
        model.vae.enable_tiling()
    return model


def _encode(
    model: DiffusionModel, config: Config, texts: Sequence[str], world: World, log: Callable[[str], None]
) -> EmbeddingCache:
    """Embed the texts, or read their embeddings from the store, and free the text encoders."""
    store = TextStore.open(config.model.text_cache, model)
    # One process of a machine writes the store, the others read it. Waiting for it takes all processes, those included
    # whose machine can keep no store.
    stored = world.any(store is not None, model.device)
    with world.local_main_first() if stored else nullcontext(), progress_of("encoded", "prompts") as progress:
        text = EmbeddingCache.build(model, texts, progress=progress, store=store)
    model.release_text_encoders()
    read = f", read {len(text) - text.encoded} from {store.folder}" if store is not None else ""
    log(f"encoded {text.encoded} distinct prompts{read}")
    return text


def forwards(config: Config, model: DiffusionModel, world: World) -> ForwardSizes:
    """The sizes of this process's forwards in a round."""
    train = config.train
    tasks = train.tasks_per_round or len(config.trained)
    samples = -(-tasks * train.samples_per_task // world.size)
    at_once = min(train.micro_batch or samples, samples)
    return ForwardSizes(
        student_rows=at_once * branches(model, config.student.guidance),
        teacher_rows=min(at_once, train.samples_per_task)
        * max(branches(model, teacher.guidance) for teacher in config.teachers),
        resolution=model.resolution(config.model.resolution),
    )


def checkpointed_blocks(planner: Planner) -> int:
    """Blocks under activation checkpointing: engine.recompute, or as many as a GPU's memory demands."""
    if planner.config.engine.recompute is not None:
        return planner.config.engine.recompute
    return planner.plan.workload.checkpointed if planner.resolved.device.type == "cuda" else 0
