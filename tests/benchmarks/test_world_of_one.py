"""The cost of a world of one process: its statistics by hand, and the measurement itself on a CPU."""

from __future__ import annotations

import json
import os
from math import comb
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import world_of_one
from benchmarks.rounds import bundle_is_there
from benchmarks.world_of_one import in_turns, median_interval, one_process


def test_the_interval_is_the_binomial_law_s() -> None:
    # Six values: the smallest and the largest miss the median in 2 of 64 cases, the next pair in 14.
    assert median_interval([6.0, 1.0, 5.0, 2.0, 4.0, 3.0]) == (1.0, 6.0)
    # Forty: order statistics 14 and 27, the classical table's entry for 95 %.
    assert median_interval([float(i) for i in range(1, 41)]) == (14.0, 27.0)
    assert 2 * sum(comb(40, k) for k in range(14)) / 2**40 <= 0.05 < 2 * sum(comb(40, k) for k in range(15)) / 2**40
    with pytest.raises(ValueError, match="take 6 or more"):
        median_interval([1.0] * 5)


def test_rounds_take_turns_and_so_does_who_begins() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, seconds: float):
        def round(index: int) -> float:
            calls.append((name, index))
            return seconds

        return round

    assert in_turns(side("a", 1.0), side("b", 2.0), 3) == [(1.0, 2.0)] * 3
    names = "".join(name for name, _ in calls)
    assert names in ("ab" * 3 + "baabba", "ab" * 3 + "abbaab")
    assert [index for name, index in calls if name == "a"] == list(range(6))


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with one_process():
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert os.environ["RANK"] == "7"
    assert "WORLD_SIZE" not in os.environ


@pytest.mark.skipif(not bundle_is_there(), reason="the bundle has not been built")
def test_both_sides_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world really is open around ddp's rounds, and both sides compute the same."""
    sizes: list[int] = []
    real = world_of_one.in_turns

    def watched(*given):
        sizes.append(dist.get_world_size())
        return real(*given)

    monkeypatch.setattr(world_of_one, "in_turns", watched)
    out = tmp_path / "cost.json"
    status = world_of_one.main(["--pairs", "6", "--samples", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert sizes == [1]
    assert not dist.is_initialized()
    assert (found["backend"], found["pairs"]) == ("gloo", 6)
    low, high = found["interval"]
    assert low <= found["ratio"] <= high
    assert status == int(high > world_of_one.LIMIT)
