"""GenEval's rules: from the objects found in an image to partial, strict and accuracy; and the means per tag.

Nothing here looks at pixels. GenEval (arXiv 2310.11513) checks a record's clauses: how many objects of a class, in
which colour, in which relation. `accuracy` is the benchmark (evaluation/evaluate_images.py of
github.com/djghosh13/geneval), `partial` and `strict` are Flow-GRPO's (arXiv 2505.05470;
reward_server/gen_eval.py of github.com/yifan123/reward-server).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opd_fast.data.prompt_files import Prompt, entry_fault
from opd_fast.errors import did_you_mean

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The benchmark's six tasks."""
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""COCO's 80 classes in COCO's order, under GenEval's names, which differ in computer mouse, tv remote and computer
keyboard."""
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
"""Names of classes in COCO and in checkpoints, to GenEval's."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Scores that a detection must exceed; the second holds for records of the tag `counting`."""
MOST_OBJECTS = 16
"""Detections of a class that are kept, the best ones."""
POSITION_MARGIN = 0.1
"""Share of both objects' extents by which their centres may differ before that counts as an offset."""
POSITION_COSINE = 0.5
"""What the offset's direction must exceed along a relation's axis."""


@dataclass(frozen=True, eq=False)
class Instance:
    """One detected object.

    Attributes:
        box: left, top, right, bottom in pixels; right and bottom are exclusive.
        score: the detector's confidence, 0..1.
        mask: (H, W) bool, the object's pixels in the whole image; None: not known.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray[Any, Any] | None = None


Objects = Mapping[str, Sequence[Instance]]
"""The objects of an image by class, each class in falling order of score."""
Colours = Mapping[str, Sequence[str]]
"""By class, the colours of its first objects, as many as `colours_asked` says."""


class Judgement(NamedTuple):
    """What GenEval says of one image.

    Attributes:
        partial: the mean of the clauses' terms, the training reward; at most 1, and negative where far too many
            objects are found.
        strict: 1 where every clause of `include` holds with exactly the count asked for, else 0.
        accuracy: 1 where the benchmark calls the image correct, else 0.
    """

    partial: float
    strict: float
    accuracy: float


def judge(objects: Objects, colours: Colours, record: Mapping[str, Any]) -> Judgement:
    """Judge an image by a GenEval record, given its objects (`kept_objects`) and their colours (`colours_asked`)."""
    partial, strict = partial_score(objects, colours, record)
    return Judgement(partial, float(strict), float(is_accurate(objects, colours, record)))


def kept_objects(found: Iterable[tuple[str, Instance]], record: Mapping[str, Any]) -> dict[str, list[Instance]]:
    """Return the detections that count for a record: above the threshold, at most MOST_OBJECTS of a class, best first.

    GenEval's suppression of overlapping boxes is off by default (its `max_overlap` is 1), so there is none here.
    """
    threshold = COUNTING_THRESHOLD if record.get("tag") == "counting" else THRESHOLD
    objects: dict[str, list[Instance]] = {}
    for name, instance in sorted(found, key=lambda item: -item[1].score):
        if instance.score > threshold and len(objects.setdefault(name, [])) < MOST_OBJECTS:
            objects[name].append(instance)
    return objects


def colours_asked(objects: Objects, record: Mapping[str, Any]) -> dict[str, int]:
    """Return by class how many of its first objects need a colour before `judge` can judge.

    A clause that finds fewer objects than it asks for looks at no colour.
    """
    asked: dict[str, int] = {}
    for clause in record.get("include", ()):
        name, count = clause["class"], clause["count"]
        if "color" in clause and len(objects.get(name, ())) >= count:
            asked[name] = max(count, asked.get(name, 0))
    return asked


def partial_score(objects: Objects, colours: Colours, record: Mapping[str, Any]) -> tuple[float, bool]:
    """Return the mean of the terms of all clauses of `include`, and whether every clause holds exactly.

    For a clause with count c of which f objects are found:

    - the count adds 1 - |c - f| / c, which is negative for f > 2c, as in the released code;
    - where f differs from c, a colour or a position (or both) adds one 0, and neither is looked at;
    - a colour that k of the objects have adds 1 - |c - k| / c;
    - a position is looked at where the colour holds. It adds 0 where the clause that it refers to did not hold, and 1
      where every object stands in the relation to every object of that clause. Where one does not, it adds 0 **and**
      1: the released code appends a 1 after its loop in any case. A record of two objects, both found, of which the
      second is misplaced, therefore scores 3/4 and not 2/3.

    `exclude` plays no part. A record without clauses scores 0.
    """
    terms: list[float] = []
    groups: list[Sequence[Instance] | None] = []
    for clause in record.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, ())
        terms.append(1 - abs(count - len(found)) / count)
        holds = len(found) == count
        if not holds and ("color" in clause or "position" in clause):
            terms.append(0.0)
        if holds and "color" in clause:
            right = list(colours[name][:count]).count(clause["color"])
            terms.append(1 - abs(count - right) / count)
            holds = right == count
        if holds and "position" in clause:
            relation, anchor = clause["position"]
            reference = groups[anchor]
            holds = reference is not None and _all_stand(relation, found, reference)
            terms += [1.0] if holds else [0.0] if reference is None else [0.0, 1.0]
        groups.append(found if holds else None)
    return (sum(terms) / len(terms) if terms else 0.0), None not in groups


def is_accurate(objects: Objects, colours: Colours, record: Mapping[str, Any]) -> bool:
    """Return whether the benchmark calls an image correct.

    Of each clause of `include` only the `count` objects with the highest scores are looked at: there must be that
    many, all of the colour, and each in the relation to each of the clause that it refers to. Of a class of `exclude`
    there must be fewer than `count`.
    """
    groups: list[Sequence[Instance] | None] = []
    for clause in record.get("include", ()):
        name, count = clause["class"], clause["count"]
        best = objects.get(name, ())[:count]
        holds = len(best) == count
        if holds and "color" in clause:
            holds = all(colour == clause["color"] for colour in colours[name][:count])
        if holds and "position" in clause:
            relation, anchor = clause["position"]
            reference = groups[anchor]
            holds = reference is not None and _all_stand(relation, best, reference)
        groups.append(best if holds else None)
    too_many = any(len(objects.get(e["class"], ())) >= e["count"] for e in record.get("exclude", ()))
    return None not in groups and not too_many


def relations(placed: Instance, anchor: Instance) -> set[str]:
    """Return in which of RELATIONS `placed` stands to `anchor`: none, one, or two (right of and below).

    The offset of the centres is shrunk along each axis by a tenth of both extents together. What is left, divided by
    the length of the whole offset, must exceed 0.5 along the relation's axis. Numbers are float32, as published, since
    boxes of whole pixels may lie exactly on the border.
    """
    a, b = (np.array(instance.box, dtype=np.float32).reshape(2, 2) for instance in (placed, anchor))
    offset = a.mean(0) - b.mean(0)
    extents = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    left = np.maximum(np.abs(offset) - np.float32(POSITION_MARGIN) * extents, 0) * np.sign(offset)
    if (np.abs(left) < 1e-3).all():
        return set()
    x, y = (float(c) for c in left / np.linalg.norm(offset))
    along = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation in RELATIONS if along[relation] > POSITION_COSINE}


def _all_stand(relation: str, placed: Sequence[Instance], anchors: Sequence[Instance]) -> bool:
    return all(relation in relations(one, other) for one in placed for other in anchors)


def record_fault(metadata: Mapping[str, Any]) -> str | None:
    """Return why GenEval cannot judge a prompt by its metadata, as `problem; remedy`, or None.

    It needs `include`, entries of which every class, colour and relation is one that GenEval knows, counts that can be
    reached, and positions that refer to an earlier entry. `exclude` may be missing.
    """
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        return 'has no GenEval list "include"; write GenEval records (.jsonl)'
    exclude = metadata.get("exclude", [])
    if not isinstance(exclude, list):
        return 'has an "exclude" that is not a list; write [{"class": ..., "count": ...}]'
    if not isinstance(metadata.get("tag", ""), str):
        return f'has the "tag" {metadata["tag"]!r}; give {", ".join(TAGS)}'
    for where, entries in (("include", include), ("exclude", exclude)):
        for index, entry in enumerate(entries):
            if fault := entry_fault(entry, len(include)) or _entry_fault(entry, index, where):
                return f"has an entry of {where!r} that {fault}"
    return None


def _entry_fault(entry: dict[str, Any], index: int, where: str) -> str | None:
    """Return what GenEval does not know in an entry that has the right form."""
    known: list[tuple[str, Any, Sequence[str]]] = [("class", entry["class"], CLASSES)]
    known += [("color", entry["color"], COLOURS)] if "color" in entry else []
    known += [("position", entry["position"][0], RELATIONS)] if "position" in entry else []
    for key, word, words in known:
        if word not in words:
            remedy = f"write {ALIASES[word]}" if word in ALIASES else did_you_mean(word, words)
            return f'has the "{key}" {word!r}, which GenEval does not know; {remedy}'
    if where == "include" and entry["count"] > MOST_OBJECTS:
        return f'has "count" {entry["count"]}, but GenEval keeps {MOST_OBJECTS} objects of a class; ask for fewer'
    if "position" in entry and entry["position"][1] >= index:
        return f'has a "position" that names entry {entry["position"][1]} in entry {index}; name an earlier entry'
    return None


class TagMeans(NamedTuple):
    """Means of values by tag.

    Attributes:
        tags: the mean of each tag, the benchmark's six first and in its order; NaN where no value is known.
        overall: the mean over tags, GenEval's overall number; NaN where a tag has no mean.
    """

    tags: dict[str, float]
    overall: float


def by_tag(values: Iterable[float], prompts: Sequence[Prompt]) -> TagMeans | None:
    """Group values by the prompts' `metadata["tag"]` and average them, as GenEval's summary_scores.py does.

    Args:
        values: one for each prompt; NaN stands for one that is missing and is left out.
        prompts: those without a tag come under "untagged".

    Returns:
        The means, or None where no prompt has a tag. Raises ValueError where the lengths differ.
    """
    groups: dict[str, list[float]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        groups.setdefault(str(prompt.metadata.get("tag") or "untagged"), []).append(float(value))
    if not groups.keys() - {"untagged"}:
        return None
    order = [tag for tag in TAGS if tag in groups] + [tag for tag in groups if tag not in TAGS]
    means = {tag: _mean([value for value in groups[tag] if not math.isnan(value)]) for tag in order}
    return TagMeans(means, _mean(list(means.values())))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
