"""A torch profile of a few rounds of a run: a trace for a timeline, and the operators that took the most time.

`RUN_DIR/profile/trace.json.gz` opens in https://ui.perfetto.dev or chrome://tracing; the ranges of `telemetry.annotate`
(round, student.forward, teacher.forward, step, backward, optimizer) are on it. `RUN_DIR/profile/operators.txt` is the
table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

FIRST, LAST = 3, 5  # rounds of this process, from 1: by the third, kernels are compiled and graphs captured
OPERATORS = 40  # lines of the table


class RoundProfiler:
    """Context manager around a run's rounds; `round()` goes around each.

    Rounds `first` to `last` of this process are recorded, counted from 1, so that a resumed run records its own. A run
    that ends in between, or by an error, leaves the rounds that it finished.

    Args:
        run_dir: the run's directory; `profile/` is made in it.
        first, last: the rounds that are recorded.
        log: takes one line about the outcome.

    Raises:
        ValueError: first is below 1 or above last.
    """

    def __init__(
        self, run_dir: Path, *, first: int = FIRST, last: int = LAST, log: Callable[[str], None] = print
    ) -> None:
        if not 1 <= first <= last:
            raise ValueError(f"rounds {first} to {last} cannot be profiled; give 1 <= first <= last")
        self.folder, self.first, self.last, self.log = Path(run_dir) / "profile", first, last, log
        self._begun = 0
        self._finished = 0
        """Recorded rounds that ran to their end."""
        self._profile: Any = None
        self._written = False

    def __enter__(self) -> RoundProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile is not None:
            self._write()
        if not self._written:
            self.log(f"profile: nothing recorded; of {self._begun} rounds none from round {self.first} on was finished")

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Around one round."""
        self._begun += 1
        if self._begun == self.first:
            self._start()
        yield
        if self._profile is not None:
            self._finished += 1
            if self._begun == self.last:
                self._write()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the last round's kernels would be cut off
        profile.stop()
        if self._finished == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        profile.export_chrome_trace(str(trace))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=OPERATORS, max_name_column_width=60)
        (self.folder / "operators.txt").write_text(table + "\n", encoding="utf-8")
        self._written = True
        rounds = (
            f"rounds {self.first} to {self.first + self._finished - 1}" if self._finished > 1 else f"round {self.first}"
        )
        self.log(f"profile: {rounds} of this process in {trace}; the top operators in operators.txt beside it")
