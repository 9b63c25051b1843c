"""metrics.jsonl, plain lines, TensorBoard, and what a resumed run keeps."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import timeit
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from opd_fast.config import LoggingConfig
from opd_fast.errors import UserError
from opd_fast.reporting import telemetry
from opd_fast.reporting.telemetry import Telemetry, annotate, read_metrics

QUIET = LoggingConfig(tensorboard=False)


def run(folder: Path, rounds: range, total: int = 10, config: LoggingConfig = QUIET) -> None:
    """Rounds with an evaluation before the first, and after every second."""
    with Telemetry(folder, config, rounds=total, start_round=rounds.start) as log:
        if rounds.start == 0:
            log.evaluation(0, {"text": {"text": 0.25}})
        for i in rounds:
            log.round(i, {"loss": 1.0 / (i + 1), "samples_per_second": 3.0})
            if i % 2:
                log.evaluation(i + 1, {"text": {"text": 0.5}})


def test_lines(tmp_path: Path) -> None:
    run(tmp_path, range(3))
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], "evaluation" in line) for line in lines] == [
        (0, True),
        (0, False),
        (1, False),
        (2, True),
        (2, False),
    ]
    assert lines[1]["loss"] == 1.0
    assert lines[3]["evaluation"] == {"text": {"text": 0.5}}
    assert all(later["time"] >= line["time"] >= 0 for line, later in itertools.pairwise(lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    with Telemetry(tmp_path, QUIET, rounds=2) as log:
        log.round(0, {"loss": 1.0})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_resuming_drops_later_rounds(tmp_path: Path) -> None:
    def without_time(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder / "metrics.jsonl")]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    run(whole, range(8))
    run(cut, range(7))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"round": 7, "ti')  # a crash in the middle of a line
    run(cut, range(4, 8))  # from the checkpoint after four rounds
    assert without_time(cut) == without_time(whole)
    times = [line["time"] for line in read_metrics(cut / "metrics.jsonl")]
    assert times == sorted(times)


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    run(tmp_path, range(3))
    run(tmp_path, range(1))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_plain_lines_are_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path, QUIET, rounds=500) as log:
        log.message("hello")
        for i in range(500):
            log.round(i, {"loss": 0.5, "samples_per_second": 12.0})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "hello"
    assert said[1].startswith("round 1/500  loss 5.000e-01  12.0 samples/s  left")
    assert said[-1].startswith("round 500/500")
    assert len(said) <= 5


def test_plain_lines_come_every_few_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: float(next(clock)))  # a second passes at every look
    run(tmp_path, range(100), total=100)
    said = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert 20 <= len(said) <= 60
    assert "left 0:00" in said[-1]


def test_a_terminal_gets_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Telemetry(tmp_path, QUIET, rounds=4) as log:
        log.round(0, {"loss": 0.5, "samples_per_second": 12.0})
        log.message("[not markup]")
    said = capsys.readouterr().err
    assert "loss 5.000e-01" in said
    assert "12.0 samples/s" in said
    assert "[not markup]" in said


def test_tensorboard_only_when_asked(tmp_path: Path) -> None:
    run(tmp_path, range(2))
    assert not (tmp_path / "tensorboard").exists()
    run(tmp_path, range(2), config=LoggingConfig(tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == [1.0, 0.5]
    assert [e.step for e in events.Scalars("evaluation/text/text")] == [0, 2]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    fake = types.ModuleType("wandb")

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((values, step))

        def finish(self, exit_code: int) -> None:
            logged.append(({}, exit_code))

    fake.init = lambda **options: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Telemetry(tmp_path, LoggingConfig(tensorboard=False, wandb=True), rounds=2) as log:
        log.round(0, {"loss": 1.0})
    assert logged == [({"loss": 1.0}, 0), ({}, 0)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging\.wandb: .*pip install"):
        Telemetry(tmp_path, LoggingConfig(tensorboard=False, wandb=True), rounds=2).__enter__()


def test_runs_of_one_name_are_their_own_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the stages of two cascades; a resumed run, moved or not, goes on, one of an earlier version under its name."""
    started: list[tuple[str, str]] = []
    fake = types.ModuleType("wandb")

    def init(*, name: str, id: str, **options: object) -> object:
        started.append((name, id))
        return types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda **k: None)

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def start(folder: Path) -> tuple[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        with Telemetry(folder, LoggingConfig(tensorboard=False, wandb=True), rounds=1):
            return started[-1]

    for cascade in ("one", "two"):
        (tmp_path / cascade).mkdir()
        (tmp_path / cascade / "config.yaml").write_text("")
    first, second = start(tmp_path / "one" / "1-words"), start(tmp_path / "two" / "1-words")
    assert (first[0], second[0]) == ("one/1-words", "two/1-words")
    assert first[1] != second[1]
    assert start(tmp_path / "one" / "1-words") == first
    moved = (tmp_path / "two" / "1-words").rename(tmp_path / "moved")
    assert start(moved) == ("moved", second[1])
    (tmp_path / "old" / "wandb").mkdir(parents=True)
    assert start(tmp_path / "old") == ("old", "old")


def test_use_outside_the_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="with"):
        Telemetry(tmp_path, QUIET, rounds=1).round(0, {})


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The NVTX ranges that are opened; the switch is looked up anew."""
    opened: list[str] = []
    fake = types.ModuleType("nvtx")

    @contextlib.contextmanager
    def range_(name: str, domain: str) -> Iterator[None]:
        opened.append(f"{domain}/{name}")
        yield

    fake.annotate = range_  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    monkeypatch.delenv(telemetry.NVTX, raising=False)
    telemetry._nvtx.cache_clear()
    yield opened
    telemetry._nvtx.cache_clear()


def test_annotate_opens_a_range_where_it_is_switched_on(ranges: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(telemetry.NVTX, "1")
    with annotate("student.forward"):
        pass
    assert ranges == ["opd_fast/student.forward"]


def test_annotate_names_a_block_for_the_torch_profiler(ranges: list[str]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded, annotate("step"):
        torch.ones(3).add_(1)
    assert "step" in {event.key for event in recorded.key_averages()}
    assert ranges == []


def test_annotate_switched_off_costs_less_than_a_microsecond(ranges: list[str]) -> None:
    """Of the processor's time, the best of many short runs, less what an empty loop takes."""

    def seconds(run: Callable[[], None]) -> float:
        return min(timeit.repeat(run, number=1, repeat=100, timer=time.thread_time))

    def annotated() -> None:
        for _ in range(1000):
            with annotate("step"):
                pass

    def empty() -> None:
        for _ in range(1000):
            pass

    assert (seconds(annotated) - seconds(empty)) / 1000 < 1e-6
    assert ranges == []
