"""What a run is refused for before its first round, told from settings, configuration files and the headers of weights.

`prepare` raises the first of it before it loads anything, and `--dry-run` prints all of it: what the one refuses, the
other does. What only loading or running tells is left to these: weights that are NaN, a teacher that yields NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from opd_fast.config import Config, TeacherConfig
from opd_fast.config.paths import BASE, MERGED, held_out, is_bundled, resolve_source
from opd_fast.config.validate import no_held_out
from opd_fast.data.prompt_files import load_prompts
from opd_fast.distributed.plan import check_guidance, lora_modules, pick_device
from opd_fast.errors import UserError, is_ours
from opd_fast.models import find_family, outline_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import find_lora, read_lora
from opd_fast.models.lora.load import check_weights
from opd_fast.models.pipeline_folder import resolve_pipeline
from opd_fast.rewards import judged_rewards
from opd_fast.solvers import solver_table
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.problems import problems
from opd_fast.training.student_init import check_mean, check_start
from opd_fast.training.teachers import check_teachers

ANCHOR = "the anchor"
"""Its name; the space keeps it apart from those that teachers may have."""


def refusals(config: Config, dtype: torch.dtype, *, sharded: bool, fetches: bool) -> Iterator[ValueError]:
    """Everything that a run of `config` would be refused for, in the order in which it would meet it.

    Args:
        dtype: of the model.
        sharded: whether several processes share its weights.
        fetches: whether weights may be fetched from the hub; else what lies there is passed over (`unchecked`).
    """
    bad = set()
    for error in problems(config):
        bad.add(error.key)
        yield error
    yield from _raised(_check_device, config, dtype, sharded)
    yield from _raised(_check_text_cache, config)
    if "model.path" in bad:
        return
    settings = config.model
    found: list[DiffusionModel] = []

    def outline() -> None:
        found.append(
            outline_model(
                settings.path,
                settings.family,
                dtype=dtype,
                max_sequence_length=settings.max_sequence_length,
                guidance_convention=settings.guidance_convention,
            )
        )

    yield from _raised(outline)
    if not found:
        return
    yield from _model_refusals(config, found[0], dtype)
    absent = frozenset() if fetches else frozenset(unchecked(config))
    yield from _weight_refusals(config, found[0], bad, absent)


def unchecked(config: Config) -> list[str]:
    """The settings' weights that lie on the hub, which is asked for them only when they are loaded."""
    named = [config.student.start, config.objective.anchor, *(teacher.weights for teacher in frozen_teachers(config))]
    weights = [name for name in named if name not in (None, BASE, MERGED)]
    on_hub = [config.model.path] if resolve_source(config.model.path, "pipeline").where == "hub" else []
    on_hub += [name for name in weights if name is not None and resolve_source(name, "teachers").where == "hub"]
    return list(dict.fromkeys(on_hub))


def _raised(check: Callable[..., object], *arguments: object) -> Iterator[ValueError]:
    """What a check raises, where it is a mistake of the user's and no defect of a library."""
    try:
        check(*arguments)
    except ValueError as error:
        if not isinstance(error, UserError) and not is_ours(error.__traceback__):
            raise
        yield error


def _check_device(config: Config, dtype: torch.dtype, sharded: bool) -> None:
    if config.parallel.offload_teachers and pick_device().type != "cuda":
        raise UserError("parallel.offload_teachers", "there is no GPU to free", "give false")
    if sharded and config.student.kind == "full" and dtype == torch.float16:
        raise UserError(
            "model.dtype", "float16 cannot train sharded weights", "give bfloat16, or parallel.strategy ddp"
        )


def _check_text_cache(config: Config) -> None:
    """That a folder of one's own can be made; the cache of all runs is done without where it cannot."""
    setting = config.model.text_cache
    if setting in ("auto", "off"):
        return
    folder = Path(setting).expanduser()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError("model.text_cache", f"{folder} cannot be made or read", "name another, or off")


