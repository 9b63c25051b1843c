"""The reward `composition`: it finds the shapes world's objects in the pixels, then scores them as GenEval does.

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

from opd_fast.data.prompt_files import Prompt, entry_fault
from opd_fast.worlds.shapes import COLOURS, RELATIONS, SHAPES, Array

BRIGHT = 0.42
"""A pixel belongs to an object when its largest channel exceeds this; the ground stays under 0.2."""
MIN_AREA = 12
RELATION_MARGIN = 2.0
"""Pixels by which one centre must lie beyond the other along the relation's axis, more than it strays across it."""

_NAMES = list(COLOURS)
_HUES = np.array([np.array(c) / np.linalg.norm(c) for c in COLOURS.values()])


def metadata_fault(metadata: dict[str, Any]) -> str | None:
    """Return why the reward cannot judge a prompt, or None: it looks for the entries of `metadata["include"]`.

    Its detector knows the shapes, colours and relations of the bundled world alone; a position names an earlier entry.
    """
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        return 'has no GenEval list "include"; write GenEval records (.jsonl)'
    for index, entry in enumerate(include):
        if fault := entry_fault(entry, len(include)):
            return f"has an entry of 'include' that {fault}"
        known: list[tuple[str, Any, tuple[str, ...]]] = [("class", entry["class"], SHAPES)]
        known += [("color", entry["color"], tuple(COLOURS))] if "color" in entry else []
        known += [("position", entry["position"][0], RELATIONS)] if "position" in entry else []
        for key, word, words in known:
            if word not in words:
                return f'has the "{key}" {word!r}, which its detector does not know; give {", ".join(words)}'
        if "position" in entry and entry["position"][1] >= index:
            return f'has a "position" that names entry {entry["position"][1]} in entry {index}; name an earlier entry'
    return None


@dataclass(frozen=True)
class DetectedObject:
    """An object read from the pixels. Its centre is in pixels, x to the right and y down."""

    shape: str
    colour: str
    x: float
    y: float


def detect(image: Array) -> list[DetectedObject]:
    """Return the objects in one image, (3, H, W) in 0..1."""
    bright = image.max(0)
    labels, _ = ndimage.label(bright > BRIGHT)
    objects = []
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
        objects.append(DetectedObject(shape, colour, x + box[1].start, y + box[0].start))
    return objects


def _holds(relation: str, placed: DetectedObject, anchor: DetectedObject) -> bool:
    dx, dy = placed.x - anchor.x, placed.y - anchor.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > RELATION_MARGIN and along > abs(across)


def score_record(objects: list[DetectedObject], include: list[dict[str, Any]]) -> tuple[float, bool]:
    """Return the partial score of a GenEval record on the detected objects, and whether every clause holds exactly.

    A clause earns 1 - |c - f| / c for its count c where f objects are found; a colour earns the same on the objects of
    that colour, a position earns 1 or 0, and both earn nothing while the count is wrong. The score is the mean of all.
    """
    terms = []
    matched: list[list[DetectedObject]] = []
    for item in include:
        want = item["count"]
        same = [o for o in objects if o.shape == item["class"]]
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


def _score_all(images: Tensor, prompts: Sequence[Prompt]) -> list[tuple[float, bool]]:
    pixels = images.detach().float().cpu().numpy()
    return [score_record(detect(p), prompt.metadata["include"]) for p, prompt in zip(pixels, prompts, strict=True)]


def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return the partial score, for training; (B,) float32 in 0..1."""
    return torch.tensor([s for s, _ in _score_all(images, prompts)], dtype=torch.float32)


def strict(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return 1 where every clause holds exactly, else 0, for reporting; (B,) float32."""
    return torch.tensor([float(s) for _, s in _score_all(images, prompts)], dtype=torch.float32)
