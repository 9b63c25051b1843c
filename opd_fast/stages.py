"""Runs in stages: one student that goes from one set of settings to the next, as a cascade of tasks does.

A YAML file with a list `stages` describes them: each has a `name` and the sections in which it differs from the rest
of the file. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_fast.config import Config
from opd_fast.errors import UserError
from opd_fast.settings import config_hash, dump, to_dict

SHARED = ("model", "parallel", "student")
"""Sections that all stages have in common, but for `student.start` of the first."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, with settings of its own."""

    name: str
    config: Config


def split(data: dict[str, Any], source: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, settings) of each stage in a YAML file's content; one without `stages` is a single one without name.

    Raises UserError for a list that is none, and for names that are missing, equal or no names of folders.
    """
    if "stages" not in data:
        return [("", data)]
    common = {section: values for section, values in data.items() if section != "stages"}
    stages = data["stages"]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError("stages", f"is a list of stages in {source}", "write [{name: NAME, train: {...}}, ...]")
    found: list[tuple[str, dict[str, Any]]] = []
    for i, stage in enumerate(stages):
        name = stage.get("name")
        if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_" for c in name):
            raise UserError(f"stages[{i}].name", f"{name!r} is no name", "use letters, digits, - _")
        if name in [other for other, _ in found]:
            raise UserError(f"stages[{i}].name", f"{name!r} is used twice", "give each stage its own name")
        found.append((name, _laid_over(common, {key: value for key, value in stage.items() if key != "name"})))
    return found


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key; whatever is no section (`teachers`, mistakes) as a whole."""
    merged = dict(below)
    for section, values in above.items():
        mine = below.get(section)
        merged[section] = {**mine, **values} if isinstance(mine, dict) and isinstance(values, dict) else values
    return merged


def check(stages: Sequence[Stage]) -> None:
    """Raise UserError where stages could not be one run."""
    first = to_dict(stages[0].config)
    for i, stage in enumerate(stages[1:], start=1):
        own = to_dict(stage.config)
        if own["student"]["start"] not in (None, first["student"]["start"]):
            raise UserError(f"stages[{i}].student.start", "is the student of the stage before", "leave it out")
        own["student"]["start"] = first["student"]["start"]
        for section in SHARED:
            for key, value in own[section].items():
                if value != first[section][key]:
                    raise UserError(
                        f"stages[{i}].{section}.{key}",
                        f"{value} differs from the first stage's {first[section][key]}",
                        "set it once, outside stages",
                    )


def stages_to_yaml(stages: Sequence[Stage]) -> str:
    """The stages as YAML, each in full; `split` reads it again."""
    return dump({"stages": [{"name": stage.name, **to_dict(stage.config)} for stage in stages]})


def stages_hash(stages: Sequence[Stage]) -> str:
    """Twelve hexadecimal digits over the settings of all stages, as `config_hash` of one."""
    return hashlib.sha256(" ".join(config_hash(stage.config) for stage in stages).encode()).hexdigest()[:12]
