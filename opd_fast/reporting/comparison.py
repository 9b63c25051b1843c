"""The table of several models: on the terminal, and as a page with the best, median and worst images."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_fast.files import replace_text
from opd_fast.reporting.curves import data_uri
from opd_fast.reporting.html import environment
from opd_fast.reporting.reward_keys import key_words
from opd_fast.reporting.table import FAILED, label, number, print_failures


@dataclass(frozen=True)
class Example:
    """An image beside its value: `kind` is best, median or worst."""

    kind: str
    value: float
    prompt: str
    file: Path


def print_comparison(results: dict[str, Any], best: Mapping[str, set[str]], console: Any = None) -> None:
    """Print means with half the width of their intervals, the best of each column in bold, and the average.

    Args:
        results: `rows`, `intervals`, `average`, `average_name`, `by_tag` and `failures` of results.json.
        best: column to the rows whose mean is the greatest.
        console: a rich Console; None prints to stdout.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    names = columns_of(results)
    table = Table()
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(key_words(name).replace(" ", "\n"), justify="right", vertical="bottom")
    if results["average"]:
        table.add_column("min-max\nmean", justify="right", vertical="bottom")
    for row, means in results["rows"].items():
        cells = []
        for name in names:
            cell = "\n".join(filter(None, (number(means.get(name)), half_width(results["intervals"][row].get(name)))))
            cells.append(f"[bold]{cell}[/bold]" if row in best.get(name, ()) else cell)
        if results["average"]:
            cells.append(number(results["average"].get(row)))
        table.add_row(escape(label(row, whole=True)), *cells)
    console.print(table)
    console.print(f"± half of the {results['interval']}", markup=False, highlight=False)
    if results["average"]:
        console.print(f"last column: {results['average_name']}", markup=False, highlight=False)
    print_tags(results, console)
    print_failures(results["failures"], console)


def print_tags(results: dict[str, Any], console: Any) -> None:
    """Print for each column whose prompts have tags a table of rows by tags; nothing where there are none."""
    from rich.markup import escape
    from rich.table import Table

    by_tag = results.get("by_tag", {})
    for name in dict.fromkeys(name for keyed in by_tag.values() for name in keyed):
        rows = {row: keyed[name] for row, keyed in by_tag.items() if name in keyed}
        table = Table(title=f"{key_words(name)} by tag", title_justify="left")
        table.add_column("", no_wrap=True)
        tags = list(dict.fromkeys(tag for scores in rows.values() for tag in scores))
        for tag in tags:
            table.add_column(tag.replace("_", "\n").replace(" ", "\n"), justify="right", vertical="bottom")
        for row, scores in rows.items():
            table.add_row(escape(label(row, whole=True)), *(number(scores.get(tag)) for tag in tags))
        console.print(table)


def half_width(interval: Sequence[float | None] | None) -> str:
    """Return `±x`, half of an interval; empty where it has no ends."""
    if interval is None or any(end is None or not math.isfinite(end) for end in interval):
        return ""
    low, high = (float(end) for end in interval if end is not None)
    return f"±{(high - low) / 2:.3f}"


def columns_of(results: dict[str, Any]) -> list[str]:
    """Return the columns of all rows, in order of appearance."""
    return list(dict.fromkeys(name for row in results["rows"].values() for name in row))


def write_comparison(
    path: Path,
    title: str,
    results: dict[str, Any],
    best: Mapping[str, set[str]],
    examples: Mapping[str, Mapping[str, Sequence[Example]]],
    facts: Sequence[tuple[str, str]],
) -> None:
    """Write the page, one HTML file that fetches nothing.

    Args:
        path: the file.
        title: its heading.
        results, best: as for `print_comparison`.
        examples: column to row to images beside their values.
        facts: (name, value) of the settings that are shown beneath the title.
    """
    names = columns_of(results)
    rows = [
        {
            "label": label(row, whole=True),
            "kind": row.partition(":")[0],
            "cells": [
                {
                    "mean": number(means.get(name)),
                    "interval": _ends(results["intervals"][row].get(name)),
                    "best": row in best.get(name, ()),
                }
                for name in names
            ],
            "average": number(results["average"].get(row)) if results["average"] else "",
        }
        for row, means in results["rows"].items()
    ]
    shown = [
        {
            "name": key_words(name),
            "rows": [{"label": label(row, whole=True), "groups": _groups(images)} for row, images in of_rows.items()],
        }
        for name, of_rows in examples.items()
    ]
    tags = [
        {"label": label(row, whole=True), "column": key_words(name), "scores": {t: number(v) for t, v in found.items()}}
        for row, keyed in results.get("by_tag", {}).items()
        for name, found in keyed.items()
    ]
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            title=title,
            facts=facts,
            columns=[key_words(name) for name in names],
            rows=rows,
            interval=results["interval"],
            average=results["average_name"] if results["average"] else "",
            tags=tags,
            examples=shown,
            failures=results["failures"],
            failed=FAILED,
            written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        )
    )
    replace_text(path, page)


def _ends(interval: Sequence[float | None] | None) -> str:
    if interval is None or any(end is None or not math.isfinite(end) for end in interval):
        return ""
    return " to ".join(number(end) for end in interval)


def _groups(examples: Sequence[Example]) -> list[dict[str, Any]]:
    kinds = dict.fromkeys(example.kind for example in examples)
    return [
        {
            "kind": kind,
            "images": [
                {"data": _picture(e.file), "value": number(e.value), "prompt": e.prompt}
                for e in examples
                if e.kind == kind
            ],
        }
        for kind in kinds
    ]


def _picture(file: Path) -> str:
    return data_uri(file.read_bytes(), "image/png" if file.suffix == ".png" else "image/jpeg")
