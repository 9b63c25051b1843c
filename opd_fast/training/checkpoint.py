"""Checkpoints that can be trusted: written in the background, atomic, verified, without pickle.

A checkpoint is a folder `round-000040/` with `shard-*.safetensors`, of which each process writes its own, and
`meta.json` (everything else, with the format's version and the SHA-256 of every shard and of itself). It is written
beside its place and renamed into it, so a crash leaves either the whole checkpoint or none. PyTorch's distributed
checkpoint (DCP) writes and reads the shards, so a run may go on with other processes and another strategy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from opd_fast.config.run_dir import CHECKPOINT_NAME
from opd_fast.distributed.world import World
from opd_fast.errors import UserError, one_line
from opd_fast.files import put_in_place
from opd_fast.models.lora.files import sha256

VERSION = 2
_OWN = {"version", "round", "sha256", "digest"}


class Checkpoints:
    """The newest `keep` checkpoints of a run, in a directory that all processes see.

    The processes of `world` save and load together, each calling the same methods; None stands for this one alone.
    """

    def __init__(self, directory: Path, keep: int, world: World | None = None) -> None:
        if keep < 1:
            raise UserError("checkpoint.keep", f"{keep} is below 1", "give 1 or more")
        self.directory, self.keep, self.world = Path(directory), keep, world or World()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._group: Any = None
        # DCP says so whenever one process uses it, which is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if self.world.size > 1:
            # Its own group: the writer's messages must not mix with those of the round that goes on meanwhile.
            self._group = dist.new_group(backend="gloo")

    def save(
        self,
        round: int,
        tensors: Mapping[str, Tensor],
        meta: dict[str, Any],
        afterwards: Callable[[], None] | None = None,
    ) -> Path:
        """Copy the state after `round` rounds; write it in the background, then prune the oldest.

        The tensors, of any dtype and device, sharded or whole, may change as soon as this returns. `meta` is what JSON
        can hold, under other keys than the checkpoint's own. Rank 0 calls `afterwards` in the
        background, once the checkpoint is whole. A checkpoint of the same round is replaced. Returns where it will lie.
        Raises UserError where the save before this one failed, because the disk is full or not writable.
        """
        if reserved := _OWN & set(meta):
            raise ValueError(f"meta keys {sorted(reserved)} are the checkpoint's own; name them otherwise")
        self.wait()
        final = self.directory / f"round-{round:06d}"
        copies = BlockingAsyncStager().stage({name: t.detach() for name, t in tensors.items()})
        self._pending = self._writer.submit(self._write, final, round, copies, dict(meta), afterwards)
        return final

    def wait(self) -> None:
        """Wait until everything saved lies on the disk. Raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def latest(self) -> Path | None:
        """The newest checkpoint, whole or not; None when there is none."""
        return next(reversed(self._all()), None)

    def find(self, path: Path | None = None) -> tuple[Path, dict[str, Any]]:
        """Verify the checkpoint in a folder, or find the newest whole one; damaged ones are named on stderr.

        Returns its folder and its metadata (`round` among it). Raises UserError where the one named is damaged, or none
        is whole.
        """
        return self.world.on_first(lambda: self._find(path))

    def restore(self, folder: Path, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, sharded or whole, with the tensors of their names.

        Raises ValueError for a name that is missing or of another shape, UserError for files that cannot be read.
        """
        shapes = {name: tuple(entry.size) for name, entry in _entries(folder).items()}
        for name, target in targets.items():
            if shapes.get(name) != tuple(target.shape):
                raise ValueError(
                    f"the checkpoint holds {name} of shape {shapes.get(name)}, this run {tuple(target.shape)}; resume "
                    "with the configuration that wrote it"
                )
        with _disk_errors(folder):
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(dict(targets), storage_reader=reader, process_group=self._group, no_dist=self.world.size == 1)

    def blanks(self, folder: Path, prefix: str = "") -> dict[str, Tensor]:
        """Targets for `restore` on the CPU, whole and unset: one for each tensor whose name begins with `prefix`."""
        return {
            name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
            for name, entry in _entries(folder).items()
            if name.startswith(prefix)
        }

    def load(self, path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """`find` a checkpoint and read all of it, whole, to the CPU."""
        folder, meta = self.find(path)
        tensors = self.blanks(folder)
        self.restore(folder, tensors)
        return tensors, meta

    # --- writing -----------------------------------------------------------------------------------------------------

    def _write(
        self, final: Path, round: int, tensors: Any, meta: dict[str, Any], afterwards: Callable[[], None] | None
    ) -> None:
        """In the writer's thread; every process calls it for the same checkpoint."""
        temporary = self.directory / f".{final.name}.part"
        self._on_first(final, lambda: self._begin(temporary))
        with _disk_errors(final):
            writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self.world.size == 1)
        header = {"version": VERSION, "round": round, "sha256": self._digests(temporary), **meta}
        self._on_first(final, lambda: self._commit(temporary, final, header))
        if afterwards is not None and self.world.is_main:
            afterwards()

    def _begin(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._restore_replaced()
        for leftover in self.directory.glob(".round-*"):  # of an earlier crash
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _restore_replaced(self) -> None:
        """Put back a checkpoint that a crash caught between its own renaming and its successor's."""
        for old in self.directory.glob(".round-*.old"):
            if not (final := self.directory / old.name[1 : -len(".old")]).exists():
                os.replace(old, final)

    def _digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of every shard, each hashed and forced to the disk by the process that wrote it."""
        shards = sorted(folder.glob(f"shard-{self.world.rank + 1:05d}-*.safetensors"))
        for path in shards:
            _sync(path)
        return dict(self.world.all_gather_objects([(path.name, sha256(path)) for path in shards], self._group))

    def _commit(self, temporary: Path, final: Path, header: dict[str, Any]) -> None:
        text = json.dumps({**header, "digest": _digest(header)}, indent=1)
        (temporary / "meta.json").write_text(text, encoding="utf-8")
        for path in (temporary / "meta.json", temporary):
            _sync(path)
        put_in_place(temporary, final)
        _sync(self.directory)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _on_first(self, final: Path, work: Callable[[], None]) -> None:
        """Rank 0 works while the others wait; where it fails all of them raise."""

        self.world.on_first(_disk_errors(final)(work), self._group)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _find(self, path: Path | None) -> tuple[Path, dict[str, Any]]:
        if path is not None:
            return Path(path), _verify(Path(path))
        with contextlib.suppress(OSError):  # of a directory that may only be read
            self._restore_replaced()
        found = self._all()
        for candidate in reversed(found):
            try:
                return candidate, _verify(candidate)
            except UserError as error:
                print(f"warning: {one_line(error)}", file=sys.stderr, flush=True)
        whole = "whole " if found else ""
        raise UserError("--resume", f"no {whole}checkpoint in {self.directory}", "start the run anew without --resume")

    def _all(self) -> list[Path]:
        """The checkpoints, whole or not, the oldest first."""
        found = [p for p in self.directory.glob("round-*") if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda folder: int(folder.name.removeprefix("round-")))


def _entries(folder: Path) -> dict[str, Any]:
    """Name to size and type of every tensor in a checkpoint, shards put together."""
    with _disk_errors(folder):
        entries: dict[str, Any] = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return entries


def _verify(folder: Path) -> dict[str, Any]:
    """The metadata of a whole checkpoint. Raises UserError for any other."""
    remedy = "the run goes on from the checkpoint before it, if there is one"
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        version = meta["version"]
        if version != VERSION:
            problem = f"is of format {version}, not {VERSION}"
            raise UserError(str(folder), problem, "resume with the version that wrote it")
        if meta.pop("digest") != _digest(meta):
            raise UserError(str(folder), "checkpoint is damaged (meta.json was altered)", remedy)
        for name, expected in meta.pop("sha256").items():
            if sha256(folder / name) != expected:
                raise UserError(str(folder), f"checkpoint is damaged (the hash of {name} does not match)", remedy)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(folder), f"checkpoint is damaged ({one_line(error)})", remedy) from error
    del meta["version"]
    return meta


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise failures of the disk and of a checkpoint's files as a UserError, on whatever process DCP met them."""
    try:
        yield
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise UserError(
                "checkpoint",
                f"{folder} cannot be written or read ({cause.strerror or cause})",
                "make room or give a directory you may write; the checkpoints before it are whole",
            ) from cause
        if isinstance(cause, SafetensorError):
            raise UserError(str(folder), f"checkpoint cannot be read ({one_line(cause)})", "remove it") from cause
        raise cause from None


def _digest(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
