"""A run's directory as training needs it, whoever starts the run: made, unused by another run, its settings in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from opd_fast.config import Config
from opd_fast.config.serialize import to_yaml
from opd_fast.errors import UserError

KEY = "run_dir"
"""What a directory is called in errors: the argument of `train`."""


CHECKPOINT_NAME = re.compile(r"round-(\d{6,})")
"""Of a checkpoint's folder: the rounds that were done."""


def newest_round(directory: Path) -> int | None:
    """The rounds done at the newest checkpoint that lies in `directory`, whole or not; None where there is none."""
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


def replace_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it into it, so that a crash leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    problem = f"{run_dir} cannot be written ({error.strerror or error})"
    return UserError(KEY, problem, "give a directory you may write")
