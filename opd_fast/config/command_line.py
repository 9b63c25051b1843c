"""The command line of a training run: recipe, overrides, run directory.

    python -m opd_fast.train [RECIPE_OR_YAML] [--section.key VALUE ...] [--run-dir DIR] [--resume RUN_DIR] [--dry-run]

`parse` returns the checked settings; `check_paths` and `prepare_run_dir` look at the disk. None of it imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from opd_fast.config import Config
from opd_fast.config.earlier import in_todays_settings, is_earlier_run
from opd_fast.config.paths import package_file
from opd_fast.config.run_dir import replace_text
from opd_fast.config.serialize import (
    check_known,
    describe,
    from_dict,
    leaves,
    may_change,
    refuse_unsafe_changes,
    sections,
    teacher_leaves,
    to_yaml,
)
from opd_fast.config.stages import Stage, split, stages_to_yaml
from opd_fast.config.stages import check as check_stages
from opd_fast.config.validate import check_text, validate
from opd_fast.errors import UserError, did_you_mean, one_line

Hints = dict[str, tuple[Any, Any]]  # key to its type and default
_OPTION_HINTS: Hints = {"seed": (int, 0), "devices": (int, 8), "gpu_memory": (float, 80.0)}
SWITCHES = ("--run-dir", "--resume", "--dry-run", "--profile", "--devices", "--gpu-memory", "--seed", "--teachers")


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        config: the checked settings; of a run in stages, the first's.
        run_dir: where the run writes; not made yet.
        resume: whether `run_dir` holds a run that goes on.
        dry_run: print the plan and stop.
        recipe: the recipe or YAML file named, for titles.
        devices: ranks that a plan is for; None: as many as were started.
        gpu_memory: GiB of each that a plan is for; None: the device's own.
        profile: record some rounds with torch's profiler.
        stages: of a run that has them.
    """

    config: Config
    run_dir: Path
    resume: bool
    dry_run: bool
    recipe: str
    devices: int | None = None
    gpu_memory: float | None = None
    profile: bool = False
    stages: tuple[Stage, ...] = ()

    @property
    def configs(self) -> list[Config]:
        """The settings of every stage."""
        return [stage.config for stage in self.stages] or [self.config]

    def to_yaml(self) -> str:
        """What `--resume` reads."""
        return to_yaml(self.config) if not self.stages else stages_to_yaml(self.stages)


def recipes() -> dict[str, Path]:
    """Recipe name to its YAML file."""
    return {path.stem: path for path in sorted(package_file("recipes").glob("*.yaml"))}


