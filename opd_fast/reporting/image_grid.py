"""Pictures of the images that models draw: one row for each model, one column for each prompt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_GRID = re.compile(r"(?P<name>.+?)(-round-0*(?P<round>\d+))?")


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
        for column in range(count):
            tile = to_picture(images[column]).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(tile, (left + column * (cell_w + gap), y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def to_picture(image: Tensor) -> Any:
    """Return a PIL image of (3, H, W) float in 0..1, rounded to 8 bits; what is not a number is black."""
    from PIL import Image

    levels = (image.detach().float() * 255).round().nan_to_num(0).clamp(0, 255).byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().contiguous().numpy())


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


def newest_grids(run_dir: Path) -> dict[str, Path]:
    """Return the last grid of each name in `samples/` as title to file.

    Files there are named `NAME.png` or `NAME-round-N.png`.
    """
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run_dir / "samples").glob("*.png")):
        match = _GRID.fullmatch(path.stem)
        assert match is not None
        name, number = match["name"], int(match["round"] or -1)
        if name not in newest or number >= newest[name][0]:
            newest[name] = (number, path)
    return {f"{name}, round {number}" if number >= 0 else name: path for name, (number, path) in newest.items()}
