"""The command line of a training run: recipe, overrides, run directory.

`parse` returns the checked settings; `opd_fast.config.run_dir` looks at the disk. Neither imports torch.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from opd_fast.config import Config
from opd_fast.config.earlier import in_todays_settings
from opd_fast.config.layers import TEACHERS, overlay, read_yaml, refuse_unknown_elements, setting_options
from opd_fast.config.options import Given, Option, print_help, read, settle
from opd_fast.config.paths import package_file
from opd_fast.config.serialize import check_known, may_change, refuse_unsafe_changes, sections, to_yaml
from opd_fast.config.stages import Stage, split, stages_to_yaml
from opd_fast.config.stages import check as check_stages
from opd_fast.config.validate import check_positive, check_text, validate
from opd_fast.errors import UserError, did_you_mean

DOOR = "python -m opd_fast.train"


DOOR_OPTIONS = (
    Option("run-dir", str | None, None, "where the run writes; runs/RECIPE-TIME when not given"),
    Option(
        "resume",
        str | None,
        None,
        f"run directory whose run goes on from its newest checkpoint; of its settings, {may_change()} may change",
    ),
    Option("dry-run", None, False, "print settings, plan and refusals, then stop"),
    Option("profile", None, False, "record rounds 3 to 5 into RUN_DIR/profile"),
    Option("devices", int | None, None, "plan for this many devices (with --dry-run)"),
    Option("gpu-memory", float | None, None, "GiB of each of them; the device's own, else 80"),
    Option("seed", int | None, None, "short for --train.seed"),
    TEACHERS,
)
"""The options that set no key."""
SWITCHES = tuple(f"--{option.name}" for option in DOOR_OPTIONS)


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        config: the checked settings; of a run in stages, those of the first.
        stages: of a run that has them.
        run_dir: where the run writes; not made yet.
        resume: whether `run_dir` holds a run that goes on.
        recipe: the recipe or YAML file named, for titles.
        dry_run: print the plan and stop.
        devices: ranks that a plan is for; None: as many as were started.
        gpu_memory: GiB of each that a plan is for; None: the device's own.
        profile: record some rounds with torch's profiler.
    """

    config: Config
    stages: tuple[Stage, ...]
    run_dir: Path
    resume: bool
    recipe: str
    dry_run: bool
    devices: int | None
    gpu_memory: float | None
    profile: bool

    @property
    def configs(self) -> list[Config]:
        """The settings of every stage."""
        return [stage.config for stage in self.stages] or [self.config]

    def to_yaml(self) -> str:
        """What `--resume` reads."""
        return stages_to_yaml(self.stages) if self.stages else to_yaml(self.config)


def recipes() -> dict[str, Path]:
    """Return the YAML file of every recipe, by name."""
    return {path.stem: path for path in sorted(package_file("recipes").glob("*.yaml"))}


def parse(argv: list[str]) -> Command:
    """Read the command line into a `Command`.

    Raises:
        UserError: unknown keys, wrong types, impossible values, a recipe or run that does not exist.
        SystemExit: with status 0 after `--help`.
    """
    options = [*DOOR_OPTIONS, *setting_options()]
    what = "Distil frozen diffusion teachers into one student along the student's own rollouts."
    titles = {name: (kind.__doc__ or "").strip() for name, kind in sections().items()}
    about = (
        f"a recipe ({', '.join(recipes())}) or a YAML file laid over the defaults; when not given, bundled for the "
        "bundled model, and for another the defaults with --teachers"
    )
    print_help(argv, DOOR, what, ("recipe", "?", about), options, titles)
    words, given = read(argv, options, DOOR)
    if len(words) > 1:
        raise UserError(words[1], "unknown argument", "one recipe or YAML file, then --section.key VALUE")
    recipe = words[0] if words else None
    door = settle(DOOR_OPTIONS, [one for one in given if "." not in one.option.name])
    for name, text in (("RECIPE", recipe), ("--run-dir", door.run_dir), ("--resume", door.resume)):
        if text is not None:
            check_text(name, text)
    for name, value in (("--devices", door.devices), ("--gpu-memory", door.gpu_memory)):
        if value is not None and not door.dry_run:
            raise UserError(name, "is for a plan", "add --dry-run, or start the run with torchrun on as many devices")
        check_positive((name, value))
    if door.resume is not None:
        run_dir, resume = Path(door.resume).expanduser(), True
        stages, name = _resumed(given, recipe, door, run_dir), run_dir.name
    else:
        path, source = _beneath(given, recipe, door)
        stages, name = _checked(_read_stages(given, path, source)), recipe or "bundled"
        run_dir, resume = _new_run_dir(door, name)
    staged = tuple(stages) if stages[0].name else ()
    plan = (door.dry_run, door.devices, door.gpu_memory, door.profile)
    return Command(stages[0].config, staged, run_dir, resume, name, *plan)


