"""Prompt files, the order in which a run draws from them, and the cache of their embeddings.

Formats: GenEval's metadata lines (https://arxiv.org/abs/2310.11513), one JSON object a line with the prompt and what
the picture must show; plain text, one prompt a line; and text whose every line quotes exactly one target, as the OCR
reward's files do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from opd_fast.models.base import ASSETS, DiffusionModel, TextEmbeds

Split = Literal["train", "test"]
_SPLIT_FILES = ("{split}_metadata.jsonl", "{split}.jsonl", "{split}.txt")


@dataclass(frozen=True)
class Prompt:
    """``metadata`` is the GenEval record, ``{"target": words}`` for a line of an OCR file, or ``{}``."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


# --- files -----------------------------------------------------------------------------------------------------------


def load_prompts(source: str | Path, split: Split = "train") -> list[Prompt]:
    """The prompts of ``source``: a .jsonl or .txt file, a folder with train/test files, or ``bundled/NAME``.

    ``split`` chooses the file in a folder (``{split}_metadata.jsonl``, ``{split}.jsonl`` or ``{split}.txt``); a file is
    taken as it is.  Blank lines are skipped, spaces around a line are dropped.
    Raises ValueError naming the file and the line for anything that cannot be read, and for a file without prompts.
    """
    path = prompt_file(source, split)
    lines = list(_lines(path))
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one on each line")
    if path.suffix == ".jsonl":
        return [_geneval(text, f"{path}, line {number}") for number, text in lines]
    targets = [_target(text) for _, text in lines]
    if all(target is not None for target in targets):
        return [Prompt(text, {"target": target}) for (_, text), target in zip(lines, targets, strict=True)]
    return [Prompt(text) for _, text in lines]


def prompt_file(source: str | Path, split: Split = "train") -> Path:
    """The file that ``load_prompts`` reads.  Raises ValueError if there is none, or more than one."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose train or test")
    name = str(source)
    if name.startswith("bundled/"):
        path = ASSETS / "prompts" / name.removeprefix("bundled/")
        if not path.is_dir():
            known = sorted(f"bundled/{p.name}" for p in (ASSETS / "prompts").glob("*") if p.is_dir())
            remedy = f"choose one of {', '.join(known)}" if known else "build them: python -m opd_fast.worlds.build"
            raise ValueError(f"no prompts named {name}; {remedy}")
    else:
        path = Path(source).expanduser()
    if path.is_dir():
        names = [pattern.format(split=split) for pattern in _SPLIT_FILES]
        found = [path / file for file in names if (path / file).is_file()]
        if len(found) != 1:
            which = "several" if found else "none"
            raise ValueError(f"{path} holds {which} of {', '.join(names)}; name the file itself")
        return found[0]
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist; give a .jsonl or .txt file, a folder, or bundled/NAME")
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{path} is neither .jsonl (GenEval) nor .txt (one prompt a line); rename or convert it")
    return path


def write_geneval(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write GenEval records, one JSON object a line.  Raises ValueError for a record that could not be read back."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for number, line in enumerate(lines, 1):
        _geneval(line, f"record {number}")
    write_lines(path, lines)


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    """Write prompts, one a line.  Raises ValueError for an empty prompt, or one that breaks over lines."""
    for number, line in enumerate(lines, 1):
        if not line.strip() or "\n" in line or "\r" in line:
            raise ValueError(f"prompt {number} is empty or spans several lines: {line!r}")
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, stripped text) of the lines that are not blank."""
    # Split at line feeds only: str.splitlines also breaks at characters that may stand inside a prompt.
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if text:
            yield number, text


def _target(line: str) -> str | None:
    """The text in double quotes, if the line has exactly one such piece."""
    pieces = line.split('"')
    return pieces[1] if len(pieces) == 3 and pieces[1].strip() else None


