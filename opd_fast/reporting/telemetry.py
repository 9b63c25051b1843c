"""What a run reports while it goes on: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases, NVTX ranges.

`metrics.jsonl` is the record; the rest shows the same numbers. It has a line for each round,
`{"round": index from 0, "time": seconds since the start, **metrics}`, and a line for each evaluation,
`{"round": rounds done, "time": ..., "evaluation": {task: {reward: mean}}}`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from opd_fast.config import LoggingConfig
from opd_fast.errors import UserError
from opd_fast.files import replace_text

PLAIN_SECONDS = 5.0  # between lines where there is no terminal


class Telemetry:
    """Context manager around the rounds of a run.

    Args:
        run_dir: where `metrics.jsonl` and `tensorboard/` lie.
        config: which of the optional loggers run.
        rounds: the number of rounds in the whole run.
        start_round: rounds done before. Lines about later rounds are dropped from the file, so that a resumed run's
            record reads as if it had never stopped; the evaluation after exactly `start_round` rounds stays.
        resumed: whether the run goes on from a checkpoint, which may be that of a run without rounds. Else it begins
            anew, and nothing stays.
    """

    def __init__(
        self, run_dir: Path, config: LoggingConfig, *, rounds: int, start_round: int = 0, resumed: bool = False
    ) -> None:
        self.run_dir, self.config, self.rounds, self.start_round = Path(run_dir), config, rounds, start_round
        self._resumed = resumed or start_round > 0
        self._metrics: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._screen: _Bar | _Lines = _Lines(rounds, start_round)
        self._opened = contextlib.ExitStack()
        self._time_before, self._start = 0.0, time.monotonic()

    def __enter__(self) -> Telemetry:
        path = self.run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["round"] < self.start_round + ("evaluation" in line)]
        if not self._resumed:
            kept = []
        self._time_before = kept[-1]["time"] if kept else 0.0
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        if self.config.wandb:
            self._wandb = _start_wandb(self.run_dir)
            self._opened.push(lambda kind, error, at: self._wandb.finish(exit_code=0 if kind is None else 1))
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.start_round or None)
            self._tensorboard = self._opened.enter_context(events)
        self._metrics = self._opened.enter_context(path.open("a", encoding="utf-8"))
        if sys.stderr.isatty():
            self._screen = _Bar(self.rounds, self.start_round)
            self._opened.enter_context(self._screen.progress)
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, at)

    @property
    def seconds(self) -> float:
        """The time since the run's start, which includes the time before a resumption."""
        return self._time_before + time.monotonic() - self._start

    def round(self, index: int, metrics: dict[str, float]) -> None:
        """Record round `index` (0-based). `loss` and `samples_per_second` also go to the screen when present."""
        self._write(index, {k: float(v) for k, v in metrics.items()}, metrics)
        self._screen.round(index, metrics)

    def evaluation(self, index: int, rewards: dict[str, dict[str, float]]) -> None:
        """Record mean rewards `{task: {reward: value}}` after `index` rounds; those that are NaN are left out."""
        rewards = {task: {k: v for k, v in row.items() if math.isfinite(v)} for task, row in rewards.items()}
        means = [(task, name, value) for task, row in rewards.items() for name, value in row.items()]
        self._write(index, {"evaluation": rewards}, {f"evaluation/{task}/{name}": value for task, name, value in means})
        self.message(f"round {index}: " + "  ".join(f"{task} {name} {value:.3f}" for task, name, value in means))

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._screen.message(text)

    def _write(self, index: int, values: dict[str, Any], scalars: dict[str, float]) -> None:
        """Write `values` into metrics.jsonl, and `scalars` wherever else metrics go."""
        if self._metrics is None:
            raise RuntimeError("Telemetry is a context manager: use it inside its `with` block")
        self._metrics.write(json.dumps({"round": index, "time": round(self.seconds, 3), **values}) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, index)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=index)


