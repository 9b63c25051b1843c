"""Composition in the shapes world: finds the objects in the pixels, then scores them as GenEval does.

GenEval (arXiv 2310.11513) checks a record's clauses: how many objects of a class, in which colour, in which relation.
Here the detector is exact enough to need no network: dark ground, connected bright regions, shape from how much of its
bounding box a region fills, colour from the nearest hue of the palette.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.worlds.shapes import COLOURS, Array

BRIGHT = 0.42
"""A pixel belongs to an object when its largest channel exceeds this; the ground stays under 0.2."""
MIN_AREA = 12
RELATION_MARGIN = 2.0
"""Pixels by which one centre must lie beyond the other along the relation's axis, more than it strays across it."""

_NAMES = list(COLOURS)
_HUES = np.array([np.array(c) / np.linalg.norm(c) for c in COLOURS.values()])


@dataclass(frozen=True)
class Found:
    """An object read from the pixels; centre in pixels, x right, y down."""

    shape: str
    colour: str
    x: float
    y: float


def detect(image: Array) -> list[Found]:
    """The objects in one image, (3, H, W) in 0..1."""
    bright = image.max(0)
    labels, _ = ndimage.label(bright > BRIGHT)
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[box] == index
        if region.sum() < MIN_AREA:
            continue
        peak = np.quantile(bright[box][region], 0.8)
        solid = region & (bright[box] > 0.5 * peak)  # without the rim that edges and decoders blur
        fill = solid.sum() / (np.ptp(solid.any(0).nonzero()) + 1) / (np.ptp(solid.any(1).nonzero()) + 1)
        shape = "triangle" if fill < 0.66 else "circle" if fill < 0.875 else "square"
        rgb = image[:, box[0], box[1]][:, region & (bright[box] > 0.8 * peak)].mean(1)
        colour = _NAMES[int(np.argmax(_HUES @ (rgb / np.linalg.norm(rgb))))]
        y, x = ndimage.center_of_mass(region)
        found.append(Found(shape, colour, x + box[1].start, y + box[0].start))
    return found


def _holds(relation: str, placed: Found, anchor: Found) -> bool:
    dx, dy = placed.x - anchor.x, placed.y - anchor.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > RELATION_MARGIN and along > abs(across)


def judge(found: list[Found], include: list[dict[str, Any]]) -> tuple[float, bool]:
    """(partial score, strict success) of a GenEval record on the objects found.

    A clause earns 1 - |c - f| / c for its count; a colour earns the same on the objects of that colour, a position 1 or
    0, and both earn nothing while the count is wrong. The score is the mean of all terms; strict wants every one exact.
    """
    terms = []
    matched: list[list[Found]] = []
    for item in include:
        want = item["count"]
        same = [o for o in found if o.shape == item["class"]]
        right = len(same) == want
        terms.append(max(0.0, 1 - abs(want - len(same)) / want))
        if "color" in item:
            coloured = [o for o in same if o.colour == item["color"]]
            terms.append(max(0.0, 1 - abs(want - len(coloured)) / want) if right else 0.0)
            same = coloured or same
        matched.append(same)
        if "position" in item:
            relation, anchor = item["position"]
            holds = any(_holds(relation, p, a) for p in same for a in matched[anchor])
            terms.append(float(right and holds))
    return float(np.mean(terms)), all(t == 1.0 for t in terms)


def _judge_all(images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, bool]]:
    pixels = images.detach().float().cpu().numpy()
    return [judge(detect(p), prompt.metadata["include"]) for p, prompt in zip(pixels, prompts, strict=True)]


def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The partial score, for training; (B,) float32 in 0..1."""
    return torch.tensor([s for s, _ in _judge_all(images, prompts)], dtype=torch.float32)


def strict(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """1 where every clause holds exactly, else 0, for reporting; (B,) float32."""
    return torch.tensor([float(s) for _, s in _judge_all(images, prompts)], dtype=torch.float32)
