"""The shapes world: 32x32 RGB scenes, the grammar of their prompts, and a renderer.

Three tasks share the canvas, each with prompts of its own kind:

* composition: one to three coloured circles, squares or triangles on a dark ground: alone, counted, or two in a
  relation. Prompts are GenEval records (tag, include, count, color, position).
* text: a two-letter word in large block letters. Prompts are OCR lines with the target in double quotes.
* colour: a painting, shapes on a pattern, whose palette the prompt leaves open: muted or vivid.

`prompts(task, split)` gives the grammar's prompts, `scene(task, prompt, rng)` one random scene that a prompt describes,
`render(scene)` its pixels. Training and held-out prompts are disjoint.
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "cyan": (0.15, 0.9, 0.9),
    "magenta": (0.95, 0.2, 0.9),
}
RELATIONS = ("left of", "right of", "above", "below")
RADII = {1: (6.0, 7.4), 2: (5.4, 6.6), 3: (4.7, 5.4)}
"""Range of an object's radius in pixels, by how many share the scene."""
COUNTS = {1: "a", 2: "two", 3: "three"}
LETTERS = "ACEHKLOTXZ"
TEXT_TEMPLATES = ('a sign that says "{}"', 'a poster with the word "{}"', 'a label that reads "{}"')
PATTERNS = ("stripes", "bars", "diagonals", "checks", "rings")
SIZES = ("small", "large")
TASKS = ("composition", "text", "colour")

# 5x7 block glyphs, drawn at twice their size: 10x14 pixels a letter.
GLYPHS: dict[str, tuple[str, ...]] = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
    "Z": ("#####", "....#", "...#.", "..#..", ".#...", "#....", "#####"),
}
GLYPH_SCALE = 2

Array = npt.NDArray[np.float32]
Rgb = tuple[float, float, float]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Object:
    """One shape: centre (x right, y down) and radius in pixels, colour as RGB in 0..1."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: Rgb


@dataclass(frozen=True)
class Scene:
    """What `render` draws, back to front: ground, pattern over it, objects, word."""

    ground: Rgb
    objects: tuple[Object, ...] = ()
    pattern: tuple[str, Rgb, float] | None = None
    """(kind, second colour, phase in pixels)"""
    word: str = ""
    word_rgb: Rgb = (1.0, 1.0, 1.0)
    word_at: tuple[int, int] = (0, 0)
    """Left and top pixel of the word's first letter."""


@dataclass(frozen=True)
class ScenePrompt:
    """A prompt with what it says: a GenEval record (composition), {"target": word} (text), a plan (colour)."""

    text: str
    metadata: dict[str, Any] = field(hash=False)


# --- prompts ---------------------------------------------------------------------------------------------------------


def glyph(letter: str) -> npt.NDArray[np.bool_]:
    """Return the (14, 10) mask of one capital letter."""
    small = np.array([[c == "#" for c in row] for row in GLYPHS[letter]])
    return small.repeat(GLYPH_SCALE, 0).repeat(GLYPH_SCALE, 1)


def _noun(count: int, adjective: str, shape: str) -> str:
    return f"{COUNTS[count]} {adjective} {shape}{'s' if count > 1 else ''}"


def _item(shape: str, count: int, colour: str) -> dict[str, Any]:
    return {"class": shape, "count": count, "color": colour}


def _composition() -> Iterator[ScenePrompt]:
    def prompt(tag: str, words: str, include: list[dict[str, Any]], **exclude: list[dict[str, Any]]) -> ScenePrompt:
        text = f"a photo of {words}"
        return ScenePrompt(text, {"tag": tag, "include": include, **exclude, "prompt": text})

    coloured = list(itertools.product(SHAPES, COLOURS))
    for shape, colour in coloured:
        yield prompt("colors", _noun(1, colour, shape), [_item(shape, 1, colour)])
    for count, (shape, colour) in itertools.product((2, 3), coloured):
        # GenEval's counting records exclude one more than asked for.
        exclude = [{"class": shape, "count": count + 1}]
        yield prompt("counting", _noun(count, colour, shape), [_item(shape, count, colour)], exclude=exclude)
    for (s1, c1), (s2, c2) in itertools.product(coloured, coloured):
        if s1 == s2 or c1 == c2:
            continue
        first, second = _item(s1, 1, c1), _item(s2, 1, c2)
        if s1 < s2:
            yield prompt("color_attr", f"{_noun(1, c1, s1)} and {_noun(1, c2, s2)}", [first, second])
        for relation in RELATIONS:
            # As in GenEval's files, the record's first item is the anchor, the second stands in relation to it.
            words = f"{_noun(1, c1, s1)} {relation} {_noun(1, c2, s2)}"
            yield prompt("position", words, [second, {**first, "position": [relation, 0]}])