class NullTelemetry:
    """The telemetry of every process but the first: it records nothing."""

    def __enter__(self) -> NullTelemetry:
        return self

    def __exit__(self, *raised: object) -> None: ...
    def round(self, index: int, metrics: dict[str, float]) -> None: ...
    def evaluation(self, index: int, rewards: dict[str, dict[str, float]]) -> None: ...
    def message(self, text: str) -> None: ...


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, none if there is no file. A last line that a crash cut short is left out."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(text))
    return lines


class _Bar:
    """A live bar on a terminal, while the context of its `progress` is open."""

    def __init__(self, rounds: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("[bold]round"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._task = self.progress.add_task("train", total=rounds, completed=start, status="")

    def round(self, index: int, metrics: dict[str, float]) -> None:
        self.progress.update(self._task, completed=index + 1, status=_status(metrics))

    def message(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)


class _Lines:
    """Plain lines where there is no terminal: one for the first and the last round, and one every few seconds."""

    def __init__(self, rounds: int, start: int) -> None:
        self._rounds, self._first = rounds, start
        self._spent, self._last, self._printed = 0.0, time.monotonic(), -PLAIN_SECONDS

    def round(self, index: int, metrics: dict[str, float]) -> None:
        now, done = time.monotonic(), index + 1
        # A round's own time, where it is given, leaves out the evaluations, which do not come with each round.
        self._spent += metrics.get("seconds", now - self._last)
        self._last = now
        if now - self._printed < PLAIN_SECONDS and done < self._rounds:
            return
        self._printed = now
        # The first round warms up caches and compilers, but it is all there is to go by at first.
        left = self._spent / (done - self._first) * (self._rounds - done)
        self.message(f"round {done}/{self._rounds}  {_status(metrics)}  left {_clock(left)}")

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _status(metrics: dict[str, float]) -> str:
    formats = {"loss": "loss {:.3e}", "samples_per_second": "{:.1f} samples/s"}
    return "  ".join(text.format(metrics[name]) for name, text in formats.items() if name in metrics)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _start_wandb(run_dir: Path) -> Any:
    """Return the run at Weights & Biases that belongs to this directory.

    `wandb.id` keeps its identity: a resumed run goes on there, and runs of one name, such as the stages of two
    cascades, are runs of their own.
    """
    try:
        import wandb
    except ImportError as error:
        remedy = "pip install 'opd_fast[wandb]' or --logging.wandb false"
        raise UserError("logging.wandb", "wandb is not installed", remedy) from error
    run_dir = run_dir.resolve()
    file = run_dir / "wandb.id"
    if not file.is_file():
        # A run of an earlier version was known by the name of its directory.
        earlier = run_dir.name if (run_dir / "wandb").is_dir() else f"{run_dir.name}-{secrets.token_hex(4)}"
        replace_text(file, earlier + "\n")
    identity = file.read_text(encoding="utf-8").strip()
    name = f"{run_dir.parent.name}/{run_dir.name}" if (run_dir.parent / "config.yaml").is_file() else run_dir.name
    return wandb.init(project="opd_fast", name=name, dir=str(run_dir), id=identity, resume="allow")


NVTX = "OPD_FAST_NVTX"
"""The environment variable that switches NVTX ranges on where it is 1; `benchmarks/profile.sh` sets it."""

_NOTHING = contextlib.nullcontext()


def annotate(name: str) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that names a block in a profile.

    It is an NVTX range in the domain opd_fast where OPD_FAST_NVTX is 1, else a range of the torch profiler while that
    records. With neither it does nothing and costs well under a microsecond.
    """
    if _nvtx():
        import nvtx

        return nvtx.annotate(name, domain="opd_fast")
    profiler = sys.modules.get("torch.autograd.profiler")  # without torch nothing is profiled
    if profiler is not None and profiler._is_profiler_enabled:
        return profiler.record_function(name)
    return _NOTHING


@functools.cache
def _nvtx() -> bool:
    """Return whether NVTX is on. It is looked up once because reading the environment costs more than all the rest."""
    return os.environ.get(NVTX) == "1"


def quiet_libraries() -> None:
    """Keep transformers from drawing a bar for each component it loads and from warning about image processors that
    this project does not use. A TRANSFORMERS_VERBOSITY set by the user is respected; downloads keep their bars."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.disable_progress_bar()
