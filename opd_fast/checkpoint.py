"""Checkpoints that can be trusted: atomic, verified, without pickle.

A checkpoint is a folder `round-000040/` with `state.safetensors` (every tensor) and `meta.json` (everything else, with
the format's version and the SHA-256 of the tensor file). It is written beside its place and renamed into it, so a crash
leaves either the whole checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_fast.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_NAME = re.compile(r"round-(\d{6,})")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they lie; made when the first one is saved.
        keep: how many of the newest are kept.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        if keep < 1:
            raise UserError("checkpoint.keep", f"{keep} is below 1", "give 1 or more")
        self.directory, self.keep = Path(directory), keep

    def save(self, round: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write the state after `round` rounds and prune the oldest.

        Args:
            round: rounds done; a checkpoint of the same round is replaced.
            tensors: any dtypes and devices; copied to contiguous CPU tensors, shared storage included.
            meta: what JSON can hold. The keys `version`, `round` and `sha256` are the checkpoint's own.

        Raises:
            UserError: the disk is full or not writable.
        """
        from safetensors.torch import save_file

        reserved = {"version", "round", "sha256"} & set(meta)
        if reserved:
            raise ValueError(f"meta keys {sorted(reserved)} are the checkpoint's own; name them otherwise")
        final = self.directory / f"round-{round:06d}"
        temporary = self.directory / f".{final.name}.part"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(".round-*"):  # of an earlier crash
                shutil.rmtree(leftover)
            temporary.mkdir()
            # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
            plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
            save_file(plain, str(temporary / "state.safetensors"), metadata={"format": "pt"})
            header = {"version": VERSION, "round": round, "sha256": _sha256(temporary / "state.safetensors")}
            (temporary / "meta.json").write_text(json.dumps({**header, **meta}, indent=1), encoding="utf-8")
            for path in (temporary / "state.safetensors", temporary / "meta.json", temporary):
                _sync(path)
            if final.exists():
                replaced = self.directory / f".{final.name}.old"
                os.replace(final, replaced)
                os.replace(temporary, final)
                shutil.rmtree(replaced)
            else:
                os.replace(temporary, final)
            _sync(self.directory)
        except OSError as error:
            raise UserError(
                "checkpoint", f"{final} cannot be written ({error.strerror or error})", "make room or write elsewhere"
            ) from error
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint, whole or not; None when there is none."""
        found = self._all()
        return found[-1] if found else None

    def load(self, path: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read and verify a checkpoint.

        Args:
            path: one checkpoint's folder. None: the newest whole one; each damaged one that is passed over is named
                on stderr.

        Returns:
            The tensors on the CPU, and the metadata (`round` among it).

        Raises:
            UserError: the checkpoint named is damaged, or none is whole.
        """
        if path is not None:
            return _read(Path(path))
        found = self._all()
        if not found:
            raise UserError("--resume", f"no checkpoint in {self.directory}", "start the run anew without --resume")
        for candidate in reversed(found):
            try:
                return _read(candidate)
            except UserError as error:
                print(f"warning: {one_line(error)}", file=sys.stderr, flush=True)
        raise UserError("--resume", f"no whole checkpoint in {self.directory}", "start the run anew without --resume")

    def _all(self) -> list[Path]:
        named = [
            (found, p) for p in self.directory.glob("round-*") if (found := _NAME.fullmatch(p.name)) and p.is_dir()
        ]
        return [p for _, p in sorted(named, key=lambda pair: int(pair[0].group(1)))]


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "the run goes on from the checkpoint before it, if there is one"
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        digest, version = meta.pop("sha256"), meta.pop("version")
        if version != VERSION:
            raise UserError(
                str(folder), f"is of format {version}, not {VERSION}", "resume with the version that wrote it"
            )
        if _sha256(folder / "state.safetensors") != digest:
            raise UserError(str(folder), "checkpoint is damaged (its hash does not match)", remedy)
        return load_file(str(folder / "state.safetensors")), meta
    except (
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        SafetensorError,
    ) as e:
        raise UserError(str(folder), f"checkpoint is damaged ({one_line(e)})", remedy) from e


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
