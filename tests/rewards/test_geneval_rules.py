"""GenEval's rules on made-up detections, against numbers worked out by hand and a computation of this file's own."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.rewards.geneval_rules import (
    CLASSES,
    COLOURS,
    RELATIONS,
    TAGS,
    Instance,
    Judgement,
    by_tag,
    colours_asked,
    judge,
    kept_objects,
    record_fault,
    relations,
)

Found = tuple[str, tuple[float, float, float, float], float, str]
"""A detection: class, box, score, and the colour that it would be given."""
LEFT, RIGHT, LOW = (0.0, 40.0, 20.0, 60.0), (80.0, 40.0, 100.0, 60.0), (80.0, 90.0, 100.0, 110.0)


def judged(found: list[Found], record: dict[str, Any]) -> Judgement:
    """The rules on detections in any order; only the colours that are asked for are given."""
    instances = [(name, Instance(box, score)) for name, box, score, _ in found]
    colour_of = {id(instance): f[3] for (_, instance), f in zip(instances, found, strict=True)}
    objects = kept_objects(instances, record)
    asked = colours_asked(objects, record)
    return judge(objects, {n: [colour_of[id(o)] for o in objects[n][:k]] for n, k in asked.items()}, record)


def of(tag: str, *include: Any, exclude: Any = ()) -> dict[str, Any]:
    """A record of clauses (class, count, {color, position}); `exclude` has pairs."""
    clauses = [{"class": name, "count": count, **more} for name, count, more in include]
    record: dict[str, Any] = {"tag": tag, "include": clauses, "prompt": "a photo"}
    if exclude:
        record["exclude"] = [{"class": name, "count": count} for name, count in exclude]
    return record


def some(name: str, count: int, colour: str = "red", score: float = 0.95, box: Any = LEFT) -> list[Found]:
    return [(name, box, score - 0.0001 * k, colour) for k in range(count)]


ONE = of("single_object", ("dog", 1, {}))
TWO = of("two_object", ("dog", 1, {}), ("cat", 1, {}))
THREE = of("counting", ("dog", 3, {}), exclude=[("dog", 4)])
RED = of("colors", ("dog", 1, {"color": "red"}))
RIGHT_OF = of("position", ("dog", 1, {}), ("cat", 1, {"position": ["right of", 0]}))
BOTH = of("color_attr", ("dog", 1, {"color": "red"}), ("cat", 1, {"color": "blue"}))
ALL_THREE = of("position", ("dog", 1, {"color": "red"}), ("cat", 2, {"color": "blue", "position": ["right of", 0]}))
NO_CAT = of("single_object", ("dog", 1, {}), exclude=[("cat", 1)])
ENOUGH = of("single_object", ("dog", 16, {}))

BY_HAND: list[tuple[str, dict[str, Any], list[Found], tuple[float, int, int]]] = [
    ("one of one", ONE, some("dog", 1), (1, 1, 1)),
    ("none of one", ONE, some("cat", 1), (0, 0, 0)),
    ("two of one", ONE, some("dog", 2), (0, 0, 1)),
    ("five of one is worth -3", ONE, some("dog", 5), (-3, 0, 1)),
    ("twenty are sixteen", ONE, some("dog", 20), (-14, 0, 1)),
    ("sixteen can be asked for", ENOUGH, some("dog", 20), (1, 1, 1)),
    ("exactly the threshold is too little", ONE, some("dog", 1, score=0.3), (0, 0, 0)),
    ("just above the threshold", ONE, some("dog", 1, score=0.3001), (1, 1, 1)),
    ("two classes", TWO, some("dog", 1) + some("cat", 1), (1, 1, 1)),
    ("one class of two", TWO, some("dog", 1), (1 / 2, 0, 0)),
    ("one class of two, twice", TWO, some("dog", 2) + some("cat", 1), (1 / 2, 0, 1)),
    ("three", THREE, some("dog", 3), (1, 1, 1)),
    ("two of three", THREE, some("dog", 2), (2 / 3, 0, 0)),
    ("four of three are excluded", THREE, some("dog", 4), (2 / 3, 0, 0)),
    ("0.9 does not count where objects are counted", THREE, some("dog", 2) + some("dog", 1, score=0.9), (2 / 3, 0, 0)),
    ("0.9001 counts", THREE, some("dog", 2) + some("dog", 1, score=0.9001), (1, 1, 1)),
    ("a fourth at 0.89 is not there", THREE, some("dog", 3) + some("dog", 1, score=0.89), (1, 1, 1)),
    ("a red dog", RED, some("dog", 1), (1, 1, 1)),
    ("a blue dog", RED, some("dog", 1, "blue"), (1 / 2, 0, 0)),
    ("no dog has no colour", RED, [], (0, 0, 0)),
    ("two red dogs", RED, some("dog", 2), (0, 0, 1)),
    ("the better dog is blue", RED, some("dog", 1, "blue") + some("dog", 1, score=0.8), (0, 0, 0)),
    ("the better dog is red", RED, some("dog", 1, "blue", 0.8) + some("dog", 1), (0, 0, 1)),
    ("right of", RIGHT_OF, some("dog", 1) + some("cat", 1, box=RIGHT), (1, 1, 1)),
    ("left of adds 0 and 1", RIGHT_OF, some("dog", 1, box=RIGHT) + some("cat", 1), (3 / 4, 0, 0)),
    ("no anchor", RIGHT_OF, some("cat", 1, box=RIGHT), (1 / 3, 0, 0)),
    ("two anchors", RIGHT_OF, some("dog", 2) + some("cat", 1, box=RIGHT), (1 / 3, 0, 1)),
    ("nothing to place", RIGHT_OF, some("dog", 1), (1 / 3, 0, 0)),
    ("two to place", RIGHT_OF, some("dog", 1) + some("cat", 2, box=RIGHT), (1 / 3, 0, 1)),
    ("both coloured", BOTH, some("dog", 1) + some("cat", 1, "blue"), (1, 1, 1)),
    ("colours exchanged", BOTH, some("dog", 1, "blue") + some("cat", 1), (1 / 2, 0, 0)),
    ("one colour right", BOTH, some("dog", 1) + some("cat", 1), (3 / 4, 0, 0)),
    ("one missing", BOTH, some("dog", 1), (1 / 2, 0, 0)),
    ("all at once", ALL_THREE, some("dog", 1) + some("cat", 2, "blue", box=RIGHT), (1, 1, 1)),
    ("one of two coloured", ALL_THREE, some("dog", 1) + some("cat", 1, "blue") + some("cat", 1), (7 / 8, 0, 0)),
    (
        "wrong colour of the anchor",
        ALL_THREE,
        some("dog", 1, "blue") + some("cat", 2, "blue", box=RIGHT),
        (3 / 5, 0, 0),
    ),
    ("wrong count adds one 0 for both", ALL_THREE, some("dog", 1) + some("cat", 1, "blue"), (5 / 8, 0, 0)),
    ("without what is excluded", NO_CAT, some("dog", 1), (1, 1, 1)),
    ("exclusion touches accuracy alone", NO_CAT, some("dog", 1) + some("cat", 1), (1, 1, 0)),
    ("excluded below the threshold", NO_CAT, some("dog", 1) + some("cat", 1, score=0.3), (1, 1, 1)),
]


@pytest.mark.parametrize(("record", "found", "expected"), [c[1:] for c in BY_HAND], ids=[c[0] for c in BY_HAND])
def test_by_hand(record: dict[str, Any], found: list[Found], expected: tuple[float, int, int]) -> None:
    for order in (found, found[::-1]):
        assert judged(order, record) == pytest.approx(expected)


def test_the_hand_cases_cover_every_tag() -> None:
    assert {record["tag"] for _, record, _, _ in BY_HAND} == set(TAGS)
    assert len(BY_HAND) == 40


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        ((60, 0, 80, 20), {"right of"}),
        ((0, 60, 20, 80), {"below"}),
        ((-60, 0, -40, 20), {"left of"}),
        ((0, -60, 20, -40), {"above"}),
        ((60, 60, 80, 80), {"right of", "below"}),  # 60 - 4 along each axis, of 84.9: 0.66
        ((4, 0, 24, 20), set()),  # 4 is a tenth of 20 + 20
        ((5, 0, 25, 20), set()),  # what is left, 1, is a fifth of 5
        ((8, 0, 28, 20), set()),  # 4 of 8 is a half, which is not more
        ((9, 0, 29, 20), {"right of"}),  # 5 of 9
        ((0, 0, 20, 20), set()),  # the same box: no offset to divide by
        ((30, 60, 50, 80), {"below"}),  # 26 and 56 of 67: 0.39 and 0.83
        ((0, 0, 100, 20), {"right of"}),  # centres 40 apart, extents 120: 28 of 40
    ],
)
def test_relations_at_the_borders(placed: tuple[float, ...], expected: set[str]) -> None:
    anchor = Instance((0, 0, 20, 20), 1.0)
    assert relations(Instance(placed, 1.0), anchor) == expected  # type: ignore[arg-type]
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(anchor, Instance(placed, 1.0)) == {opposite[r] for r in expected}  # type: ignore[arg-type]


# --- against a plain computation -------------------------------------------------------------------------------------


def stands(a: Found, b: Found, relation: str) -> bool:
    """GenEval's relation, from its description: centres, extents, a tenth, and a cosine of a half."""
    (al, at, ar, ab), (bl, bt, br, bb) = a[1], b[1]
    dx, dy = (al + ar - bl - br) / 2, (at + ab - bt - bb) / 2
    sx = max(abs(dx) - 0.1 * ((ar - al) + (br - bl)), 0.0)
    sy = max(abs(dy) - 0.1 * ((ab - at) + (bb - bt)), 0.0)
    if sx < 1e-3 and sy < 1e-3:
        return False
    axis = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    shrunk = sx if relation in ("left of", "right of") else sy
    return axis > 0 and shrunk / math.hypot(dx, dy) > 0.5


