"""Settings in other forms: dotted keys, plain dictionaries, YAML, hashes; and what a resumed run may change of them.

`opd_fast.config.schema` says which settings there are, `opd_fast.config.validate` what they may not be.
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

# What may change when a run is resumed: how long it goes on, where, and what it writes down, never what it learns from.
RESUMABLE = ("train.rounds", "model.text_cache", "logging.", "evaluation.", "checkpoint.", "parallel.")

_hints = functools.cache(get_type_hints)


def sections() -> dict[str, type]:
    """Section name to dataclass, without `teachers`, in the order of `Config`."""
    hints = _hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != "teachers"}


def leaves() -> dict[str, tuple[Any, Any, str]]:
    """Dotted key to (type, default, help) for everything outside `teachers`."""
    return {f"{name}.{key}": leaf for name, kind in sections().items() for key, leaf in _fields(kind).items()}


def teacher_leaves() -> dict[str, tuple[Any, Any, str]]:
    """Field to (type, default, help) of one teacher; the default of a required one is `dataclasses.MISSING`."""
    return _fields(TeacherConfig)


def _fields(kind: type) -> dict[str, tuple[Any, Any, str]]:
    found = {}
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found[f.name] = (_hints(kind)[f.name], default, f.metadata["help"])
    return found


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data that JSON and YAML can hold; `from_dict` is the inverse."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples become lists
    return data


def from_dict(data: dict[str, Any]) -> Config:
    """`Config` from checked plain data; keys that are absent keep their defaults."""
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
    """Dotted key to value: `train.lr`, `teachers[0].name`, `train.betas[0]`."""
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
    """The configuration as YAML; parsing it again gives an equal `Config`."""
    return dump(to_dict(config))


def dump(data: dict[str, Any]) -> str:
    """Plain data as YAML, numbers written so that YAML 1.1 reads numbers."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    def represent_float(self, data: float) -> Any:
        # YAML 1.1 reads 1e-05 as a string: a mantissa needs its point.
        text = repr(data)
        return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Dumper.add_representer(float, _Dumper.represent_float)


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits over everything but what changes no number of a run: `logging`, `checkpoint` and
    `model.text_cache`."""
    data = {key: value for key, value in to_dict(config).items() if key not in ("logging", "checkpoint")}
    del data["model"]["text_cache"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def changed(before: Config, after: Config) -> list[str]:
    """Dotted keys whose values differ."""
    old, new = flatten(before), flatten(after)
    return [key for key in {**old, **new} if old.get(key, MISSING) != new.get(key, MISSING)]


def may_change(keys: Sequence[str] = RESUMABLE) -> str:
    """The settings that a resumed run may change, in words."""
    return ", ".join(key.rstrip(".") for key in keys)


def refuse_unsafe_changes(before: Config, after: Config, *, staged: bool = False, besides: Sequence[str] = ()) -> None:
    """Raise unless `after` continues the run that `before` describes (see `RESUMABLE`).

    A stage keeps its rounds as well: the next one may have begun from where they ended. `besides` are further keys
    that may change: paths whose content is compared instead.
    """
    free = tuple(key for key in RESUMABLE if not (staged and key == "train.rounds"))
    for key in changed(before, after):
        if not key.startswith(free) and key not in besides:
            why = f"a resumed run keeps its value ({flatten(before).get(key, 'unset')})"
            raise UserError(key, why, f"put it back, or start a new run; {may_change(free)} may change")


def describe(hint: Any) -> str:
    """A type in words: "a whole number or null"."""
    if getattr(hint, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, args = getattr(hint, "__origin__", None), get_args(hint)
    if origin is tuple:
        return f"a list of {len(args)} numbers"
    if origin is list:
        return "a list of " + {"text": "texts"}.get(describe(args[0]), describe(args[0]))
    return " or ".join(describe(arg) for arg in args)


def check_known(data: dict[str, Any], source: str = "") -> None:
    """Raise for keys of nested plain data that name no setting. `source` (a file name) goes into the message."""
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
