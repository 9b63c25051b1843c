"""The directory of a run: it is made, holds no other run, is locked, and has the run's settings in it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opd_fast.config import Config
from opd_fast.config.command_line import Command
from opd_fast.config.serialize import to_yaml
from opd_fast.errors import UserError
from opd_fast.files import replace_text

KEY = "run_dir"
"""Errors call the directory by the name of the argument of `train`."""
CHECKPOINT_NAME = re.compile(r"round-(\d{6,})")
"""Matches the folder of a checkpoint; the group is the number of rounds that were done."""


def newest_round(directory: Path) -> int | None:
    """The number of rounds done at the newest checkpoint in `directory`, whole or not; None where there is none."""
    names = (CHECKPOINT_NAME.fullmatch(path.name) for path in directory.glob("round-*"))
    return max((int(name.group(1)) for name in names if name), default=None)


def make_run_dir(run_dir: Path, *, resume: bool) -> None:
    """Make the directory where it does not exist.

    Raises `UserError` where it cannot be made, or holds the checkpoints of a run that is not resumed.
    """
    if not resume and newest_round(run_dir / "checkpoints") is not None:
        raise UserError(KEY, f"{run_dir} holds the checkpoints of a run", "give another folder, or resume that run")
    with _writing(run_dir, KEY):
        run_dir.mkdir(parents=True, exist_ok=True)


def write_settings(run_dir: Path, config: Config) -> None:
    """Write a run's settings into config.yaml, where `--resume` reads them; raise `UserError` where that fails."""
    path, text = run_dir / "config.yaml", to_yaml(config)
    with _writing(run_dir, KEY):
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)


@contextmanager
def _writing(run_dir: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(run_dir, key, error.strerror or error) from error


def _unwritable(run_dir: Path, key: str, why: object) -> UserError:
    return UserError(key, f"{run_dir} cannot be written ({why})", "give a directory you may write")


# --- as a command line names it ------------------------------------------------------------------------------------


def check_run_dir(command: Command) -> None:
    """Raise `UserError` for a run directory that holds another run, or cannot be made or written; write nothing."""
    run_dir, key = command.run_dir, _key(command)
    beginning = {"config.yaml", ".config.yaml.part", ".lock"}
    if not command.resume and run_dir.is_dir() and any(p.name not in beginning for p in run_dir.iterdir()):
        raise UserError(key, f"{run_dir} is not empty", f"give another, or go on with --resume {run_dir}")
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise _unwritable(run_dir, key, "Permission denied" if nearest.is_dir() else "Not a directory")


def prepare_run_dir(command: Command, hold: ExitStack | None = None) -> Path:
    """Make the run directory, write config.yaml into it and return it; keep it `locked` for as long as `hold` is open.

    Raises `UserError` as `check_run_dir`, or where another run is in it.
    """
    check_run_dir(command)
    with _writing(command.run_dir, _key(command)):
        command.run_dir.mkdir(parents=True, exist_ok=True)
        if hold is not None:
            hold.enter_context(locked(command.run_dir))
        replace_text(command.run_dir / "config.yaml", command.to_yaml())
    return command.run_dir


def _key(command: Command) -> str:
    return "--resume" if command.resume else "--run-dir"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir` for this process until the block, or the process, ends; raise `UserError` if another one has it.

    A launcher that is killed may leave its processes training: a resumed run must not write between them. Where the
    file system knows no locks, the block runs without one.
    """
    import fcntl

    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            why = f"{run_dir} is in use by {file.read().strip() or 'another process'}"
            raise UserError("--run-dir", why, "end that run first") from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
