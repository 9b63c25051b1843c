"""The state of a run, read from its directory without torch, so that a finished run ends before torch is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_fast.config import Config
from opd_fast.config.run_dir import newest_round
from opd_fast.config.serialize import config_hash
from opd_fast.config.stages import Stage, stages_hash
from opd_fast.errors import UserError


def finished(run_dir: Path, config: Config) -> dict[str, Any] | None:
    """Read results.json of a run that has done all rounds of `config` and was evaluated under its settings.

    Returns None where something is left to do. Raises UserError for `train.rounds` below the rounds that were done.
    """
    rounds, done = config.train.rounds, newest_round(run_dir / "checkpoints")
    if done is not None and rounds < done:
        raise UserError(
            "train.rounds",
            f"{rounds} is below the {done} rounds that {run_dir} has done",
            f"give {done} to end there, or more to go on",
        )
    return _results_of(run_dir, rounds, config_hash(config))


def finished_stages(run_dir: Path, stages: Sequence[Stage]) -> dict[str, Any] | None:
    """Read results.json of a finished run in stages; None where something is left to do."""
    return _results_of(run_dir, sum(stage.config.train.rounds for stage in stages), stages_hash(stages))


def _results_of(run_dir: Path, rounds: int, config_hash: str) -> dict[str, Any] | None:
    results = read_results(run_dir)
    return results if (results.get("rounds"), results.get("config_hash")) == (rounds, config_hash) else None


def read_results(run_dir: Path) -> dict[str, Any]:
    """The content of results.json; empty where there is none that can be read."""
    try:
        found = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def ended(run_dir: Path, results: dict[str, Any], *, staged: bool = False) -> str:
    """The message about a finished run."""
    remedy = f"go on with --resume {run_dir} --train.rounds N, N above {results['rounds']}"
    if staged:
        remedy = "its stages keep their rounds, so start a new run to train longer"
    return (
        f"{run_dir} is finished: all of its {results['rounds']} rounds are done; {remedy}\n"
        f"student: {run_dir / 'student'}   report: {run_dir / 'report.html'}"
    )
