"""The keys of a row of results.json: which task and which reward a mean belongs to.

A key is `REWARD` where one task alone has that reward, and `TASK/REWARD` where several have it. Neither name has a
slash, so that a key can be read in one way only. metrics.jsonl keeps `{task: {reward: mean}}` and needs no such keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

Pair = tuple[str, str]
"""(task, reward)"""


def reward_keys(pairs: Iterable[Pair]) -> dict[Pair, str]:
    """Return the key of each (task, reward) of a table, in order; a pair that comes twice has one key."""
    distinct = list(dict.fromkeys(pairs))
    tasks = Counter(reward for _, reward in distinct)
    return {(task, reward): f"{task}/{reward}" if tasks[reward] > 1 else reward for task, reward in distinct}


def reward_key(row: Mapping[str, object], task: str, reward: str) -> str:
    """Return the key under which a row has the reward of a task, or would have it."""
    shared = f"{task}/{reward}"
    return shared if shared in row else reward


def key_words(key: str) -> str:
    """Return a key as a heading: `TASK: REWARD`, or the reward alone, with spaces for underscores."""
    return key.replace("/", ": ").replace("_", " ")
