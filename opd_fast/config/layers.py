"""Settings from layers: the defaults, then a YAML file, then the options of the command line, later ones winning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from opd_fast.config import Config
from opd_fast.config.options import Given, Option, typed
from opd_fast.config.serialize import check_known, from_dict, leaves, sections, teacher_leaves
from opd_fast.errors import UserError, did_you_mean, one_line


def setting_options() -> list[Option]:
    """Return an option for each setting outside `teachers`."""
    return [Option(key, *leaf) for key, leaf in leaves().items()]


_FIELDS = tuple(Option(name, *leaf) for name, leaf in teacher_leaves().items())
TEACHERS = Option(
    "teachers",
    list[dict],
    [],
    "list of teachers, as YAML or JSON; --teachers.NAME.FIELD VALUE sets one field of the teacher of that name, or "
    "number from 0, such as --teachers.text.weight 2 or --teachers.1.weight 2; the fields: "
    + ", ".join(f"{field.name} ({field.help})" for field in _FIELDS),
    _FIELDS,
)
"""The list of teachers, whose elements have the teachers' fields."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; an empty one where it holds nothing."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({one_line(error)})", "name a readable YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:  # brackets in brackets without end
        raise UserError(str(path), f"is not valid YAML ({one_line(error)})", "fix the file") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(str(path), "holds no sections", "write settings as section: {key: value}")
    return {section: values for section, values in data.items() if values is not None}  # `model:` alone sets nothing


def overlay(base: dict[str, Any], given: Sequence[Given], where: str = "") -> tuple[Config, list[str]]:
    """Lay `base`, a YAML file's content with known keys, over the defaults, and `given` over both.

    `where` follows the problem in errors about `base`, such as " in FILE".

    Returns:
        The settings, and the teachers' names before `given` changed fields of single ones.

    Raises:
        UserError: a value of the wrong type.
    """
    replaced = {one.option.name for one in given if not one.owner}
    data: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for option in setting_options():
        section, name = option.name.split(".")
        if name in base.get(section, {}):
            value = base[section][name]
            if isinstance(value, bool) and (option.hint is str or "off" in get_args(option.hint)):
                value = "on" if value else "off"  # words that YAML 1.1 reads as booleans
            is_missing = value is None and option.name in replaced
            data[section][name] = None if is_missing else typed(option, value, option.name, where)
    teachers = base.get("teachers") or []
    for one in given:
        if one.key == "teachers":
            teachers = one.value(teachers)
        elif "." in one.option.name:
            section, name = one.option.name.split(".")
            data[section][name] = one.value(data[section].get(name, one.option.default))
    if "teachers" in replaced:
        check_known({"teachers": teachers})
        where = ""  # a mistake in them is the command line's
    teachers = [_typed_teacher(i, teacher, where) for i, teacher in enumerate(teachers)]
    names = [teacher["name"] for teacher in teachers]
    for one in given:
        if one.owner and (place := find_element(names, one.element)) is not None:
            teachers[place][one.option.name] = one.value()
    for one in given:
        if one.key == "seed":
            data["train"]["seed"] = one.value()
    return from_dict({**data, "teachers": teachers}), names


def find_element(names: Sequence[str], element: str) -> int | None:
    """Return the index of the element with this name, or else with this number; None where there is none."""
    if element in names:
        return names.index(element)
    return int(element) if element.isdecimal() and int(element) < len(names) else None


def refuse_unknown_elements(given: Sequence[Given], stages: Sequence[Sequence[str]]) -> None:
    """Raise `UserError` for a teacher that no stage has, by name or number; `stages` has the names in each."""
    for one in given:
        if one.owner and all(find_element(names, one.element) is None for names in stages):
            known = list(dict.fromkeys(name for names in stages for name in names))
            remedy = did_you_mean(one.element, known) if known else "list them with --teachers"
            if known and one.element.isdecimal():
                remedy = f"give a number up to {max(map(len, stages)) - 1}, or a name: {', '.join(known)}"
            raise UserError(f"{one.owner}.{one.element}", "unknown teacher", remedy)


def _typed_teacher(index: int, teacher: dict[str, Any], where: str) -> dict[str, Any]:
    given = [field for field in _FIELDS if field.name in teacher]
    return {f.name: typed(f, teacher[f.name], f"teachers[{index}].{f.name}", where) for f in given}
