"""results.json: what a run measured, in one file.

`results` everywhere is its content:
`{"rows": {"base": {REWARD: x}, "teacher:NAME": {...}, "stage:NAME": {...}, "student": {...}}, "recovered":
{TASK: share or None}, "rounds": n, "seconds": {"train": s, "total": s}, "seed": n, "commit": ..., "config_hash": ...,
"failures": [what rewards did wrong, in words]}`. Results of former versions have no "failures".
In a row, a reward that several tasks have stands under `TASK/REWARD` for each of them
(`opd_fast.reporting.reward_keys`).
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

from opd_fast.config import Config
from opd_fast.config.serialize import config_hash
from opd_fast.files import replace_text

KEYS = ("rows", "recovered", "rounds", "seconds", "seed", "commit", "config_hash")


def new_results(config: Config) -> dict[str, Any]:
    """Return the results of a run that has not begun: seed, commit and settings are filled in, the rest is empty."""
    return {
        "rows": {},
        "recovered": {},
        "rounds": 0,
        "seconds": {"train": 0.0, "total": 0.0},
        "seed": config.train.seed,
        "commit": source_commit(),
        "config_hash": config_hash(config),
        "failures": [],
    }


def write_results(run_dir: Path, results: dict[str, Any]) -> None:
    """Write results.json; one that is there is replaced as a whole.

    Raises:
        ValueError: a key of the format is missing, or `rows` lacks base or student.
    """
    missing = [key for key in KEYS if key not in results]
    missing += [f"rows.{row}" for row in ("base", "student") if row not in results.get("rows", {})]
    if missing:
        raise ValueError(f"results lack {', '.join(missing)}; fill them in before writing results.json")
    # NaN is not JSON: a reward that could not be measured is null.
    text = json.dumps(finite(results), indent=2, allow_nan=False) + "\n"
    replace_text(Path(run_dir) / "results.json", text)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gain_recovered(base: float, teacher: float, student: float) -> float | None:
    """Return (student - base) / (teacher - base): at 0 the student has learnt nothing, at 1 it equals the teacher.

    The result is None where the teacher gains nothing over the base, and NaN where one of the three has no value.
    """
    gain = teacher - base
    return None if gain <= 1e-6 else (student - base) / gain


@functools.cache
def source_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, or None outside git.

    `-dirty` is appended where tracked files differ from the commit.
    """
    here = Path(__file__).resolve().parent
    try:
        run = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10, check=True)
        run(["git", "ls-files", "--error-unmatch", Path(__file__).name])  # not some repository around site-packages
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        dirty = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit
