"""Text embeddings of a run's prompts: in memory while it lasts, on disk from one run to the next.

On disk, a folder for each key (`text_key`) holds shards of up to a batch of prompts. A shard is written whole or not at
all, so a killed run goes on where it stopped and runs side by side do no harm; what does not pass its checks is encoded
again. Where every prompt is there, the text encoders are not even loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from opd_fast.errors import UserError, one_line
from opd_fast.files import open_to_umask, replacing
from opd_fast.models.base import DiffusionModel, TextEmbeds
from opd_fast.reporting.telemetry import PLAIN_SECONDS

FORMAT = 1
SMALL = 256 * 2**20
"""Bytes of text encoders that encode a run's prompts in seconds: `auto` keeps nothing of theirs."""
WHOLE_FILE = 64 * 2**20
"""Bytes up to which a file is hashed from end to end."""
_ENDS = 2**20
_READ = (".safetensors", ".json", ".txt", ".model", ".jinja")  # what a text encoder or tokenizer is loaded from
_ABANDONED = 3600.0  # seconds after which an unfinished shard belongs to no living run


class EmbeddingCache:
    """Text embeddings of distinct prompts, each encoded once, with "" for the unconditional branch.

    The rows lie on the model's device while they fit ``device_limit`` bytes, else in host memory; ``rows`` answers on
    the model's device either way.  (SD3.5 with 128 T5 tokens: 1.7 MB a prompt in bfloat16, so 8 GiB hold 5,000.)
    """

    def __init__(self, index: dict[str, int], embeds: TextEmbeds, device: torch.device, encoded: int) -> None:
        """``index``: prompt -> row of ``embeds``; ``device``: where ``rows`` answers.  Use ``build``."""
        self._index = index
        self._embeds = embeds
        self.device = device
        self.encoded = encoded
        """How many of the texts were encoded; the others were read from disk."""

    @classmethod
    def build(
        cls,
        model: DiffusionModel,
        prompts: Sequence[str],
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
        *,
        store: TextStore | None = None,
        device_limit: int = 8 * 2**30,
    ) -> EmbeddingCache:
        """The embeddings of every distinct text of ``prompts`` and "": read from ``store``, the rest encoded ``batch``
        at a time and put there, calling ``progress(done, total)`` with the number of texts to encode.
        """
        texts = list(dict.fromkeys(["", *prompts]))
        index = {text: row for row, text in enumerate(texts)}
        rows: TextEmbeds | None = None

        def keep(names: list[str], part: TextEmbeds) -> None:
            nonlocal rows
            if rows is None:
                rows = _allocate(part, len(texts), model.device, device_limit)
            elif _layout(rows) != _layout(part):
                assert store is not None
                raise ValueError(f"{store.folder} holds embeddings that this model does not make; delete the folder")
            places = torch.tensor([index[name] for name in names], device=rows.sequence.device)
            for name, tensor in part.tensors.items():
                rows.tensors[name].index_copy_(0, places, tensor.detach().to(places.device))

        missing = dict.fromkeys(texts)
        for names, part in store.read(texts) if store is not None else ():
            keep(names, part)
            for name in names:
                del missing[name]
        left = list(missing)
        for start in range(0, len(left), batch):
            names = left[start : start + batch]
            part = model.encode(names)
            if store is not None:
                store.write(names, part)
            keep(names, part)
            if progress is not None:
                progress(start + len(names), len(left))
        assert rows is not None
        return cls(index, rows, model.device, len(left))

    def __len__(self) -> int:
        """Number of distinct texts, "" among them."""
        return len(self._index)

    def rows(self, prompts: Sequence[str]) -> TextEmbeds:
        """One row per prompt, in order, on the model's device.  Raises KeyError for a prompt that was not built."""
        missing = [text for text in prompts if text not in self._index]
        if missing:
            raise KeyError(f"{len(missing)} prompts were not encoded beforehand, e.g. {missing[0]!r}")
        return self._embeds.index([self._index[text] for text in prompts]).to(self.device)

    @property
    def negative(self) -> TextEmbeds:
        """The one row of the empty prompt."""
        return self.rows([""])


def _allocate(like: TextEmbeds, count: int, device: torch.device, limit: int) -> TextEmbeds:
    """``count`` rows of no value: allocated once, for collecting parts and joining them would need twice the memory."""
    width = sum(math.prod(t.shape[1:]) * t.element_size() for t in like.tensors.values())
    device = device if width * count <= limit else torch.device("cpu")
    return TextEmbeds(**{k: t.new_empty(count, *t.shape[1:], device=device) for k, t in like.tensors.items()})


def _layout(embeds: TextEmbeds) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (t.dtype, tuple(t.shape[1:])) for name, t in embeds.tensors.items()}


# --- on disk ---------------------------------------------------------------------------------------------------------


class TextStore:
    """One model's embeddings on disk.

    A shard ``NAME.safetensors`` holds the rows of some prompts, and in its metadata the key, their texts, and for each
    row a CRC-32 of its text, shapes, dtypes and bytes.
    """

    def __init__(self, root: Path, model: DiffusionModel, key: str, setting: str = "model.text_cache") -> None:
        """The folder ``root/key``, made where it is not there.  Raises UserError, naming ``setting``, where it cannot
        be.
        """
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
        """The store that the setting ``key`` asks for: a folder's name, "auto" or "off"; None for no store.

        "auto" is `cache_root`, unless the text encoders are small or the folder cannot be made.  Raises UserError for a
        folder that cannot be made, and for one beside a model that tells no text encoders.
        """
        if setting == "off":
            return None
        files = text_files(model)
        if setting != "auto":
            if not files:
                raise UserError(key, f"{model.name} tells no text encoders to key it by", "give off")
            return cls(Path(setting).expanduser(), model, text_key(model, files), key)
        if sum(file.stat().st_size for file in files) <= SMALL:
            return None
        try:
            return cls(cache_root(), model, text_key(model, files), key)
        except UserError as error:
            _warn(f"{one_line(error)}; going on without")
            return None

    def read(self, texts: Sequence[str]) -> Iterator[tuple[list[str], TextEmbeds]]:
        """Shard by shard, those of ``texts`` that are there, and their rows on the CPU.  What is damaged is named on
        stderr and deleted.
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
        """The rows of a shard that are wanted.  Raises any of the errors that ``read`` knows for a damaged one."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as shard:
            facts = shard.metadata() or {}
            if facts["key"] != self._key:
                raise ValueError("of another model")
            texts: list[str] = json.loads(facts["texts"])
            sums: list[int] = json.loads(facts["checksums"])
            rows = [row for row, text in enumerate(texts) if text in wanted]
            part = TextEmbeds(**{name: shard.get_tensor(name)[rows] for name in shard.keys()})  # noqa: SIM118
        if part.sequence.shape[1] != self._tokens or part.sequence.dtype != self._dtype:
            raise ValueError(f"rows of {tuple(part.sequence.shape[1:])} {part.sequence.dtype}")
        names = [texts[row] for row in rows]
        if [sums[row] for row in rows] != _checksums(names, part):
            raise ValueError("a checksum does not match")
        return names, part

    def write(self, texts: Sequence[str], embeds: TextEmbeds) -> None:
        """Put the rows of ``texts`` there, under a temporary name until they are whole.  A disk that takes no more is
        told of once, and the run goes on without.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._writable:
            return
        host = embeds.to("cpu")
        facts = {
            "key": self._key,
            "texts": json.dumps(list(texts)),
            "checksums": json.dumps(_checksums(texts, host)),
        }
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
    """`opd_fast/text` in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opd_fast" / "text"


def text_files(model: DiffusionModel) -> list[Path]:
    """The files that the model's text encoders and tokenizers are loaded from."""
    return sorted(
        file for folder in model.text_folders() for file in folder.iterdir() if file.suffix in _READ and file.is_file()
    )


def text_key(model: DiffusionModel, files: Sequence[Path]) -> str:
    """What embeddings depend on, as 32 hexadecimal digits: the text encoders' files, the number of tokens, the dtype,
    the family's own code and the libraries' versions.

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
    """The files of a family's class and of those that it builds on."""
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


def _checksums(texts: Sequence[str], embeds: TextEmbeds) -> list[int]:
    """Of each row, on the CPU."""
    layout = repr(sorted(_layout(embeds).items())).encode()
    sums = []
    for row, text in enumerate(texts):
        total = zlib.crc32(layout, zlib.crc32(text.encode("utf-8", "surrogatepass")))
        for _, tensor in sorted(embeds.tensors.items()):
            total = zlib.crc32(tensor[row].contiguous().view(torch.uint8).numpy().data, total)
        sums.append(total)
    return sums


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


# --- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def encoding_progress() -> Iterator[Callable[[int, int], None]]:
    """``progress`` for ``EmbeddingCache.build``: a bar on a terminal, a line every few seconds elsewhere; nothing where
    nothing is encoded.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        said = time.monotonic()

        def line(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said >= PLAIN_SECONDS:
                said = time.monotonic()
                print(f"encoded {done}/{total} prompts", file=sys.stderr, flush=True)

        yield line
        return
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True)
    task = bar.add_task("prompts", total=None)

    def advance(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()