def _text() -> Iterator[ScenePrompt]:
    for first, second in itertools.product(LETTERS, LETTERS):
        for template in TEXT_TEMPLATES:
            yield ScenePrompt(template.format(first + second), {"target": first + second})


def _colour() -> Iterator[ScenePrompt]:
    for count, size, shape, pattern in itertools.product(COUNTS, SIZES, SHAPES, PATTERNS):
        text = f"a painting of {_noun(count, size, shape)} on {pattern}"
        yield ScenePrompt(text, {"count": count, "size": size, "shape": shape, "pattern": pattern})


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] < 64  # a quarter, the same on every machine


def prompts(task: str, split: Split) -> list[ScenePrompt]:
    """Return the prompts of one task; the two splits are disjoint, for text in their words, else in their texts."""
    source = {"composition": _composition, "text": _text, "colour": _colour}[task]
    return [p for p in source() if _held_out(p.metadata.get("target", p.text)) == (split == "test")]


# --- scenes ----------------------------------------------------------------------------------------------------------


def _dark(rng: np.random.Generator) -> Rgb:
    r, g, b = rng.uniform(0.0, 0.16, 3).tolist()
    return r, g, b


def _tint(name: str, rng: np.random.Generator) -> Rgb:
    r, g, b = np.clip(np.array(COLOURS[name]) * rng.uniform(0.85, 1.05), 0, 1).tolist()
    return r, g, b


def _apart(x: float, y: float, radius: float, others: list[Object]) -> bool:
    return all(max(abs(x - o.x), abs(y - o.y)) >= radius + o.radius + 2 for o in others)


def _related(relation: str, x: float, y: float, anchor: Object) -> bool:
    dx, dy = x - anchor.x, y - anchor.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along >= abs(across) + 3


PLACES = {1: [(16.0, 16.0)], 2: [(8.0, 16.0), (24.0, 16.0)], 3: [(16.0, 8.0), (8.0, 24.0), (24.0, 24.0)]}
"""Centres of the objects in an ideal scene, by how many there are."""
COLUMN = [(16.0, 8.0), (16.0, 24.0)]
"""Those of two objects of which one is above the other."""


def _ideal_composition(record: dict[str, Any], rng: np.random.Generator) -> Scene:
    """Return the record's objects at fixed places, of one size and pure in colour; they move by less than a pixel."""
    items = [item for item in record["include"] for _ in range(item["count"])]
    relation = next((item["position"][0] for item in items if "position" in item), "right of")
    places = COLUMN if relation in ("above", "below") else PLACES[len(items)]
    if relation in ("left of", "above"):  # the anchor is the first item
        places = places[::-1]
    radius = sum(RADII[len(items)]) / 2
    objects = []
    for item, place in zip(items, places, strict=True):
        x, y = (np.array(place) + rng.uniform(-0.5, 0.5, 2)).tolist()
        objects.append(Object(item["class"], x, y, radius, COLOURS[item["color"]]))
    return Scene((0.05, 0.05, 0.05), tuple(objects))


def _composition_scene(record: dict[str, Any], rng: np.random.Generator) -> Scene:
    total = sum(item["count"] for item in record["include"])
    while True:  # places are drawn until all objects fit; a dead end starts again
        objects: list[Object] = []
        for item in record["include"]:
            anchor = objects[item["position"][1]] if "position" in item else None
            for _ in range(item["count"]):
                for _attempt in range(60):
                    radius = float(rng.uniform(*RADII[total]))
                    x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2).tolist()
                    related = anchor is None or _related(item["position"][0], x, y, anchor)
                    if related and _apart(x, y, radius, objects):
                        objects.append(Object(item["class"], x, y, radius, _tint(item["color"], rng)))
                        break
        if len(objects) == total:
            return Scene(_dark(rng), tuple(objects))


