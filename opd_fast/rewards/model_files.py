"""Finds the weights of rewards: a path of this machine first, then the hub's cache, then the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from opd_fast.config.paths import Source, resolve_source
from opd_fast.errors import UserError, one_line


def find_model(
    key: str, name: str, *, fetch: bool = True, patterns: Sequence[str] | None = None, needs: Sequence[str] = ()
) -> Path | None:
    """Return the file or folder that the setting `reward_models.{key}` names.

    Args:
        key: the setting, for messages.
        name: a path, `owner/name` on the hub, or `owner/name/FILE` for one file of it.
        fetch: whether it may be downloaded. Without it None stands for what is neither here nor in the hub's cache.
        patterns: which files of a repository are wanted; None: all.
        needs: patterns of which each must match a file before a repository in the cache counts as whole; `a|b` is met
            by either, and of a file in shards every one is needed. Another library may have put a part of it there.

    Raises:
        UserError: a path that does not exist, or a repository that can be neither found nor fetched.
    """
    from huggingface_hub import snapshot_download

    source = _resolve(name)
    if source.path is not None:
        if not source.path.exists():
            raise UserError(f"reward_models.{key}", f"{name} does not exist", "give a path that does, or a hub id")
        return source.path
    wanted = [source.inside] if source.inside else list(patterns) if patterns else None
    for local in (True, False) if fetch else (True,):
        try:
            found = Path(snapshot_download(source.repo, allow_patterns=wanted, local_files_only=local)) / source.inside
        except Exception as error:  # the hub's errors share no base
            problem = one_line(error)
            continue
        absent = [source.inside] if not found.exists() else [need for need in needs if not _has(found, need)]
        if not absent:
            return found
        # Where the hub cannot be reached, what the cache has of the repository comes back once more.
        problem = f"what could be had of it lacks {absent[0].replace('|', ' or ')}"
    if not fetch:
        return None
    inside = f" {source.inside}" if source.inside else ""
    raise UserError(
        f"reward_models.{key}",
        f"{name} is not on this machine and cannot be fetched ({problem})",
        f"run: hf download {source.repo}{inside}, or give a path",
    )


def _resolve(name: str) -> Source:
    """Return what a name refers to. Unlike a teacher's weights, one file of a repository may be a pickle."""
    source = resolve_source(name, "teachers")
    parts = name.split("/")
    reads_as_file = len(parts) > 2 and all(re.fullmatch(r"[A-Za-z0-9][\w.+-]*", part) for part in parts)
    if source.where == "local" and reads_as_file and not Path(name).exists() and not Path(parts[0]).exists():
        return Source("hub", None, "/".join(parts[:2]), "/".join(parts[2:]))
    return source


def _has(folder: Path, need: str) -> bool:
    return any(_whole([file.name for file in folder.glob(pattern)]) for pattern in need.split("|"))


def _whole(names: list[str]) -> bool:
    """Return whether there is a file, or, of one in shards such as model-00001-of-00003.safetensors, every shard."""
    totals = [int(found[1]) for name in names if (found := re.search(r"-\d+-of-(\d+)\.", name))]
    return len(totals) >= max(totals, default=1) or len(names) > len(totals)
