"""results.json, the table, image grids and the report."""

from __future__ import annotations

import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from opd_fast.config.serialize import from_dict, to_yaml
from opd_fast.reporting import curves
from opd_fast.reporting.curves import reward_series, step_series
from opd_fast.reporting.html import write_report
from opd_fast.reporting.image_grid import image_grid, newest_grids
from opd_fast.reporting.results import gain_recovered, new_results, source_commit, write_results
from opd_fast.reporting.table import print_table, reward_names

CONFIG = from_dict({"teachers": [{"name": "text", "weights": "org/x", "prompts": "p.txt"}], "train": {"seed": 5}})


def results() -> dict[str, Any]:
    found = new_results(CONFIG)
    found["rows"] = {
        "base": {"composition": 0.4, "text": 0.3, "colour": 0.2, "composition_strict": 0.1},
        "teacher:composition": {"composition": 0.8, "text": 0.3, "colour": 0.2, "composition_strict": 0.6},
        "teacher:text": {"composition": 0.4, "text": 0.7, "colour": 0.2, "composition_strict": 0.1},
        "student": {"composition": 0.78, "text": 0.66, "colour": 0.2, "composition_strict": 0.55},
    }
    found["recovered"] = {"composition": 0.95, "text": None}
    found.update(rounds=80, seconds={"train": 212.34, "total": 391.0})
    return found


def history() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"round": 0, "time": 0.0, "evaluation": {"text": {"text": 0.3}}}]
    for i in range(4):
        steps = {f"loss/step_{j:02d}": 10.0 ** (j - i) for j in range(12)}
        lines.append({"round": i, "time": float(i), "loss": 2.0 / (i + 1), "loss/task_text": 1.0 / (i + 1), **steps})
    lines.append({"round": 4, "time": 4.0, "evaluation": {"text": {"text": 0.6}}})
    lines.append({"round": 4, "time": 5.0, "evaluation": {"text": {"text": 0.66}}})  # the same round, after resuming
    return lines


def test_gain_recovered() -> None:
    assert gain_recovered(0.2, 0.6, 0.5) == pytest.approx(0.75)
    assert gain_recovered(0.2, 0.6, 0.1) == pytest.approx(-0.25)
    assert gain_recovered(0.6, 0.6, 0.6) is None
    assert gain_recovered(0.6, 0.2, 0.3) is None


def test_results_json(tmp_path: Path) -> None:
    found = results()
    found["rows"]["base"]["colour"] = math.nan
    write_results(tmp_path, found)
    read = json.loads((tmp_path / "results.json").read_text())
    assert list(read) == ["rows", "recovered", "rounds", "seconds", "seed", "commit", "config_hash", "failures"]
    assert read["rows"]["base"]["colour"] is None
    assert read["rows"]["student"] == found["rows"]["student"]
    assert (read["seed"], read["rounds"]) == (5, 80)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("lost", ["rows", "seed", "config_hash"])
def test_incomplete_results_are_refused(tmp_path: Path, lost: str) -> None:
    found = results()
    del found[lost]
    with pytest.raises(ValueError, match=lost):
        write_results(tmp_path, found)
    assert not list(tmp_path.iterdir())


def test_results_need_base_and_student(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.base, rows\.student"):
        write_results(tmp_path, new_results(CONFIG))


def test_commit_is_a_hash_or_absent() -> None:
    commit = source_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


def test_columns_keep_strict_beside_its_reward() -> None:
    assert reward_names(results()) == ["composition", "composition_strict", "text", "colour"]


def test_table() -> None:
    out = io.StringIO()
    print_table(results(), Console(file=out, width=100))
    lines = out.getvalue().splitlines()

    def row(label: str) -> str:
        (line,) = [line for line in lines if re.search(rf"│ {label} +│", line)]
        return line

    assert re.findall(r"[\d.]{5}", row("base")) == ["0.400", "0.100", "0.300", "0.200"]
    assert re.findall(r"[\d.]{5}", row("student")) == ["0.780", "0.550", "0.660", "0.200"]
    assert "95 %" in row("teacher composition")
    assert "no gain" in row("teacher text")
    assert [i for i, line in enumerate(lines) if "base" in line] < [
        i for i, line in enumerate(lines) if "student" in line
    ]


def test_table_of_a_partial_run() -> None:
    found = results()
    del found["rows"]["student"]["colour"]
    found["recovered"] = {}
    out = io.StringIO()
    print_table(found, Console(file=out, width=100))
    assert "recovered" not in out.getvalue()
    assert re.search(r"student .* - +│", out.getvalue())


def test_what_failed_stands_beneath_the_table_and_in_the_report(tmp_path: Path) -> None:
    found = results()
    found["failures"] = ["reward 'a:b' raised OSError: [bold]no <b>server</b>[/bold]", "reward 'text' " + 40 * "long "]
    out = io.StringIO()
    print_table(found, Console(file=out, width=60))
    _, _, beneath = out.getvalue().partition("Some rewards failed.")
    assert beneath.splitlines()[1:] == [f"  {message}" for message in found["failures"]]
    page = write_report(tmp_path, found, history()).read_text()
    assert "<b>server" not in page
    _, _, listed = html.unescape(page).partition("Some rewards failed.")
    assert all(f"<li>{message}</li>" in listed for message in found["failures"])


def test_results_of_former_versions_are_shown(tmp_path: Path) -> None:
    found = results()
    del found["failures"]
    write_results(tmp_path, found)
    out = io.StringIO()
    print_table(json.loads((tmp_path / "results.json").read_text()), Console(file=out, width=100))
    assert "0.780" in out.getvalue()
    assert "failed" not in out.getvalue()
    assert "Some rewards failed" not in write_report(tmp_path, found, history()).read_text()


def test_image_grid_places_every_image(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    base = colours[:, :, None, None].expand(3, 3, 8, 8)
    rows = {"base": base, "student": 1 - base}
    image_grid(rows, ["one", "two words here", "three"], tmp_path / "deep" / "grid.png", scale=5)
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png").convert("RGB"))
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 0, 255), (255, 255, 0)]:
        assert (picture == colour).all(2).sum() == 40 * 40, colour
    ys, xs = np.nonzero((picture == (255, 0, 0)).all(2))
    student_ys, student_xs = np.nonzero((picture == (0, 255, 255)).all(2))
    assert xs.min() == student_xs.min()  # the same prompt in the same column
    assert ys.max() < student_ys.min()


