"""Prompt files, and the order in which a run draws from them.

Formats: GenEval's metadata lines (https://arxiv.org/abs/2310.11513), one JSON object a line with the prompt and what
the picture must show; plain text, one prompt a line, where a line that quotes exactly one piece has it as its target,
as in the OCR reward's files; and tables (comma- or tab-separated, or parquet) with a column of prompts, as DrawBench's
list (https://arxiv.org/abs/2205.11487) is published.

Whatever a later part (tokenizer, reward, report) could not take is refused here, with the file and the line.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from opd_fast.config.paths import Split, prompt_file
from opd_fast.seeds import Stream

Number = TypeVar("Number", int, float)
COLUMNS = ("prompt", "prompts", "caption", "text")
"""What the column of prompts may be called, in any case."""
LONGEST = 10_000
"""Characters of a prompt: several times what any text encoder reads. A longer one is a file whose lines do not end."""
MOST_OBJECTS = 1000
"""The largest count of a GenEval entry."""
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark its own begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt with what its file says beside it.

    ``metadata`` is the GenEval record, ``{"target": words}`` for a line of text that quotes exactly one piece, the
    other columns of a table's row, or ``{}``.  ``where`` names the file and the line in messages; it makes no prompt
    differ from another.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False, repr=False)


# --- files -----------------------------------------------------------------------------------------------------------


def load_prompts(source: str | Path, split: Split = "train") -> list[Prompt]:
    """The prompts of ``source``: a file of any format above, a folder with train/test files, or ``bundled/NAME``.

    ``split`` chooses the file in a folder (``{split}_metadata.jsonl``, or ``{split}`` with one of ``SUFFIXES``); a file
    is taken as it is.  Lines end with LF, CRLF or CR.  Blank lines are skipped, spaces around a prompt are dropped.
    Raises ValueError naming the file and the line for anything that cannot be read, for a prompt that no text encoder
    could take (half a character, a NUL, more than ``LONGEST`` characters), and for a file without prompts.
    """
    path = prompt_file(source, split)
    if path.suffix == ".parquet":
        return _parquet(path)
    lines = list(_lines(path))
    if path.suffix in (".csv", ".tsv") or (path.suffix == ".txt" and lines and _is_drawbench(lines[0][1])):
        return _separated(path)
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one prompt on each line")
    if path.suffix == ".jsonl":
        return [_geneval(text, f"{path}, line {number}") for number, text in lines]
    prompts = [_made(text, _target(text), f"{path}, line {number}") for number, text in lines]
    if len(prompts) == 1 and len(parts := prompts[0].text.splitlines()) > 1:
        end = prompts[0].text[len(parts[0])]
        raise ValueError(
            f"{prompts[0].where}: the only line holds U+{ord(end):04X}, which ends no line here; end lines with a line "
            f"feed"
        )
    return prompts


def write_geneval(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write GenEval records, one JSON object a line.  Raises ValueError for a record that could not be read back."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    for number, line in enumerate(lines, 1):
        _geneval(line, f"record {number}")
    write_lines(path, lines)


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    """Write prompts, one a line.  Raises ValueError for an empty prompt, or one that breaks over lines."""
    for number, line in enumerate(lines, 1):
        if _is_blank(line) or "\n" in line or "\r" in line:
            raise ValueError(f"prompt {number} is empty or spans several lines: {line!r}")
        if fault := _fault(line):
            raise ValueError(f"prompt {number} {fault}")
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, stripped text) of the lines that are not blank."""
    for number, line in enumerate(_raw_lines(path), 1):
        # Files that were joined keep their byte-order marks, in front of lines.
        text = line.strip().lstrip("\ufeff").strip()
        if not _is_blank(text):
            yield number, text


def _raw_lines(path: Path) -> Iterator[str]:
    """Every line as it stands, without its end: LF, CRLF or CR."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); give a file you may read") from error
    for mark, name in _ENCODINGS:
        if data.startswith(mark):
            raise ValueError(f"{path}, line 1: not UTF-8 but {name}; convert the file to UTF-8")
    # str.splitlines also breaks at characters that may stand inside a prompt.
    for number, raw in enumerate(re.split(rb"\r\n|\r|\n", data.removeprefix(codecs.BOM_UTF8)), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
        if "\0" in line:
            raise ValueError(f"{path}, line {number}: holds a NUL byte, as UTF-16 does; convert the file to UTF-8")
        yield line


def _is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: spaces, control and formatting characters alone."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _fault(value: Any) -> str | None:
    """What no later part can take in a text, or in the texts of a record: half a character, or a NUL."""
    if isinstance(value, dict):
        return next((fault for pair in value.items() for fault in map(_fault, pair) if fault), None)
    if isinstance(value, list):
        return next((fault for fault in map(_fault, value) if fault), None)
    if not isinstance(value, str):
        return None
    half = next((c for c in value if 0xD800 <= ord(c) < 0xE000), None)
    if half is not None:
        return f"holds half a character (the lone surrogate \\u{ord(half):04x}); write the whole character"
    return "holds a NUL character; take it out" if "\0" in value else None


def _made(text: str, metadata: Any, where: str) -> Prompt:
    """A prompt that every later part can take; ``metadata``: a record, or the target of a line of text."""
    if isinstance(metadata, str) or metadata is None:
        metadata = {} if metadata is None else {"target": metadata}
    text = text.strip()
    if fault := _fault(text) or _fault(metadata):
        raise ValueError(f"{where}: {fault}")
    if len(text) > LONGEST:
        raise ValueError(
            f"{where}: a prompt of {len(text)} characters, of which no text encoder reads more than {LONGEST}; look "
            f"how the file's lines end, or shorten it"
        )
    return Prompt(text, metadata, where)


def _target(line: str) -> str | None:
    """The text in double quotes, if the line has exactly one such piece."""
    pieces = line.split('"')
    return pieces[1] if len(pieces) == 3 and pieces[1].strip() else None


def _geneval(line: str, where: str) -> Prompt:
    """A GenEval record: prompt; and, where given, tag, include [{class, count, color?, position?}], exclude."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two keys named {twice!r}")
        return found

    try:
        record = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}, not a JSON object")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or _is_blank(prompt):
        raise ValueError(f'{where}: lacks the text "prompt"')
    for clause in ("include", "exclude"):
        entries = record.get(clause, [])
        if not isinstance(entries, list):
            raise ValueError(f'{where}: "{clause}" must be a list of {{"class", "count"}}')
        for entry in entries:
            if fault := entry_fault(entry, len(record.get("include", []))):
                raise ValueError(f"{where}: an entry of {clause!r} {fault}")
    return _made(prompt, record, where)


def entry_fault(entry: Any, included: int) -> str | None:
    """What is wrong with an entry of a GenEval record's ``include`` or ``exclude``, in words; None: nothing.

    ``included``: how many entries ``include`` has, which a position may name.
    """
    named = isinstance(entry, dict) and isinstance(entry.get("class"), str) and not _is_blank(entry["class"])
    if not named:
        return 'names no "class"'
    count = entry.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_OBJECTS:
        return f'has "count" {str(count)[:40]}; give a whole number from 1 to {MOST_OBJECTS}'
    if "color" in entry and not isinstance(entry["color"], str):
        return f'has "color" {entry["color"]!r}; give a word'
    if "position" in entry:
        position = entry["position"]
        good = isinstance(position, list) and len(position) == 2 and isinstance(position[0], str)
        good = good and isinstance(position[1], int) and not isinstance(position[1], bool)
        if not good or not 0 <= position[1] < included:
            return f'has "position" {position!r}; give [relation, index of an entry of "include"]'
    return None


def _is_drawbench(line: str) -> bool:
    """Whether a text file is DrawBench's table, whose header would be no prompt."""
    return [cell.strip().casefold() for cell in line.replace("\t", ",").split(",")] == ["prompts", "category"]


def _separated(path: Path) -> list[Prompt]:
    """A table with a header; its separator is the tab in a .tsv file and wherever the header has one, else a comma."""
    lines = [f"{line}\n" for line in _raw_lines(path)]
    header = next((line for line in lines if line.strip()), "")
    separator = "\t" if path.suffix == ".tsv" or "\t" in header else ","
    rows = csv.reader(lines, delimiter=separator, strict=True)
    columns: list[str] | None = None
    column = 0
    prompts: list[Prompt] = []
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            quotes = "put it in double quotes, doubled inside"
            remedy = "close its double quotes, or shorten the cell" if "field limit" in str(error) else quotes
            raise ValueError(f"{where}: not readable as a table ({error}); {remedy}") from None
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = [cell.strip() for cell in cells]
            column = _prompt_column(path, columns)
        elif len(cells) != len(columns):
            raise ValueError(
                f"{where}: {len(cells)} cells where the header has {len(columns)}; put a cell that holds the separator "
                f"in double quotes"
            )
        else:
            prompts.append(_row(dict(zip(columns, cells, strict=True)), columns[column], where))
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write a header and one prompt on each line")
    return prompts


def _parquet(path: Path) -> list[Prompt]:
    try:
        from datasets import Dataset
    except ImportError:
        raise ValueError(
            f"{path} is read by the package datasets, which is not installed; pip install 'opd_fast[datasets]', or "
            f"convert the file to .csv"
        ) from None
    try:
        table = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps pyarrow's errors in its own, of no common base
        raise ValueError(
            f"{path} cannot be read as parquet ({type(error).__name__}: {' '.join(str(error).split())[:200]}); write "
            f"it again"
        ) from None
    columns = list(table.column_names)
    column = columns[_prompt_column(path, columns)]
    prompts = [_row(row, column, f"{path}, row {number}") for number, row in enumerate(table, 1)]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; it has no rows")
    return prompts