def plain(found: list[Found], record: dict[str, Any]) -> tuple[float, float, float]:
    """Partial, strict and accuracy, in two separate passes over the record, from the published description."""
    least = 0.9 if record["tag"] == "counting" else 0.3
    pool = {
        name: sorted((f for f in found if f[0] == name and f[2] > least), key=lambda f: f[2], reverse=True)[:16]
        for name in CLASSES
    }
    terms: list[float] = []
    fine: dict[int, list[Found]] = {}
    for number, clause in enumerate(record["include"]):
        have, want = pool[clause["class"]], clause["count"]
        terms.append(1 - abs(want - len(have)) / want)
        if len(have) != want:
            if {"color", "position"} & clause.keys():
                terms.append(0)
            continue
        if "color" in clause:
            match = sum(f[3] == clause["color"] for f in have)
            terms.append(1 - abs(want - match) / want)
            if match != want:
                continue
        if "position" in clause:
            relation, other = clause["position"]
            if other not in fine:
                terms.append(0)
                continue
            failed = any(not stands(a, b, relation) for a in have for b in fine[other])
            if failed:
                terms.append(0)
            terms.append(1)
            if failed:
                continue
        fine[number] = have
    strict = len(fine) == len(record["include"])

    correct = True
    top: dict[int, list[Found]] = {}
    for number, clause in enumerate(record["include"]):
        have = pool[clause["class"]][: clause["count"]]
        good = len(have) >= clause["count"]
        good = good and all(f[3] == clause.get("color", f[3]) for f in have)
        if good and "position" in clause:
            relation, other = clause["position"]
            good = other in top and all(stands(a, b, relation) for a in have for b in top[other])
        if good:
            top[number] = have
        correct = correct and good
    for entry in record.get("exclude", []):
        correct = correct and len(pool[entry["class"]]) < entry["count"]
    return sum(terms) / len(terms), float(strict), float(correct)


