"""What reinforcement learning gains on the bundled world, seed by seed: teachers, joint and cascaded baselines.

python -m benchmarks.reinforcement [RUN ...] [--seeds 0,1,2] [--jobs 2] [--runs DIR] [--out FILE]

A RUN is one of `RUNS`; each is `python -m opd_fast.train RECIPE ... --seed N` on one core, `--jobs` at a time. One
whose results.json lies in DIR already is not repeated, one that was cut off is resumed. FILE keeps every run, its curve
of held-out rewards, and each RUN's mean gain with its standard deviation over the seeds; the table in
docs/reinforcement.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd_fast.reporting.reward_keys import key_words, reward_key
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training import stages as cascade

RUNS: dict[str, list[str]] = {
    "teacher-composition": ["teacher-composition"],
    "teacher-text": ["teacher-text"],
    "teacher-colour": ["teacher-colour"],
    "teacher-colour by Flow-GRPO": ["teacher-colour", "--rl.guard", "false"],
    "teacher-text by Flow-GRPO": ["teacher-text", "--rl.guard", "false"],
    "joint-grpo-guard": ["joint-grpo-guard"],
    "joint-nft": ["joint-nft"],
    "joint-raw-sum": ["joint-raw-sum"],
    "cascade-nft": ["cascade-nft"],
}


def train(name: str, seed: int, folder: Path) -> Path:
    """The folder of one run, made now unless it is there."""
    run_dir = folder / f"{name.replace(' ', '-').lower()}-{seed}"
    if (run_dir / "results.json").is_file():
        return run_dir
    arguments = [*RUNS[name], "--seed", str(seed), "--run-dir", str(run_dir)]
    if (run_dir / "config.yaml").is_file():
        arguments = ["--resume", str(run_dir)]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "opd_fast.train", *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return run_dir


def told(name: str, seed: int, run_dir: Path) -> dict[str, Any]:
    """What a run leaves for the file."""
    results = json.loads((run_dir / "results.json").read_text())
    base, student = results["rows"]["base"], results["rows"]["student"]
    found = {
        "run": name,
        "seed": seed,
        "base": base,
        "student": student,
        "gain": {key: mean - base[key] for key, mean in student.items()},
        "curve": [
            {"round": line["round"]}
            | {reward_key(base, t, reward): v for t, row in line["evaluation"].items() for reward, v in row.items()}
            for line in history(run_dir)
            if "evaluation" in line
        ],
        **{key: results[key] for key in ("rounds", "seconds", "commit", "config_hash")},
    }
    stages = {row.removeprefix("stage:"): means for row, means in results["rows"].items() if row.startswith("stage:")}
    return found | ({"stages": stages} if stages else {})


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of all stages where there are some."""
    if (run_dir / "metrics.jsonl").is_file():
        return read_metrics(run_dir / "metrics.jsonl")
    folders = [path.parent for path in run_dir.glob("*/metrics.jsonl")]
    folders.sort(key=lambda folder: int(folder.name.partition("-")[0]))
    return cascade.history(folders, [json.loads((folder / "results.json").read_text()) for folder in folders])


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By run and reward: the gains' mean, smallest and standard deviation; and the mean minutes."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["run"] for run in runs):
        mine = [run for run in runs if run["run"] == name]
        found[name] = {
            "seeds": [run["seed"] for run in mine],
            "minutes": statistics.mean(run["seconds"]["total"] for run in mine) / 60,
            "gain": {
                reward: {
                    "mean": statistics.mean(gains := [run["gain"][reward] for run in mine]),
                    "smallest": min(gains),
                    "deviation": statistics.stdev(gains) if len(gains) > 1 else None,
                }
                for reward in mine[0]["gain"]
            },
        }
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each run and reward, over the seeds."""
    lines = ["| run | reward | base | after | gain, spread over seeds | minutes |", "|---|---|---|---|---|---|"]
    for name, found in summary(runs).items():
        mine = [run for run in runs if run["run"] == name]
        for reward, gain in found["gain"].items():
            base, after = (statistics.mean(run[row][reward] for run in mine) for row in ("base", "student"))
            spread = "one seed" if gain["deviation"] is None else f"± {gain['deviation']:.3f}, {len(mine)} seeds"
            cells = (f"`{name}`", key_words(reward), f"{base:.3f}", f"{after:.3f}")
            lines.append(f"| {' | '.join(cells)} | {gain['mean']:+.3f} ({spread}) | {found['minutes']:.0f} |")
    return "\n".join(lines)


def put_table(page: Path, text: str) -> None:
    """Write `text` between the page's marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- gains: begin -->\n")
    _, end, after = rest.partition("\n<!-- gains: end -->")
    if not begin or not end:
        raise ValueError(f"{page} has no marks <!-- gains: begin --> and <!-- gains: end -->")
    page.write_text(before + begin + text + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; all of them when none is given")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/reinforcement"))
    parser.add_argument("--out", type=Path, default=Path("docs/reinforcement.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/reinforcement.md"))
    arguments = parser.parse_args()
    names = arguments.names or list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"unknown runs {unknown}; known are {list(RUNS)}")
    wanted = [(name, int(seed)) for name in names for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda one: train(*one, arguments.runs), wanted))
    runs = [told(name, seed, folder) for (name, seed), folder in zip(wanted, folders, strict=True)]
    before = json.loads(arguments.out.read_text())["runs"] if arguments.out.is_file() else []
    runs += [run for run in before if (run["run"], run["seed"]) not in wanted]
    runs.sort(key=lambda run: (list(RUNS).index(run["run"]), run["seed"]))
    text = json.dumps({"summary": summary(runs), "runs": runs}, indent=2)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    put_table(arguments.page, table(runs))
    for name, found in summary(runs).items():
        for reward, gain in found["gain"].items():
            spread = "" if gain["deviation"] is None else f" +- {gain['deviation']:.3f}"
            print(f"{name:28} {reward:20} {gain['mean']:+.3f}{spread}  smallest {gain['smallest']:+.3f}")
        print(f"{name:28} {found['minutes']:.1f} minutes a run, {len(found['seeds'])} seeds")


if __name__ == "__main__":
    main()