def _prompt_column(path: Path, columns: Sequence[str]) -> int:
    """Which column holds the prompts.  Raises ValueError unless exactly one is called so, and for a name used twice."""
    found = [i for i, name in enumerate(columns) if name.casefold() in COLUMNS]
    if len(found) != 1:
        raise ValueError(
            f"{path} has {'several columns' if found else 'no column'} for the prompts among {', '.join(columns)}; "
            f"call exactly one of them {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
    twice = [name for i, name in enumerate(columns) if name in columns[:i]]
    if twice:
        raise ValueError(f"{path} has two columns named {twice[0]!r}; rename one of them")
    return found[0]


def _row(cells: dict[str, Any], column: str, where: str) -> Prompt:
    text = cells.pop(column)
    if not isinstance(text, str) or _is_blank(text):
        raise ValueError(f"{where}: the column {column!r} holds no text; write a prompt there or drop the row")
    return _made(text, cells, where)


# --- order -----------------------------------------------------------------------------------------------------------


class PromptSource:
    """Which prompts a task's rounds see: epochs, each a shuffle keyed by (seed, stream, epoch), laid end to end.

    Rounds are the task's own: its turns, where a `TaskSchedule` leaves it out now and then.  Round r takes places r*n
    to r*n + n - 1 of that sequence, so any round is known without the rounds before it, and a resumed run needs no
    state.  ``n`` must stay the same throughout a run.
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


class TaskSchedule:
    """Which tasks a round takes.

    A round has ``per_round`` places.  ``round_robin`` hands them out in turn, round after round.  ``weighted`` draws
    them in proportion to the tasks' shares by systematic sampling (Madow 1949): a task holds ``expected`` places on
    average, and in each round that number rounded down or up, so that a task may hold several and another none.
    Either follows from (seed, round) alone, so a resumed run needs no state.
    """

    def __init__(
        self,
        shares: Sequence[float],
        per_round: int | None = None,
        kind: Literal["round_robin", "weighted"] = "round_robin",
        seed: int = 0,
        among: Sequence[int] | None = None,
    ) -> None:
        """``shares``: one positive number a task, read by ``weighted`` alone; ``among``: the tasks that come at all,
        None for every one; ``per_round``: None for one place to each of them.

        Raises ValueError for less than one task or place.
        """
        self._among = list(range(len(shares))) if among is None else sorted(among)
        self.tasks = len(shares)
        self.per_round = len(self._among) if per_round is None else per_round
        if not self._among or self.per_round < 1:
            raise ValueError(
                f"no schedule of {len(self._among)} tasks with {self.per_round} places a round; give 1 or more"
            )
        self._kind = kind
        self._key = (seed % 2**64, Stream.TASK_SCHEDULE)
        weights = [shares[task] if kind == "weighted" else 1.0 for task in self._among]
        self._places = [self.per_round * weight / math.fsum(weights) for weight in weights]
        self.expected = self._spread(self._places)
        """Places of each task in a round, on average."""
        self._before = [[0] * len(weights)]  # of the weighted schedule: turns taken before each round, as far as asked

    def _spread(self, values: Sequence[Number]) -> list[Number]:
        """What the tasks that come have, with 0 for the others."""
        found = dict(zip(self._among, values, strict=True))
        return [found.get(task, 0) for task in range(self.tasks)]

    def round(self, index: int) -> list[tuple[int, range]]:
        """(task, its turns) for each task of round ``index`` (from 0), ascending; a task's turns count from 0 through
        the whole run, and turn t sees batch t of its `PromptSource`.
        """
        if index < 0:
            raise ValueError(f"no round {index}; rounds count from 0")
        spans = zip(self.turns(index), self.turns(index + 1), strict=True)
        return [(task, range(start, stop)) for task, (start, stop) in enumerate(spans) if start < stop]

    def turns(self, rounds: int) -> list[int]:
        """How many turns each task has had after ``rounds`` rounds."""
        count = len(self._among)
        if self._kind == "round_robin":
            return self._spread([(rounds * self.per_round + count - 1 - i) // count for i in range(count)])
        while len(self._before) <= rounds:
            drawn = self._draw(len(self._before) - 1)
            self._before.append([had + places for had, places in zip(self._before[-1], drawn, strict=True)])
        return self._spread(self._before[rounds])

    def _draw(self, index: int) -> list[int]:
        """Each task's places in a round: the whole numbers that fall into its stretch of a line shifted at random."""
        rng = np.random.default_rng([*self._key, index])
        order = rng.permutation(len(self._among))
        ends = np.cumsum(np.asarray(self._places)[order])
        ends[-1] = self.per_round  # whatever rounding has made of it
        ends -= rng.random()
        places = np.diff(np.ceil(ends), prepend=0.0)
        drawn = [0] * len(order)
        for task, count in zip(order, places, strict=True):
            drawn[int(task)] = int(count)
        return drawn
