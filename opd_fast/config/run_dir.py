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
    return max(
        (int(found.group(1)) for p in directory.glob("round-*") if (found := CHECKPOINT_NAME.fullmatch(p.name))),
        default=None,
    )


def make_run_dir(run_dir: Path, *, resume: bool) -> None:
    """Make the directory where it does not exist.

    Raises:
        UserError: it cannot be made, or it holds the checkpoints of a run that is not resumed.
    """
    if not resume and newest_round(run_dir / "checkpoints") is not None:
        raise UserError(KEY, f"{run_dir} holds the checkpoints of a run", "give another folder, or resume that run")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def write_settings(run_dir: Path, config: Config) -> None:
    """Leave the settings that a run goes on with in config.yaml, where `--resume` reads them.

    Raises:
        UserError: the directory cannot be written.
    """
    path, text = run_dir / "config.yaml", to_yaml(config)
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, why: object, key: str = KEY) -> UserError:
    why = why.strerror or why if isinstance(why, OSError) else why
    return UserError(key, f"{run_dir} cannot be written ({why})", "give a directory you may write")


# --- as a command line names it ------------------------------------------------------------------------------------


@contextmanager
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
        raise _unwritable(run_dir, why, key)


def prepare_run_dir(command: Command, hold: ExitStack | None = None) -> Path:
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
        raise _unwritable(run_dir, error, key) from error
    return run_dir
