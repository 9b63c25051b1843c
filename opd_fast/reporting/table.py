"""The table of rewards that a run prints when it ends; the report shows the same cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opd_fast.reporting.reward_keys import key_words

FAILED = "Some rewards failed. A mean is over the images that have a value; a dash marks one without any."


def print_table(results: dict[str, Any], console: Any = None) -> None:
    """Print the mean rewards of base, teachers and student, and beneath them what rewards did wrong.

    A teacher's row ends with the share of its gain that the student recovered. `console` is a rich Console; None prints
    to stdout.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    names = reward_names(results)
    recovered = results.get("recovered", {})
    table = Table(title="Mean reward on held-out prompts", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(key_words(name).replace(" ", "\n"), justify="right", vertical="bottom")
    if recovered:
        table.add_column("gain\nrecovered", justify="right")
    for row, means in results["rows"].items():
        cells = [number(means.get(name)) for name in names]
        if recovered:
            cells.append(recovered_share(recovered, row))
        table.add_row(label(row, whole=True), *cells, style="bold" if row == "student" else None)
    console.print(table)
    print_failures(results.get("failures", ()), console)


def print_failures(failures: Sequence[str], console: Any) -> None:
    """Print beneath a table why values are missing from it. Without failures it prints nothing."""
    if failures:
        console.print(FAILED, markup=False, highlight=False, soft_wrap=True)
    for message in failures:
        console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)


def reward_names(results: dict[str, Any]) -> list[str]:
    """Return the table's columns: the keys of all rows in order of appearance, with `NAME_strict` after `NAME`."""
    names = list(dict.fromkeys(name for row in results["rows"].values() for name in row))
    if not all(name.removesuffix("_strict") in names for name in names):
        return names
    return sorted(names, key=lambda name: (names.index(name.removesuffix("_strict")), name))


def label(row: str, *, whole: bool = False) -> str:
    """Return a row's name in words. `whole` adds "teacher", for a place where nothing beside the name says it."""
    kind, _, name = row.partition(":")
    return {"teacher": f"teacher {name}" if whole else name, "stage": f"after stage {name}"}.get(kind, row)


def number(value: float | None) -> str:
    """Return a mean with three decimals, or a dash where no image has a value."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def recovered_share(recovered: dict[str, float | None], row: str) -> str:
    """Return the cell "gain recovered" of a row; it is empty unless the row is a teacher's."""
    task = row.removeprefix("teacher:")
    if not row.startswith("teacher:") or task not in recovered:
        return ""
    share = recovered[task]
    if share is not None and not math.isfinite(share):
        return "-"
    return "no gain" if share is None else f"{100 * share:.0f} %"