def build_parser() -> Any:
    """The jsonargparse parser: one typed argument for each setting, explained by its field."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m opd_fast.train",
        description="Distil frozen diffusion teachers into one student along the student's own rollouts.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        type=str,
        help=f"a recipe ({', '.join(recipes())}) or a YAML file laid over the defaults; when not given, "
        "bundled for the bundled model, and for another the defaults with --teachers",
    )
    parser.add_argument("--run-dir", type=str, help="where the run writes; runs/RECIPE-TIME when not given")
    parser.add_argument(
        "--resume",
        type=str,
        help=f"run directory whose run goes on from its newest checkpoint; of its settings, {may_change()} may change",
    )
    parser.add_argument("--dry-run", action="store_true", help="print settings, plan and refusals, then stop")
    parser.add_argument("--profile", action="store_true", help="record rounds 3 to 5 into RUN_DIR/profile")
    parser.add_argument("--devices", type=int | None, help="plan for this many devices (with --dry-run)")
    parser.add_argument("--gpu-memory", type=float | None, help="GiB of each of them; the device's own, else 80")
    parser.add_argument("--seed", type=int | None, help="short for --train.seed")
    fields = ", ".join(f"{name} ({help})" for name, (_, _, help) in teacher_leaves().items())
    parser.add_argument("--teachers", type=list[dict], default=[], help=f"list of teachers, as YAML or JSON: {fields}")
    groups = {name: parser.add_argument_group(name, (kind.__doc__ or "").strip()) for name, kind in sections().items()}
    for key, (hint, default, help) in leaves().items():
        groups[key.split(".")[0]].add_argument(f"--{key}", type=hint, default=default, help=help)
    return parser


def parse(argv: list[str]) -> Command:
    """Read the command line into a `Command`.

    Raises:
        UserError: unknown keys, wrong types, impossible values, a recipe or run that does not exist.
        SystemExit: with status 0 after `--help`.
    """
    parser = build_parser()
    check_options(argv, [*SWITCHES, *(f"--{key}" for key in leaves())], "python -m opd_fast.train --help lists all")
    first = strict(lambda: parser.parse_args(argv))
    for option, text in (("RECIPE", first.recipe), ("--run-dir", first.run_dir), ("--resume", first.resume)):
        if text is not None:
            check_text(option, text)
    _check_plan_options(first)
    if first.resume is not None:
        return _resumed(parser, argv, first)
    recipe = first.recipe or "bundled"
    stages = _checked(_read_stages(parser, argv, *_beneath(first, recipe)))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = Path(first.run_dir or f"runs/{Path(recipe).stem}-{stamp}").expanduser()
    if first.run_dir is None and not first.dry_run and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError("--run-dir", "not given while torchrun may restart the run", "name one for it to find")
    # After a failure torchrun starts the same command again: it goes on with what the first start began.
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run_dir / "config.yaml").is_file()
    return _command(stages, run_dir, again, recipe, first)


def _beneath(first: Any, recipe: str) -> tuple[Path | None, str]:
    """(YAML file that the command line is laid over, its name); no file: the defaults alone.

    Where no recipe is named, the bundled one serves the bundled model: its teachers, resolution and learning rate are
    that model's own, and another model has its teachers from the command line.
    """
    path = first.model.path
    if first.recipe is not None or path == "bundled":
        return _recipe_file(recipe), recipe
    check_text("model.path", path)
    if not first.teachers:
        raise UserError(
            "model.path",
            f"{path} is given without teachers, and those of the bundled recipe fit the bundled pipeline alone",
            "name them with --teachers '[{name: N, weights: W, prompts: P}]', or in a YAML file",
        )
    return None, "the command line"


def _command(stages: list[Stage], run_dir: Path, resume: bool, recipe: str, first: Any) -> Command:
    staged = tuple(stages) if stages[0].name else ()
    plan = (first.dry_run, recipe, first.devices, first.gpu_memory, first.profile)
    return Command(stages[0].config, run_dir, resume, *plan, staged)


def _read_stages(parser: Any, argv: list[str], path: Path | None, source: str) -> list[Stage]:
    """The stages of a YAML file, `argv` laid over each of them; one without name where it has none, or for no file."""
    data = read_yaml(path) if path is not None else {}
    if is_earlier_run(data):
        data = in_todays_settings(data)
    return [
        Stage(name, _overlaid(parser, argv, base, source=f"{source}, stage {name}" if name else source))
        for name, base in split(data, source)
    ]


def _checked(stages: list[Stage]) -> list[Stage]:
    """The same, their settings validated."""
    for stage in stages:
        try:
            validate(stage.config)
        except UserError as error:
            if not stage.name:
                raise
            raise UserError(f"stage {stage.name}: {error.key}", error.problem, error.remedy) from None
    check_stages(stages)
    return stages


def _check_plan_options(first: Any) -> None:
    for option, value in (("--devices", first.devices), ("--gpu-memory", first.gpu_memory)):
        if value is None:
            continue
        if not first.dry_run:
            raise UserError(option, "is for a plan", "add --dry-run, or start the run with torchrun on as many devices")
        if not 0 < value < math.inf:
            raise UserError(option, f"{value} is not above 0", "give a positive number")


def _resumed(parser: Any, argv: list[str], first: Any) -> Command:
    run_dir = Path(first.resume).expanduser()
    if first.recipe is not None:
        raise UserError(
            "RECIPE", f"{first.recipe!r} beside --resume", "a resumed run reads its own config.yaml; drop it"
        )
    if first.run_dir is not None and Path(first.run_dir).expanduser() != run_dir:
        raise UserError("--run-dir", "differs from --resume", "drop it: a resumed run writes where it wrote before")
    if not (run_dir / "config.yaml").is_file():
        raise UserError("--resume", f"no config.yaml in {run_dir}", "name the directory of an earlier run")
    path = run_dir / "config.yaml"
    before, after = (_read_stages(parser, given, path, str(path)) for given in ([], argv))
    for old, new in zip(before, after, strict=True):
        refuse_unsafe_changes(old.config, new.config, staged=bool(new.name))
    return _command(_checked(after), run_dir, True, run_dir.name, first)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping (or nothing)."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({one_line(error)})", "name a readable YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:  # brackets in brackets without end
        raise UserError(str(path), f"is not valid YAML ({one_line(error)})", "mend the file") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(str(path), "holds no sections", "write settings as section: {key: value}")
    return {section: values for section, values in data.items() if values is not None}  # `model:` alone sets nothing


def read_config(path: str | Path) -> Config:
    """The settings in a YAML file laid over the defaults, checked and validated."""
    config = _overlaid(build_parser(), [], read_yaml(Path(path)), source=str(path))
    validate(config)
    return config


def _recipe_file(recipe: str) -> Path:
    known = recipes()
    if recipe in known:
        return known[recipe]
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or os.sep in recipe:
        raise UserError("RECIPE", f"no such file: {recipe}", f"recipes in the package: {', '.join(known)}")
    raise UserError("RECIPE", f"no recipe or YAML file {recipe!r}", did_you_mean(recipe, known))


def _overlaid(parser: Any, argv: list[str], base: dict[str, Any], source: str) -> Config:
    """Defaults, then `base`, then `argv`."""
    check_known(base, source)
    base = _words(base)
    typed = strict(lambda: parser.parse_object(base, defaults=False), source).as_dict()
    flat = {f"{s}.{k}": v for s, values in typed.items() if isinstance(values, dict) for k, v in values.items()}
    fresh = build_parser()
    fresh.set_defaults({**flat, "teachers": typed.get("teachers") or []})
    found = strict(lambda: fresh.parse_args(argv)).as_dict()
    for key, (hint, default, _) in leaves().items():
        section, name = key.split(".")
        _refuse_null(key, found[section][name], hint, default)
    data = {name: found[name] for name in (*sections(), "teachers")}
    check_known(data)
    if data["teachers"] != typed.get("teachers"):
        source = ""  # a mistake in them is the command line's
    data["teachers"] = [_typed_teacher(i, teacher, source) for i, teacher in enumerate(data["teachers"])]
    if found["seed"] is not None:
        data["train"]["seed"] = found["seed"]
    return from_dict(data)


def _words(base: dict[str, Any]) -> dict[str, Any]:
    """`off` and `on`, which YAML 1.1 reads as booleans, where a setting takes them as words."""
    words = {key for key, (hint, _, _) in leaves().items() if hint is str or "off" in get_args(hint)}

    def word(key: str, value: Any) -> Any:
        return ("on" if value else "off") if isinstance(value, bool) and key in words else value

    return {
        section: {key: word(f"{section}.{key}", value) for key, value in values.items()}
        if isinstance(values, dict)
        else values
        for section, values in base.items()
    }


def _refuse_null(key: str, value: Any, hint: Any, default: Any) -> None:
    """The parser takes null for any setting, as if it were not given."""
    if value is None and type(None) not in get_args(hint):
        raise UserError(key, f"null is not {describe(hint)}", _example(key, default))


def _typed_teacher(index: int, teacher: dict[str, Any], source: str) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    for name, (hint, default, _) in teacher_leaves().items():
        parser.add_argument(f"--{name}", type=hint, **({} if default is MISSING else {"default": default}))
    hints = {f"teachers[{index}].{name}": (hint, default) for name, (hint, default, _) in teacher_leaves().items()}
    found = strict(lambda: parser.parse_object(teacher), source, f"teachers[{index}].", hints)
    for name, (hint, default, _) in teacher_leaves().items():
        _refuse_null(f"teachers[{index}].{name}", found[name], hint, default)
    result: dict[str, Any] = found.as_dict()
    return result


def check_options(argv: list[str], known: list[str], help: str) -> None:
    """Refuse options that are not in `known`, by name, before jsonargparse refuses them without one."""
    for token in argv:
        if not token.startswith("--") or token == "--":
            continue
        plain = token.split("=")[0].removesuffix("+")
        if plain in known or plain == "--help":
            continue
        inside = [key for key in known if key.startswith(plain + ".")]
        if inside:
            raise UserError(plain, "is a section", f"set its keys one by one, as in {inside[0]} VALUE")
        remedy = did_you_mean(plain, known) if _near(plain, known) else help
        raise UserError(plain.removeprefix("--"), "unknown key", remedy)


def _near(word: str, known: list[str]) -> bool:
    return did_you_mean(word, known).startswith("did you mean")


def strict(run: Any, source: str = "", prefix: str = "", hints: Hints | None = None) -> Any:
    """Run a jsonargparse call; its error becomes one line with the key, the type it wants and a remedy."""
    from jsonargparse import ArgumentError

    try:
        return run()
    except RecursionError:
        raise UserError("command line", "a value has brackets in brackets without end", "mend it") from None
    except ArgumentError as error:
        hints = hints or {**{key: (hint, default) for key, (hint, default, _) in leaves().items()}, **_OPTION_HINTS}
        raise _readable(str(error), source, prefix, hints) from None


def _readable(message: str, source: str, prefix: str, hints: Hints) -> UserError:
    where = f" in {source}" if source and source not in recipes() else ""
    found = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = prefix + found.group(1) if found else ""
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    shown = value.group(1).strip() if value else "something else"
    if key in hints:
        hint, default = hints[key]
        choices = [str(choice) for choice in get_args(hint)] if getattr(hint, "__origin__", None) is Literal else []
        remedy = did_you_mean(shown, choices) if choices and _near(shown, choices) else _example(key, default)
        return UserError(key, f"{shown!r} is not {describe(hint)}{where}", remedy)
    if key == "teachers":
        return UserError(key, f"{shown!r} is no list of teachers{where}", "give [{name: N, weights: W, prompts: P}]")
    alone = re.search(r"argument (\S+): expected one argument", message)
    if alone:
        return UserError(alone.group(1).lstrip("-"), "has no value", f"write {alone.group(1)} VALUE")
    required = re.search(r"arguments? (?:is|are) required: (.*)", message)
    if required:
        names = required.group(1).split(", ")
        return UserError(", ".join(names), "not given", "give " + " ".join(f"--{n} VALUE" for n in names))
    extra = re.search(r"unrecognized arguments: (.*)", message)
    if extra:
        return UserError(extra.group(1), "is no option", "one recipe or YAML file, then --section.key VALUE")
    return UserError(key or "command line", one_line(ValueError(message)), "--help lists all options")


def _example(key: str, default: Any) -> str:
    if default is MISSING:
        return f"mend {key}"
    shown = json.dumps(default) if not isinstance(default, str) else default
    return f"the default is {shown}"


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir` for this process until the block, or the process, ends.

    A launcher that is killed may leave its processes training: a resumed run must not write between them. Where the
    file system knows no locks the block runs without one.

    Raises:
        UserError: a living process has it.
    """
    import fcntl

    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                "--run-dir", f"{run_dir} is in use by {file.read().strip() or 'another process'}", "end that run first"
            ) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def check_run_dir(command: Command) -> None:
    """Raise `UserError` for a run directory that holds another run, or cannot be made or written; write nothing."""
    run_dir = command.run_dir
    key = "--resume" if command.resume else "--run-dir"
    beginning = {"config.yaml", ".config.yaml.part", ".lock"}
    if not command.resume and run_dir.is_dir() and any(p.name not in beginning for p in run_dir.iterdir()):
        raise UserError(key, f"{run_dir} is not empty", f"give another, or go on with --resume {run_dir}")
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "Not a directory" if not nearest.is_dir() else "Permission denied"
        raise UserError(key, f"{run_dir} cannot be written ({why})", "give a directory you may write")


def prepare_run_dir(command: Command, hold: contextlib.ExitStack | None = None) -> Path:
    """Make the run directory, write config.yaml into it and return it; keep it `locked` for as long as `hold` is open.

    Raises:
        UserError: the directory cannot be made or written, another run is in it, or it holds more than the config.yaml
            of a run that never began while `command.resume` is false.
    """
    run_dir = command.run_dir
    key = "--resume" if command.resume else "--run-dir"
    check_run_dir(command)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if hold is not None:
            hold.enter_context(locked(run_dir))
        replace_text(run_dir / "config.yaml", command.to_yaml())
    except OSError as error:
        raise UserError(
            key, f"{run_dir} cannot be written ({error.strerror or error})", "give a directory you may write"
        ) from error
    return run_dir
