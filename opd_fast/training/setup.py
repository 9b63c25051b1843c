"""Everything a run needs before its first round: model, text, teachers, student, prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from opd_fast.config import Config
from opd_fast.data.prompt_files import Prompt, PromptSource, TaskSchedule, load_prompts
from opd_fast.data.text_embeddings import EmbeddingCache, TextStore, encoding_progress
from opd_fast.distributed.plan import branches, make_plan, resolve
from opd_fast.distributed.world import World
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning
from opd_fast.seeds import noise_keys
from opd_fast.solvers import SolverTable, solver_table
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.float8_check import Gate
from opd_fast.training.optimize import Engaged, Forwards, engage
from opd_fast.training.preflight import anchor_teacher, evaluation_task, frozen_teachers, refusals
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
    """Which of them a task's turn takes."""
    schedule: TaskSchedule
    """Which tasks a round takes."""
    tasks: list[EvalTask]
    """Held-out prompts with their rewards, for the tasks that have both."""
    text: EmbeddingCache
    world: World
    engaged: Engaged
    """The engine's techniques that are at work."""
    anchor: TeacherBank | None
    """A bank of one: what the student is held to."""


def prepare(
    config: Config, say: Callable[[str], None], world: World | None = None, backends: Sequence[str] = ()
) -> Setup:
    """Load what `config` names; `backends` of attention are those that a resumed run had.

    Raises ValueError, naming the setting, for what is missing or does not fit.
    """
    world = world or World()
    resolved = resolve(config)
    device, dtype = resolved.device, resolved.dtype
    for error in refusals(config, dtype, sharded=world.sharded, fetches=True):
        raise error
    train = config.train
    prompts = [load_prompts(teacher.prompts) for teacher in config.teachers]
    sources = [PromptSource(len(p), train.seed, stream) for stream, p in enumerate(prompts)]
    shares = [teacher.share for teacher in config.teachers]
    schedule = TaskSchedule(shares, train.tasks_per_round, train.task_schedule, train.seed, config.trained)
    tasks = [task for teacher in config.teachers if (task := evaluation_task(teacher, config, say)) is not None]

    torch.backends.cuda.matmul.allow_tf32 = resolved.tf32
    model = load_model(
        config.model.path,
        config.model.family,
        device="cpu" if world.sharded else device,  # sharded weights go to the device block by block
        dtype=dtype,
        max_sequence_length=config.model.max_sequence_length,
        text_device="cpu" if config.model.text_device == "cpu" else None,
        guidance_convention=config.model.guidance_convention,
    )
    if world.sharded:
        model.device = device
        model.vae.to(device)
    guidances = [config.student.guidance, config.evaluation.guidance, *(t.guidance for t in config.teachers)]
    if any(guidance is not None for guidance in guidances):
        say(f"guidance: {model.guidance_meaning}")
    if config.evaluation.vae_tiling:
        model.vae.enable_tiling()
    resolution = model.resolution(config.model.resolution)
    shape = model.latent_shape(resolution)
    sampler = config.sampler
    table = solver_table(
        sampler.solver, model.sigmas(sampler.steps, resolution), sampler.eta, variance=config.objective.variance
    )
    evaluation_table = solver_table("ode", model.sigmas(config.evaluation.steps, resolution), 0.0)

    # Only what this run will meet: a prompt's T5 embedding is large, and files hold many times a run's prompts.
    met = [
        p[i].text
        for p, source, turns in zip(prompts, sources, schedule.turns(train.rounds), strict=True)
        for i in source.seen(turns, prompts_per_turn(config))
    ]
    met += [p.text for task in tasks for p in task.prompts]
    store = TextStore.open(config.model.text_cache, model)
    # One process of a machine writes the store, the others read it. Waiting for it takes all processes, those included
    # whose machine can keep no store.
    stored = world.any(store is not None, model.device)
    with world.first_here() if stored else nullcontext(), encoding_progress() as progress:
        text = EmbeddingCache.build(model, met, progress=progress, store=store)
    model.release_text_encoders()
    read = f", read {len(text) - text.encoded} from {store.folder}" if store is not None else ""
    say(f"encoded {text.encoded} distinct prompts{read}")

    placement, offload = config.engine.placement, config.parallel.offload_teachers
    teachers = load_teachers(model, frozen_teachers(config), placement, offload=offload)
    for teacher in teachers.teachers:
        say(f"teacher {teacher.name}: {teacher.source}")
    anchor = load_anchor(model, config)
    student = Student.build(model, config.student, seed=config.train.seed, teachers=teachers)
    gate = Gate.before(config, model, student, teachers, table, text, prompts) if not world.sharded else None
    engaged = engage(
        config.engine,
        model,
        student,
        teachers,
        forwards(config, model, world),
        anchor=anchor,
        compiled=resolved.compile,
        graphed=resolved.graphs,
        recompute=blocks_to_recompute(config, device, world.size),
        backends=backends,
        world=world,
        say=say,
    )
    if engaged.fp8:
        say(gate.after() if gate is not None else "precision: fp8, its change of the losses not measured")
    student.distribute(world)  # after compiling: FSDP's hooks stay outside the compiled blocks
    teachers.distribute(world)
    sigma = table.sigmas[0].float().to(device)
    probe = philox_normal(noise_keys(config.train.seed, samples=1).to(device), shape, INITIAL_NOISE)
    teachers.check(probe, sigma, Conditioning.build(model, text.negative, None, None))
    trainable = sum(p.numel() for p in student.parameters())
    say(f"student starts from {student.began}")
    say(f"student trains {trainable:,} parameters in {dtype}".replace("torch.", "") + f" on {device}")
    return Setup(
        config,
        model,
        student,
        teachers,
        table,
        evaluation_table,
        shape,
        prompts,
        sources,
        schedule,
        tasks,
        text,
        world,
        engaged,
        anchor,
    )


def forwards(config: Config, model: DiffusionModel, world: World) -> Forwards:
    """The sizes of this process's forwards in a round."""
    train = config.train
    tasks = train.tasks_per_round or len(config.trained)
    samples = -(-tasks * train.samples_per_task // world.size)
    at_once = min(train.micro_batch or samples, samples)
    return Forwards(
        student_rows=at_once * branches(model, config.student.guidance),
        teacher_rows=min(at_once, train.samples_per_task)
        * max(branches(model, teacher.guidance) for teacher in config.teachers),
        resolution=model.resolution(config.model.resolution),
    )


def blocks_to_recompute(config: Config, device: torch.device, devices: int) -> int:
    """engine.recompute, or what a GPU's memory demands."""
    if config.engine.recompute is not None:
        return config.engine.recompute
    if device.type != "cuda":
        return 0
    return make_plan(config, devices).load.recomputed


def load_anchor(model: DiffusionModel, config: Config) -> TeacherBank | None:
    """The frozen model of `objective.anchor`, with the student's guidance; loaded before the student's adapters."""
    if config.objective.anchor == BASE:
        return base_teacher(model, config.student.guidance)
    settings = anchor_teacher(config)
    if settings is None:
        return None
    return load_teachers(model, [settings], config.engine.placement, offload=config.parallel.offload_teachers)


def prompts_per_turn(config: Config) -> int:
    """Distinct prompts among a task's samples: as many, or one for each group in reinforcement learning."""
    return config.train.samples_per_task // (config.rl.images_per_prompt if config.reinforces else 1)
