"""Settings in other forms: dotted keys, plain dictionaries, YAML, hashes; and what a resumed run may change of them.

`opd_fast.config.schema` says which settings there are, `opd_fast.config.validate` what they may not be.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, Literal, get_args, get_type_hints

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
    found: dict[str, tuple[Any, Any, str]] = {}
    for section, kind in sections().items():
        for name, hint, default, help in _fields(kind):
            found[f"{section}.{name}"] = (hint, default, help)
    return found


def teacher_leaves() -> dict[str, tuple[Any, Any, str]]:
    """Field to (type, default, help) of one teacher; the default of a required one is `dataclasses.MISSING`."""
    return {name: (hint, default, help) for name, hint, default, help in _fields(TeacherConfig)}


def _fields(kind: type) -> Iterator[tuple[str, Any, Any, str]]:
    hints = _hints(kind)
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        yield f.name, hints[f.name], default, f.metadata["help"]


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
    import yaml

    text: str = yaml.dump(data, Dumper=_dumper(), sort_keys=False, allow_unicode=True)
    return text


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def number(dumper: Any, value: float) -> Any:
        # YAML 1.1 reads 1e-05 as a string: a mantissa needs its point.
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return dumper.represent_scalar("tag:yaml.org,2002:float", text)

    Dumper.add_representer(float, number)
    return Dumper


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


def may_change(*, staged: bool = False) -> str:
    """The settings that a resumed run may change, in words."""
    return ", ".join(key.rstrip(".") for key in _resumable(staged))


def _resumable(staged: bool) -> list[str]:
    return [key for key in RESUMABLE if not (staged and key == "train.rounds")]


def refuse_unsafe_changes(before: Config, after: Config, *, staged: bool = False, besides: Sequence[str] = ()) -> None:
    """Raise unless `after` continues the run that `before` describes (see `RESUMABLE`).

    A stage keeps its rounds as well: the next one may have begun from where they ended. `besides` are further keys
    that may change: paths whose content is compared instead.
    """
    free = _resumable(staged)
    for key in changed(before, after):
        if not key.startswith(tuple(free)) and key not in besides:
            raise UserError(
                key,
                f"a resumed run keeps its value ({flatten(before).get(key, 'unset')})",
                f"put it back, or start a new run; {may_change(staged=staged)} may change",
            )


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
    known = [*sections(), "teachers"]
    for section, values in data.items():
        if section not in known:
            raise UserError(str(section), f"unknown key{where}", did_you_mean(str(section), known))
        if section == "teachers":
            _check_teacher_list(values, where)
            continue
        names = [f.name for f in fields(sections()[section])]
        if not isinstance(values, dict):
            raise UserError(section, f"holds settings{where}, got {values!r}", f"write {section}: {{{names[0]}: ...}}")
        for key in values:
            if key not in names:
                near = did_you_mean(str(key), names)
                raise UserError(f"{section}.{key}", f"unknown key{where}", near)


def _check_teacher_list(values: Any, where: str) -> None:
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise UserError("teachers", f"is a list of teachers{where}, got {values!r}", "write [{name, weights, prompts}]")
    names = [f.name for f in fields(TeacherConfig)]
    for i, teacher in enumerate(values):
        for key in teacher:
            if key not in names:
                raise UserError(f"teachers[{i}].{key}", f"unknown key{where}", did_you_mean(str(key), names))
        for f in fields(TeacherConfig):
            if f.default is MISSING and f.name not in teacher:
                raise UserError(f"teachers[{i}].{f.name}", f"is missing{where}", f"add it: {f.metadata['help']}")
