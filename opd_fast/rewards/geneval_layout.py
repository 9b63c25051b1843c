"""temporary"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor


def image_file(folder: Path, index: int, sample: int) -> Path:
    return folder / f"{index:05d}" / "samples" / f"{sample:04d}.png"


def save_image(folder: Path, index: int, sample: int, image: Tensor, record: dict[str, Any]) -> None:
    from PIL import Image

    path = image_file(folder, index, sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent.parent / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)