def drawn_record(rng: random.Random, tag: str) -> dict[str, Any]:
    first, second, third = rng.sample(CLASSES, 3)
    count = rng.randint(2, 4)
    record = {
        "single_object": of(tag, (first, 1, {}), exclude=[(third, rng.randint(1, 2))]),
        "two_object": of(tag, (first, 1, {}), (second, 1, {})),
        "counting": of(tag, (first, count, {}), exclude=[(first, count + 1)]),
        "colors": of(tag, (first, 1, {"color": "red"})),
        "position": of(tag, (first, 1, {}), (second, 1, {"position": [rng.choice(RELATIONS), 0]})),
        "color_attr": of(tag, (first, 1, {"color": "red"}), (second, 1, {"color": "blue"})),
    }[tag]
    if rng.random() < 0.3:  # what the benchmark's own records do not combine
        record["include"][-1]["count"] = rng.randint(1, 3)
        record["include"][-1].setdefault("color", "blue")
    return record


def drawn_scene(rng: random.Random, record: dict[str, Any]) -> list[Found]:
    """Detections near what the record asks for, many of them near a threshold."""
    scores = [x / 1000 for x in rng.sample([*range(295, 306), *range(895, 906), *range(910, 1000, 2)], 60)]
    scores = [0.3 if s == 0.295 else 0.9 if s == 0.895 else s for s in scores]
    found: list[Found] = []
    wanted = [(clause, clause["count"]) for clause in record["include"]]
    asked = {clause["class"] for clause in record["include"]}
    wanted += [(entry, entry["count"] - 1) for entry in record.get("exclude", []) if entry["class"] not in asked]
    for clause, count in wanted:
        for _ in range(max(0, count + rng.choice([0, 0, 0, 0, -1, 1, 2]))):
            x, y = rng.choice([(0, 0), (50, 0), (-50, 0), (0, 50), (0, -50), (rng.randint(-9, 9), rng.randint(-9, 9))])
            width, height = rng.randint(10, 30), rng.randint(10, 30)
            colour = clause.get("color", "red") if rng.random() < 0.8 else rng.choice(COLOURS)
            score = scores.pop() if rng.random() < 0.3 else 0.91005 + 0.0001 * len(found)
            found.append(
                (clause["class"], (100.0 + x, 100.0 + y, 100.0 + x + width, 100.0 + y + height), score, colour)
            )
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("tag", TAGS)
def test_against_a_plain_computation(tag: str) -> None:
    rng = random.Random(tag)
    seen: Counter[tuple[float, float]] = Counter()
    partial = set()
    for _ in range(300):
        record = drawn_record(rng, tag)
        assert record_fault(record) is None
        found = drawn_scene(rng, record)
        expected = plain(found, record)
        assert judged(found, record) == pytest.approx(expected, abs=1e-12), (record, found)
        seen[expected[1:]] += 1
        partial.add(expected[0])
    # Each outcome is met, so that a rule that is left out would show.
    assert min(seen[0.0, 0.0], seen[1.0, 1.0]) > 20
    assert tag == "counting" or seen[0.0, 1.0] > 5
    assert len(partial) > 4


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({}, 'has no GenEval list "include"; write GenEval records (.jsonl)'),
        ({"include": []}, 'has no GenEval list "include"; write GenEval records (.jsonl)'),
        (
            {"include": [{"class": "doge", "count": 1}]},
            "has an entry of 'include' that has the \"class\" 'doge', which GenEval does not know; did you mean dog?",
        ),
        (
            {"include": [{"class": "keyboard", "count": 1}]},
            "has an entry of 'include' that has the \"class\" 'keyboard', which GenEval does not know; write "
            "computer keyboard",
        ),
        (
            of("colors", ("dog", 1, {"color": "grey"})),
            "has an entry of 'include' that has the \"color\" 'grey', which GenEval does not know; did you mean green?",
        ),
        (
            of("position", ("dog", 1, {}), ("cat", 1, {"position": ["beside", 0]})),
            "has an entry of 'include' that has the \"position\" 'beside', which GenEval does not know; known: "
            "left of, right of, above, below",
        ),
        (
            of("position", ("dog", 1, {"position": ["above", 1]}), ("cat", 1, {})),
            "has an entry of 'include' that has a \"position\" that names entry 1 in entry 0; name an earlier entry",
        ),
        (
            of("counting", ("dog", 17, {})),
            "has an entry of 'include' that has \"count\" 17, but GenEval keeps 16 objects of a class; ask for fewer",
        ),
        (
            of("counting", ("dog", 1, {}), exclude=[("cats", 2)]),
            "has an entry of 'exclude' that has the \"class\" 'cats', which GenEval does not know; did you mean cat?",
        ),
        (of("counting", ("dog", 16, {}), exclude=[("dog", 17)]), None),
        ({"tag": 3, "include": [{"class": "dog", "count": 1}]}, f'has the "tag" 3; give {", ".join(TAGS)}'),
        (
            {"include": [{"class": "dog", "count": 1}], "exclude": "cat"},
            'has an "exclude" that is not a list; write [{"class": ..., "count": ...}]',
        ),
    ],
)
def test_faults_of_records(record: dict[str, Any], fault: str | None) -> None:
    assert record_fault(json.loads(json.dumps(record))) == fault


