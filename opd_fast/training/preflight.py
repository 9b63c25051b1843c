"""The checks before a run. They read settings, configuration files and the headers of weights.

`prepare` raises the first refusal before it loads anything, and `--dry-run` prints all of them, so that both refuse the
same. What shows only in loading or running is found there: weights that are NaN, a teacher that yields NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from opd_fast.config import Config, TeacherConfig
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import BASE, MERGED, held_out, is_bundled, resolve_source
from opd_fast.config.validate import no_held_out
from opd_fast.data.prompt_files import load_prompts
from opd_fast.distributed.plan import Planner, check_guidance, lora_modules, rollout_solver
from opd_fast.errors import UserError, is_ours
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import find_lora, read_lora
from opd_fast.models.lora.load import check_weights
from opd_fast.models.pipeline_folder import resolve_pipeline
from opd_fast.rewards import evaluated_rewards
from opd_fast.solvers import SolverTable, solver_table
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.problems import problems
from opd_fast.training.student_init import check_merged, check_start
from opd_fast.training.teacher_loading import check_teachers

ANCHOR = "the anchor"
"""The anchor's name. A teacher cannot have it, because a teacher's name has no space."""


def refusals(planner: Planner, *, sharded: bool, fetches: bool) -> Iterator[ValueError]:
    """Everything that a run of the planner's settings would be refused for, in the order in which it would meet it.

    `sharded` says whether several processes share the model's weights, `fetches` whether weights may be fetched from
    the hub; where they may not, those that lie there are not checked (`unchecked`).
    """
    config = planner.config
    bad = set()
    for error in problems(config):
        bad.add(error.key)
        yield error
    yield from _raised(partial(_check_device, planner, sharded), partial(_check_text_cache, config))
    if "model.path" in bad:
        return
    no_model = list(_raised(lambda: planner.model))
    yield from no_model
    if not no_model:
        passed_over = bad if fetches else bad | {*unchecked(config)}
        yield from _raised(*_model_checks(config, planner.model, passed_over))


def _model_checks(config: Config, meta: DiffusionModel, passed_over: set[str]) -> Iterator[Callable[[], object]]:
    """Yield the checks of what the model's files, its configuration and other weights contradict, in order.

    `passed_over` holds settings that are known to be wrong, and weights that cannot be looked at.
    """
    yield from (partial(check, config, meta) for check in (_check_sampling, check_guidance, _targets, _check_files))
    teachers, anchor, start = frozen_teachers(config), anchor_teacher(config), config.student.start
    there = [t for i, t in enumerate(teachers) if not passed_over & {f"teachers[{i}].weights", t.weights}]
    frozen = list(there)
    if anchor is not None and not passed_over & {"objective.anchor", anchor.weights}:
        frozen.append(anchor)
    for teacher in frozen:
        yield partial(check_teachers, meta, [teacher], config.engine.placement)
    if start == MERGED and "student.start" not in passed_over and len(there) == len(teachers):
        yield partial(_check_merged, config, meta)
    elif start is not None and start != MERGED and not passed_over & {"student.start", start}:
        yield partial(_check_start, config, meta, start)


def unchecked(config: Config) -> list[str]:
    """The weights of the settings that lie on the hub; the hub is asked for them only when they are loaded."""
    weights = [config.student.start, config.objective.anchor, *(teacher.weights for teacher in frozen_teachers(config))]
    named = [name for name in weights if name is not None and name not in (BASE, MERGED)]
    on_hub = [config.model.path] if resolve_source(config.model.path, "pipeline").where == "hub" else []
    return list(dict.fromkeys(on_hub + [name for name in named if resolve_source(name, "teachers").where == "hub"]))


def _raised(*checks: Callable[[], object]) -> Iterator[ValueError]:
    """Yields what the checks raise for a user's mistake; other errors, which are defects of a library, are raised."""
    for check in checks:
        try:
            check()
        except ValueError as error:
            if not isinstance(error, UserError) and not is_ours(error.__traceback__):
                raise
            yield error


def _check_device(planner: Planner, sharded: bool) -> None:
    config, resolved = planner.config, planner.resolved
    if config.parallel.offload_teachers and resolved.device.type != "cuda":
        raise UserError("parallel.offload_teachers", "there is no GPU to free", "give false")
    if sharded and config.student.kind == "full" and resolved.dtype == torch.float16:
        remedy = "give bfloat16, or parallel.strategy ddp"
        raise UserError("model.dtype", "float16 cannot train sharded weights", remedy)


def _check_text_cache(config: Config) -> None:
    """Check that a folder of one's own can be made. A run does without the shared cache where that cannot be made."""
    setting = config.model.text_cache
    if setting in ("auto", "off"):
        return
    folder = Path(setting).expanduser()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError("model.text_cache", f"{folder} cannot be made or read", "name another, or off")


def _check_sampling(config: Config, meta: DiffusionModel) -> None:
    meta.latent_shape(meta.resolution(config.model.resolution))
    rollout_solver(config, meta)
    evaluation_solver(config, meta)


def _check_files(config: Config, meta: DiffusionModel) -> None:
    """Check a folder on this machine; a hub model's files are checked once they are here."""
    path, length = config.model.path, config.model.max_sequence_length
    folder = resolve_source(path, "pipeline").path
    if folder is not None and folder.is_dir():
        meta.check_files(resolve_pipeline(path), dtype=meta.dtype, max_sequence_length=length)


def _targets(config: Config, meta: DiffusionModel) -> dict[str, tuple[int, int]]:
    """The layers of a LoRA student: name to (inputs, outputs)."""
    if config.student.kind != "lora":
        return {}
    return lora_modules(meta.transformer, meta.targets(config.student.targets))


def _check_start(config: Config, meta: DiffusionModel, start: str) -> None:
    check_weights(meta, start, what="student.start")
    if config.student.kind == "lora":
        check_start(meta, config.student, _targets(config, meta))


def _check_merged(config: Config, meta: DiffusionModel) -> None:
    weights = [teacher.weights for teacher in frozen_teachers(config)]
    if config.student.kind == "lora" and all(find_lora(name) is not None for name in weights):
        changed = {module for name in weights for module in read_lora(name, meta).tensors}
        check_merged(config.student, bool(changed & set(_targets(config, meta))))


# --- what settings come to -------------------------------------------------------------------------------------------


def frozen_teachers(config: Config) -> list[TeacherConfig]:
    """The entries of `teachers` that teach: none under a method whose tasks have rewards in place of teachers."""
    return config.teachers if method_spec(config).has_teachers else []


def anchor_teacher(config: Config) -> TeacherConfig | None:
    """`objective.anchor` as a teacher with the student's guidance, where it is weights of its own."""
    weights = config.objective.anchor
    if weights is None or weights == BASE:
        return None
    return TeacherConfig(name=ANCHOR, weights=weights, prompts="", guidance=config.student.guidance)


def evaluation_solver(config: Config, model: DiffusionModel) -> SolverTable:
    """The solver of evaluations, on the model's own noise levels."""
    sigmas = model.sigmas(config.evaluation.steps, model.resolution(config.model.resolution))
    return solver_table("ode", sigmas, 0.0)


def evaluation_task(teacher: TeacherConfig, config: Config, log: Callable[[str], None]) -> EvalTask | None:
    """A teacher's held-out prompts and rewards; None where it has no reward or evaluations are off.

    `log` gets a line where the file is found without `eval_prompts`, and where it has fewer prompts than asked for.
    """
    if not config.evaluates(teacher):
        return None
    file = held_out(teacher.prompts, teacher.eval_prompts)
    if file is None:
        raise no_held_out(f"teachers.{teacher.name}.eval_prompts", teacher.prompts)
    every, asked = load_prompts(file), config.evaluation.prompts
    if teacher.eval_prompts is None and not is_bundled(teacher.prompts):
        log(f"task {teacher.name}: held-out prompts from {file}")
    images = config.evaluation.images(len(every))
    if len(every) < asked:
        log(
            f"task {teacher.name}: {len(every)} held-out prompts in {file}, fewer than evaluation.prompts = {asked}; "
            f"an evaluation draws {images} images of them"
        )
    return EvalTask(teacher.name, every[:asked], evaluated_rewards(teacher, config.evaluation.rewards), images)
