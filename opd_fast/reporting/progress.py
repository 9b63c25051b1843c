"""Progress of work outside the training loop: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from opd_fast.reporting.telemetry import PLAIN_SECONDS


@contextlib.contextmanager
def progress_of(done_what: str, what: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Give the block a function of (done, total) that shows how far the work is.

    Nothing is shown before its first call, nor at all where `shown` is false.

    Args:
        done_what: the verb of the plain lines, such as "encoded".
        what: what is counted, such as "prompts".
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True)
    task = bar.add_task(what, total=None)
    printed = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal printed
        if not shown:
            return
        if console.is_terminal:
            bar.start()
            bar.update(task, completed=done, total=total)
        elif time.monotonic() - printed >= PLAIN_SECONDS:
            printed = time.monotonic()
            print(f"{done_what} {done}/{total} {what}", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if console.is_terminal:  # elsewhere it would end with an empty line
            bar.stop()
