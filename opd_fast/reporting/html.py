"""The report of a run: one HTML file that fetches nothing."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

from opd_fast.files import replace_text
from opd_fast.reporting import curves
from opd_fast.reporting.image_grid import newest_grids
from opd_fast.reporting.reward_keys import key_words
from opd_fast.reporting.table import FAILED, label, number, recovered_share, reward_names


def write_report(run_dir: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> Path:
    """Write report.html with the table, the curves, the image grids and the settings, and return its path.

    Args:
        run_dir: `config.yaml` and `samples/*.png` are read from it.
        results: the content of results.json.
        history: the lines of metrics.jsonl (`telemetry.read_metrics`). Losses are found under `loss`,
            `loss/step_NN` and `loss/task_NAME`; of each grid `NAME-round-N.png` the last is shown.
    """
    run_dir = Path(run_dir)
    names = reward_names(results)
    table = [
        {
            "label": label(row),
            "kind": row.partition(":")[0],
            "cells": [number(means.get(name)) for name in names],
            "share": recovered_share(results["recovered"], row),
        }
        for row, means in results["rows"].items()
    ]
    settings = run_dir / "config.yaml"
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=run_dir.resolve().name,
            written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            results=results,
            facts=_facts(results),
            rewards=[key_words(name) for name in names],
            table=table,
            failures=list(results.get("failures", ())),
            failed=FAILED,
            shares={
                task: None if share is None or not math.isfinite(share) else share
                for task, share in results["recovered"].items()
            },
            curves=curves.draw(results, history),
            grids=[
                {"name": name, "data": curves.data_uri(path.read_bytes())}
                for name, path in newest_grids(run_dir).items()
            ],
            config=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        )
    )
    path = run_dir / "report.html"
    replace_text(path, page)
    return path


def environment() -> Any:
    """Return the jinja2 environment of the package's templates; what they are given is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = results["seconds"]
    facts = [("rounds", str(results["rounds"])), ("training", _duration(seconds.get("train")))]
    facts += [("whole run", _duration(seconds.get("total"))), ("seed", str(results["seed"]))]
    commit = results["commit"]
    facts.append(("commit", commit[:10] + ("+" if commit.endswith("-dirty") else "") if commit else "unknown"))
    facts.append(("settings", str(results["config_hash"])))
    return facts


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