def test_every_class_colour_and_relation_passes() -> None:
    clauses = [{"class": name, "count": 1, "color": COLOURS[i % 10]} for i, name in enumerate(CLASSES)]
    clauses = [{**c, "position": [RELATIONS[i % 4], i - 1]} if i else c for i, c in enumerate(clauses)]
    assert len(set(CLASSES)) == 80
    assert record_fault({"include": clauses}) is None


@pytest.mark.skipif(
    "OPD_FAST_PROMPT_DATA" not in os.environ, reason="OPD_FAST_PROMPT_DATA names no folder of prompt files"
)
def test_the_published_records() -> None:
    prompts = load_prompts(Path(os.environ["OPD_FAST_PROMPT_DATA"]) / "geneval", "test")
    assert len(prompts) == 2212
    rng = random.Random(0)
    for prompt in prompts:
        assert record_fault(prompt.metadata) is None
        found = drawn_scene(rng, prompt.metadata)
        assert judged(found, prompt.metadata) == pytest.approx(plain(found, prompt.metadata), abs=1e-12)


# --- tags ------------------------------------------------------------------------------------------------------------


def tagged(*tags: str | None) -> list[Prompt]:
    return [Prompt("a photo", {} if tag is None else {"tag": tag}) for tag in tags]


def test_means_by_tag() -> None:
    prompts = tagged("counting", "single_object", "counting", "counting", "mine")
    means = by_tag([1.0, 0.5, 0.0, 0.0, 0.25], prompts)
    assert means is not None
    assert list(means.tags.items()) == [
        ("single_object", 0.5),
        ("counting", pytest.approx(1 / 3)),
        ("mine", 0.25),
    ]
    assert means.overall == pytest.approx((0.5 + 1 / 3 + 0.25) / 3)  # not the mean over images, 0.35


def test_means_by_tag_without_some_values() -> None:
    nan = math.nan
    means = by_tag([1.0, nan, nan], tagged("colors", "colors", "position"))
    assert means is not None
    assert means.tags["colors"] == 1.0
    assert math.isnan(means.tags["position"])
    assert math.isnan(means.overall)  # the mean of the other tags is another number
    means = by_tag([1.0, 0.0], tagged("colors", None))
    assert means is not None
    assert means == ({"colors": 1.0, "untagged": 0.0}, 0.5)
    assert by_tag([1.0], tagged(None)) is None
    assert by_tag([], []) is None
    with pytest.raises(ValueError, match="shorter"):
        by_tag([1.0, 2.0], tagged("colors"))
