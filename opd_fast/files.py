"""Files that others read: written whole or not at all, with the permissions that the user's umask gives."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give the block a path beside `path` to write, and rename it to `path` once the block has ended.

    A crash leaves the old file or the new one. A block that raises leaves the old one, and nothing beside it.
    `shared` allows other processes to write the same file at the same time.
    """
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}.part" if shared else f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Put a text in the place of a file, in UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder, and put it in the place of `folder` once it is whole."""
    part, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    put_in_place(part, folder)


def put_in_place(part: Path, folder: Path) -> None:
    """Rename `part` to `folder`; one that is there steps aside as `.NAME.old`, and is removed last."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def open_to_umask(*files: Path) -> None:
    """Give files the permissions of any new file in their folder: safetensors writes temporary files of mode 0600.

    Reading the umask sets it for all threads of a process, and a folder may have a default ACL: a new file has both.
    """
    modes: dict[Path, int] = {}
    for file in files:
        if file.parent not in modes:
            probe = file.with_name(f".{file.name}-{secrets.token_hex(6)}.part")
            probe.touch()
            modes[file.parent] = stat.S_IMODE(probe.stat().st_mode)
            probe.unlink()
        file.chmod(modes[file.parent])
