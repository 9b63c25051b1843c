"""One table of several models: means, intervals, scores by tag, and the min-max mean over the listed rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.evaluation.judge import ROWS, Judged
from opd_fast.evaluation.judgements import read_identity, read_scores
from opd_fast.evaluation.request import Request
from opd_fast.reporting.reward_keys import reward_keys
from opd_fast.rewards.geneval_rules import by_tag

AVERAGE = "min-max mean over the listed rows"
RESAMPLES = 2000
CONFIDENCE = 0.95
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Column:
    """A reward on a task's prompts."""

    task: str
    reward: str


@dataclass
class Cell:
    """One model's values in a column.

    Attributes:
        values: of every image, NaN where one is missing; image i is of prompt i % prompts.
        folder: where its thumbnails lie.
    """

    values: Array
    prompts: list[dict[str, Any]]
    folder: Path
    mean: float = field(init=False)
    interval: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self.mean = float(np.nanmean(self.values)) if np.isfinite(self.values).any() else math.nan
        self.interval = bootstrap_interval(per_prompt(self.values, len(self.prompts)))

    def by_tag(self) -> dict[str, float]:
        """Return the mean of each `tag` of the prompts' metadata, and `mean of tags`; empty where there are no tags."""
        prompts = [Prompt(prompt["text"], prompt["metadata"]) for prompt in self.prompts]
        found = by_tag(self.values, [prompts[i % len(prompts)] for i in range(len(self.values))])
        return {} if found is None else found.tags | {"mean of tags": found.overall}


Table = dict[str, dict[Column, Cell]]
"""Row to column to cell; a row may lack columns."""


def per_prompt(values: Array, prompts: int) -> Array:
    """Return the mean of each prompt's images, (prompts,); NaN where none has a value."""
    padded = np.full(-(-len(values) // prompts) * prompts, np.nan)
    padded[: len(values)] = values
    images = padded.reshape(-1, prompts)
    count = np.isfinite(images).sum(0)
    total = np.where(np.isfinite(images), images, 0.0).sum(0)
    return np.divide(total, count, out=np.full(prompts, np.nan), where=count > 0)


def bootstrap_interval(values: Array, confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron 1979), resampling prompts; NaN without two values.

    Prompts are resampled rather than images, because the images of one prompt are alike.
    """
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 200):  # 200 rows of indices at a time keep thousands of prompts small
        chosen = draws.integers(0, len(values), (200, len(values)))
        means[start : start + 200] = values[chosen].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def min_max_means(table: Table) -> dict[str, float]:
    """Return for each row the mean of its columns, each scaled so that the least row is 0 and the best is 1.

    A column without two distinct means says nothing and is left out; so is a row that lacks one of the others.
    """
    scaled: dict[str, list[float]] = {row: [] for row in table}
    for column in columns(table):
        means = {row: cells[column].mean for row, cells in table.items() if column in cells}
        finite = [mean for mean in means.values() if math.isfinite(mean)]
        if not finite or max(finite) == min(finite):
            continue
        for row in table:
            mean = means.get(row, math.nan)
            scaled[row].append((mean - min(finite)) / (max(finite) - min(finite)))
    return {row: float(np.mean(values)) if values else math.nan for row, values in scaled.items()}


def columns(table: Table) -> list[Column]:
    """Return the columns of all rows, in order of appearance."""
    return list(dict.fromkeys(column for cells in table.values() for column in cells))


def keys_of(table: Table) -> dict[Column, str]:
    """Return the key of each column in results.json (`reporting.reward_keys`)."""
    found = reward_keys((column.task, column.reward) for column in columns(table))
    return {Column(*pair): key for pair, key in found.items()}


def best_keys(table: Table) -> dict[str, set[str]]:
    """Return for each column, by its key, the rows of the greatest mean; empty where only one row has the column."""
    found, keys = {}, keys_of(table)
    for column in columns(table):
        means = {row: cells[column].mean for row, cells in table.items() if column in cells}
        finite = [mean for mean in means.values() if math.isfinite(mean)]
        best = {row for row, mean in means.items() if finite and mean == max(finite)}
        found[keys[column]] = best if len(finite) > 1 else set()
    return found


def table_of(request: Request, judged: Judged) -> Table:
    """Return the table of an evaluation."""
    table: Table = {}
    for row in request.rows:
        for task in request.tasks:
            judgements = judged.rows[row.name][task.name]
            prompts = [{"text": prompt.text, "metadata": prompt.metadata} for prompt in task.prompts]
            for reward in task.rewards:
                cell = Cell(np.array(judgements.column(reward)), prompts, judgements.folder)
                table.setdefault(row.name, {})[Column(task.name, reward)] = cell
    return table


def read_evaluation(folder: Path) -> Table:
    """Read the table of a finished evaluation's folder.

    Raises:
        UserError: the folder holds no evaluation, or a damaged one.
    """
    try:
        facts = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        table: Table = {}
        for row in facts["rows"]:
            for task in facts["tasks"]:
                place = _task_folder(folder, row["folder"], task["name"])
                scores = read_scores(place)
                for reward in task["rewards"]:
                    values = [scores.get(i, {}).get(reward, math.nan) for i in range(task["images"])]
                    cell = Cell(np.array(values), task["prompts"], place)
                    table.setdefault(row["name"], {})[Column(task["name"], reward)] = cell
        return table
    except OSError as error:
        raise UserError("RUN", f"{folder} holds no evaluation ({error.strerror})", "name one, or a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("RUN", f"{folder / 'evaluation.json'} is damaged ({error})", "evaluate again") from error


def _task_folder(folder: Path, row: str, task: str) -> Path:
    from opd_fast.evaluation.judge import file_name

    return folder / ROWS / row / file_name(task)


def merged(tables: Mapping[str, Table]) -> Table:
    """Return one table of several evaluations, by name.

    Rows of one name that were drawn alike are one row; others of one name get their evaluation's name before it.

    Raises:
        UserError: two evaluations have a task of one name with other prompts.
    """
    prompts: dict[str, tuple[str, list[str]]] = {}
    found: Table = {}
    taken: dict[str, str] = {}
    for name, table in tables.items():
        for row, cells in table.items():
            for column, cell in cells.items():
                texts = [prompt["text"] for prompt in cell.prompts]
                first, known = prompts.setdefault(column.task, (name, texts))
                if texts != known:
                    problem = f"{name} and {first} judge other prompts under the name {column.task!r}"
                    raise UserError("RUN", problem, "evaluate them on the same prompts")
            identity = str(sorted((c.task, _images(cell)) for c, cell in cells.items()))
            chosen = row if taken.get(row, identity) == identity else f"{name}/{row}"
            taken[chosen] = identity
            found.setdefault(chosen, {}).update(cells)
    return found


def _images(cell: Cell) -> str:
    identity = read_identity(cell.folder)
    return str(cell.folder) if identity is None else str(identity["images"])


def image_lines(table: Table) -> Iterator[dict[str, Any]]:
    """Yield a line for every image of every row: row, task, prompt, sample, the prompt's text, and its scores."""
    for row, cells in table.items():
        by_task: dict[str, dict[str, Cell]] = {}
        for column, cell in cells.items():
            by_task.setdefault(column.task, {})[column.reward] = cell
        for task, of_task in by_task.items():
            prompts = next(iter(of_task.values())).prompts
            for index in range(len(next(iter(of_task.values())).values)):
                sample, prompt = divmod(index, len(prompts))
                scores = {name: float(cell.values[index]) for name, cell in of_task.items()}
                kept = {name: value if math.isfinite(value) else None for name, value in scores.items()}
                where = {"row": row, "task": task, "prompt": prompt, "sample": sample}
                yield where | {"text": prompts[prompt]["text"], "scores": kept}


def to_results(table: Table, failures: Sequence[str]) -> dict[str, Any]:
    """Return results.json's part of a table: `rows`, `intervals`, `average`, `by_tag`, `failures`.

    In a row, a reward that several tasks have stands under `TASK/REWARD` (`reporting.reward_keys`).
    """
    keys = keys_of(table)
    named = {row: {keys[column]: cell for column, cell in cells.items()} for row, cells in table.items()}
    tags = {
        row: {key: found for key, cell in cells.items() if (found := cell.by_tag())} for row, cells in named.items()
    }
    results: dict[str, Any] = {
        "rows": {row: {key: cell.mean for key, cell in cells.items()} for row, cells in named.items()},
        "intervals": {row: {key: list(cell.interval) for key, cell in cells.items()} for row, cells in named.items()},
        "interval": f"{CONFIDENCE:.0%} bootstrap over prompts",
        "average": min_max_means(table) if len(table) > 1 else {},
        "average_name": AVERAGE,
        "failures": list(failures),
    }
    return results | ({"by_tag": tags} if any(tags.values()) else {})
