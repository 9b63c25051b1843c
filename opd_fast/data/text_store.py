"""Text embeddings on disk, from one run to the next.

A folder for each key (`text_key`) holds shards of up to a batch of prompts. A shard is written whole or not at all, so
that a killed run goes on where it stopped and runs side by side do no harm; what does not pass its checks is encoded
again. Where every prompt is there, the text encoders are not even loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from opd_fast.errors import UserError, one_line
from opd_fast.files import open_to_umask, replacing
from opd_fast.models.base import DiffusionModel, TextEmbeds

FORMAT = 1
SMALL = 256 * 2**20
"""Text encoders of up to so many bytes encode a run's prompts in seconds, so that `auto` does not keep embeddings."""
WHOLE_FILE = 64 * 2**20
"""Files of up to so many bytes are hashed from end to end."""
_ENDS = 2**20
_READ = (".safetensors", ".json", ".txt", ".model", ".jinja")  # what a text encoder or tokenizer is loaded from
_ABANDONED = 3600.0  # seconds after which an unfinished shard cannot belong to a living run


class TextStore:
    """One model's embeddings on disk.

    A shard ``NAME.safetensors`` holds the rows of some prompts, and in its metadata the key, their texts, and for each
    row a CRC-32 of its text, shapes, dtypes and bytes.  The sums take about 1.5 of the 6 seconds in which a thousand
    prompts of SD3.5 (2.6 GB) are read, and nothing else would notice bytes that a disk has changed.
    """

    def __init__(self, root: Path, model: DiffusionModel, key: str, setting: str = "model.text_cache") -> None:
        """Use the folder ``root/key``, which is made if it is missing.  Raises UserError, which names ``setting``."""
        self.folder = root / key
        self._key, self._tokens, self._dtype = key, model.text_tokens, model.dtype
        self._writable = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part"):  # of a run that was killed
                with contextlib.suppress(FileNotFoundError):  # one of a run beside this one, just finished
                    if time.time() - part.stat().st_mtime > _ABANDONED:
                        part.unlink()
        except OSError as error:
            raise UserError(
                setting, f"{self.folder} cannot be made or read ({error.strerror})", "name another, or off"
            ) from error

    @classmethod
    def open(cls, setting: str, model: DiffusionModel, key: str = "model.text_cache") -> TextStore | None:
        """Open the store that ``setting`` asks for: a folder's name, "auto" or "off", which returns None.

        "auto" is `cache_root`, or None where the text encoders are small or the folder cannot be made.  Raises
        UserError, which names ``key``, for a folder that cannot be made, and for one beside a model that does not name
        its text encoders' files.
        """
        if setting == "off":
            return None
        files = text_files(model)
        if setting != "auto":
            if not files:
                raise UserError(key, f"{model.name} does not name its text encoders' files", "give off")
            return cls(Path(setting).expanduser(), model, text_key(model, files), key)
        if sum(file.stat().st_size for file in files) <= SMALL:
            return None
        try:
            return cls(cache_root(), model, text_key(model, files), key)
        except UserError as error:
            _warn(f"{one_line(error)}; going on without")
            return None

    def read(self, texts: Sequence[str]) -> Iterator[tuple[list[str], TextEmbeds]]:
        """Yield for each shard those of ``texts`` that it holds, and their rows on the CPU.

        A damaged shard is named on stderr and deleted.
        """
        from safetensors import SafetensorError

        wanted = set(texts)
        for path in sorted(self.folder.glob("*.safetensors")):
            if not wanted:
                return
            try:
                names, part = self._rows(path, wanted)
            except FileNotFoundError:  # another run found it damaged
                continue
            except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
                _warn(f"{path} is damaged ({one_line(error)}); its prompts are encoded again")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            if names:
                wanted.difference_update(names)
                yield names, part

    def _rows(self, path: Path, wanted: set[str]) -> tuple[list[str], TextEmbeds]:
        """Return the wanted rows of a shard.  For a damaged one it raises any of the errors that ``read`` expects."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as shard:
            facts = shard.metadata() or {}
            if facts["key"] != self._key:
                raise ValueError("of another model")
            texts, sums = json.loads(facts["texts"]), json.loads(facts["checksums"])
            rows = [row for row, text in enumerate(texts) if text in wanted]
            part = TextEmbeds(**{name: shard.get_tensor(name)[rows] for name in shard.keys()})  # noqa: SIM118
        if part.sequence.shape[1] != self._tokens or part.sequence.dtype != self._dtype:
            raise ValueError(f"rows of {tuple(part.sequence.shape[1:])} {part.sequence.dtype}")
        names = [texts[row] for row in rows]
        if [sums[row] for row in rows] != _checksums(names, part):
            raise ValueError("a checksum does not match")
        return names, part

    def write(self, texts: Sequence[str], embeds: TextEmbeds) -> None:
        """Write the rows of ``texts``, under a temporary name until they are whole.

        Where the disk takes no more, a warning is printed once, and the run goes on without the store.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._writable:
            return
        host = embeds.to("cpu")
        facts = {"key": self._key, "texts": json.dumps(list(texts)), "checksums": json.dumps(_checksums(texts, host))}
        name = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        try:
            with replacing(self.folder / f"{name}.safetensors", shared=True) as part:
                save_file({k: t.contiguous() for k, t in host.tensors.items()}, part, metadata=facts)
                open_to_umask(part)  # others may share the folder
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # else a crash could leave the name without the bytes
        except (OSError, SafetensorError) as error:
            self._writable = False
            _warn(f"{self.folder} cannot be written ({one_line(error)}); embeddings are not kept")


