"""Threads that do a run's jobs beside it: a line of jobs for each thread, and a bound on the batches in flight.

The threads are daemons, unlike those of `concurrent.futures`, which Python joins before it exits: a job that hangs
would keep an interrupted process alive.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that `Workers.close` waits for jobs that still run, all threads together."""


class Job(Generic[T]):
    """What is done once, in whatever thread, and what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._finished = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return self._finished.is_set()

    def run(self) -> None:
        """Do it; whatever it raises is kept for `result`."""
        assert self._work is not None
        try:
            self._value = self._work()
        except BaseException as error:
            self._error = error
        self._finish()

    def run_here(self) -> None:
        """Do it in the caller's thread, whose KeyboardInterrupt passes through at once."""
        self.run()
        if isinstance(self._error, KeyboardInterrupt):
            raise self._error

    def cancel(self) -> None:
        """Leave it undone."""
        self._error = RuntimeError("the batch was not judged, because its RewardRunner was closed before")
        self._finish()

    def result(self) -> T:
        """Wait for the job and return what it returned. Raises what it raised."""
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def _finish(self) -> None:
        self._work = None  # it holds the batch's images
        self._finished.set()


class Workers:
    """Threads by the names of their lines, each begun at its first job.

    Args:
        ahead: batches whose jobs may be unfinished at a time.
    """

    def __init__(self, ahead: int) -> None:
        self._slots = threading.Semaphore(ahead)
        self._lines: dict[str, SimpleQueue[Callable[[], None] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        # The threads do not hold this object, so that one that nobody closed ends them when it goes.
        self._stop = weakref.finalize(self, _stop, self._closed, self._lines)

    def reserve(self) -> None:
        """Wait until a batch may be added. Raises RuntimeError after `close`."""
        if self._closed.is_set():
            raise RuntimeError("the RewardRunner was closed")
        self._slots.acquire()

    def release(self) -> None:
        """Give back what `reserve` took, for a batch without jobs."""
        self._slots.release()

    def start(self, jobs: Sequence[tuple[str, Job[T]]]) -> None:
        """Add the jobs of a batch, (line, job), at least one, to the ends of their lines. `reserve` comes before."""
        left, lock, slots, closed = [len(jobs)], threading.Lock(), self._slots, self._closed

        def do(job: Job[T]) -> None:
            if closed.is_set():
                job.cancel()
            else:
                job.run()
            with lock:
                left[0] -= 1
                if not left[0]:
                    slots.release()

        for line, job in jobs:
            if line not in self._lines:
                queue = self._lines[line] = SimpleQueue()
                thread = threading.Thread(target=_work_off, args=(queue,), name=f"rewards {line}", daemon=True)
                self._threads.append(thread)
                thread.start()
            # The queue alone holds the job, so that a finished one keeps nothing alive.
            self._lines[line].put(lambda job=job: do(job))  # type: ignore[misc]

    def close(self) -> None:
        """End the threads: jobs that have not begun are cancelled, those that run get `PATIENCE` seconds."""
        self._stop()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def _stop(closed: threading.Event, lines: dict[str, SimpleQueue[Callable[[], None] | None]]) -> None:
    closed.set()
    for queue in lines.values():
        queue.put(None)


def _work_off(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (do := queue.get()) is not None:
        do()
        del do
