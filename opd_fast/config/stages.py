"""Runs in stages: one student that goes from one set of settings to the next, as a cascade of tasks does.

A YAML file with a list `stages` describes them: each has a `name`, and the sections in which it differs from the file.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_fast.config import Config, EvaluationConfig, TeacherConfig
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import held_out
from opd_fast.config.serialize import config_hash, dump, to_dict
from opd_fast.errors import UserError

SHARED = ("model", "parallel", "student")
"""All stages have these sections in common, except `student.start` of the first."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, with settings of its own."""

    name: str
    config: Config


def split(data: dict[str, Any], source: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, settings) of each stage in a YAML file's content; without `stages` there is one with an empty name.

    Raises:
        UserError: `stages` is not a list of mappings, or a name is missing, used twice, or cannot name a folder.
    """
    if "stages" not in data:
        return [("", data)]
    common = dict(data)
    stages = common.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError("stages", f"is a list of stages in {source}", "write [{name: NAME, train: {...}}, ...]")
    found: list[tuple[str, dict[str, Any]]] = []
    for i, stage in enumerate(stages):
        sections = dict(stage)
        name = sections.pop("name", None)
        if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name):
            raise UserError(f"stages[{i}].name", f"{name!r} is not a name", "use letters, digits, - _")
        if name in [other for other, _ in found]:
            raise UserError(f"stages[{i}].name", f"{name!r} is used twice", "give each stage its own name")
        for section, values in sections.items():  # `teachers`, and mistakes, replace what the file has outside stages
            below = common.get(section)
            if isinstance(below, dict) and isinstance(values, dict):
                sections[section] = below | values
        found.append((name, common | sections))
    return found


def check(stages: Sequence[Stage]) -> None:
    """Raise UserError where stages could not be one run."""
    first = stages[0].config
    for i, config in enumerate([stage.config for stage in stages[1:]], start=1):
        if config.student.start not in (None, first.student.start):
            raise UserError(f"stages[{i}].student.start", "is the student of the stage before", "leave it out")
        for section in SHARED:
            for key, value in vars(getattr(config, section)).items():
                before = getattr(getattr(first, section), key)
                if value != before and (section, key) != ("student", "start"):
                    why = f"{value} differs from the first stage's {before}"
                    raise UserError(f"stages[{i}].{section}.{key}", why, "set it once, outside stages")
    _check_one_table(stages)


def _check_one_table(stages: Sequence[Stage]) -> None:
    """Raise UserError where the rewards of stages could not stand in one table.

    A column is a task's reward on the same prompts in all rows, a row `teacher:NAME` is one teacher.
    """
    evaluation: EvaluationConfig | None = None
    tasks: dict[str, TeacherConfig] = {}
    teachers: dict[str, TeacherConfig] = {}
    for i, config in enumerate(stage.config for stage in stages):
        judged = [(j, task) for j, task in enumerate(config.teachers) if config.evaluates(task)]
        if not judged:
            continue
        evaluation = evaluation or config.evaluation
        for key in ("prompts", "images_per_prompt", "steps", "guidance", "vae_tiling", "rewards"):
            value, before = getattr(config.evaluation, key), getattr(evaluation, key)
            if value != before:
                why = f"{value} differs from the {before} of an earlier stage, and their rewards stand in one table"
                raise UserError(f"stages[{i}].evaluation.{key}", why, "set it once, outside stages")
        for j, task in judged:
            if _held_out(task) != _held_out(tasks.setdefault(task.name, task)):
                why = f"are not those of {task.name!r} in an earlier stage, and their rewards stand in one column"
                raise UserError(f"stages[{i}].teachers[{j}].eval_prompts", why, "give one of the two another name")
            other = teachers.setdefault(task.name, task) if method_spec(config).has_teachers else task
            for key in ("weights", "guidance"):
                value, before = getattr(task, key), getattr(other, key)
                if value != before:
                    value, before = ("null" if given is None else given for given in (value, before))
                    why = f"{value} is not the {before} of {task.name!r} in an earlier stage"
                    raise UserError(f"stages[{i}].teachers[{j}].{key}", why, "give one of the two another name")


def _held_out(task: TeacherConfig) -> Path | str:
    """Return the file of a task's held-out prompts, or the setting that names it where there is no such file."""
    with contextlib.suppress(ValueError):
        if (file := held_out(task.prompts, task.eval_prompts)) is not None:
            return file.resolve()
    return task.eval_prompts or task.prompts


def stages_to_yaml(stages: Sequence[Stage]) -> str:
    """Return the stages as YAML, each with all of its settings; `split` reads it."""
    return dump({"stages": [{"name": stage.name, **to_dict(stage.config)} for stage in stages]})


def stages_hash(stages: Sequence[Stage]) -> str:
    """Return twelve hexadecimal digits that identify the settings of all stages, as `config_hash` does for one."""
    return hashlib.sha256(" ".join(config_hash(stage.config) for stage in stages).encode()).hexdigest()[:12]
