"""Rounds of the bundled model on 1, 2, ... processes, samples growing with them, beside what is predicted:

    python -m benchmarks.weak_scaling [--worlds 1,2] [--rounds 8] [--out FILE]

Every process has one thread, so two cores carry two processes and no more. The prediction
(`opd_fast.distributed.communication`) takes the compute time of one process from the measurement, and bandwidth and
latency of the links from all-reduces timed in the same processes: it is the model of communication that is put to
the test, and what two processes take from each other besides (caches, the memory's bandwidth, waiting for the
slower) is not in it. `docs/weak-scaling.json` is what `--out` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.environment import environment
from opd_fast.config import Config
from opd_fast.config.command_line import parse
from opd_fast.distributed.communication import Network, collectives, seconds
from opd_fast.distributed.plan import make_plan
from opd_fast.distributed.world import World, open_world
from opd_fast.training.methods.opd import OPD
from opd_fast.training.setup import prepare

PER_PROCESS = 2  # samples of each task
CASES = {
    "lora-ddp": ("--parallel.strategy", "ddp"),
    "full-ddp": ("--parallel.strategy", "ddp", "--student.kind", "full"),
    "full-fsdp2": ("--parallel.strategy", "fsdp2", "--student.kind", "full"),
    "full-fsdp2-block": ("--parallel.strategy", "fsdp2", "--student.kind", "full", "--parallel.reshard", "block"),
}


def settings(case: str, size: int) -> Config:
    samples = str(PER_PROCESS * size)
    return parse(["bundled", "--train.samples_per_task", samples, "--evaluation.every", "0", *CASES[case]]).config


def measure(case: str, rounds: int) -> dict[str, float]:
    """Median seconds of a round, and the links as all-reduces show them; in every process alike."""
    torch.set_num_threads(1)
    config = settings(case, int(os.environ["WORLD_SIZE"]))
    with open_world(config) as world:
        method = OPD(prepare(config, lambda text: None, world))
        times = []
        for index in range(rounds + 2):
            world.wait()
            begun = time.perf_counter()
            method.accumulate(index, torch.amp.GradScaler("cpu", enabled=False))
            world.wait()
            times.append(time.perf_counter() - begun)
            for parameter in method.setup.student.parameters():
                parameter.grad = None
        small, large = _all_reduce(world, 1), _all_reduce(world, 2**22)
    return {"seconds": statistics.median(times[2:]), "small": small, "large": large}


def _all_reduce(world: World, values: int) -> float:
    """Median seconds of an all-reduce of float32 values."""
    if world.size == 1:
        return 0.0
    data, times = torch.ones(values), []
    for _ in range(20):
        world.wait()
        begun = time.perf_counter()
        dist.all_reduce(data)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def predicted(case: str, n: int, found: dict[str, float], alone: float) -> tuple[float, dict[str, float]]:
    """Seconds of the round by the model, and the links it was given. On a CPU nothing is hidden: every collective of
    the round counts in full."""
    if n == 1:
        return alone, {}
    latency = found["small"] / (2 * (n - 1))
    bandwidth = 2 * (n - 1) / n * 4 * 2**22 / max(found["large"] - found["small"], 1e-9)
    network = Network(ranks_per_node=n, intra_bandwidth=bandwidth, intra_latency=latency, share=1)
    plan = make_plan(settings(case, n), n)
    wire = 0.0
    for c in collectives(plan.workload, plan.strategy, n, plan.shard_size, n):
        parts = plan.workload.blocks if c.purpose != "gradients" or c.kind == "reduce-scatter" else 1
        wire += c.count * parts * seconds(c.kind, c.size / parts, c.ranks, network, c.per_node)
    return alone + wire, {"latency_s": latency, "bandwidth_Bps": bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weak_scaling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--worlds", default="1,2", help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=8, help="rounds timed, after two that are not")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        case, out = given.inside
        found = measure(case, given.rounds)
        if os.environ["RANK"] == "0":
            Path(out).write_text(json.dumps(found))
        return
    rows = []
    for case in CASES:
        alone = None
        for world in map(int, given.worlds.split(",")):
            found = _launched(case, world, given.rounds)
            alone = found["seconds"] if alone is None else alone
            expected, links = predicted(case, world, found, alone)
            rows.append(
                {
                    "name": f"{case}/{world}",
                    "processes": world,
                    "samples": 3 * PER_PROCESS * world,
                    "seconds": round(found["seconds"], 4),
                    "predicted_seconds": round(expected, 4),
                    "efficiency": round(alone / found["seconds"], 3),
                    "predicted_efficiency": round(alone / expected, 3),
                    **{key: float(f"{value:.3g}") for key, value in links.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        content = {
            "environment": environment(
                torch.device("cpu"), " ".join(["python -m benchmarks.weak_scaling", *sys.argv[1:]])
            ),
            "rows": rows,
        }
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _launched(case: str, world: int, rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        inside = ["-m", "benchmarks.weak_scaling", "--rounds", str(rounds), "--inside", case, str(out)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *inside], check=True, env=variables, capture_output=True)
        found: dict[str, float] = json.loads(out.read_text())
        return found


if __name__ == "__main__":
    main()
