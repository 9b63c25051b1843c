"""The order in which a run draws prompts and tasks: stateless, so that a resumed run needs no record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

Number = TypeVar("Number", int, float)


class PromptSource:
    """The prompts that a task's rounds see: epochs laid end to end, each a shuffle keyed by (seed, stream, epoch).

    A round here is a turn of the task, since a `TaskSchedule` may leave the task out of rounds of the run.  Round r
    takes positions r*n to r*n + n - 1 of the sequence, so that any round is known without the rounds before it and a
    resumed run needs no state.  ``n`` must stay the same throughout a run.
    """

    def __init__(self, count: int, seed: int, stream: int = 0) -> None:
        """Order ``count`` prompts; ``stream`` sets tasks apart that share a seed.  Raises ValueError for count < 1."""
        if count < 1:
            raise ValueError("a prompt source needs at least one prompt")
        self.count = count
        self._key = (seed % 2**64, stream % 2**64)

    def batch(self, round: int, n: int) -> list[int]:
        """Return the indices of the ``n`` prompts of round ``round`` (from 0).

        Raises ValueError if round < 0 or n < 1.
        """
        if round < 0 or n < 1:
            raise ValueError(f"no batch of {n} prompts in round {round}; rounds count from 0 and n from 1")
        positions = range(round * n, (round + 1) * n)
        return [int(_shuffle(self.count, *self._key, p // self.count)[p % self.count]) for p in positions]

    def seen(self, rounds: int, n: int) -> list[int]:
        """Return the distinct prompts, ascending, of the first ``rounds`` rounds: all that a run needs to embed."""
        if rounds * n >= self.count:
            return list(range(self.count))
        return sorted({index for r in range(rounds) for index in self.batch(r, n)})


@lru_cache(maxsize=16)
def _shuffle(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


_SCHEDULE_STREAM = 2**32 - 1
"""Sets the schedule's draws apart from the tasks' shuffles, whose streams count from 0."""


class TaskSchedule:
    """The tasks that each round takes.

    A round has ``per_round`` places.  ``round_robin`` hands them out in turn, round after round.  ``weighted`` draws
    them in proportion to the tasks' shares by systematic sampling (Madow 1949): a task holds ``expected`` places on
    average, and in each round that number rounded down or up, so that a task may hold several and another none.
    Either follows from (seed, round) alone, so a resumed run needs no state.
    """

    def __init__(
        self,
        shares: Sequence[float],
        per_round: int | None = None,
        kind: Literal["round_robin", "weighted"] = "round_robin",
        seed: int = 0,
        among: Sequence[int] | None = None,
    ) -> None:
        """Make a schedule of the tasks ``among``, or of all, with ``per_round`` places a round, or one for each task.

        ``shares`` has one positive number a task, which ``weighted`` alone reads.  Raises ValueError for less than one
        task or place.
        """
        self._among = list(range(len(shares))) if among is None else sorted(among)
        self.tasks = len(shares)
        self.per_round = len(self._among) if per_round is None else per_round
        if not self._among or self.per_round < 1:
            raise ValueError(f"no schedule of {len(self._among)} tasks with {self.per_round} places; give 1 or more")
        self._kind = kind
        self._key = (seed % 2**64, _SCHEDULE_STREAM)
        weights = [shares[task] if kind == "weighted" else 1.0 for task in self._among]
        self._places = [self.per_round * weight / math.fsum(weights) for weight in weights]
        self.expected = self._spread(self._places)
        """How many places each task has in a round, on average."""
        self._before = [[0] * len(weights)]  # turns taken before each weighted round, as far as needed

    def _spread(self, values: Sequence[Number]) -> list[Number]:
        """Return one value a task: ``values`` for the tasks that come, 0 for the others."""
        by_task = dict(zip(self._among, values, strict=True))
        return [by_task.get(task, 0) for task in range(self.tasks)]

    def round(self, index: int) -> list[tuple[int, range]]:
        """Return (task, its turns) for each task of round ``index`` (from 0), ascending.

        A task's turns count from 0 through the whole run, and turn t sees batch t of its `PromptSource`.
        """
        if index < 0:
            raise ValueError(f"no round {index}; rounds count from 0")
        spans = zip(self.turns(index), self.turns(index + 1), strict=True)
        return [(task, range(start, stop)) for task, (start, stop) in enumerate(spans) if start < stop]

    def turns(self, rounds: int) -> list[int]:
        """Return how many turns each task has had after ``rounds`` rounds."""
        count = len(self._among)
        if self._kind == "round_robin":
            return self._spread([(rounds * self.per_round + count - 1 - i) // count for i in range(count)])
        while len(self._before) <= rounds:
            drawn = self._draw(len(self._before) - 1)
            self._before.append([had + places for had, places in zip(self._before[-1], drawn, strict=True)])
        return self._spread(self._before[rounds])

    def _draw(self, index: int) -> list[int]:
        """Return each task's places in a round: the whole numbers in its stretch of a randomly shifted line."""
        rng = np.random.default_rng([*self._key, index])
        order = rng.permutation(len(self._among))
        ends = np.cumsum(np.asarray(self._places)[order])
        ends[-1] = self.per_round  # the sum, without its rounding error
        ends -= rng.random()
        places = np.diff(np.ceil(ends), prepend=0.0)
        drawn = [0] * len(order)
        for task, count in zip(order, places, strict=True):
            drawn[int(task)] = int(count)
        return drawn
