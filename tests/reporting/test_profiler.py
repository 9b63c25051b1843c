"""What `RoundProfiler` records of a run, and what it leaves when the run is short or fails."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from opd_fast.reporting.profiler import RoundProfiler
from opd_fast.reporting.telemetry import annotate


def run(folder: Path, rounds: int, fail_in: int | None = None, **which: int) -> list[str]:
    """Rounds of one product each, of another size in each; what was said."""
    said: list[str] = []
    with RoundProfiler(folder, log=said.append, **which) as profiler:  # type: ignore[arg-type]
        for index in range(rounds):
            with profiler.round(), annotate(f"round {index + 1}"):
                torch.mm(torch.ones(8, 8), torch.ones(8, 8))
                if index + 1 == fail_in:
                    raise RuntimeError("out of luck")
    return said


def ranges(folder: Path) -> set[str]:
    """The annotated rounds on the trace."""
    events = json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("round ")}


def test_the_rounds_asked_for_are_recorded(tmp_path: Path) -> None:
    said = run(tmp_path, 8)
    assert ranges(tmp_path) == {"round 3", "round 4", "round 5"}
    table = (tmp_path / "profile" / "operators.txt").read_text()
    assert "aten::mm" in table
    assert said == [
        f"profile: rounds 3 to 5 of this process in {tmp_path}/profile/trace.json.gz; "
        "the top operators in operators.txt beside it"
    ]


def test_a_run_that_ends_early_leaves_what_it_did(tmp_path: Path) -> None:
    (said,) = run(tmp_path, 3)
    assert ranges(tmp_path) == {"round 3"}
    assert said.startswith("profile: round 3 of this process in")


def test_an_error_leaves_the_rounds_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        run(tmp_path, 9, fail_in=3, first=2, last=4)
    assert "round 2" in ranges(tmp_path)
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_run_too_short_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, 2) == ["profile: nothing recorded; of 2 rounds none from round 3 on was finished"]
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(("first", "last"), [(0, 3), (4, 3)])
def test_rounds_that_cannot_be(tmp_path: Path, first: int, last: int) -> None:
    with pytest.raises(ValueError, match="cannot be profiled"):
        RoundProfiler(tmp_path, first=first, last=last)
