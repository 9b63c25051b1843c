"""Random prompt files of every format, encoding and line end, with records and cells of any type.

`python -m tests.fuzz` runs them. Of each is asked: it is refused in one clean line that names the file, or every prompt
is what the file says, and tokenizer, report and rewards can take it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import random
import sys
import tempfile
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from opd_fast.data.prompt_files import LONGEST, Prompt, load_prompts
from opd_fast.reporting.image_grid import image_grid
from opd_fast.rewards import composition, text
from opd_fast.rewards.metadata import check_metadata
from tests.fuzz import Tally, outcome_of
from tests.tiny import tiny_tokenizer

Case = tuple[str, bytes, list[str] | None, str]
"""(name of the file, content, the prompts that it holds or None where damage leaves that open, the kind)."""

WORDS = (
    "a",
    "red",
    "cup",
    "of",
    'says "HK"',
    '"',
    "ü",
    "杯",
    "\U0001f600",
    "$x_1$",
    "[b]",
    "<i>",
    "%s",
    "{0}",
    "-",
    "\\",
)
ENDS = ("\n", "\r\n", "\r")
OTHER_ENDS = ("\x85", "\u2028", "\u2029", "\x0b", "\x0c")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "gb18030")
BLANKS = ("", " ", "\t", "\u200b", "\ufeff", "\x1c")
ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2.5, math.nan, math.inf, 10**30, "", " ", "x", "cup", "\ud800", "a\x00b", [], {}, [1]),
    *(["left of", 0], ["left of", 7], ["behind", 0], ["above", True], [None, None], [{"class": "circle", "count": 1}]),
)


def sentence(rng: random.Random) -> str:
    """A prompt that any reader must give back as it is."""
    return " ".join(["see", *rng.choices(WORDS, k=rng.randint(0, 6)), "end"])


def record(rng: random.Random) -> dict[str, Any]:
    """A GenEval record, of which something may be odd."""
    entries: list[Any] = []
    for index in range(rng.randint(0, 3)):
        entry: dict[str, Any] = {"class": rng.choice(["circle", "square", "triangle"]), "count": rng.randint(1, 3)}
        if rng.random() < 0.4:
            entry["color"] = rng.choice(["red", "blue"])
        if index and rng.random() < 0.4:
            entry["position"] = [rng.choice(["left of", "above"]), rng.randrange(index)]
        entries.append(entry)
    made: dict[str, Any] = {"prompt": sentence(rng), "tag": "x", "include": entries}
    if rng.random() < 0.5 and entries:
        entry = rng.choice(entries)
        entry[rng.choice(["class", "count", "color", "position"])] = rng.choice(ODD)
    if rng.random() < 0.2:
        made[rng.choice(["prompt", "include", "exclude", "target"])] = rng.choice(ODD)
    return made


def encoded(rng: random.Random, lines: list[str], texts: list[str]) -> tuple[bytes, list[str] | None, str]:
    """Lines as a file: its content, the prompts that it must give where it is taken, and what is odd about it."""
    kind = rng.choice(["plain", "plain", "plain", "other ends", "encoding", "damaged"])
    end, encoding = rng.choice(ENDS), "utf-8"
    if kind == "other ends":
        end = rng.choice(OTHER_ENDS)
    if kind == "encoding":
        encoding = rng.choice(ENCODINGS)
    content = (end.join(lines) + rng.choice(["", end])).encode(
        encoding, "surrogatepass" if "utf" in encoding else "ignore"
    )
    if encoding in ("latin-1", "cp1252"):
        texts = [t.encode(encoding, "ignore").decode(encoding) for t in texts]
    if kind != "damaged":
        return content, texts, f"{kind} {encoding} {end!r}"
    data = bytearray(content or b"x")
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice([0, 9, 10, 13, 34, 0x80, 0xED, 0xFF])
    return bytes(data), None, kind


def lines_case(rng: random.Random) -> Case:
    texts = [sentence(rng) for _ in range(rng.choice([0, 1, 1, 2, 3, 8]))]
    lines = list(texts)
    for _ in range(rng.choice([0, 0, 1, 3])):
        lines.insert(rng.randint(0, len(lines)), rng.choice(BLANKS))
    if rng.random() < 0.05:
        texts = lines = [*texts, "x" * rng.choice([LONGEST, LONGEST + 1, 200_000])]
    content, expected, kind = encoded(rng, lines, texts)
    # Separated by what ends no line, several prompts are one that nobody meant.
    return "case.txt", content, expected, kind


def records_case(rng: random.Random) -> Case:
    records = [record(rng) for _ in range(rng.choice([1, 2, 3]))]
    lines = [json.dumps(r, ensure_ascii=rng.random() < 0.5) for r in records]
    if rng.random() < 0.1:
        lines.append(rng.choice(['{"prompt": "a", "prompt": "b"}', "[" * 5000, '"x"', "null", '{"prompt": 1}', "{"]))
        records = [*records, {"prompt": None}]
    texts = [r["prompt"].strip() if isinstance(r["prompt"], str) else "\x00" for r in records]
    return "case.jsonl", *encoded(rng, lines, texts)


def table_case(rng: random.Random) -> Case:
    texts = [sentence(rng) for _ in range(rng.choice([1, 2, 3]))]
    columns = [
        rng.choice(["prompt", "Caption", "text", "title"]),
        *rng.sample(["tag", "target", "id"], rng.randint(0, 2)),
    ]
    if rng.random() < 0.15:
        columns.append(rng.choice([*columns, "" if columns[0] == "title" else "Prompts", ""]))
    tab = rng.random() < 0.4
    told = io.StringIO()
    writer = csv.writer(told, delimiter="\t" if tab else ",", lineterminator="\n")
    writer.writerow(columns)
    for one in texts:
        row = [one, *(rng.choice(["x", "", "HK", "a\nb", " "]) for _ in columns[1:])]
        writer.writerow(row[:-1] if len(row) > 1 and rng.random() < 0.05 else row)
    name = rng.choice(["case.tsv", "case.csv"]) if tab else "case.csv"
    return name, *encoded(rng, told.getvalue().removesuffix("\n").split("\n"), texts)


def parquet_rows(rng: random.Random) -> tuple[list[dict[str, Any]], list[str]]:
    texts = [sentence(rng) for _ in range(rng.choice([1, 3]))]
    rows = [
        {"prompt": one, "target": "HK", "include": [{"class": "circle", "count": 1, "color": None}]} for one in texts
    ]
    for _ in range(rng.choice([0, 1, 2])):
        rng.choice(rows)[rng.choice(["prompt", "target", "include"])] = rng.choice([*ODD, b"x", {"bytes": b""}])
    return rows, [row["prompt"].strip() if isinstance(row["prompt"], str) else "\x00" for row in rows]


def check_prompts(path: Path, expected: list[str] | None) -> str:
    """Read a file; what is taken must be what it holds, and every later part must be able to take it."""
    try:
        prompts = load_prompts(path)
    except ValueError as error:
        return "a refusal that names no file" if str(path) not in str(error) else refused(error)
    found = [prompt.text for prompt in prompts]
    if expected is not None and found != expected:
        return f"{found!r}"[:300] + " are not the file's prompts"
    if not all(prompt.where.startswith(str(path)) for prompt in prompts):
        return "a prompt that names no file"
    tokenizer()(found)
    json.dumps([found, [repr(p.metadata) for p in prompts]], ensure_ascii=False).encode()
    image_grid({"x": torch.zeros(1, 3, 8, 8)}, found[:1], path.with_suffix(".png"))
    for name, score in (("text", text.score), ("composition", composition.score)):
        fit = [prompt for prompt in prompts if fits(name, prompt)]
        values = score(torch.zeros(len(fit), 3, 32, 32), fit) if fit else torch.zeros(0)
        if not bool(values.isfinite().all()):
            return f"{name} gives {values.tolist()}"
    return "taken"


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def refused(error: ValueError) -> str:
    """Leave a refusal to `outcome_of`, which judges its form."""
    raise error


def fits(reward: str, prompt: Prompt) -> bool:
    try:
        check_metadata(reward, [prompt], "prompts")
    except ValueError:
        return False
    return True


def fuzz_prompts(count: int, seed: int) -> Tally:
    """`count` prompt files, the formats in turn."""
    tally = Tally()
    makers: list[Callable[[random.Random], Case]] = [lines_case, records_case, table_case]
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            rng = random.Random(f"prompts {seed} {index}")
            if index % 4 == 3:
                rows, expected = parquet_rows(rng)
                name, content, kind = "case.parquet", b"PAR1", "rows"
            else:
                name, content, expected, kind = makers[index % 4](rng)  # type: ignore[assignment]
                rows = []
            path = Path(folder) / name
            path.write_bytes(content)
            datasets = types.SimpleNamespace(
                Dataset=types.SimpleNamespace(from_parquet=lambda _, rows=rows: Rows(rows))
            )

            def run(path: Path = path, expected: list[str] | None = expected) -> str:
                return check_prompts(path, expected)

            with mock.patch.dict(sys.modules, {"datasets": datasets}):
                outcome, detail = outcome_of(run)
            tally.add(f"prompts {path.suffix}", outcome, f"seed {seed} index {index} {kind} {content[:300]!r}", detail)
    return tally


class Rows:
    """What stands for a `datasets.Dataset`."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.column_names, self._rows = list(rows[0]), rows

    def __iter__(self) -> Any:
        return (dict(row) for row in self._rows)
