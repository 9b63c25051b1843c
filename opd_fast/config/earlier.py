"""Run directories of earlier versions: what their config.yaml says, in today's settings.

A run writes every section into its config.yaml, so a file that has all of them and lacks a setting was written by a
version that did not know that setting. A file that a user writes has the sections that it changes, and is read as it
stands.
"""

from __future__ import annotations

from typing import Any

_SECTIONS = {
    *("model", "student", "teachers", "sampler", "objective", "train", "checkpoint", "evaluation"),
    *("parallel", "engine", "logging"),
}
"""Those that every version has written."""


def in_todays_settings(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a YAML file; a config.yaml from before `model.guidance_convention` as today's version writes it.

    Guidance was g of v = u + g (c - u) for every family, which is the convention "linear", and a teacher without
    guidance had 1, which is null now.
    """
    data = dict(data)
    if isinstance(data.get("stages"), list):
        data["stages"] = [in_todays_settings(stage) if isinstance(stage, dict) else stage for stage in data["stages"]]
    model, teachers = data.get("model"), data.get("teachers")
    if data.keys() >= _SECTIONS and isinstance(model, dict) and "guidance_convention" not in model:
        data["model"] = {"guidance_convention": "linear", **model}
        if isinstance(teachers, list):
            unguided = [isinstance(teacher, dict) and teacher.get("guidance") == 1.0 for teacher in teachers]
            data["teachers"] = [t | {"guidance": None} if one else t for t, one in zip(teachers, unguided, strict=True)]
    return data