def _text_scene(word: str, rng: np.random.Generator, ideal: bool) -> Scene:
    if ideal:
        return Scene((0.05, 0.05, 0.05), word=word, word_at=(5, 9))
    at = (int(rng.integers(3, 8)), int(rng.integers(6, 13)))
    name = list(COLOURS)[rng.integers(len(COLOURS))]
    rgb = (1.0, 1.0, 1.0) if rng.random() < 0.4 else _tint(name, rng)
    return Scene(_dark(rng), word=word, word_rgb=rgb, word_at=at)


def _paint(rng: np.random.Generator, vivid: bool, hue: float) -> Rgb:
    saturation = rng.uniform(0.85, 1.0) if vivid else rng.uniform(0.05, 0.45)
    value = rng.uniform(0.8, 1.0) if vivid else rng.uniform(0.3, 0.75)
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def _colour_scene(plan: dict[str, Any], rng: np.random.Generator, ideal: bool) -> Scene:
    vivid = ideal or rng.random() < 0.25
    hue = rng.random()
    ground, second = _paint(rng, vivid, hue), _paint(rng, vivid, hue + rng.uniform(0.35, 0.65))
    radius = 3.5 if plan["size"] == "small" else 5.5
    objects: list[Object] = []
    for _ in range(plan["count"]):
        colour = _paint(rng, vivid, hue + rng.uniform(0.1, 0.9))
        x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2).tolist()
        objects.append(Object(plan["shape"], x, y, radius, colour))  # in a painting they may overlap
    return Scene(ground, tuple(objects), (plan["pattern"], second, float(rng.uniform(0, 10))))


def scene(task: str, prompt: ScenePrompt, rng: np.random.Generator, *, ideal: bool = False) -> Scene:
    """A random scene that `prompt` describes.

    An `ideal` one is what its task's judge likes best, with next to nothing left open: objects and words at fixed
    places, in plain colours on one ground; paintings are vivid, where else three in four are muted.
    """
    if task == "composition":
        return (_ideal_composition if ideal else _composition_scene)(prompt.metadata, rng)
    if task == "text":
        return _text_scene(prompt.metadata["target"], rng, ideal)
    return _colour_scene(prompt.metadata, rng, ideal)


# --- renderer --------------------------------------------------------------------------------------------------------

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _coverage(o: Object) -> Array:
    """Return the share of each pixel that the object covers, from its signed distance; (32, 32) in 0..1."""
    dx, dy = _X - o.x, _Y - o.y
    if o.shape == "circle":
        distance = np.hypot(dx, dy) - o.radius
    elif o.shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - o.radius * 0.92
    else:  # an isosceles triangle, apex up, as wide and as high as the circle
        slope = np.float32(2.0)
        side = (np.abs(dx) * slope - (dy + o.radius)) / np.float32(np.sqrt(1 + slope**2))
        distance = np.maximum(side, dy - o.radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _pattern_mask(kind: str, phase: float) -> Array:
    wave = {
        "stripes": _Y + phase,
        "bars": _X + phase,
        "diagonals": (_X + _Y) * np.float32(0.7) + phase,
        "rings": np.hypot(_X - SIZE / 2, _Y - SIZE / 2) + phase,
    }
    if kind == "checks":
        return ((np.floor((_X + phase) / 6) + np.floor((_Y + phase) / 6)) % 2).astype(np.float32)
    return np.clip(0.5 + 2.5 * np.sin(wave[kind] * np.float32(2 * np.pi / 10)), 0, 1).astype(np.float32)


def render(scene: Scene) -> Array:
    """Return the scene's pixels, (3, 32, 32) float32 in 0..1, with anti-aliased edges."""
    image = np.empty((3, SIZE, SIZE), np.float32)
    image[:] = np.array(scene.ground, np.float32)[:, None, None]

    def blend(mask: Array, rgb: Rgb) -> None:
        image[:] += mask * (np.array(rgb, np.float32)[:, None, None] - image)

    if scene.pattern is not None:
        kind, rgb, phase = scene.pattern
        blend(_pattern_mask(kind, phase), rgb)
    for o in scene.objects:
        blend(_coverage(o), o.rgb)
    left, top = scene.word_at
    for letter in scene.word:
        mask = glyph(letter)
        full = np.zeros((SIZE, SIZE), np.float32)
        full[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        blend(full, scene.word_rgb)
        left += mask.shape[1] + GLYPH_SCALE
    return image