def cache_root() -> Path:
    """Return `opd_fast/text` in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opd_fast" / "text"


def text_files(model: DiffusionModel) -> list[Path]:
    """Return the files that the model's text encoders and tokenizers are loaded from."""
    return sorted(
        file for folder in model.text_folders() for file in folder.iterdir() if file.suffix in _READ and file.is_file()
    )


def text_key(model: DiffusionModel, files: Sequence[Path]) -> str:
    """Return a key of all that embeddings depend on, 32 hexadecimal digits.

    They depend on the text encoders' files, the number of tokens, the dtype, the family's own code and the libraries'
    versions.

    A file up to `WHOLE_FILE` bytes counts with its content, wherever it lies. A larger one, which takes long to read,
    counts with its size, its time of change and its first and last mebibyte (a safetensors header is within the first).
    """
    facts = {
        "format": FORMAT,
        "files": [[file.parent.name, file.name, *_fingerprint(file)] for file in files],
        "tokens": model.text_tokens,
        "dtype": str(model.dtype),
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in _code(type(model))],
        "libraries": {name: importlib.metadata.version(name) for name in ("diffusers", "transformers")},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _code(family: type[DiffusionModel]) -> list[Path]:
    """Return the files of a family's class and of the classes that it builds on."""
    kinds = [kind for kind in family.__mro__ if issubclass(kind, DiffusionModel)]
    return [Path(inspect.getfile(kind)) for kind in kinds]


def _fingerprint(file: Path) -> list[int | str]:
    facts = file.stat()
    with file.open("rb") as content:
        if facts.st_size <= WHOLE_FILE:
            return [hashlib.file_digest(content, "sha256").hexdigest()]
        ends = content.read(_ENDS)
        content.seek(max(0, facts.st_size - _ENDS))
        return [facts.st_size, facts.st_mtime_ns, hashlib.sha256(ends + content.read()).hexdigest()]


def row_layout(embeds: TextEmbeds) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return name to dtype and shape of one row of each tensor."""
    return {name: (t.dtype, tuple(t.shape[1:])) for name, t in embeds.tensors.items()}


def _checksums(texts: Sequence[str], embeds: TextEmbeds) -> list[int]:
    """Return a CRC-32 for each row; the rows are on the CPU."""
    layout = repr(sorted(row_layout(embeds).items())).encode()
    sums = []
    for row, text in enumerate(texts):
        total = zlib.crc32(layout, zlib.crc32(text.encode("utf-8", "surrogatepass")))
        for _, tensor in sorted(embeds.tensors.items()):
            total = zlib.crc32(tensor[row].contiguous().view(torch.uint8).numpy().data, total)
        sums.append(total)
    return sums


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
