"""Prompt files: what they may look like, and what is refused in them.

Formats: GenEval's metadata lines (https://arxiv.org/abs/2310.11513), one JSON object a line with the prompt and what
the picture must show; plain text, one prompt a line, where a line that quotes exactly one piece has it as its target,
as in the OCR reward's files; and tables (comma- or tab-separated, or parquet) with a column of prompts, as DrawBench's
list (https://arxiv.org/abs/2205.11487) is published.

Whatever a later part (tokenizer, reward, report) could not take is refused here, with the file and the line.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd_fast.config.paths import Split, prompt_file

COLUMNS = ("prompt", "prompts", "caption", "text")
"""Names that the column of prompts may have, in upper or lower case."""
LONGEST = 10_000
"""The most characters of a prompt, several times what any text encoder reads. A longer one comes from a file whose
lines do not end."""
MOST_OBJECTS = 1000
"""The largest count of a GenEval entry."""
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt with what its file says beside it.

    ``metadata`` is the GenEval record, ``{"target": words}`` for a line of text that quotes exactly one piece, the
    other columns of a table's row, or ``{}``.  ``where`` names the file and the line in messages; prompts are equal
    whatever it is.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False, repr=False)


def load_prompts(source: str | Path, split: Split = "train") -> list[Prompt]:
    """Read the prompts of ``source``: a file of any format above, a folder with train/test files, or ``bundled/NAME``.

    ``split`` chooses the file in a folder (``{split}_metadata.jsonl``, or ``{split}`` with one of ``SUFFIXES``); a file
    is taken as it is.  Lines end with LF, CRLF or CR.  Blank lines are skipped, spaces around a prompt are dropped.
    Raises ValueError naming the file and the line for anything that cannot be read, for a prompt that no text encoder
    could take (half a character, a NUL, more than ``LONGEST`` characters), and for a file without prompts.
    """
    path = prompt_file(source, split)
    if path.suffix == ".parquet":  # `datasets` keeps what it has read
        return _parquet(path)
    try:
        digest = hashlib.blake2b(path.read_bytes()).digest()
    except OSError:  # the parser says what is wrong with the file
        return list(_parse.__wrapped__(path, b""))
    return list(_parse(path, digest))


@lru_cache(maxsize=32)
def _parse(path: Path, digest: bytes) -> tuple[Prompt, ...]:
    """Parse a file of that content.

    A run reads its prompts once for each check before it begins, and once to train; a long file takes seconds.
    """
    lines = list(_lines(path))
    if path.suffix in (".csv", ".tsv") or (path.suffix == ".txt" and lines and _is_drawbench(lines[0][1])):
        return tuple(_separated(path))
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one prompt on each line")
    if path.suffix == ".jsonl":
        return tuple(_geneval(text, f"{path}, line {number}") for number, text in lines)
    prompts = [_checked_prompt(text, _target(text), f"{path}, line {number}") for number, text in lines]
    if len(prompts) == 1 and len(parts := prompts[0].text.splitlines()) > 1:
        end = prompts[0].text[len(parts[0])]
        raise ValueError(
            f"{prompts[0].where}: the only line holds U+{ord(end):04X}, which does not end a line here; end lines with "
            f"a line feed"
        )
    return tuple(prompts)


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
    """Yield (line number from 1, stripped text) for each line that is not blank."""
    for number, line in enumerate(_raw_lines(path), 1):
        # Files that were joined keep their byte-order marks, in front of lines.
        text = line.strip().lstrip("\ufeff").strip()
        if not _is_blank(text):
            yield number, text


def _raw_lines(path: Path) -> Iterator[str]:
    """Yield every line as it stands, without its end, which is LF, CRLF or CR."""
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
    """Return whether a text has only spaces, control and formatting characters, so that nothing of it can be seen."""
    return all(c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text)


def _fault(value: Any) -> str | None:
    """Return what is wrong with a text, or with the texts of a record, for every later part; None if nothing is.

    A text is wrong if it holds half a character or a NUL.
    """
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


def _checked_prompt(text: str, metadata: Any, where: str) -> Prompt:
    """Return a prompt that every later part can take; ``metadata`` is a record, or the target of a line of text."""
    if isinstance(metadata, str) or metadata is None:
        metadata = {} if metadata is None else {"target": metadata}
    text = text.strip()
    if fault := _fault(text) or _fault(metadata):
        raise ValueError(f"{where}: {fault}")
    if len(text) > LONGEST:
        raise ValueError(
            f"{where}: a prompt of {len(text)} characters, of which no text encoder reads more than {LONGEST}; check "
            f"how the file's lines end, or shorten it"
        )
    return Prompt(text, metadata, where)


def _target(line: str) -> str | None:
    """Return the text in double quotes if the line has exactly one such piece, else None."""
    pieces = line.split('"')
    return pieces[1] if len(pieces) == 3 and pieces[1].strip() else None


def _geneval(line: str, where: str) -> Prompt:
    """Read a GenEval record: prompt and, where given, tag, include [{class, count, color?, position?}], exclude."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"two keys named {next(name for name in names if names.count(name) > 1)!r}")
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=unique_keys)
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
    return _checked_prompt(prompt, record, where)


def entry_fault(entry: Any, included: int) -> str | None:
    """Return what is wrong with an entry of a GenEval record's ``include`` or ``exclude``; None if nothing is.

    ``included`` is the number of entries of ``include``, any of which a position may name.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("class"), str) or _is_blank(entry["class"]):
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
    """Return whether a text file's first line is the header of DrawBench's table, rather than a prompt."""
    return [cell.strip().casefold() for cell in line.replace("\t", ",").split(",")] == ["prompts", "category"]


def _separated(path: Path) -> list[Prompt]:
    """Read a table with a header, separated by tabs in a .tsv file or where the header has one, else by commas."""
    lines = [f"{line}\n" for line in _raw_lines(path)]
    header = next((line for line in lines if line.strip()), "")
    separator = "\t" if path.suffix == ".tsv" or "\t" in header else ","
    rows = csv.reader(lines, delimiter=separator, strict=True)
    columns: list[str] = []
    column, prompts = 0, list[Prompt]()
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
        if not columns:
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
    except Exception as error:  # datasets wraps pyarrow's errors in its own, which have no common base
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
    """Return the index of the column that holds the prompts.

    Raises ValueError unless exactly one column is called as in ``COLUMNS``, and for a name used twice.
    """
    named = [i for i, name in enumerate(columns) if name.casefold() in COLUMNS]
    if len(named) != 1:
        raise ValueError(
            f"{path} has {'several columns' if named else 'no column'} for the prompts among {', '.join(columns)}; "
            f"call exactly one of them {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
    if twice := [name for i, name in enumerate(columns) if name in columns[:i]]:
        raise ValueError(f"{path} has two columns named {twice[0]!r}; rename one of them")
    return named[0]


def _row(cells: dict[str, Any], column: str, where: str) -> Prompt:
    text = cells.pop(column)
    if not isinstance(text, str) or _is_blank(text):
        raise ValueError(f"{where}: the column {column!r} holds no text; write a prompt there or drop the row")
    return _checked_prompt(text, cells, where)
