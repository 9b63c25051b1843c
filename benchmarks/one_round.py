"""One round of the engine for a profiler to watch: warm-up first, then CUDA's profiler is on for a single round.

python -m benchmarks.one_round [--shape SHAPE] [--samples N] [--warm-up N] [--graphs on|off]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environment import default_device, synchronize
from benchmarks.ladder import SHAPES, work_for
from opd_fast.config import EngineConfig


def main(argv: Sequence[str]) -> int:
    """Warm up and run the round; its time goes to stdout."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_round", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="sd35m-512" if cuda else "tiny")
    parser.add_argument("--samples", type=int, metavar="N", help="samples a task (default: 3; tiny: 8)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds before (default: 2)")
    parser.add_argument("--graphs", choices=["on", "off"], default="on" if cuda else "off")
    parser.add_argument("--compile", choices=["on", "off"], default="on" if cuda else "off")
    options = parser.parse_args(argv)
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        work = work_for(options.shape, options.samples, Path(folder), device)
        side = work.engine(EngineConfig(graphs=options.graphs, compile=options.compile), say=print)
        for _ in range(options.warm_up):
            side.round(work.batch)
        if cuda:
            torch.cuda.profiler.start()
        start = time.perf_counter()
        side.round(work.batch)
        seconds = time.perf_counter() - start
        if cuda:
            torch.cuda.profiler.stop()
    synchronize(device)
    print(f"one round of {options.shape}: {seconds:.3f} s, {len(work.batch)} samples, {work.recipe.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
