"""The pictures of an evaluation: image grids, and the best, median and worst images of each column, from thumbnails."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opd_fast.evaluation.comparison import Cell, Table, columns, keys_of
from opd_fast.evaluation.judge import ROWS, file_name
from opd_fast.evaluation.judgements import thumb
from opd_fast.evaluation.request import Request
from opd_fast.reporting.comparison import Example
from opd_fast.reporting.image_grid import image_grid

EXAMPLES = 3
"""Images of each kind that the report shows of a row and column."""


def examples(table: Table) -> dict[str, dict[str, list[Example]]]:
    """Return column to row to its best, median and worst images; a row without thumbnails is left out."""
    keys = keys_of(table)
    found: dict[str, dict[str, list[Example]]] = {}
    for column in columns(table):
        for row, cells in table.items():
            if column in cells and (images := chosen(cells[column])):
                found.setdefault(keys[column], {})[row] = images
    return found


def chosen(cell: Cell, count: int = EXAMPLES) -> list[Example]:
    """Return the best, median and worst `count` images of a cell; no image stands twice."""
    order = [int(i) for i in np.argsort(-cell.values, kind="stable") if math.isfinite(cell.values[i])]
    count = min(count, len(order) // 3) or min(1, len(order))
    middle = (len(order) - count) // 2
    kinds = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:] if count else []}
    images: list[Example] = []
    seen: set[int] = set()
    for kind, indices in kinds.items():
        for index in indices:
            file = thumb(cell.folder, index)
            if file is not None and index not in seen:
                seen.add(index)
                prompt = cell.prompts[index % len(cell.prompts)]["text"]
                images.append(Example(kind, float(cell.values[index]), prompt, file))
    return images


def write_grids(request: Request, out: Path, count: int) -> None:
    """Write a grid OUT/TASK.png for each task: the first image of the first `count` prompts, a line for each row."""
    for task in request.tasks:
        shown = min(count, len(task.prompts))
        rows: dict[str, Tensor] = {}
        for row in request.rows:
            folder = out / ROWS / file_name(row.name) / file_name(task.name)
            files = [thumb(folder, index) for index in range(shown)]
            if all(file is not None for file in files):
                rows[row.name.removeprefix("teacher:")] = torch.stack(
                    [_read(file) for file in files if file is not None]
                )
        if rows:
            # Small images are enlarged to be seen, large ones are kept.
            scale = max(1, 128 // next(iter(rows.values())).shape[3])
            captions = [prompt.text for prompt in task.prompts[:shown]]
            image_grid(rows, captions, out / f"{file_name(task.name)}.png", scale)


def _read(file: Path) -> Tensor:
    """(3, H, W) float32 in 0..1."""
    from PIL import Image

    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
