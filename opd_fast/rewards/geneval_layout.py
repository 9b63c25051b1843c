"""GenEval's folder of images: what other evaluators of GenEval, its own above all, read.

    FOLDER/00000/metadata.jsonl      the prompt's record, one JSON object
    FOLDER/00000/samples/0000.png    its images
    FOLDER/00001/...

That is the layout of github.com/djghosh13/geneval's README; its `grid.png` is optional and not written. The evaluator
takes folders whose names are digits and images whose names are digits and `.png`. An image's number has four digits
here, as in that README; its generation script writes five.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, one_line
from opd_fast.files import replacing
from opd_fast.reporting.image_grid import to_picture


def image_record(prompt: Prompt) -> dict[str, Any]:
    """Return what `metadata.jsonl` says of a prompt: its record as the prompt file has it, or its text and metadata."""
    return prompt.metadata if "prompt" in prompt.metadata else {"prompt": prompt.text, **prompt.metadata}


def image_file(folder: str | Path, index: int, sample: int) -> Path:
    """Return where `save_image` writes an image."""
    return Path(folder) / f"{index:05d}" / "samples" / f"{sample:04d}.png"


def save_image(folder: str | Path, index: int, sample: int, image: Tensor, record: Mapping[str, Any]) -> Path:
    """Write one image and, with the first one of its prompt, the prompt's record. Returns the image's path.

    Several processes may write into one folder at the same time. An image that is there is replaced.

    Args:
        folder: the top of the layout; it is made where it does not exist.
        index: of the prompt in its file, from 0.
        sample: number of the image among the prompt's, from 0.
        image: (3, H, W) float in 0..1; it is rounded to 8 bits.
        record: `image_record` of the prompt.

    Raises:
        UserError: the prompt's folder has another prompt's record, or cannot be written.
        ValueError: a negative number, or an image of another shape.
    """
    if index < 0 or sample < 0:
        raise ValueError(f"a prompt's and an image's number begin at 0, not at {min(index, sample)}")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image is (3, H, W), not {tuple(image.shape)}")
    path = image_file(folder, index, sample)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_record(path.parent.parent / "metadata.jsonl", record)
        with replacing(path, shared=True) as part:
            to_picture(image).save(part, format="PNG")
    except OSError as error:
        raise UserError(
            str(path), f"cannot be written ({one_line(error)})", "give a folder that you may write to"
        ) from error
    return path


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(dict(record), ensure_ascii=False, default=str)  # a table's cells may be dates
    if not path.exists():
        with replacing(path, shared=True) as part:
            part.write_text(f"{text}\n", encoding="utf-8")
    elif _parsed(path.read_bytes()) != _parsed(text):
        raise UserError(str(path), "belongs to another prompt or prompt file", "give a new folder")


def _parsed(text: str | bytes) -> Any:
    """Return what a JSON text holds, or the text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text