def _new_run_dir(door: SimpleNamespace, recipe: str) -> tuple[Path, bool]:
    """Return the run directory, and whether it holds a run that goes on: torchrun repeats a command that failed."""
    if door.run_dir is None and not door.dry_run and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError("--run-dir", "not given while torchrun may restart the run", "name one for it to find")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = Path(door.run_dir or f"runs/{Path(recipe).stem}-{stamp}").expanduser()
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return run_dir, again and (run_dir / "config.yaml").is_file()


def _beneath(given: Sequence[Given], recipe: str | None, door: SimpleNamespace) -> tuple[Path | None, str]:
    """Return the YAML file beneath the command line, None for the defaults alone, and its name in errors.

    Without a recipe, the bundled one serves the bundled model, whose teachers, resolution and learning rate it has;
    another model has its teachers from the command line.
    """
    path = next((one.text for one in reversed(given) if one.key == "model.path"), "bundled")
    if recipe is not None or path == "bundled":
        return _recipe_file(recipe or "bundled"), recipe or "bundled"
    check_text("model.path", path)
    if not door.teachers:
        why = f"{path} is given without teachers, and those of the bundled recipe fit the bundled pipeline alone"
        remedy = "name them with --teachers '[{name: N, weights: W, prompts: P}]', or in a YAML file"
        raise UserError("model.path", why, remedy)
    return None, "the command line"


def _read_stages(given: Sequence[Given], path: Path | None, source: str) -> list[Stage]:
    """Return the stages of a YAML file, one without name where it has none, or for no file; `given` lies over each."""
    data = in_todays_settings(read_yaml(path)) if path is not None else {}
    stages, names = [], []
    for name, base in split(data, source):
        place = f"{source}, stage {name}" if name else source
        check_known(base, place)
        config, teachers = overlay(base, given, "" if place in recipes() else f" in {place}")
        stages.append(Stage(name, config))
        names.append(teachers)
    refuse_unknown_elements(given, names)
    return stages


def _checked(stages: list[Stage]) -> list[Stage]:
    """Return `stages` once their settings are validated."""
    for stage in stages:
        try:
            validate(stage.config)
        except UserError as error:
            if not stage.name:
                raise
            raise UserError(f"stage {stage.name}: {error.key}", error.problem, error.remedy) from None
    check_stages(stages)
    return stages


def _resumed(given: Sequence[Given], recipe: str | None, door: SimpleNamespace, run_dir: Path) -> list[Stage]:
    if recipe is not None:
        raise UserError("RECIPE", f"{recipe!r} beside --resume", "a resumed run reads its own config.yaml; drop it")
    if door.run_dir is not None and Path(door.run_dir).expanduser() != run_dir:
        raise UserError("--run-dir", "differs from --resume", "drop it: a resumed run writes where it wrote before")
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError("--resume", f"no config.yaml in {run_dir}", "name the directory of an earlier run")
    before, after = (_read_stages(laid, path, str(path)) for laid in ([], given))
    for old, new in zip(before, after, strict=True):
        refuse_unsafe_changes(old.config, new.config, staged=bool(new.name))
    return _checked(after)


def read_config(path: str | Path) -> Config:
    """The settings in a YAML file laid over the defaults, checked and validated; of stages, the first's."""
    return _checked(_read_stages([], Path(path), str(path)))[0].config


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
