"""What a run leaves for its reader: results.json, the table, image grids, and one self-contained report.html.

`results` everywhere is the content of results.json:
`{"rows": {"base": {REWARD: x}, "teacher:NAME": {...}, "stage:NAME": {...}, "student": {...}}, "recovered":
{TASK: share or None}, "rounds": n, "seconds": {"train": s, "total": s}, "seed": n, "commit": ..., "config_hash": ...,
"failures": [what rewards did wrong, in words]}`. Results of former versions have no "failures".
In a row, a reward that several tasks have stands under `TASK/REWARD` for each of them
(`opd_fast.reporting.reward_keys`).
"""

from __future__ import annotations

import base64
import datetime
import functools
import json
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_fast.files import replace_text
from opd_fast.reporting.reward_keys import key_words

if TYPE_CHECKING:
    from torch import Tensor

    from opd_fast.config import Config

KEYS = ("rows", "recovered", "rounds", "seconds", "seed", "commit", "config_hash")
_GRID = re.compile(r"(?P<name>.+?)(-round-0*(?P<round>\d+))?")


def write_results(run_dir: Path, results: dict[str, Any]) -> None:
    """Write results.json (replaced as a whole).

    Raises:
        ValueError: a key of the format is missing, or `rows` lacks base or student.
    """
    missing = [key for key in KEYS if key not in results]
    missing += [f"rows.{row}" for row in ("base", "student") if row not in results.get("rows", {})]
    if missing:
        raise ValueError(f"results lack {', '.join(missing)}; fill them in before writing results.json")
    # NaN is not JSON: a reward that could not be measured is null.
    text = json.dumps(_finite(results), indent=2, allow_nan=False) + "\n"
    replace_text(Path(run_dir) / "results.json", text)


def gain_recovered(base: float, teacher: float, student: float) -> float | None:
    """(student - base) / (teacher - base): 0 has learnt nothing, 1 equals the teacher. None where the teacher gains
    nothing over the base, NaN where one of them has no value."""
    gain = teacher - base
    return None if gain <= 1e-6 else (student - base) / gain


@functools.cache
def source_commit() -> str | None:
    """The commit of the checkout this package runs from, with `-dirty` where tracked files differ; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        run = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        run(["git", "ls-files", "--error-unmatch", Path(__file__).name])  # not some repository around site-packages
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def reward_names(results: dict[str, Any]) -> list[str]:
    """Columns of the table: every key of the rows in order of appearance, `NAME_strict` right after `NAME`."""
    seen = list(dict.fromkeys(name for row in results["rows"].values() for name in row))
    return sorted(seen, key=lambda name: (seen.index(name.removesuffix("_strict")), name)) if _paired(seen) else seen


def _paired(names: list[str]) -> bool:
    return all(name.removesuffix("_strict") in names for name in names)


def print_table(results: dict[str, Any], console: Any = None) -> None:
    """Print base, teachers and student against the rewards; a teacher's row ends with the share of its gain that the
    student recovered. Beneath stands what rewards did wrong. `console`: a rich Console, stdout when None."""
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
        cells = [_number(means.get(name)) for name in names]
        if recovered:
            cells.append(_share(recovered, row))
        table.add_row(_label(row, whole=True), *cells, style="bold" if row == "student" else None)
    console.print(table)
    print_failures(results.get("failures", ()), console)


FAILED = "Some rewards failed. A mean is over the images that have a value; a dash marks one without any."


def print_failures(failures: Sequence[str], console: Any) -> None:
    """Print beneath a table why values are missing from it; nothing where none is."""
    if failures:
        console.print(FAILED, markup=False, highlight=False, soft_wrap=True)
    for message in failures:
        console.print(f"  {message}", markup=False, highlight=False, soft_wrap=True)


def _label(row: str, *, whole: bool = False) -> str:
    """A row's name in words; `whole`: with "teacher", where nothing beside it says so."""
    kind, _, name = row.partition(":")
    return {"teacher": f"teacher {name}" if whole else name, "stage": f"after stage {name}"}.get(kind, row)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _share(recovered: dict[str, float | None], row: str) -> str:
    task = row.removeprefix("teacher:")
    if not row.startswith("teacher:") or task not in recovered:
        return ""
    share = recovered[task]
    if share is not None and not math.isfinite(share):
        return "-"
    return "no gain" if share is None else f"{100 * share:.0f} %"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- image grids ------------------------------------------------------------------------------------------------------


def image_grid(rows: dict[str, Tensor], prompts: list[str], path: Path, scale: int = 4) -> None:
    """Write a PNG with one labelled row for each model and one column for each prompt.

    Args:
        rows: label to images (n, 3, H, W), float in [0, 1], any device; the same n and size in every row.
        prompts: n captions, wrapped above their columns.
        scale: pixels drawn for each pixel of an image (nearest neighbour).

    Raises:
        ValueError: rows of different sizes, or another number of captions.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1:
        raise ValueError(f"image grid rows differ in shape ({sorted(shapes)}); give each the same images")
    count, _, height, width = next(iter(shapes))
    if count != len(prompts):
        raise ValueError(f"image grid has {count} columns but {len(prompts)} captions; give one for each image")
    cell_w, cell_h, gap = width * scale, height * scale, 6
    font = ImageFont.load_default(13)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    captions = [_wrap(prompt, cell_w - 4, lambda text: measure.textlength(text, font=font)) for prompt in prompts]
    left = int(max(measure.textlength(label, font=font) for label in rows)) + 20
    top = 10 + 16 * max(len(lines) for lines in captions) + gap
    size = (left + count * (cell_w + gap), top + len(rows) * (cell_h + gap))
    canvas = Image.new("RGB", size, "#ffffff")
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(captions):
        for i, line in enumerate(lines):  # captions stand on the images, not at the top
            y = top - gap - 16 * (len(lines) - i)
            draw.text((left + column * (cell_w + gap) + 2, y), line, fill="#333333", font=font)
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * (cell_h + gap)
        draw.text((10, y + cell_h // 2), label, fill="#111111", font=font, anchor="lm")
        pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for column in range(count):
            tile = Image.fromarray(pixels[column]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (cell_w + gap), y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _wrap(text: str, width: float, measure: Any, lines: int = 4) -> list[str]:
    """Break `text` into at most `lines` lines of `width` pixels, the last one cut short by an ellipsis."""
    wrapped, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and measure(longer) > width:
            wrapped.append(line)
            line = word
        else:
            line = longer
    wrapped.append(line)
    if len(wrapped) > lines:
        wrapped = wrapped[:lines]
        wrapped[-1] += " ..."
    for i, shown in enumerate(wrapped):
        while measure(shown) > width and len(shown) > 4:
            shown = shown.removesuffix("...").rstrip()[:-1] + "..."
        wrapped[i] = shown
    return wrapped


# --- report.html ------------------------------------------------------------------------------------------------------


def write_report(run_dir: Path, results: dict[str, Any], history: list[dict[str, Any]]) -> Path:
    """Write report.html: table, curves, image grids and settings, with nothing to fetch.

    Args:
        run_dir: `config.yaml` and `samples/*.png` are read from it.
        results: the content of results.json.
        history: the lines of metrics.jsonl (`telemetry.read_metrics`). Losses are found under `loss`,
            `loss/step_NN` and `loss/task_NAME`; of each grid `NAME-round-N.png` the last is shown.
    """
    import jinja2

    from opd_fast.reporting import curves

    run_dir = Path(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = reward_names(results)
    table = [
        {
            "label": _label(row),
            "kind": row.partition(":")[0],
            "cells": [_number(means.get(name)) for name in names],
            "share": _share(results["recovered"], row),
        }
        for row, means in results["rows"].items()
    ]
    settings = run_dir / "config.yaml"
    page = environment.get_template("report.html.j2").render(
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
        grids=[{"name": name, "data": _inline(path.read_bytes())} for name, path in newest_grids(run_dir).items()],
        config=settings.read_text(encoding="utf-8") if settings.is_file() else "",
    )
    path = run_dir / "report.html"
    replace_text(path, page)
    return path


def newest_grids(run_dir: Path) -> dict[str, Path]:
    """Title to file of the last grid of each name in samples/, where files are `NAME.png` or `NAME-round-N.png`."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run_dir / "samples").glob("*.png")):
        found = _GRID.fullmatch(path.stem)
        assert found is not None
        name, number = found["name"], int(found["round"] or -1)
        if name not in newest or number >= newest[name][0]:
            newest[name] = (number, path)
    return {f"{name}, round {number}" if number >= 0 else name: path for name, (number, path) in newest.items()}


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


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def new_results(config: Config) -> dict[str, Any]:
    """A results.json with what is known before the run: seed, commit, settings. The rest is empty."""
    from opd_fast.config.serialize import config_hash

    return {
        "rows": {},
        "recovered": {},
        "rounds": 0,
        "seconds": {"train": 0.0, "total": 0.0},
        "seed": config.train.seed,
        "commit": source_commit(),
        "config_hash": config_hash(config),
        "failures": [],
    }
