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
        self._begun = self._finished = 0  # rounds, and recorded rounds that ran to their end
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> RoundProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile is not None:
            self._write(self._profile)
        if self._finished == 0:
            self.log(f"profile: nothing recorded; of {self._begun} rounds none from round {self.first} on was finished")

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Around one round."""
        self._begun += 1
        if self._begun == self.first:
            self._profile = torch.profiler.profile()
            self._profile.start()
        yield
        if self._profile is not None:
            self._finished += 1
            if self._begun == self.last:
                self._write(self._profile)

    def _write(self, profile: torch.profiler.profile) -> None:
        self._profile = None
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
        last = self.first + self._finished - 1
        rounds = f"rounds {self.first} to {last}" if self._finished > 1 else f"round {self.first}"
        self.log(f"profile: {rounds} of this process in {trace}; the top operators in operators.txt beside it")
