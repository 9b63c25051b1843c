"""A run in stages: each trains in a folder of its own, from the student that the one before it left."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opd_fast.config import Config
from opd_fast.config.serialize import to_yaml
from opd_fast.config.stages import Stage, stages_hash
from opd_fast.distributed.plan import Planner
from opd_fast.distributed.world import World
from opd_fast.files import replace_folder, replace_text
from opd_fast.reporting.html import write_report
from opd_fast.reporting.image_grid import newest_grids
from opd_fast.reporting.results import new_results, write_results
from opd_fast.reporting.reward_keys import reward_keys
from opd_fast.reporting.table import print_table
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.rewards import evaluated_rewards
from opd_fast.training.loop import train
from opd_fast.training.resuming import read_results

Row = dict[str, Any]
"""The means of one row of results.json, by key."""


def train_stages(
    stages: Sequence[Stage],
    run_dir: str | Path,
    *,
    resume: bool = False,
    profile: bool = False,
    world: World | None = None,
    planner: Planner | None = None,
) -> dict[str, Any]:
    """Run the stages one after the other, or on from where they stood.

    Returns the content of results.json: the rewards of the base, of the teachers, of the student after each stage (rows
    `stage:NAME`) and of the last student, and the rounds and seconds of all together. An interrupted run returns what
    its stage did. `planner` is that of the first stage, where the caller has one.
    """
    world, run_dir = world or World(), Path(run_dir).expanduser()
    done: list[dict[str, Any]] = []
    run = partial(train, profile=profile, world=world, within=run_dir, printed=set())
    folders = [run_dir / f"{number}-{stage.name}" for number, stage in enumerate(stages, start=1)]
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True)):
        config = stage.config
        if number > 0:
            config = copy.deepcopy(config)
            config.student.start = str(folders[number - 1] / "student")
            # The first stage alone merges its teachers.
            config.student.merge, config.student.merge_density = "linear", None
            config.student.merge_coefficients = None
        results = world.on_first(partial(read_results, folder)) if resume else {}
        if not results:
            if world.is_main:
                print(f"stage {number + 1} of {len(stages)}: {stage.name}", flush=True)
            again = world.on_first(partial(_begin, folder, config))
            results = run(config, folder, resume=again, planner=planner if number == 0 else None)
        if results["rounds"] < config.train.rounds:
            return results
        done.append(results)
    return _finish(stages, folders, done, run_dir, world)


def _begin(folder: Path, config: Config) -> bool:
    """Make a stage's folder. Returns whether one was there."""
    again = (folder / "config.yaml").is_file()
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", to_yaml(config))
    return again


def _finish(
    stages: Sequence[Stage], folders: Sequence[Path], done: Sequence[dict[str, Any]], run_dir: Path, world: World
) -> dict[str, Any]:
    rows = joined_rows(stages, [stage["rows"] for stage in done])
    results = new_results(stages[-1].config) | {"config_hash": stages_hash(stages), "rows": rows}
    results["recovered"] = done[-1]["recovered"]
    results["failures"] = list(dict.fromkeys(failure for stage in done for failure in stage.get("failures", ())))
    results["rounds"] = sum(stage["rounds"] for stage in done)
    results["seconds"] = {key: round(sum(stage["seconds"][key] for stage in done), 2) for key in ("train", "total")}
    if not world.is_main:
        return results
    last = folders[-1] / "student"
    replace_folder(run_dir / "student", lambda part: shutil.copytree(last, part, dirs_exist_ok=True))
    (run_dir / "samples").mkdir(exist_ok=True)
    for path in newest_grids(folders[-1]).values():
        shutil.copy(path, run_dir / "samples")
    write_results(run_dir, results)
    print_table(results)
    write_report(run_dir, results, history(folders, done))
    print(f"student: {run_dir / 'student'}   report: {run_dir / 'report.html'}", flush=True)
    return results


def joined_rows(stages: Sequence[Stage], tables: Sequence[dict[str, Row]]) -> dict[str, Row]:
    """The rows of all stages in one table: the base's and the teachers', one after each stage, the last student's.

    A stage may have tasks that the others lack, so that the keys are those of all stages' tasks together.
    """
    pairs = [
        [(t.name, r) for t in stage.config.teachers for r in evaluated_rewards(t, stage.config.evaluation.rewards)]
        for stage in stages
    ]
    keys = reward_keys(pair for of_stage in pairs for pair in of_stage)
    base: Row = {}
    teachers: dict[str, Row] = {}
    students: dict[str, Row] = {}
    for stage, of_stage, rows in zip(stages, pairs, tables, strict=True):
        renamed = [(key, keys[pair]) for pair, key in reward_keys(of_stage).items()]
        joined = {name: {new: row[key] for key, new in renamed if key in row} for name, row in rows.items()}
        base |= {key: mean for key, mean in joined["base"].items() if key not in base}
        for name, row in joined.items():
            if name.startswith("teacher:"):
                teachers[name] = teachers.get(name, {}) | row
        students[f"stage:{stage.name}"] = joined["student"]
    return {"base": base, **teachers, **students, "student": joined["student"]}


def history(folders: Sequence[Path], done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of all stages' metrics.jsonl, rounds and seconds counted through."""
    lines: list[dict[str, Any]] = []
    rounds, seconds = 0, 0.0
    for folder, results in zip(folders, done, strict=True):
        metrics = read_metrics(folder / "metrics.jsonl")
        lines += [line | {"round": rounds + line["round"], "time": seconds + line["time"]} for line in metrics]
        rounds, seconds = rounds + results["rounds"], seconds + results["seconds"]["total"]
    return lines
