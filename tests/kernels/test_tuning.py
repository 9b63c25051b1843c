"""Launch parameters: the rule, what is measured and when, what is kept. Times are given here, not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from opd_kernels import tuning
from opd_kernels.tuning import CANDIDATES, Launch, Problem, Tuner

DEVICE = torch.device("cuda", 0)
PROBLEM = Problem("step", 9, 65536, "cond_s=bfloat16 cond_t=bfloat16 keys")
USUAL, WIDE = Launch(1024, 4, 1), Launch(2048, 8, 1)


class Clock:
    """Stands in for `device_times`: the times given by candidate, 10 us for the others; counts its calls."""

    def __init__(self) -> None:
        self.microseconds: dict[Launch, float] = {}
        self.scatter = [1.0] * 10
        self.calls = 0

    def __call__(self, runs: list[Callable[[], object]]) -> list[list[float]]:
        self.calls += 1
        return [[t * self.microseconds.get(run(), 10.0) / 1e6 for t in self.scatter] for run in runs]  # type: ignore[call-overload]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "device_times", clock)
    monkeypatch.setattr(tuning, "identity", lambda device: "a device, triton, kernels")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("OPD_FAST_TUNE", raising=False)
    return clock


def choose(tuner: Tuner, problem: Problem = PROBLEM) -> Launch:
    return tuner.choose(problem, DEVICE, lambda launch: lambda: launch)


def test_the_rule_is_what_it_was() -> None:
    assert [tuning.rule(batch, 65536).tiles for batch in (1, 127, 128, 511, 512)] == [1, 1, 2, 2, 4]
    assert {tuning.rule(batch, 65536)[:2] for batch in (1, 128, 512)} == {(1024, 4)}


def test_candidates_fit_the_problem() -> None:
    assert set(Problem("step", 768, 65536, "").candidates()) == set(CANDIDATES)
    assert Problem("step", 768, 65536, "").candidates()[0] == tuning.rule(768, 65536)
    tiny = Problem("step", 24, 1024, "").candidates()
    assert tiny[0] == USUAL
    assert all(launch.block * launch.tiles < 2048 for launch in tiny)
    assert {c.tiles for c in Problem("log_prob_backward", 768, 65536, "", tiled=False).candidates()} == {1}
    assert Problem("step", 3, 35, "").candidates() == [USUAL]


def test_nothing_is_measured_unasked(clock: Clock) -> None:
    tuner = Tuner()
    assert choose(tuner) == USUAL
    assert clock.calls == 0
    assert [choice.source for choice in tuner.choices()] == ["rule"]


def test_the_fastest_is_taken_and_kept(clock: Clock, tmp_path: Path) -> None:
    tuner = Tuner()
    clock.microseconds = {WIDE: 8.0}
    with tuner.measuring() as chosen:
        assert choose(tuner) == choose(tuner) == WIDE
    assert clock.calls == 1
    assert str(chosen[0]).startswith(f"kernel {PROBLEM.key}: 2048x1/8, measured (8 us; ")
    clock.microseconds = {USUAL: 1.0}
    assert choose(tuner) == WIDE  # whatever is measured later
    with tuner.measuring() as chosen:
        assert choose(tuner) == WIDE
    assert chosen == []
    again = Tuner()  # another process
    assert choose(again) == WIDE
    assert again.choices()[0].source == "kept"
    assert again.choices()[0].microseconds["2048x1/8"] == 8.0
    assert clock.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]


def test_a_disturbed_measurement_counts_for_an_hour(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(time=lambda: 1000.0)
    monkeypatch.setattr(tuning, "time", now)
    clock.microseconds, clock.scatter = {WIDE: 8.0}, [1.0, 1.0, 1.0, 1.5, 1.5, 1.6]
    with (tuner := Tuner()).measuring():
        assert choose(tuner) == WIDE
    entry = json.loads((tmp_path / "kernels.json").read_text())["a device, triton, kernels"][PROBLEM.key]
    assert entry["until"] == 4600.0
    clock.microseconds, clock.scatter = {}, [1.0, 1.0, 1.01, 1.0, 1.0, 5.0]
    for seconds, wanted, calls in ((4599.0, WIDE, 1), (4601.0, USUAL, 2), (1e9, USUAL, 2)):
        now.time = lambda seconds=seconds: seconds
        with (tuner := Tuner()).measuring():
            assert choose(tuner) == wanted
        assert clock.calls == calls
    entry = json.loads((tmp_path / "kernels.json").read_text())["a device, triton, kernels"][PROBLEM.key]
    assert entry["until"] is None


def test_what_an_earlier_version_kept_is_measured_again(clock: Clock, tmp_path: Path) -> None:
    entry = {"launch": "2048x1/8", "microseconds": {"2048x1/8": 1.0}}
    (tmp_path / "kernels.json").write_text(json.dumps({"a device, triton, kernels": {PROBLEM.key: entry}}))
    with (tuner := Tuner()).measuring():
        assert choose(tuner) == USUAL
    assert clock.calls == 1


def test_noise_does_not_replace_the_rule(clock: Clock) -> None:
    tuner = Tuner()
    clock.microseconds = {WIDE: 9.8}
    with tuner.measuring():
        assert choose(tuner) == USUAL


def test_the_rules_choices_are_measured_when_asked(clock: Clock) -> None:
    tuner = Tuner()
    clock.microseconds = {WIDE: 5.0}
    assert choose(tuner) == USUAL
    before = tuner.epoch
    with tuner.measuring():
        assert choose(tuner) == WIDE
    assert tuner.epoch > before  # bound launches of the rule's choice are not used again


def test_a_capture_does_not_measure(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = Tuner()
    clock.microseconds = {WIDE: 5.0}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuner.measuring():
        assert choose(tuner) == USUAL
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert choose(tuner) == USUAL  # once used, it stays
    assert clock.calls == 0


def test_sizes_in_powers_of_two(clock: Clock) -> None:
    tuner = Tuner()
    with tuner.measuring() as chosen:
        choose(tuner)
        choose(tuner, PROBLEM._replace(batch=16, elements=40000))
        assert len(chosen) == 1
        for other in ({"batch": 17}, {"elements": 65552}, {"elements": 65535}, {"operands": "x0"}, {"kernel": "y"}):
            choose(tuner, PROBLEM._replace(**other))  # type: ignore[arg-type]
    assert len(chosen) == clock.calls == 6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "{",
        json.dumps({"a device, triton, kernels": 3}),
        json.dumps({"a device, triton, kernels": {PROBLEM.key: {"launch": "999x1/4", "microseconds": {}}}}),
        json.dumps({"a device, triton, kernels": {PROBLEM.key: {"launch": "2048x1/8"}}}),
        json.dumps({"another device": {PROBLEM.key: {"launch": "2048x1/8", "microseconds": {}}}}),
    ],
)
def test_a_file_of_no_use_is_measured_over(clock: Clock, tmp_path: Path, content: str) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(content)
    clock.microseconds = {Launch(512, 2, 1): 5.0}
    tuner = Tuner()
    with tuner.measuring():
        assert choose(tuner) == Launch(512, 2, 1)
    kept = json.loads(file.read_text())
    assert kept["a device, triton, kernels"][PROBLEM.key]["launch"] == "512x1/2"
    assert ("another device" in kept) == ("another device" in content)


def test_a_folder_that_cannot_be_written(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "file" / "below"))
    clock.microseconds = {WIDE: 5.0}
    tuner = Tuner()
    with tuner.measuring():
        assert choose(tuner) == WIDE


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert tuning.cache_file() == tmp_path / "a" / "kernels.json"
    monkeypatch.delenv("OPD_FAST_CACHE")
    assert tuning.cache_file() == tmp_path / "b" / "opd_fast" / "kernels.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_file() == Path.home() / ".cache" / "opd_fast" / "kernels.json"


def test_switched_off(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.microseconds = {WIDE: 5.0}
    tuner = Tuner()
    with tuner.measuring():
        assert choose(tuner) == WIDE
    monkeypatch.setenv("OPD_FAST_TUNE", "0")
    off = Tuner()
    with off.measuring() as chosen:
        assert choose(off) == USUAL
    assert [choice.source for choice in chosen] == ["rule"]
    monkeypatch.setenv("OPD_FAST_TUNE", "yes")
    with pytest.raises(ValueError, match="OPD_FAST_TUNE must be 0 or 1, got 'yes'"), Tuner().measuring():
        pass


def test_one_measures_at_a_time(clock: Clock) -> None:
    tuner = Tuner()
    with tuner.measuring(), pytest.raises(ValueError, match="already active"), tuner.measuring():
        pass
    with tuner.measuring():
        pass


def test_a_launch_for_everything_inside(clock: Clock) -> None:
    tuner = Tuner()
    with tuner.using(WIDE):
        assert choose(tuner) == WIDE
    assert choose(tuner) == USUAL
    with tuner.using(Launch(1024, 4, 4)):
        assert choose(tuner, PROBLEM._replace(tiled=False)) == USUAL
    with pytest.raises(ValueError, match="no candidate"), tuner.using(Launch(32, 1, 1)):
        pass


def test_identity_names_the_kernels() -> None:
    name = tuning.identity(torch.device("cpu"))
    assert name.startswith("cpu, triton 3.")
    assert len(name.rsplit("kernels ")[1]) == 12
