"""What OpenMP's waiting costs: rounds of the bundled run while the machine is idle, and beside another process.

python -m benchmarks.waiting [--rounds 8] [--calm 0] [--out FILE] [SETTING]

A thread of GCC's OpenMP runtime, which torch's CPU wheel carries, spins while it waits for the others. Where another
process holds a core, a spinning thread takes the time slice that the late one needs. Each way to wait (libgomp's own
default, the bound that `opd_fast.waiting` sets, another bound, no spinning at all) has a process of its own, since the
runtime reads its variables once. The processes take turns, round by round, idle and beside a Python loop that is pinned
to one core, so that whatever else the machine does meets all of them. The median round of each is printed; its least
and most go to the file, with the load averages meanwhile and the number of rounds that began beside other
processes. SETTINGs are those of `python -m opd_fast.train`.
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
ROUNDS = 1000  # that a process may be asked for
WAYS: dict[str, dict[str, str]] = {
    "libgomp's default": {},
    "opd_fast's": waiting.BOUNDED,
    **{f"{count} turns": {"GOMP_SPINCOUNT": str(count)} for count in (100, 10_000)},
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


class Process:
    """A process that waits in one way, its model loaded and its threads started; a context manager."""

    def __init__(self, way: dict[str, str], given: Sequence[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in waiting.VARIABLES} | way
        words = [sys.executable, "-m", "benchmarks.waiting", "--child", *given]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._process = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def round(self, index: int) -> float:
        """Seconds of round `index`. Raises RuntimeError where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{index}\n")
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            raise RuntimeError("a process that measures has ended; its message is above") from None


def child(given: Sequence[str]) -> None:
    """Answer each number of a round on stdin with its seconds on stdout."""
    from benchmarks.world_of_one import settings, side
    from opd_fast.distributed.world import World
    from opd_fast.reporting.telemetry import quiet_libraries

    quiet_libraries()
    run = side([*settings("single", ROUNDS, None), *given], World())
    for line in sys.stdin:
        print(run(int(line)), flush=True)


def await_calm(running: int, seconds: float) -> bool:
    """Wait, at most so many seconds, until no more than so many threads run on this machine; whether that came true."""
    end = time.monotonic() + seconds
    while True:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        if int(next(line.split()[1] for line in lines if line.startswith("procs_running"))) <= running:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.01)


def measure(rounds: int, calm: float, given: Sequence[str]) -> dict[str, Any]:
    """Every way's rounds, idle and busy: median, least, most."""
    found: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in WAYS}
    load: list[float] = []
    disturbed = 0
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        for name, way in WAYS.items():
            processes[name] = stack.enter_context(Process(way, given))
            processes[name].round(0)  # one loads at a time, and warms up
        for index in range(1, rounds + 1):
            for state in ("idle", "busy"):
                load.append(os.getloadavg()[0])
                with neighbour() if state == "busy" else contextlib.nullcontext():
                    for name, process in processes.items():
                        # This process runs as it looks, and so does the neighbour.
                        disturbed += not await_calm(2 if state == "busy" else 1, calm)
                        found[name][state].append(process.round(index))
                told = ", ".join(f"{name} {states[state][-1]:.2f} s" for name, states in found.items())
                print(f"{state}: {told}", file=sys.stderr, flush=True)
    return {
        "rounds": rounds,
        "load": [min(load), max(load)],
        "disturbed": disturbed,
        "ways": {
            name: {"variables": WAYS[name], **{state: _summary(seconds) for state, seconds in states.items()}}
            for name, states in found.items()
        },
    }


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    figures = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(value, 3) for name, value in figures.items()}


@main_guard
def main(argv: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waiting", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each way, idle and busy")
    parser.add_argument("--calm", type=float, default=0, help="seconds that a round waits at most for other processes")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, given = parser.parse_known_args(argv)
    if not 1 <= options.rounds < ROUNDS:
        parser.error(f"--rounds needs 1 to {ROUNDS - 1}")
    if options.child:
        child(given)
        return 0
    found = measure(options.rounds, options.calm, given)
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