def _geneval(line: str, where: str) -> Prompt:
    """A GenEval record: prompt; and, where given, tag, include [{class, count, color?, position?}], exclude."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}, not a JSON object")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{where}: lacks the text "prompt"')
    for clause in ("include", "exclude"):
        entries = record.get(clause, [])
        if not isinstance(entries, list):
            raise ValueError(f'{where}: "{clause}" must be a list of {{"class", "count"}}')
        for entry in entries:
            _check_entry(entry, len(record.get("include", [])), f"{where}: an entry of {clause!r}")
    return Prompt(prompt.strip(), record)


def _check_entry(entry: Any, included: int, where: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str):
        raise ValueError(f'{where} names no "class"')
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f'{where} has "count" {count!r}; give a whole number from 1')
    if "color" in entry and not isinstance(entry["color"], str):
        raise ValueError(f'{where} has "color" {entry["color"]!r}; give a word')
    if "position" in entry:
        position = entry["position"]
        good = isinstance(position, list) and len(position) == 2 and isinstance(position[0], str)
        if not good or not isinstance(position[1], int) or not 0 <= position[1] < included:
            raise ValueError(f'{where} has "position" {position!r}; give [relation, index of an entry of "include"]')


# --- order -----------------------------------------------------------------------------------------------------------


class PromptSource:
    """Which prompts a task's rounds see: epochs, each a shuffle keyed by (seed, stream, epoch), laid end to end.

    Round r takes places r*n to r*n + n - 1 of that sequence, so any round is known without the rounds before it, and a
    resumed run needs no state.  ``n`` must stay the same throughout a run.
    """

    def __init__(self, count: int, seed: int, stream: int = 0) -> None:
        """``count`` prompts; ``stream`` tells tasks apart that share a seed.  Raises ValueError for count < 1."""
        if count < 1:
            raise ValueError("a prompt source needs at least one prompt")
        self.count = count
        self._key = (seed % 2**64, stream % 2**64)

    def batch(self, round: int, n: int) -> list[int]:
        """Indices of the ``n`` prompts of round ``round`` (from 0).  Raises ValueError if round < 0 or n < 1."""
        if round < 0 or n < 1:
            raise ValueError(f"no batch of {n} prompts in round {round}; rounds count from 0 and n from 1")
        places = range(round * n, (round + 1) * n)
        return [int(_shuffle(self.count, *self._key, p // self.count)[p % self.count]) for p in places]

    def seen(self, rounds: int, n: int) -> list[int]:
        """The distinct prompts, ascending, that the first ``rounds`` rounds use: all that a run needs to embed."""
        if rounds * n >= self.count:
            return list(range(self.count))
        return sorted({index for r in range(rounds) for index in self.batch(r, n)})


@lru_cache(maxsize=16)
def _shuffle(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


# --- embeddings ------------------------------------------------------------------------------------------------------


class EmbeddingCache:
    """Text embeddings of distinct prompts, each encoded once, with "" for the unconditional branch.

    The rows lie on the model's device while they fit ``device_limit`` bytes, else in host memory; ``rows`` answers on
    the model's device either way.  (SD3.5 with 128 T5 tokens: 1.7 MB a prompt in bfloat16, so 8 GiB hold 5,000.)
    """

    def __init__(self, index: dict[str, int], embeds: TextEmbeds, device: torch.device) -> None:
        """``index``: prompt -> row of ``embeds``; ``device``: where ``rows`` answers.  Use ``build``."""
        self._index = index
        self._embeds = embeds
        self.device = device

    @classmethod
    def build(
        cls,
        model: DiffusionModel,
        prompts: Sequence[str],
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
        *,
        device_limit: int = 8 * 2**30,
    ) -> EmbeddingCache:
        """Encode every distinct text of ``prompts`` and "", ``batch`` at a time, calling ``progress(done, total)``."""
        texts = list(dict.fromkeys(["", *prompts]))
        rows: TextEmbeds | None = None
        for start in range(0, len(texts), batch):
            part = model.encode(texts[start : start + batch])
            if rows is None:
                # Allocated once: collecting the parts and joining them would need twice the memory.
                width = sum(math.prod(t.shape[1:]) * t.element_size() for t in part.tensors.values())
                device = part.sequence.device if width * len(texts) <= device_limit else torch.device("cpu")
                rows = TextEmbeds(
                    **{
                        name: t.new_empty(len(texts), *t.shape[1:], device=device)
                        for name, t in part.tensors.items()
                    }
                )
            for name, tensor in part.tensors.items():
                rows.tensors[name][start : start + len(part)] = tensor.detach()
            if progress is not None:
                progress(start + len(part), len(texts))
        assert rows is not None
        return cls({text: row for row, text in enumerate(texts)}, rows, model.device)

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
