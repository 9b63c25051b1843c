"""Run directories of earlier versions: what their config.yaml says, in today's settings.

A run writes every section into its config.yaml, so a file that has all of them and lacks a setting was written by a
version that did not know that setting. A file that a user writes has the sections that it changes, and is read as it
stands.
"""

from __future__ import annotations

from typing import Any

_SECTIONS = {
    "model",
    "student",
    "teachers",
    "sampler",
    "objective",
    "train",
    "checkpoint",
    "evaluation",
    "parallel",
    "engine",
    "logging",
}
"""Those that every version has written."""


def is_earlier_run(data: dict[str, Any]) -> bool:
    """Whether the content of a YAML file is the config.yaml of a run from before `model.guidance_convention`."""
    return any(
        set(part) >= _SECTIONS and isinstance(part["model"], dict) and "guidance_convention" not in part["model"]
        for part in _parts(data)
    )


def in_todays_settings(data: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run as today's version writes them.

    Guidance was g of v = u + g (c - u) for every family, which is the convention "linear", and a teacher without
    guidance had 1, which is null now.
    """
    if isinstance(data.get("stages"), list):
        return {
            **data,
            "stages": [_translated(stage) if isinstance(stage, dict) else stage for stage in data["stages"]],
        }
    return _translated(data)


def _parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    stages = data.get("stages")
    return [data, *(stage for stage in stages if isinstance(stage, dict))] if isinstance(stages, list) else [data]


def _translated(data: dict[str, Any]) -> dict[str, Any]:
    found = dict(data)
    if isinstance(data.get("model"), dict):
        found["model"] = {"guidance_convention": "linear", **data["model"]}
    if isinstance(data.get("teachers"), list):
        found["teachers"] = [
            {key: value for key, value in teacher.items() if (key, value) != ("guidance", 1.0)}
            if isinstance(teacher, dict)
            else teacher
            for teacher in data["teachers"]
        ]
    return found
