"""The bundled run with all exact techniques of the engine on, and all off: does it end at the same rewards?

python -m benchmarks.same_rewards [--seeds 0,1,2] [--off-seeds 0] [--runs DIR] [--out FILE]

Runs `python -m opd_fast.train bundled` for each seed; a run whose results.json lies in DIR already is not repeated. An
off run counts as the same where each of its rewards lies within the spread of the on runs, widened by their standard
deviation: another seed would move them by as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_fast.config.command_line import parse
from opd_fast.config.serialize import to_dict

OFF = {
    "placement": "shared",
    "group_teachers": "false",
    "merge_student": "false",
    "fuse_projections": "false",
    "cache_modulation": "false",
    "attention": "native",
    "compile": "off",
    "graphs": "off",
}
SWITCHES = [word for key, value in OFF.items() for word in (f"--engine.{key}", value)]


def run(seed: int, on: bool, folder: Path) -> dict[str, Any]:
    """The results of one run, made now unless they are there."""
    run_dir = folder / f"{'on' if on else 'off'}-{seed}"
    if not (run_dir / "results.json").is_file():
        arguments = ["bundled", "--seed", str(seed), "--evaluation.every", "1000", "--checkpoint.every", "0"]
        arguments += ["--run-dir", str(run_dir), *([] if on else SWITCHES)]
        subprocess.run([sys.executable, "-m", "opd_fast.train", *arguments], check=True)
    results: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return {
        "seed": seed,
        "techniques": "on" if on else "off",
        "student": results["rows"]["student"],
        "recovered": results["recovered"],
        "seconds": results["seconds"],
        "commit": results["commit"],
    }


def verdict(on: Sequence[dict[str, float]], off: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """By reward: the on runs' smallest, largest and standard deviation, the off runs', and whether they agree."""
    found = {}
    for reward in on[0]:
        values = [row[reward] for row in on]
        spread = statistics.stdev(values)
        others = [row[reward] for row in off]
        same = all(min(values) - spread <= value <= max(values) + spread for value in others)
        found[reward] = {"on": values, "spread": spread, "off": others, "same": same}
    return found


def main(argv: Sequence[str]) -> int:
    """Run, compare, write; 1 where a reward differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_rewards", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="of the runs with the techniques on; at least two")
    parser.add_argument("--off-seeds", default="0", help="of the runs without")
    parser.add_argument("--runs", type=Path, help="where run directories are, or go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    seeds, off_seeds = ([int(seed) for seed in text.split(",")] for text in (options.seeds, options.off_seeds))
    if len(seeds) < 2:
        parser.error("--seeds needs two or more for a spread")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        runs = [run(seed, True, folder) for seed in seeds] + [run(seed, False, folder) for seed in off_seeds]
    students: dict[str, list[dict[str, float]]] = {
        kind: [row["student"] for row in runs if row["techniques"] == kind] for kind in ("on", "off")
    }
    rewards = verdict(students["on"], students["off"])
    for reward, row in rewards.items():
        values = ", ".join(f"{value:.3f}" for value in row["on"])
        others = ", ".join(f"{value:.3f}" for value in row["off"])
        outcome = "same" if row["same"] else "DIFFERS"
        print(f"{reward:20} on {values} (spread {row['spread']:.3f})   off {others}   {outcome}")
    if options.out is not None:
        engine = to_dict(parse(["bundled"]).config)["engine"]
        content = {"command": ["python", "-m", "benchmarks.same_rewards", *argv], "on": engine, "off": OFF}
        options.out.write_text(json.dumps(content | {"runs": runs, "rewards": rewards}, indent=1) + "\n")
    return int(not all(row["same"] for row in rewards.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
