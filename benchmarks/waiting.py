"""What OpenMP's waiting costs: rounds of the bundled run while the machine is idle, and beside another process.

python -m benchmarks.waiting [--rounds 8] [--repeats 3] [--seconds 60] [--out FILE] [SETTING]

A thread of GCC's OpenMP runtime, which torch's CPU wheel carries, spins while it waits for the others. Where another
process holds a core, a spinning thread takes the time slice that the late one needs. Each way to wait (libgomp's own
default, the bound that `opd_fast.waiting` sets, other bounds, no spinning at all) runs in a process of its own, since
the runtime reads its variables once; the ways take turns, idle and beside a Python loop that is pinned to one core.
The median round of each is printed, with the range over all processes. SETTINGs are those of
`python -m opd_fast.train`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd_fast import waiting
from opd_fast.errors import main_guard

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 1
WAYS: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "opd_fast's": waiting.BOUNDED,
    **{f"{count} turns": {"GOMP_SPINCOUNT": str(count)} for count in (10_000,)},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
"""Name to the environment variables that ask for it."""


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """Another process that computes all the time, on the last core that this one may use."""
    core = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def rounds_of(way: dict[str, str], given: Sequence[str], options: argparse.Namespace) -> list[float]:
    """Seconds of each round in a process of its own that waits in this way."""
    environment = {name: value for name, value in os.environ.items() if name not in waiting.VARIABLES} | way
    words = [sys.executable, "-m", "benchmarks.waiting", "--child"]
    for name in ("rounds", "seconds"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run([*words, *given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(given: Sequence[str], rounds: int, seconds: float) -> None:
    """Print the seconds of up to `rounds` rounds, as many as fit into `seconds`; at least one."""
    from benchmarks.world_of_one import settings, side
    from opd_fast.parallel import World
    from opd_fast.telemetry import quiet_libraries

    quiet_libraries()
    run = side([*settings("single", WARM_UP + rounds, None), *given], World())
    begun = time.monotonic()
    found: list[float] = []
    for index in range(WARM_UP + rounds):
        found.append(run(index))
        if time.monotonic() - begun > seconds:
            break
    print(json.dumps(found[WARM_UP:] or found[-1:]))


def measure(options: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Every way's rounds, idle and busy: median, least, most, and how many."""
    found: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in WAYS}
    load: list[float] = []
    for _ in range(options.repeats):
        for state in ("idle", "busy"):
            for name, way in WAYS.items():
                load.append(os.getloadavg()[0])
                with neighbour() if state == "busy" else contextlib.nullcontext():
                    found[name][state] += rounds_of(way, given, options)
                print(f"{state}  {name}: {statistics.median(found[name][state]):.2f} s", file=sys.stderr, flush=True)
    return {
        "load": [min(load), max(load)],
        "ways": {
            name: {"variables": WAYS[name], **{state: _summary(seconds) for state, seconds in states.items()}}
            for name, states in found.items()
        },
    }


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    figures = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(value, 3) for name, value in figures.items()} | {"rounds": len(seconds)}


@main_guard
def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each way, idle and busy")
    parser.add_argument("--seconds", type=float, default=60, help="after which a process begins no other round")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, given = parser.parse_known_args(argv)
    if min(options.rounds, options.repeats) < 1:
        parser.error("--rounds and --repeats need 1 or more")
    if options.child:
        child(given, options.rounds, options.seconds)
        return 0
    found = measure(options, given)
    for name, row in found["ways"].items():
        told = "  ".join(f"{state} {row[state]['seconds']:.2f} s" for state in ("idle", "busy"))
        print(f"{name:20}{told}")
    if options.out is not None:
        from benchmarks.environment import default_device, environment

        command = " ".join(["python -m benchmarks.waiting", *argv])
        content = {"environment": environment(default_device(), command), **found}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