def _model_refusals(config: Config, outline: DiffusionModel, dtype: torch.dtype) -> Iterator[ValueError]:
    """What the model's files and its configuration contradict."""
    s = config.sampler

    def solvers() -> None:
        resolution = outline.resolution(config.model.resolution)
        shape = outline.latent_shape(resolution)
        assert len(shape) == 3
        solver_table(s.solver, outline.sigmas(s.steps, resolution), s.eta, variance=config.objective.variance)
        solver_table("ode", outline.sigmas(config.evaluation.steps, resolution), 0.0)

    yield from _raised(solvers)
    yield from _raised(check_guidance, config, outline)
    yield from _raised(_targets, config, outline)
    path = config.model.path
    folder = resolve_source(path, "pipeline").path
    if folder is not None and folder.is_dir():  # else the hub's, which are checked once they are here
        family = find_family(config.model.family, lambda: resolve_pipeline(path))
        length = config.model.max_sequence_length
        check = partial(family.check_files, resolve_pipeline(path), dtype=dtype, max_sequence_length=length)
        yield from _raised(check)


def _targets(config: Config, outline: DiffusionModel) -> dict[str, tuple[int, int]]:
    """The layers of a LoRA student: name to (inputs, outputs)."""
    if config.student.kind != "lora":
        return {}
    return lora_modules(outline.transformer, outline.targets(config.student.targets))


def _weight_refusals(
    config: Config, outline: DiffusionModel, bad: set[str], absent: frozenset[str]
) -> Iterator[ValueError]:
    """What teachers, anchor and the student's start contradict: names, shapes, formats."""
    keys = {teacher.name: f"teachers[{i}].weights" for i, teacher in enumerate(config.teachers)}
    placement = config.engine.placement
    there = [t for t in frozen_teachers(config) if keys[t.name] not in bad and t.weights not in absent]
    for teacher in there:
        yield from _raised(check_teachers, outline, [teacher], placement)
    anchor, start = anchor_teacher(config), config.student.start
    if anchor is not None and "objective.anchor" not in bad and anchor.weights not in absent:
        yield from _raised(check_teachers, outline, [anchor], placement)
    if start is None or "student.start" in bad or start in absent:
        return
    if start == MERGED:
        if len(there) == len(frozen_teachers(config)):
            yield from _raised(_check_mean, config, outline)
        return
    wrong = list(_raised(partial(check_weights, outline, start, what="student.start")))
    yield from wrong
    if not wrong and config.student.kind == "lora":
        yield from _raised(_check_start, config, outline)


def _check_start(config: Config, outline: DiffusionModel) -> None:
    check_start(outline, config.student, _targets(config, outline))


def _check_mean(config: Config, outline: DiffusionModel) -> None:
    weights = [teacher.weights for teacher in frozen_teachers(config)]
    if config.student.kind == "lora" and all(find_lora(name) is not None for name in weights):
        changed = {module for name in weights for module in read_lora(name, outline).tensors}
        check_mean(config.student, bool(changed & set(_targets(config, outline))))


# --- what settings come to -------------------------------------------------------------------------------------------


def frozen_teachers(config: Config) -> list[TeacherConfig]:
    """The entries of `teachers` that teach: none in reinforcement learning, where they are tasks with rewards."""
    return [] if config.reinforces else config.teachers


def anchor_teacher(config: Config) -> TeacherConfig | None:
    """`objective.anchor` as a teacher with the student's guidance, where it is weights of its own."""
    weights = config.objective.anchor
    if weights is None or weights == BASE:
        return None
    return TeacherConfig(name=ANCHOR, weights=weights, prompts="", guidance=config.student.guidance)


def evaluation_task(teacher: TeacherConfig, config: Config, say: Callable[[str], None]) -> EvalTask | None:
    """A teacher's held-out prompts and rewards; None where it has no reward or evaluations are off.

    `say` is told which file is taken where `eval_prompts` names none, and where it has fewer prompts than asked for.
    """
    if teacher.reward is None or config.evaluation.every == 0:
        return None
    file = held_out(teacher.prompts, teacher.eval_prompts)
    if file is None:
        raise no_held_out(f"teachers.{teacher.name}.eval_prompts", teacher.prompts)
    every, asked = load_prompts(file), config.evaluation.prompts
    if teacher.eval_prompts is None and not is_bundled(teacher.prompts):
        say(f"task {teacher.name}: held-out prompts from {file}")
    images = config.evaluation.images(len(every))
    if len(every) < asked:
        say(
            f"task {teacher.name}: {len(every)} held-out prompts in {file}, fewer than evaluation.prompts = {asked}; "
            f"an evaluation draws {images} images of them"
        )
    return EvalTask(teacher.name, every[:asked], judged_rewards(teacher), images)
