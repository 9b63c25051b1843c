"""The ladder's own logic on a small model: rows, ratios, and what it says of a technique that is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ladder
from benchmarks.ladder import BARE, RUNGS, TECHNIQUES, Ladder, Technique
from benchmarks.models import NANO
from benchmarks.report import render
from benchmarks.rounds import Recipe, Work, random_work
from benchmarks.same_rewards import SWITCHES, verdict
from opd_fast.config import EngineConfig
from opd_fast.config.command_line import parse
from opd_fast.training import optimize as engine
from opd_fast.training.optimize import ActiveTechniques
from opd_fast.training.student import Student
from tests.benchmarks.test_benchmarks import ENVIRONMENT

CPU = torch.device("cpu")
RECIPE = Recipe(
    steps=3,
    samples_per_task=2,
    guidance=4.5,
    teacher_guidance=(4.5, 4.5, 1.0),
    micro_batch=2,
    rank=4,
    resolution=64,
)
MERGING = TECHNIQUES[1:3]


class OutOfResources(Exception):
    """As Triton raises it: of no kind that torch knows."""


@pytest.fixture(autouse=True)
def _no_memory_profile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it takes longer than the rounds; one test measures it."""
    if request.node.name != "test_every_rung_is_a_row":
        monkeypatch.setattr(ladder.Side, "peak_bytes", lambda self, batch: 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return random_work(CPU, NANO, RECIPE, tmp_path_factory.mktemp("teachers"))


def climb(work: Work, techniques: tuple[Technique, ...] = MERGING, pairs: int | None = 2) -> dict[str, Any]:
    wanted = ["one-pass", *(technique.name for technique in techniques)]
    climbed = Ladder(work, "ladder/nano", pairs=pairs, techniques=techniques).rows(wanted)
    return {row["name"].removeprefix("ladder/nano/"): row for row in climbed}


def test_every_rung_is_a_row(work: Work) -> None:
    rows = climb(work)
    assert list(rows) == ["one-pass", "teachers-merged", "student-merged", "reference"]
    for name, row in rows.items():
        assert row["exact"] is True
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert row["ratio_vs_reference"] > 0
        assert row["share_of_floor"] == pytest.approx(work.floor_seconds() / row["seconds"]["p50"], rel=1e-4)
        assert row["gradient_error"] <= 1e-5, name
        assert row["loss_error"] <= 1e-5, name
        assert row["peak_bytes"] > 0
        assert row["samples"] == 6
    assert rows["reference"]["ratio_vs_reference"] == 1.0
    assert rows["reference"]["pairs"] == 6  # two with each rung
    assert rows["one-pass"]["engaged"] == {}
    assert rows["teachers-merged"]["engaged"] == {"teachers-merged": 3}
    layers = len([name for name in work.start if name.endswith(".A")])
    assert rows["student-merged"]["engaged"] == {"teachers-merged": 3, "student-merged": layers}
    # Three merged teachers take the room of three more models.
    assert rows["teachers-merged"]["peak_bytes"] > 1.5 * rows["one-pass"]["peak_bytes"]
    page = render({"a.json": {"environment": ENVIRONMENT, "rows": json.loads(json.dumps(list(rows.values())))}})
    assert "| `ladder/nano/student-merged` |" in page


def test_ratios_are_of_rounds_in_turn(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the reference's and the engine's rounds move: 6 s and 2 s, the machine twice as slow later."""
    seconds = iter([2.0, 6.0, 4.0, 12.0, 2.0, 6.0])  # engine, reference, engine, ...
    monkeypatch.setattr(ladder.Side, "seconds", lambda self, batch: next(seconds))
    monkeypatch.setattr(ladder, "BARE", EngineConfig(placement="merged", merge_student=False, compile="off"))
    row = climb(work, (), pairs=3)["one-pass"]
    assert row["seconds"]["p50"] == 2.0
    assert row["ratio_vs_reference"] == 3.0


def test_ratio_to_the_compiled_reference_leaves_drift_out(work: Work) -> None:
    climbed = Ladder(work, "ladder/nano", pairs=1, techniques=(), compile_blocks=True)
    climbed.work.compiled = lambda: work.published()[1]  # type: ignore[method-assign]
    try:
        rows = {row["name"].rsplit("/", 1)[-1]: row for row in climbed.rows(["compiled-reference", "one-pass"])}
    finally:
        del climbed.work.compiled
    compiled, own = rows["compiled-reference"], rows["one-pass"]
    assert own["ratio_vs_compiled"] == pytest.approx(own["ratio_vs_reference"] / compiled["ratio_vs_reference"], 1e-4)
    assert "ratio_vs_compiled" not in compiled


@pytest.mark.parametrize(("pairs", "seconds", "expected"), [(None, 0.0, 2), (None, 1e9, 20), (5, 0.0, 5)])
def test_pairs_fit_the_time(
    work: Work, monkeypatch: pytest.MonkeyPatch, pairs: int | None, seconds: float, expected: int
) -> None:
    monkeypatch.setattr(ladder.Side, "seconds", lambda self, batch: 0.5)
    rows = Ladder(work, "ladder/nano", pairs=pairs, seconds=seconds, techniques=()).rows(["one-pass"])
    assert next(rows)["pairs"] == expected


@pytest.fixture
def idle_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that merges no student, whatever it is told."""
    monkeypatch.setattr(Student, "merge_in_rounds", lambda self, wanted: setattr(self, "_merged", None) or 0)


@pytest.mark.usefixtures("idle_student")
def test_a_technique_that_is_off_has_a_reason_and_no_time(work: Work) -> None:
    rows = climb(work)
    assert rows["student-merged"] == {"name": "ladder/nano/student-merged", "note": "not engaged: student-merged"}
    assert rows["teachers-merged"]["ratio_vs_reference"] > 0


@pytest.mark.usefixtures("idle_student")
def test_rungs_above_one_that_is_off_go_without_it(work: Work) -> None:
    rows = climb(work, (MERGING[1], MERGING[0]))
    assert "seconds" not in rows["student-merged"]
    assert rows["teachers-merged"]["engaged"] == {"teachers-merged": 3}


def test_a_technique_nobody_asked_for_is_told(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.rounds.apply_techniques", lambda *args, **kwargs: ActiveTechniques(compiled=24))
    techniques = (Technique("blocks", {"compile": "off"}, lambda active: active.compiled),)
    assert climb(work, techniques)["one-pass"]["note"] == "at work though not asked for: blocks"


def test_a_rung_that_fails_does_not_end_the_climb(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_techniques(settings: EngineConfig, *args: Any, **kwargs: Any) -> ActiveTechniques:
        if settings.placement == "merged":
            raise OutOfResources("no room\nfor three")
        return engine.apply_techniques(settings, *args, **kwargs)

    monkeypatch.setattr("benchmarks.rounds.apply_techniques", apply_techniques)
    rows = climb(work)
    assert rows["teachers-merged"]["note"] == "failed: OutOfResources: no room for three"
    assert set(rows["student-merged"]["engaged"]) == {"student-merged"}


def test_lossy_rungs_are_marked(work: Work) -> None:
    lossy = Technique("teachers-merged", {"placement": "merged"}, MERGING[0].evidence, exact=False)
    rows = climb(work, (lossy, MERGING[1]))
    assert rows["one-pass"]["exact"] is True
    assert rows["teachers-merged"]["exact"] is False
    assert rows["student-merged"]["exact"] is False


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = ladder.main(
        [
            "--shape",
            "nano",
            "--pairs",
            "1",
            "--rungs",
            "one-pass,teachers-merged,graphs",
            "--save-results",
            str(tmp_path),
        ]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "needs a GPU" in out
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        f"ladder/nano/{name}" for name in ("graphs", "one-pass", "reference", "teachers-merged")
    ]


@pytest.mark.usefixtures("idle_student")
def test_status_tells_of_a_technique_that_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder.main(["--shape", "nano", "--pairs", "1", "--rungs", "student-merged"]) == 1
    assert "not engaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--rungs", "graph"], "unknown rung graph"), (["--pairs", "0"], "--pairs is 0"), (["--samples", "-1"], "is -1")],
)
def test_wrong_options(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ladder.parse(argv)
    assert message in capsys.readouterr().err


def test_the_last_rung_is_the_engines_default_but_for_precision() -> None:
    settings = {key: value for technique in TECHNIQUES for key, value in technique.change.items()}
    on_a_gpu = vars(EngineConfig()) | {"compile": "on", "graphs": "on", "precision": "fp8"}
    assert vars(BARE) | settings == on_a_gpu
    assert RUNGS[-2] == "fp8"


def test_a_rung_may_take_the_place_of_another(work: Work) -> None:
    rows = climb(work, TECHNIQUES[:3])
    assert rows["teachers-grouped"]["engaged"] == {"teachers-grouped": 3}
    assert rows["teachers-merged"]["engaged"] == {"teachers-merged": 3}
    assert set(rows["student-merged"]["engaged"]) == {"teachers-merged", "student-merged"}


def test_rewards_are_the_same_within_the_spread_of_seeds() -> None:
    on = [{"text": value} for value in (0.90, 0.94, 0.92)]
    assert verdict(on, [{"text": 0.95}])["text"]["same"]
    assert verdict(on, [{"text": 0.89}, {"text": 0.93}])["text"]["same"]
    assert not verdict(on, [{"text": 0.93}, {"text": 0.87}])["text"]["same"]


def test_off_is_off() -> None:
    settings = vars(parse(["bundled", *SWITCHES]).config.engine)
    assert settings == vars(BARE)
