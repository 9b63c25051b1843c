"""What a user sees when a run cannot go on: one line that names the setting, what is wrong and what to do."""

from __future__ import annotations

import functools
import os
import sys
import time
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
    """A mistake in what the user gave.

    Args:
        key: the configuration key, option or file at fault, as the user would write it.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        key, problem, remedy = (short(part) for part in (key, problem, remedy))
        super().__init__(f"{key}: {problem}; {remedy}")
        self.key, self.problem, self.remedy = key, problem, remedy

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
    """Whether an exception was raised by a file of this project rather than in a library beneath it."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return bool(set(Path(trace.tb_frame.f_code.co_filename).parts) & set(PACKAGES))


def _tell(message: str) -> None:
    """Print to stderr: rank 0 at once, the others a little later, unless the launcher has ended them by then."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        time.sleep(3)  # it mostly says the same, and then the launcher ends this one
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)


def main_guard(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Wrap a command line's `main(argv) -> exit status`: a user's mistake becomes one line on stderr and status 2.

    A `UserError`, and any other `ValueError` that this project raises, is a mistake with its remedy in the message. A
    `ValueError` from inside a library is a defect and keeps its traceback. Where a device has no memory left, the
    message names the settings that need less. Ctrl-C outside the training loop, which handles its own, ends with
    status 130.
    """

    @functools.wraps(main)
    def guarded(argv: list[str]) -> int:
        try:
            return main(argv)
        except ValueError as error:
            if not isinstance(error, UserError) and not is_ours(error.__traceback__):
                raise
            _tell(f"error: {short(one_line(error), 3 * LONGEST)}")
            return 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; this file does without torch
                raise
            _tell(f"error: {short(one_line(error), LONGEST)}; {FEWER}")
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded
