"""What a user sees when a run cannot go on: one line that names the setting, what is wrong and what to do."""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType

PACKAGES = ("opd_fast", "opd_kernels")
FEWER = (
    "give fewer samples at a time (--train.micro_batch 1), let blocks recompute their activations (--engine.recompute),"
    " or keep teachers on one base (--engine.placement shared); --dry-run estimates what a setting takes"
)
LONGEST = 600
"""Characters of each part of a message."""


class UserError(ValueError):
    """A mistake in what the user gave: the key, option or file as the user writes it, what is wrong, and a remedy."""

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        self.key, self.problem, self.remedy = short(key), short(problem), short(remedy)
        super().__init__(f"{self.key}: {self.problem}; {self.remedy}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.key, self.problem, self.remedy)  # the default would call it with the joined message


def short(text: str, longest: int = LONGEST) -> str:
    """`text`, of which the middle is left out where it is longer than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest - 100]} ... {text[-95:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt word: the nearest known one, or the list when nothing is near."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def is_ours(trace: TracebackType | None) -> bool:
    """Return whether a file of this project raised an exception, rather than a library beneath it."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return bool(frames) and not set(Path(frames[-1].f_code.co_filename).parts).isdisjoint(PACKAGES)


def _tell(message: str) -> int:
    """Print an error to stderr and return the exit status. Rank 0 prints at once; the others wait, because they mostly
    say the same, and the launcher ends them meanwhile."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)
    print(f"rank {rank}: error: {message}" if rank else f"error: {message}", file=sys.stderr, flush=True)
    return 2


def main_guard(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Wrap a command line's `main(argv) -> exit status`: a user's mistake becomes one line on stderr and status 2.

    A `UserError`, and any other `ValueError` that this project raises, is a mistake with its remedy in the message. A
    `ValueError` from inside a library is a defect and keeps its traceback. Where a device has no memory left, the
    message names settings that need less. Ctrl-C outside the training loop, which handles it, ends with status 130.
    """

    @functools.wraps(main)
    def guarded(argv: list[str]) -> int:
        try:
            return main(argv)
        except ValueError as error:
            if not isinstance(error, UserError) and not is_ours(error.__traceback__):
                raise
            return _tell(short(one_line(error), 3 * LONGEST))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; this file does without torch
                raise
            return _tell(f"{short(one_line(error))}; {FEWER}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded
