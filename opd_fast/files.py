"""Permissions of written files."""

from __future__ import annotations

import secrets
import stat
from pathlib import Path


def open_to_umask(*files: Path) -> None:
    """Give files the permissions of any new file in their folder, as the user's umask and the folder's default ACL have
    it: safetensors writes through a temporary file of its own, which leaves 0600.

    The umask cannot be read without setting it, for all threads of a process, so a new file is asked instead.
    """
    modes: dict[Path, int] = {}
    for file in files:
        if file.parent not in modes:
            probe = file.with_name(f".{file.name}-{secrets.token_hex(6)}.part")
            probe.touch()
            modes[file.parent] = stat.S_IMODE(probe.stat().st_mode)
            probe.unlink()
        file.chmod(modes[file.parent])
