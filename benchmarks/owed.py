"""What only a GPU can measure: each row by name, with the command that measures it.

`benchmarks/README.md` lists those that no results file of a GPU has yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Owed:
    """A row of a GPU's results file, or a file of another benchmark."""

    name: str
    command: str
    what: str = ""


_STEP = "benchmarks/gpu.sh 1"
_LADDER = "benchmarks/gpu.sh 2"
_ROUND = "benchmarks/gpu.sh 3"
_SUITE = "pytest benchmarks --benchmark-only --save-results"

ROWS = (
    Owed("step/1GB", _STEP),
    Owed("step/1GB/drawn", _STEP),
    Owed("step/sd35m-512", _STEP),
    Owed("step/sd35m-512/drawn", _STEP),
    Owed("step/sd35m-512/unguided", _SUITE),
    Owed("step/sd35m-512/unguided/drawn", _SUITE),
    Owed("step/tiny", _SUITE),
    Owed("step/tiny/drawn", _SUITE),
    Owed("round/sd35m-512/exact", _STEP),
    Owed("round/sd35m-512/exact/compiled", _ROUND, "against the compiled loop"),
    Owed("round/sd35m-512/exact/at-once", _ROUND, "all 18 rows in one forward, the engine alone"),
    Owed("round/sd35m-512/fp8", _ROUND),
    Owed("round/sd35m-512/exact/1", _SUITE),
    Owed("round/sd35m-512/exact/16", _SUITE),
    Owed("round/sd35m-1024/exact", _ROUND),
    Owed("round/bundled", _SUITE),
    Owed("round/bundled/ode", _SUITE),
    Owed("round/tiny", _SUITE),
    Owed("round/tiny/ode", _SUITE),
    Owed("round/tiny/guided", _SUITE),
    *(
        Owed(f"ladder/sd35m-512/{rung}", _LADDER)
        for rung in ("one-pass", "student-merged", "blocks", "graphs", "fp8", "reference")
    ),
    *(
        Owed(f"ladder/sd35m-512/{rung}", "python -m benchmarks.ladder --save-results")
        for rung in (
            "teachers-grouped",
            "teachers-merged",
            "projections",
            "modulation",
            "attention",
            "compiled-reference",
        )
    ),
)
"""In the order of their worth."""

FILES = (
    Owed("the GPU tests", "pytest -m gpu", "about 500 cases; none has run on a GPU"),
    Owed("counters of the step kernel", "benchmarks/gpu.sh 1", "by Nsight Compute"),
    Owed("a timeline of a round", "benchmarks/profile.sh nsys", "by Nsight Systems"),
    Owed("time to quality", "python -m benchmarks.time_to_quality"),
    Owed("weak scaling over GPUs", "python -m benchmarks.weak_scaling", "on a machine with several"),
    Owed("what ddp costs a process alone", "python -m benchmarks.world_of_one", "a world of one asks for no reduction"),
)
"""What has no row: taken off this list by hand once it is done."""


def unmeasured(results: Iterable[dict[str, Any]]) -> list[Owed]:
    """Those of `ROWS` that no results file of a GPU has with a time."""
    measured = {
        row["name"]
        for content in results
        if content["environment"].get("threads") is None
        for row in content["rows"]
        if "seconds" in row
    }
    return [owed for owed in ROWS if owed.name not in measured]
