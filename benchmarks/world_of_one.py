"""What `ddp` costs a process alone: rounds of the bundled run in a world of one process, and without any world.

python -m benchmarks.world_of_one [--pairs 40] [--samples N] [--out FILE] [SETTING]

Both sides hold a student, teachers and an optimizer of their own; their rounds (gradients, clip, optimizer) take turns,
and so does who begins, so that whatever else changes changes for both. Told are the median of the pairs' ratios and an
interval that covers the true median in nineteen cases of twenty, whatever the ratios' distribution. On a GPU the world
is NCCL's. The status is 0 where the whole interval lies under one per cent of cost. SETTINGs are those of
`python -m opd_fast.train`, for both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import comb
from pathlib import Path

import torch

from benchmarks.environment import default_device, environment, synchronize
from opd_fast.config.command_line import parse
from opd_fast.distributed.world import World, open_world
from opd_fast.errors import main_guard
from opd_fast.reporting.telemetry import quiet_libraries
from opd_fast.training.methods.opd import OPD
from opd_fast.training.optimizer import make_optimizer
from opd_fast.training.setup import prepare

LIMIT = 1.01
"""Of a process alone."""
WARM_UP = 3
CONFIDENCE = 0.95


def settings(strategy: str, rounds: int, samples: int | None) -> list[str]:
    count = [] if samples is None else ["--train.samples_per_task", str(samples)]
    rest = ["--train.rounds", str(rounds), "--evaluation.every", "0", "--checkpoint.every", "0"]
    return ["bundled", "--parallel.strategy", strategy, *rest, *count]


@contextmanager
def one_process() -> Iterator[None]:
    """The environment that a launcher gives to the only process it starts."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def side(argv: Sequence[str], world: World) -> Callable[[int], float]:
    """A round by its number; it returns its seconds."""
    setup = prepare(parse(list(argv)).config, lambda text: None, world)
    method, optimizer = OPD(setup), make_optimizer(setup.student, setup.config)
    device = setup.model.device
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def round(index: int) -> float:
        synchronize(device)
        begun = time.perf_counter()
        method.accumulate(index, scaler)
        torch.nn.utils.clip_grad_norm_(setup.student.parameters(), setup.config.train.clip)
        optimizer.step()
        setup.student.ema.update(index, setup.config.train.ema)
        optimizer.zero_grad()
        world.any(False, device)  # the loop asks so for a signal on any rank
        synchronize(device)
        return time.perf_counter() - begun

    return round


def in_turns(first: Callable[[int], float], second: Callable[[int], float], pairs: int) -> list[tuple[float, float]]:
    """Seconds of `pairs` rounds of each; who begins changes from pair to pair."""
    for index in range(WARM_UP):
        first(index), second(index)
    found = []
    for index in range(WARM_UP, WARM_UP + pairs):
        if index % 2:
            other = second(index)
            found.append((first(index), other))
        else:
            found.append((first(index), second(index)))
    return found


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that covers the median with at least `confidence`.

    The number of values below the true median is binomial (n, 1/2); values from the k-th smallest to the k-th largest
    miss it with probability 2 P(B < k). Raises ValueError where even the smallest and the largest cover it too rarely.
    """
    n, ordered = len(values), sorted(values)
    k = missed = 0
    while k < n // 2 and 2 * (missed + comb(n, k)) <= (1 - confidence) * 2**n:
        missed += comb(n, k)
        k += 1
    if k == 0:
        raise ValueError(f"{n} values are too few for an interval of {confidence:.0%}; take 6 or more")
    return ordered[k - 1], ordered[n - k]


@main_guard
def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world_of_one", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40, help="rounds of each")
    parser.add_argument("--samples", type=int, help="of each task; default: the recipe's")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options, given = parser.parse_known_args(argv)
    if options.pairs < 6:
        parser.error("--pairs needs 6 or more for an interval")
    quiet_libraries()
    rounds = WARM_UP + options.pairs
    single, ddp = (settings(strategy, rounds, options.samples) + given for strategy in ("single", "ddp"))
    alone = side(single, World())
    with one_process(), open_world(parse(ddp).config) as world:
        seconds = in_turns(alone, side(ddp, world), options.pairs)
    ratios = [together / apart for apart, together in seconds]
    low, high = median_interval(ratios)
    found = {
        "single_seconds": statistics.median(apart for apart, _ in seconds),
        "ddp_seconds": statistics.median(together for _, together in seconds),
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "pairs": options.pairs,
        "backend": "nccl" if default_device().type == "cuda" else "gloo",
    }
    verdict = "under 1 %" if high <= LIMIT else "over 1 %" if low > LIMIT else "more --pairs would tell"
    measured = f"{found['ratio']:.4f} of a process alone ({low:.4f} to {high:.4f}, {options.pairs} pairs)"
    print(f"ddp at world size 1: {measured}: {verdict}")
    if options.out is not None:
        command = " ".join(["python -m benchmarks.world_of_one", *argv])
        content = {"environment": environment(default_device(), command), **found}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(high > LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