def test_image_grid_wraps_long_captions(tmp_path: Path) -> None:
    image_grid({"base": torch.zeros(1, 3, 32, 32)}, ["word " * 60], tmp_path / "grid.png", scale=2)
    assert Image.open(tmp_path / "grid.png").height < 32 * 2 + 100


def test_image_grid_mistakes(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        image_grid({"a": images, "b": images[:1]}, ["x", "y"], tmp_path / "grid.png")
    with pytest.raises(ValueError, match="3 captions"):
        image_grid({"a": images}, ["x", "y", "z"], tmp_path / "grid.png")


def test_series() -> None:
    assert reward_series(history()) == {("text", "text"): [(0, 0.3), (4, 0.66)]}
    steps = step_series(history())
    assert list(steps) == [f"{j:02d}" for j in range(12)]
    assert steps["01"] == [(0, 10.0), (1, 1.0), (2, 0.1), (3, 0.01)]


def test_newest_grids(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("text-round-0002", "text-round-0010", "colour-round-0010", "extra"):
        (samples / f"{name}.png").write_bytes(b"")
    assert {title: path.name for title, path in newest_grids(tmp_path).items()} == {
        "text, round 10": "text-round-0010.png",
        "colour, round 10": "colour-round-0010.png",
        "extra": "extra.png",
    }


def test_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(CONFIG) + "# <script>alert(1)</script>\n")
    image_grid({"base": torch.zeros(1, 3, 8, 8)}, ["x"], tmp_path / "samples" / "text-round-0004.png")
    path = write_report(tmp_path, results(), history())
    page = path.read_text()
    assert path == tmp_path / "report.html"
    for text in ("0.780", "95 %", "no better than the base", "3 min 32 s", "flow_sde", "text, round 4"):
        assert text in page, text
    assert page.count("data:image/png;base64,") == 2 * 3 + 1  # three curves on two backgrounds, one grid
    assert "<script>" not in page
    assert not re.search(r'(?:src|href|srcset)="(?!data:)', page)  # nothing to fetch
    assert "prefers-color-scheme: dark" in page


def test_report_of_a_run_without_evaluation(tmp_path: Path) -> None:
    found = new_results(CONFIG)
    page = write_report(tmp_path, found, [{"round": 0, "time": 0.0, "loss": 0.0}]).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<table>" not in page


# --- rewards of several tasks ----------------------------------------------------------------------------------------


def shared_results() -> dict[str, Any]:
    """Two tasks with one reward: the first fell, the second rose."""
    found = new_results(CONFIG)
    found["rows"] = {
        "base": {"a/text": 0.9, "b/text": 0.1},
        "teacher:a": {"a/text": 1.0, "b/text": 0.1},
        "teacher:b": {"a/text": 0.9, "b/text": 0.6},
        "student": {"a/text": 0.8, "b/text": 0.5},
    }
    found["recovered"] = {"a": -1.0, "b": 0.8}
    return found


def test_a_table_has_a_column_for_each_task_of_a_reward() -> None:
    out = io.StringIO()
    print_table(shared_results(), Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    above = [[cell.strip() for cell in line.split("┃")] for line in lines if line.startswith("┃")]
    assert [" ".join(filter(None, words)) for words in zip(*above, strict=True)][2:-2] == ["a: text", "b: text"]
    (student,) = [line for line in lines if "student" in line]
    assert re.findall(r"[\d.]{5}", student) == ["0.800", "0.500"]


def drawn(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], tasks: list[str]) -> dict[str, dict[str, float]]:
    """By panel of the rewards: the labelled levels. Each task rises from 0.5 to 0.6."""
    original, panels = curves._rewards, {}

    def figure(series: Any, results: Any, theme: Any) -> Any:
        made = original(series, results, theme)
        for ax in made.axes:
            levels = [line.get_ydata()[0] for line in ax.lines[1:]]
            labels = [text.get_text() for text in ax.texts]
            panels[ax.get_title(loc="left")] = dict(zip(labels, ["", *levels], strict=True))
        return made

    monkeypatch.setattr(curves, "_rewards", figure)
    monkeypatch.setattr(curves, "_apart", lambda levels, least: levels)
    curves.draw(found, [{"round": i, "evaluation": {t: {"text": 0.5 + i / 10} for t in tasks}} for i in range(2)])
    return {title: {k: v for k, v in levels.items() if k != "student"} for title, levels in panels.items()}


def test_a_curve_has_the_levels_of_its_own_task(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, shared_results(), ["a", "b"]) == {
        "a: text": {"teacher": 1.0, "base": 0.9},
        "b: text": {"teacher": 0.6, "base": 0.1},
    }


def test_a_curve_of_an_earlier_run_without_one_of_its_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"rows": {"base": {"text": math.nan}, "teacher:a": {"text": 1.0}, "student": {"text": 0.6}}}
    assert drawn(monkeypatch, found, ["a"]) == {"a: text": {"teacher": 1.0}}
