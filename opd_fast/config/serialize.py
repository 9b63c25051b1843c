"""Settings in other forms: dotted keys, plain dictionaries, YAML and hashes; and what a resumed run may change.

`opd_fast.config.schema` defines the settings, and `opd_fast.config.validate` refuses values that cannot work.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, get_args, get_type_hints

import yaml

from opd_fast.config import Config, TeacherConfig
from opd_fast.errors import UserError, did_you_mean

RESUMABLE = ("train.rounds", "model.text_cache", "logging.", "evaluation.", "checkpoint.", "parallel.")
"""A resumed run may change how long it trains, on which devices, and what it records, but never what it learns from."""

_hints = functools.cache(get_type_hints)


def sections() -> dict[str, type]:
    """Return the dataclass of every section but `teachers`, by name and in the order of `Config`."""
    hints = _hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != "teachers"}


def leaves() -> dict[str, tuple[Any, Any, str]]:
    """Return (type, default, help) of every setting outside `teachers`, by dotted key."""
    return {f"{name}.{key}": leaf for name, kind in sections().items() for key, leaf in _fields(kind).items()}


def teacher_leaves() -> dict[str, tuple[Any, Any, str]]:
    """Return (type, default, help) of a teacher's fields; a required field has the default `dataclasses.MISSING`."""
    return _fields(TeacherConfig)


def _fields(kind: type) -> dict[str, tuple[Any, Any, str]]:
    found = {}
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found[f.name] = (_hints(kind)[f.name], default, f.metadata["help"])
    return found


def to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as data that JSON and YAML can hold; `from_dict` reads it."""
    return json.loads(json.dumps(asdict(config)))  # tuples become lists


def from_dict(data: dict[str, Any]) -> Config:
    """Return the `Config` that checked plain data describes; keys that are absent keep their defaults."""
    made: dict[str, Any] = {}
    for name, kind in sections().items():
        values = dict(data.get(name) or {})
        for key, hint in _hints(kind).items():
            if getattr(hint, "__origin__", None) is tuple and key in values:
                values[key] = tuple(values[key])
        made[name] = kind(**values)
    made["teachers"] = [TeacherConfig(**teacher) for teacher in data.get("teachers") or []]
    return Config(**made)


def flatten(config: Config) -> dict[str, Any]:
    """Return every value by its dotted key, such as `train.lr`, `teachers[0].name` or `train.betas[0]`."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f"{prefix}[{i}]", inner)
        else:
            flat[prefix] = value

    walk("", asdict(config))
    return flat


def to_yaml(config: Config) -> str:
    """Return the settings as YAML; reading it gives an equal `Config`."""
    return dump(to_dict(config))


def dump(data: dict[str, Any]) -> str:
    """Return plain data as YAML in which YAML 1.1 finds the same numbers."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    def represent_float(self, data: float) -> Any:
        # YAML 1.1 reads 1e-05 as a string: a mantissa needs its point.
        text = repr(data)
        return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Dumper.add_representer(float, _Dumper.represent_float)


def config_hash(config: Config) -> str:
    """Return twelve hexadecimal digits that identify all settings except `logging`, `checkpoint` and
    `model.text_cache`, which change no number of a run."""
    data = {key: value for key, value in to_dict(config).items() if key not in ("logging", "checkpoint")}
    del data["model"]["text_cache"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def changed(before: Config, after: Config) -> list[str]:
    """Return the dotted keys whose values differ."""
    old, new = flatten(before), flatten(after)
    return [key for key in {**old, **new} if old.get(key, MISSING) != new.get(key, MISSING)]


def may_change(keys: Sequence[str] = RESUMABLE) -> str:
    """Return the names of the settings that a resumed run may change, as a message lists them."""
    return ", ".join(key.rstrip(".") for key in keys)


def refuse_unsafe_changes(before: Config, after: Config, *, staged: bool = False, besides: Sequence[str] = ()) -> None:
    """Raise `UserError` where a run with the settings `before` may not go on with the settings `after`.

    `RESUMABLE` settings may change, and those in `besides`, which are paths whose content is compared instead. A stage
    (`staged`) keeps its rounds, because the next stage may have begun from where they ended.
    """
    free = tuple(key for key in RESUMABLE if not (staged and key == "train.rounds"))
    for key in changed(before, after):
        if not key.startswith(free) and key not in besides:
            why = f"a resumed run keeps its value ({flatten(before).get(key, 'unset')})"
            raise UserError(key, why, f"put it back, or start a new run; {may_change(free)} may change")


def describe(hint: Any) -> str:
    """Return a type in words, such as "a whole number or null"."""
    if getattr(hint, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, args = getattr(hint, "__origin__", None), get_args(hint)
    if origin is tuple:
        return f"a list of {len(args)} numbers"
    if origin is list:
        return "a list of " + {"text": "texts", "a number": "numbers"}.get(describe(args[0]), describe(args[0]))
    return " or ".join(describe(arg) for arg in args)


def check_known(data: dict[str, Any], source: str = "") -> None:
    """Raise `UserError` for keys of plain data that name no setting; its message mentions `source`, a file's name."""
    where = f" in {source}" if source else ""
    kinds = {**sections(), "teachers": TeacherConfig}
    for section, values in data.items():
        if section not in kinds:
            raise UserError(str(section), f"unknown key{where}", did_you_mean(str(section), kinds))
        if section == "teachers":
            if not isinstance(values, list) or not all(isinstance(teacher, dict) for teacher in values):
                why = f"is a list of teachers{where}, got {values!r}"
                raise UserError("teachers", why, "write [{name, weights, prompts}]")
            for i, teacher in enumerate(values):
                _check_keys(f"teachers[{i}]", teacher, TeacherConfig, where)
            continue
        if not isinstance(values, dict):
            first = fields(kinds[section])[0].name
            raise UserError(section, f"holds settings{where}, got {values!r}", f"write {section}: {{{first}: ...}}")
        _check_keys(section, values, kinds[section], where)


def _check_keys(place: str, values: dict[str, Any], kind: type, where: str) -> None:
    known = _fields(kind)
    for key in values:
        if key not in known:
            raise UserError(f"{place}.{key}", f"unknown key{where}", did_you_mean(str(key), known))
    for name, (_, default, help) in known.items():
        if default is MISSING and name not in values:
            raise UserError(f"{place}.{name}", f"is missing{where}", f"add it: {help}")
