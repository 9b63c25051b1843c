"""The table of several models: means, intervals, tags, the min-max mean, and what stands in bold."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from opd_fast.errors import UserError
from opd_fast.evaluation.comparison import (
    Cell,
    Column,
    best_keys,
    bootstrap_interval,
    merged,
    min_max_means,
    per_prompt,
    read_evaluation,
    to_results,
)
from opd_fast.evaluation.pictures import chosen
from opd_fast.reporting.comparison import print_comparison, write_comparison

PROMPTS = [{"text": f"p{i}", "metadata": {"tag": "colors" if i % 2 else "counting"}} for i in range(4)]


def cell(values: list[float], prompts: list[dict] = PROMPTS, folder: Path = Path()) -> Cell:  # type: ignore[type-arg]
    return Cell(np.array(values), prompts, folder)


def table(**rows: tuple[float, float]) -> dict[str, dict[Column, Cell]]:
    """Each row with the means of two columns."""
    a, b = Column("t", "a"), Column("t", "b")
    return {row: {a: cell([means[0]] * 4), b: cell([means[1]] * 4)} for row, means in rows.items()}


def test_images_of_a_prompt_are_averaged_first() -> None:
    values = np.array([0.0, 1.0, 2.0, 4.0, np.nan])
    assert per_prompt(values, 3).tolist() == [2.0, 1.0, 2.0]
    assert per_prompt(np.array([np.nan, 1.0]), 2).tolist()[1] == 1.0
    assert math.isnan(per_prompt(np.array([np.nan, 1.0]), 2)[0])


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 200 samples of 60 values, 95 % intervals hold the true mean in about 95 %."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.exponential(1.0, 60))
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99
    low, high = bootstrap_interval(generator.normal(0, 1, 400))
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    assert all(math.isnan(end) for end in bootstrap_interval(np.array([0.3])))
    assert bootstrap_interval(np.array([0.5, 0.5, np.nan])) == (0.5, 0.5)


def test_the_average_is_the_min_max_mean_over_the_rows() -> None:
    found = min_max_means(table(base=(0.2, 10.0), teacher=(0.6, 10.0), student=(0.5, 30.0)))
    assert found == pytest.approx({"base": 0.0, "teacher": (1 + 0) / 2, "student": (0.75 + 1) / 2})
    # A column in which all rows are equal says nothing.
    assert min_max_means(table(base=(0.0, 1.0), student=(1.0, 1.0))) == {"base": 0.0, "student": 1.0}
    lacking = table(base=(0.0, 1.0), student=(1.0, 2.0))
    lacking["student"][Column("t", "b")] = cell([math.nan] * 4)
    assert math.isnan(min_max_means(lacking | {"other": table(x=(0.5, 3.0))["x"]})["student"])


def test_the_published_average_of_the_paper() -> None:
    """DiffusionOPD's table over its rows for two columns, by hand: GenEval and OCR of base, +CFG and OPD."""
    found = min_max_means(table(none=(0.24, 0.12), cfg=(0.63, 0.59), opd=(0.95, 0.94)))
    assert found["cfg"] == pytest.approx(((0.63 - 0.24) / 0.71 + (0.59 - 0.12) / 0.82) / 2)


def test_scores_by_tag() -> None:
    found = cell([1.0, 0.0, 0.5, 0.25]).by_tag()
    assert found == {"counting": 0.75, "colors": 0.125, "mean of tags": 0.4375}
    assert cell([1.0, 0.0, 0.5, 0.25], [{"text": "p", "metadata": {}}] * 4).by_tag() == {}
    # Four prompts, eight images.
    assert cell([1.0, 0.0] * 4).by_tag()["counting"] == 1.0


def test_what_is_printed(tmp_path: Path) -> None:
    rows = table(base=(0.2, 0.1), student=(0.5, 0.05))
    results = to_results(rows, ["reward 'c' raised OSError: down"])
    out = io.StringIO()
    print_comparison(
        results, best_keys(rows), Console(file=out, width=120, force_terminal=True, color_system="standard")
    )
    text = out.getvalue()
    assert best_keys(rows) == {"a": {"student"}, "b": {"base"}}
    bold = [line for line in text.splitlines() if "\x1b[1m" in line]
    assert any("\x1b[1m0.500\x1b[0m" in line for line in bold)
    assert not any("\x1b[1m0.200" in line for line in bold)
    assert "last column: min-max mean over the listed rows" in text
    assert "down" in text
    write_comparison(tmp_path / "r.html", "<title>", results, best_keys(rows), {}, [("steps", "4")])
    page = (tmp_path / "r.html").read_text()
    assert "&lt;title&gt;" in page
    assert '<td class="best">0.500<small>0.500 to 0.500</small></td>' in page
    assert "mean of tags" in page


def test_best_median_and_worst_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "thumbs").mkdir()
    values = [0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, math.nan]
    for i in range(10):
        (tmp_path / "thumbs" / f"{i:06d}.png").write_bytes(b"")
    images = chosen(cell(values, PROMPTS, tmp_path), 3)
    assert [(e.kind, e.value) for e in images] == [
        *[("best", 0.9), ("best", 0.8), ("best", 0.7)],
        *[("median", 0.6), ("median", 0.5), ("median", 0.4)],
        *[("worst", 0.3), ("worst", 0.2), ("worst", 0.1)],
    ]
    assert images[0].prompt == "p1"
    assert [e.kind for e in chosen(cell([0.5, 0.1], PROMPTS[:2], tmp_path), 3)] == ["best", "worst"]
    assert chosen(cell([math.nan] * 2, PROMPTS[:2], tmp_path)) == []


def test_tables_are_merged_where_prompts_agree(tmp_path: Path) -> None:
    first, second = table(base=(0.1, 0.2), student=(0.3, 0.4)), table(base=(0.1, 0.2), student=(0.5, 0.6))
    for name, rows in (("one", first), ("two", second)):
        for row, cells in rows.items():
            folder = tmp_path / name / row
            folder.mkdir(parents=True)
            images = "same" if row == "base" else name
            (folder / "identity.json").write_text(json.dumps({"images": images, "rewards": {}, "count": 4}))
            for one in cells.values():
                one.folder = folder
    found = merged({"one": first, "two": second})
    assert {row: cells[Column("t", "a")].mean for row, cells in found.items()} == {
        "base": 0.1,
        "student": 0.3,
        "two/student": 0.5,
    }
    other = {"base": {Column("t", "a"): cell([1.0], [{"text": "q", "metadata": {}}])}}
    with pytest.raises(UserError, match="two and one judge other prompts under the name 't'"):
        merged({"one": first, "two": other})


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no evaluation"):
        read_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": []})[:-3])
    with pytest.raises(UserError, match=r"evaluation.json is damaged .*; evaluate again"):
        read_evaluation(tmp_path)
