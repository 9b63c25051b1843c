"""Ctrl-C and SIGTERM as a question that the training loop asks between rounds."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Inside the block the first SIGINT or SIGTERM only makes the given function true; a second SIGINT ends at once."""
    signalled = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        if signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        signalled = True

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it handles signals
        yield lambda: False
        return
    try:
        yield lambda: signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
