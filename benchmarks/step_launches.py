"""The step kernel alone, for Nsight Compute to count: no model, a few launches, seconds.

python -m benchmarks.step_launches [--launches N]

Two problems: the latent of Stable Diffusion 3.5 Medium at the published batch, whose tensors fit into L2, and one that
moves 1 GB. Each is launched once to compile it, then N times between `torch.cuda.profiler.start` and `stop`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.test_step import CASES, CUDA, engine_on, operands

NAMES = ("step/sd35m-512", "step/1GB", "step/1GB/drawn")


def main(argv: Sequence[str]) -> int:
    """Launch; 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_launches", description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=2, metavar="N", help="of each problem (default: 2)")
    options = parser.parse_args(argv)
    if not CUDA:
        print("the step kernel needs a CUDA device; its rows on a CPU: pytest benchmarks/test_step.py", file=sys.stderr)
        return 1
    for case in (case for case in CASES if case.name in NAMES):
        run = engine_on(case, operands(case))
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for _ in range(options.launches):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        operands.cache_clear()
        print(f"{case.name}: {options.launches} launches")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
