"""Runs that are killed again and again end where they would have ended: `python -m tests.soak [--kills N]`.

- Kills: a bundled run gets SIGKILL at random moments, whatever it is doing (loading, training, saving), and is resumed
  each time; once as one process, once as two under torchrun, where half of the kills hit one process, half all.
- Crashes: a small run is killed at a random point inside the writing of a checkpoint; the checkpoint before it must be
  whole each time.

The last resumption ends, and its student is compared with that of a run that nothing disturbed: bit for bit for one
process, to rounding for two. Results go to --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from opd_fast.errors import UserError
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training.checkpoint import Checkpoints

SETTINGS = (
    *("--evaluation.every", "0", "--train.samples_per_task", "1", "--sampler.steps", "4"),
    *("--checkpoint.every", "2", "--logging.tensorboard", "false"),
)


def start(processes: int, *arguments: str) -> subprocess.Popen[bytes]:
    """A training run in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "opd_fast.train", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=variables, stdout=quiet, stderr=quiet, start_new_session=True)


def whole_round(run_dir: Path) -> int:
    """The round of the newest whole checkpoint; 0 without one."""
    try:
        return int(Checkpoints(run_dir / "checkpoints", 3).find()[1]["round"])
    except UserError:
        return 0


def difference(found: Path, expected: Path) -> float:
    """The largest difference between two students, relative to the largest weight; 0 means every bit."""
    a, b = (load_file(run / "student" / "adapter_model.safetensors") for run in (found, expected))
    assert a.keys() == b.keys()
    largest = max(float(value.abs().max()) for value in b.values())
    return max(float((a[k] - b[k]).abs().max()) for k in b) / largest


def kills(count: int, processes: int, rounds: int, chance: random.Random, work: Path) -> dict[str, Any]:
    settings = ("bundled", *SETTINGS, "--train.rounds", str(rounds))
    calm, run = work / f"calm-{processes}", work / f"killed-{processes}"
    began = time.monotonic()
    process = start(processes, *settings, "--run-dir", str(calm))
    while process.poll() is None and not read_metrics(calm / "metrics.jsonl"):
        time.sleep(0.1)
    loading = time.monotonic() - began
    assert process.wait() == 0, "the undisturbed run failed"

    killed, before_training, lost = 0, 0, 0
    while killed < count:
        arguments = ("--resume", str(run)) if (run / "config.yaml").exists() else (*settings, "--run-dir", str(run))
        process = start(processes, *arguments)
        delay, told = chance.uniform(0, 1.6 * loading), len(read_metrics(run / "metrics.jsonl"))
        try:
            assert process.wait(delay) == 0, "a resumed run failed"
            raise SystemExit(f"the run was through after {killed} kills: give more --rounds")
        except subprocess.TimeoutExpired:
            before_training += len(read_metrics(run / "metrics.jsonl")) == told
        done, whole = len(read_metrics(run / "metrics.jsonl")), whole_round(run)
        if processes > 1 and chance.random() < 0.5:
            _kill_one(process, chance)
        else:
            _kill_all(process)
        process.wait()
        killed += 1
        assert whole_round(run) >= whole, "a kill cost a checkpoint"
        lost += max(0, done - whole_round(run))
        print(f"kill {killed}/{count} after {delay:.1f} s, round {whole_round(run)}", file=sys.stderr, flush=True)
    assert start(processes, "--resume", str(run)).wait() == 0, "the last resumption failed"
    return {
        "processes": processes,
        "kills": killed,
        "before_a_round_was_through": before_training,
        "rounds": rounds,
        "rounds_done_again": lost,
        "largest_relative_difference": difference(run, calm),
        "seconds": round(time.monotonic() - began),
    }


def _kill_one(launcher: subprocess.Popen[bytes], chance: random.Random) -> None:
    """SIGKILL for one of the launcher's processes; the launcher then ends the others and itself."""
    import psutil

    children = psutil.Process(launcher.pid).children()
    if children:
        chance.choice(children).kill()
    else:
        launcher.kill()


def _kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and what it started; a launcher's processes lead sessions of their own."""
    import psutil

    for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
        process.kill()


# --- inside a save ----------------------------------------------------------------------------------------------------


def die_in_a_save(save: int, event: int) -> Callable[[], int]:
    """Kill this process at call number `event` of the checkpoint writer's thread in save number `save` (from 0).

    What is returned gives the number of calls in all saves so far.
    """
    counts, marks = [0], [0]

    def watch(frame: FrameType, kind: str, argument: object) -> None:
        if not threading.current_thread().name.startswith("checkpoint"):
            return
        if kind == "call" and frame.f_code is Checkpoints._write.__code__:
            marks.append(counts[0])
        counts[0] += 1
        if len(marks) - 2 == save and counts[0] - marks[-1] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    return lambda: counts[0]


def crashing_run(settings: Path, run_dir: Path, save: int, event: int) -> None:
    """The body of a run that dies in a save, in a process of its own."""
    from opd_fast.config.command_line import read_config
    from opd_fast.training.loop import train

    torch.set_num_threads(1)
    counted = die_in_a_save(save, event)
    run_dir.mkdir(parents=True, exist_ok=True)
    train(read_config(settings), run_dir, resume=(run_dir / "checkpoints").exists())
    (run_dir / "calls").write_text(str(counted()))


def crashes(count: int, chance: random.Random, work: Path) -> dict[str, Any]:
    from tests.runs import write_world

    settings = write_world(work / "world")
    rounds = count + 12
    text = settings.read_text().replace("rounds: 6", f"rounds: {rounds}").replace("every: 2", "every: 1")
    settings.write_text(text.replace("every: 3", "every: 0"))
    began = time.monotonic()

    def child(run: Path, save: int, event: int) -> int:
        arguments = ["--crash", str(settings), str(run), str(save), str(event)]
        return subprocess.run([sys.executable, "-m", "tests.soak", *arguments], capture_output=True).returncode

    calm, run = work / "calm", work / "crashing"
    assert child(calm, -2, 0) == 0
    calls = int((calm / "calls").read_text()) // (rounds + 1)  # of one save
    crashed, points = 0, []
    while crashed < count:
        point = chance.randrange(1, calls)
        before = whole_round(run)
        code = child(run, 1, point)  # its first save goes well, so that every life gets on by a round
        if code == 0:
            raise SystemExit(f"the run was through after {crashed} crashes")
        assert code == -signal.SIGKILL, f"exit status {code}"
        assert whole_round(run) > before, "a crash inside a save lost the one before it"
        crashed += 1
        points.append(round(point / calls, 3))
        print(f"crash {crashed}/{count} at {point}/{calls}, round {whole_round(run)}", file=sys.stderr, flush=True)
    assert child(run, -2, 0) == 0
    return {
        "crashes": crashed,
        "at_share_of_the_save": points,
        "calls_of_a_save": calls,
        "largest_relative_difference": difference(run, calm),
        "seconds": round(time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--crashes", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=500, help="of the runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--crash", nargs=4, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.crash:
        world, run, save, event = settings.crash
        crashing_run(Path(world), Path(run), int(save), int(event))
        return
    chance = random.Random(settings.seed)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    named = {k: v for k, v in vars(settings).items() if k not in ("out", "crash")}
    results: dict[str, Any] = {"command": "python -m tests.soak", "settings": named, "runs": []}
    try:
        if settings.crashes:
            results["runs"].append(crashes(settings.crashes, chance, work))
        for processes in settings.processes if settings.kills else ():
            results["runs"].append(kills(settings.kills, processes, settings.rounds, chance, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        text = json.dumps(results, indent=1) + "\n"
        print(text)
        if settings.out:
            settings.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
