"""Refuses values out of range and combinations that cannot work, without looking at any file."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import fields

from opd_fast.config import DETERMINISTIC, Config
from opd_fast.config.methods.spec import method_spec, refuse_set, refuse_unread_settings
from opd_fast.config.paths import ASSETS, MERGED, is_bundled
from opd_fast.config.serialize import flatten, sections
from opd_fast.errors import UserError, did_you_mean


def validate(config: Config) -> None:
    """Raise `UserError` for a value out of range or a combination that cannot work."""
    for key, value in flatten(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(key, f"{value} is not a finite number", "give a finite one")
        if isinstance(value, str):
            check_text(key, value)
    _check_ranges(config)
    _check_sampler(config)
    _check_objective(config)
    _check_teachers(config)
    _check_merging(config)
    _check_bundled(config)
    refuse_unread_settings(config)
    method_spec(config).check(config)
    _check_engine(config)


def check_text(key: str, text: str) -> None:
    """Raise `UserError` for text that no file can have as its name, whatever it is meant as."""
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise UserError(key, f"{text!r} has characters that cannot be printed", "take them out")
    if any(len(part.encode()) > 255 for part in text.split("/")) or len(text) > 4000:
        raise UserError(key, f"{text!r} is longer than a file's name can be", "give a shorter one")
    if text.startswith("~") and len(text) > 1 and os.path.expanduser(text) == text:
        raise UserError(key, f"{text!r} names a user who has no home here", "write the path in full")


def check_least(*values: tuple[str, float | None, float]) -> None:
    """Raise `UserError` for the first (key, value, least) whose value is below the least one."""
    for key, value, least in values:
        if value is not None and not value >= least:
            raise UserError(key, f"{value} is below {least:g}", f"give {least:g} or more")


def check_positive(*values: tuple[str, float | None]) -> None:
    """Raise `UserError` for the first (key, value) whose value is not a positive number."""
    for key, value in values:
        if value is not None and not 0 < value < math.inf:
            raise UserError(key, f"{value} is not above 0", "give a positive number")


def _check_ranges(config: Config) -> None:
    parts = {name: getattr(config, name) for name in sections()}
    parts |= {f"teachers[{i}]": teacher for i, teacher in enumerate(config.teachers)}
    for name, part in parts.items():
        for field in fields(part):
            key, value, allowed = f"{name}.{field.name}", getattr(part, field.name), field.metadata
            if allowed["least"] is not None:
                check_least((key, value, allowed["least"]))
            if allowed["positive"]:
                check_positive((key, value))
            if isinstance(value, int) and value > allowed["most"]:
                raise UserError(key, f"{value} is above {allowed['most']}", f"give {allowed['most']} or less")
    t = config.train
    for key, share in (("train.ema", t.ema), ("train.betas[0]", t.betas[0]), ("train.betas[1]", t.betas[1])):
        if not 0 <= share < 1:
            raise UserError(key, f"{share} is not in [0, 1)", "give a decay below 1")
    if t.warmup >= max(t.rounds, 1):
        raise UserError("train.warmup", f"{t.warmup} is not below train.rounds = {t.rounds}", "shorten the warm-up")
    if not config.model.text_cache:
        raise UserError("model.text_cache", "is empty", "name a folder, or give auto or off")


def _check_sampler(config: Config) -> None:
    s = config.sampler
    if s.solver not in DETERMINISTIC and s.eta == 0:
        why = f"{s.solver} with eta 0 adds no noise, so its KL is undefined"
        raise UserError("sampler.eta", why, "give eta > 0 or solver ode")
    # DDIM draws sqrt of 1 - (...) and CPS turns by eta * pi / 2: both end at eta = 1.
    if s.solver in ("ddim", "cps") and s.eta > 1:
        raise UserError("sampler.eta", f"{s.eta} is above 1, the most {s.solver} can add", "give eta in (0, 1]")
    least = 1 if s.train_last else 2
    if s.steps < least:
        why = "" if s.train_last else " while the last step is not trained"
        raise UserError("sampler.steps", f"{s.steps} is below {least}{why}", f"give {least} or more")


def _check_objective(config: Config) -> None:
    o, s = config.objective, config.sampler
    readers: list[tuple[tuple[str, ...], bool, str]] = [
        (("reward_gradient", "kl_scale", "clamp"), o.kind == "ppo", "objective.kind ppo"),
        (("log_prob",), o.kind == "ppo" and s.solver == "cps", "objective.kind ppo and sampler.solver cps"),
        (("variance",), o.kind in ("kl", "ppo"), "objective.kind kl"),
        (("anchor_weight",), o.anchor is not None, "objective.anchor"),
        (("query_law", "query_weights"), o.queries is not None, "objective.queries"),
        (("query_alpha", "query_beta"), o.query_law == "beta", "objective.query_law beta"),
    ]
    for names, read, reader in readers:
        if not read:
            refuse_set(
                config, [f"objective.{name}" for name in names], "has no reader", f"set {reader}, or leave it out"
            )
    if o.kind == "ppo" and s.solver in DETERMINISTIC:
        why = f"ppo needs log-probabilities, and {s.solver} draws nothing"
        raise UserError("objective.kind", why, "use solver flow_sde, or kl")
    if o.kind == "ppo" and s.train_last and s.solver in ("cps", "ddim"):
        why = f"the last step of {s.solver} adds no noise, so ppo cannot train it"
        raise UserError("sampler.train_last", why, "set it false")
    if o.queries is None:
        return
    trained = s.steps if s.train_last else s.steps - 1
    if not 1 <= o.queries <= trained:
        raise UserError("objective.queries", f"{o.queries} of {trained} trained steps", f"give 1 to {trained}, or null")
    if o.kind == "ppo":
        raise UserError("objective.queries", "are not for ppo, whose rewards are those of all steps", "use kl or null")


def _check_teachers(config: Config) -> None:
    if not config.teachers:
        remedy = "list at least one as {name, weights, prompts}, or start from a recipe"
        raise UserError("teachers", "none is given", remedy)
    names = [teacher.name for teacher in config.teachers]
    for name in config.train.tasks or []:
        if name not in names:
            raise UserError("train.tasks", f"{name!r} is not a task", did_you_mean(name, names))
    if config.train.tasks == []:
        raise UserError("train.tasks", "is empty, so that nothing is trained", "name one, or give null")
    asked, most = config.train.tasks_per_round, len(config.trained)
    if asked is not None and asked > most:
        raise UserError("train.tasks_per_round", f"{asked} of {most} tasks", f"give {most} or less, or null")
    for i, teacher in enumerate(config.teachers):
        if not teacher.name or not all(c.isalnum() or c in "-_." for c in teacher.name):
            raise UserError(f"teachers[{i}].name", f"{teacher.name!r} is not a name", "use letters, digits, - _ .")
        if teacher.name in names[:i]:
            raise UserError(f"teachers[{i}].name", f"{teacher.name!r} is used twice", "give each teacher its own name")
        for key, value in (("weight", teacher.weight), ("share", teacher.share)):
            if value <= 0:
                why = f"{value} is not above 0"
                raise UserError(f"teachers[{i}].{key}", why, "give a positive one or drop the teacher")
        if teacher.share != 1 and config.train.task_schedule != "weighted":
            why = f"{teacher.share} is read by the weighted schedule alone"
            raise UserError(f"teachers[{i}].share", why, "set train.task_schedule weighted, or give weight instead")


def _check_merging(config: Config) -> None:
    """Raise for settings of a merge that no merge reads, or that do not fit the teachers."""
    s, teachers = config.student, len(config.teachers)
    if s.start != MERGED:
        given = ("merge", s.merge, "linear"), ("merge_density", s.merge_density, None)
        for key, value, default in (*given, ("merge_coefficients", s.merge_coefficients, None)):
            if value != default:
                why = f"is read with student.start {MERGED} alone"
                raise UserError(f"student.{key}", why, f"set student.start {MERGED}, or leave it out")
        return
    if s.merge == "linear" and s.merge_density is not None:
        why = f"{s.merge_density} is not read by merge linear, which prunes nothing"
        raise UserError("student.merge_density", why, "leave it out, or set student.merge magnitude_prune or another")
    if s.merge != "linear" and s.merge_density is None:
        raise UserError("student.merge_density", f"is missing, and merge {s.merge} prunes", "give it, such as 0.2")
    if s.merge_density is not None and s.merge_density > 1:
        raise UserError("student.merge_density", f"{s.merge_density} is above 1", "give a share in (0, 1]")
    if isinstance(s.merge_coefficients, list) and len(s.merge_coefficients) != teachers:
        why = f"are {len(s.merge_coefficients)} for {teachers} teachers"
        raise UserError("student.merge_coefficients", why, "give one for each teacher, in their order, or one number")


def no_held_out(key: str, prompts: str) -> UserError:
    """The error for a task that a reward judges and that has no held-out prompts."""
    why = f"is missing while a reward is set, and {prompts} has no test split beside it"
    return UserError(key, why, "name held-out prompts")


def _check_bundled(config: Config) -> None:
    """Raise for a bundled LoRA on another pipeline than the bundled one, because it is a difference to that base alone
    and means nothing for another one of the same shapes."""
    own = os.path.abspath(ASSETS / "pipeline")
    if config.model.path == "bundled" or os.path.abspath(os.path.expanduser(config.model.path)) == own:
        return
    named = [("student.start", config.student.start), ("objective.anchor", config.objective.anchor)]
    named += [(f"teachers[{i}].weights", teacher.weights) for i, teacher in enumerate(config.teachers)]
    for key, weights in named:
        if weights is not None and is_bundled(weights):
            why = f"{weights} is a LoRA of the bundled pipeline, and model.path is {config.model.path}"
            raise UserError(key, why, "name weights that were made for this model, or set model.path bundled")


def _check_engine(config: Config) -> None:
    precision, dtype, parallel = config.engine.precision, config.model.dtype, config.parallel
    if precision in ("float32", "tf32") and dtype not in ("auto", "float32"):
        why = f"{precision} contradicts model.dtype = {dtype}"
        raise UserError("engine.precision", why, "set model.dtype to auto or float32")
    if parallel.shard_size is not None and parallel.strategy != "hsdp":
        why = f"{parallel.shard_size} is read by hsdp alone"
        raise UserError("parallel.shard_size", why, "set parallel.strategy hsdp, or null")
    if parallel.offload_teachers and config.engine.placement != "merged":
        remedy = "set engine.placement merged, or offload nothing"
        raise UserError("parallel.offload_teachers", "teachers share the base", remedy)
    for name, wanted, extra in (
        ("wandb", config.logging.wandb, "opd_fast[wandb]"),
        ("tensorboard", config.logging.tensorboard, "tensorboard"),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            remedy = f"pip install '{extra}' or --logging.{name} false"
            raise UserError(f"logging.{name}", f"{name} is not installed", remedy)
