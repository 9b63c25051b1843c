"""The engine's techniques switched on one after the other: what each of them gives.

python -m benchmarks.ladder [--shape SHAPE] [--samples N] [--rungs NAME,NAME] [--pairs N] [--save-results [DIR]]

Every row is measured in turn with the published loop, a round of each, so that a drift of the machine meets both. A row
whose technique is not at work although it was asked for has the reason in place of a time: the engine's own record
(`opd_fast.training.optimize.ActiveTechniques`) must show it. Contestants are built one after the other; only the
published loop stays.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import default_device, environment
from benchmarks.models import NANO, SD35M_512, SD35M_1024, Shape
from benchmarks.report import (
    RESULTS,
    ordered,
    quantiles,
    ratio_text,
    rounded,
    save_rows,
    size_text,
    time_text,
)
from benchmarks.rounds import Recipe, Side, Work, allocated, published_recipe, random_work, tiny_work
from opd_fast.config import EngineConfig
from opd_fast.training.optimize import ActiveTechniques

Row = dict[str, Any]
SHAPES: dict[str, Shape | None] = {"tiny": None, "nano": NANO, "sd35m-512": SD35M_512, "sd35m-1024": SD35M_1024}
MOST_PAIRS = 20
LEFT_BEHIND = 2**28  # bytes of a rung that may stay on the GPU before compiled code is thrown away


@dataclass(frozen=True)
class Technique:
    """A rung: what it switches on top of those before, and what shows that it is at work."""

    name: str
    change: dict[str, Any]
    """Of `EngineConfig`."""
    evidence: Callable[[ActiveTechniques], Any]
    """Zero or empty where it is not at work."""
    gpu: bool = False
    exact: bool = True
    replaces: str = ""
    """The rung whose technique this one takes the place of."""


def _count(field: str) -> Callable[[ActiveTechniques], Any]:
    return lambda active: getattr(active, field)


BARE = EngineConfig(
    placement="shared",
    group_teachers=False,
    merge_student=False,
    fuse_projections=False,
    cache_modulation=False,
    attention="native",
    compile="off",
    graphs="off",
    precision="auto",
)
"""The one pass alone: teachers are adapters on one base and switched, the student's LoRA is not merged."""

TECHNIQUES = (
    Technique("teachers-grouped", {"group_teachers": True}, _count("grouped_teachers")),
    Technique("teachers-merged", {"placement": "merged"}, _count("merged_teachers"), replaces="teachers-grouped"),
    Technique("student-merged", {"merge_student": True}, _count("merged_layers")),
    Technique("projections", {"fuse_projections": True}, _count("fused")),
    Technique("modulation", {"cache_modulation": True}, _count("modulation")),
    Technique("blocks", {"compile": "on"}, _count("compiled"), gpu=True),
    Technique("attention", {"attention": "auto"}, lambda active: "/".join(active.backends)),
    Technique("graphs", {"graphs": "on"}, lambda active: active.graphs.replays, gpu=True),
    Technique("fp8", {"precision": "fp8"}, _count("fp8"), gpu=True, exact=False),
)
RUNGS = ("one-pass", *(technique.name for technique in TECHNIQUES), "compiled-reference")


class Ladder:
    """The rungs on one piece of work.

    Args:
        work: what every contestant does.
        prefix: of the rows' names.
        pairs: rounds of each rung in turn with the reference; None: as many as fit into `seconds`, 2 to 20.
        seconds: for the pairs of one rung.
        techniques: in their order.
    """

    def __init__(
        self,
        work: Work,
        prefix: str,
        *,
        pairs: int | None = None,
        seconds: float = 10.0,
        techniques: Sequence[Technique] = TECHNIQUES,
        compile_blocks: bool | None = None,
    ) -> None:
        self.work, self.prefix, self.pairs, self.seconds = work, prefix, pairs, seconds
        self.techniques = techniques
        self.cuda = work.device.type == "cuda"
        self.compiles = self.cuda if compile_blocks is None else compile_blocks
        """Whether rungs that compile run: on a CPU that takes minutes."""
        self._reference_seconds: list[float] = []

    def rows(self, wanted: Sequence[str] = RUNGS) -> Iterator[Row]:
        """Those of the `wanted` rungs as they are measured, then the compiled reference's and the reference's.

        The compiled reference takes longest to build, so it comes last; the engine's rows get their ratio to it then.
        """
        loop, self.reference = self.work.published()
        self.truth = self.work.truth(loop, self.reference)
        self.reference.round(self.work.batch)
        rows: list[Row] = []
        if "one-pass" in wanted:
            rows.append(self._row("one-pass", lambda: self.work.engine(BARE), True, self._nothing_else))
            yield rows[-1]
        settings, exact = BARE, True
        held: list[Technique] = []
        for technique in self.techniques:
            asked = replace(settings, **technique.change)
            why = self._not_here(technique)
            kept = [other for other in held if other.name != technique.replaces]
            if why is None and technique.name in wanted:
                checks = [*kept, technique]
                row = self._row(
                    technique.name,
                    lambda asked=asked: self.work.engine(asked),  # type: ignore[misc]
                    exact and technique.exact,
                    lambda side, checks=checks: self._missing(side, checks),  # type: ignore[misc]
                )
                why = row.get("note")
                rows.append(row)
                yield row
            elif technique.name in wanted:
                yield {"name": f"{self.prefix}/{technique.name}", "note": why}
            if why is None:  # what is not at work is left out of the rungs above
                settings, exact = asked, exact and technique.exact
                held = [*kept, technique]
        if "compiled-reference" in wanted:
            compiled = self._compiled_reference()
            for row in rows:
                if "seconds" in row and "seconds" in compiled:
                    # Each ratio was measured in turn with the reference, so that a drift in between drops out.
                    row["ratio_vs_compiled"] = rounded(row["ratio_vs_reference"] / compiled["ratio_vs_reference"])
            yield compiled
        yield self._reference_row()

    def _not_here(self, technique: Technique) -> str | None:
        if technique.gpu and not self.cuda and not (technique.name == "blocks" and self.compiles):
            return "needs a GPU"
        return None

    def _missing(self, side: Side, asked: Sequence[Technique]) -> str | None:
        """What was asked for and is not at work."""
        assert side.active is not None
        missing = [technique.name for technique in asked if not technique.evidence(side.active)]
        return f"not engaged: {', '.join(missing)}" if missing else self._nothing_else(side, asked)

    def _nothing_else(self, side: Side, asked: Sequence[Technique] = ()) -> str | None:
        """What is at work and was not asked for: the row would not be what its name says."""
        assert side.active is not None
        names = {technique.name for technique in asked}
        extra = [t.name for t in self.techniques if t.name not in names and t.evidence(side.active)]
        return f"at work though not asked for: {', '.join(extra)}" if extra else None

    def _compiled_reference(self) -> Row:
        if not self.compiles:
            return {"name": f"{self.prefix}/compiled-reference", "note": "needs a GPU"}
        return self._row("compiled-reference", self.work.compiled, True, lambda side: None)

    def _row(self, name: str, build: Callable[[], Side], exact: bool, fault: Callable[[Side], str | None]) -> Row:
        """Build, warm up, check, time in turn with the reference, compare the gradient, free."""
        row: Row = {"name": f"{self.prefix}/{name}"}
        begun = time.perf_counter()
        before = allocated(self.work.device)
        try:
            measured = self._measured(build(), fault)
            self._free(before)
        except torch.OutOfMemoryError:
            measured = {"note": "out of memory"}
        except Exception as error:  # whatever it is (Triton's compiler has errors of its own), the other rungs go on
            measured = {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        if "note" in measured:
            with suppress(Exception):
                self._free(before)
        if "note" not in measured:
            measured |= {"exact": exact, "built_and_measured_seconds": time.perf_counter() - begun}
        return ordered(rounded(row | measured))

    def _measured(self, side: Side, fault: Callable[[Side], str | None]) -> Row:
        batch = self.work.batch
        side.round(batch)  # compiles, captures
        if self.cuda:
            side.round(batch)
        found = fault(side)
        if found is not None:
            return {"note": found}
        own, reference = [side.seconds(batch)], [self.reference.seconds(batch)]
        pairs = self.pairs or max(2, min(MOST_PAIRS, round(self.seconds / (own[0] + reference[0]))))
        for _ in range(pairs - 1):
            own.append(side.seconds(batch))
            reference.append(self.reference.seconds(batch))
        self._reference_seconds += reference
        ratio = statistics.median(r / s for r, s in zip(reference, own, strict=True))
        seconds = quantiles(own)
        row: Row = {
            "seconds": seconds,
            "ratio_vs_reference": ratio,
            "share_of_floor": self.work.floor_seconds() / seconds["p50"],
            "peak_bytes": side.peak_bytes(batch),
            "pairs": pairs,
            "samples": len(batch),
            **self.work.errors(side, self.truth),
        }
        if side.active is not None:
            row["engaged"] = {t.name: value for t in self.techniques if (value := t.evidence(side.active))}
        return row

    def _reference_row(self) -> Row:
        seconds = quantiles(self._reference_seconds or [self.reference.seconds(self.work.batch)])
        row = {
            "name": f"{self.prefix}/reference",
            "seconds": seconds,
            "ratio_vs_reference": 1.0,
            "share_of_floor": self.work.floor_seconds() / seconds["p50"],
            "peak_bytes": self.reference.peak_bytes(self.work.batch),
            "exact": True,
            "pairs": max(1, len(self._reference_seconds)),
            "samples": len(self.work.batch),
            **self.work.errors(self.reference, self.truth),
        }
        return ordered(rounded(row))

    def _free(self, before: int) -> None:
        gc.collect()
        if not self.cuda:
            return
        if allocated(self.work.device) > before + LEFT_BEHIND:  # compiled code holds on to the weights
            torch._dynamo.reset()
            gc.collect()
        torch.cuda.empty_cache()


def table_of(rows: Sequence[Row], title: str) -> Any:
    """The rows as a rich table."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("rung", no_wrap=True)
    for column in ("median", "20 to 80 %", "vs published", "vs compiled", "of the floor", "peak", "gradient error"):
        table.add_column(column, justify="right")
    for row in rows:
        name = row["name"].rsplit("/", 1)[-1]
        if "note" in row:
            table.add_row(name, row["note"], style="dim" if row["note"] == "needs a GPU" else "red")
            continue
        seconds = row["seconds"]
        table.add_row(
            name + ("" if row["exact"] else " (lossy)"),
            time_text(seconds["p50"]),
            f"{time_text(seconds['p20'])} to {time_text(seconds['p80'])}",
            ratio_text(row["ratio_vs_reference"]),
            ratio_text(row.get("ratio_vs_compiled")),
            f"{100 * row['share_of_floor']:.0f} %",
            size_text(row["peak_bytes"]),
            f"{row['gradient_error']:.1e}",
        )
    return table


def work_for(name: str, samples: int | None, folder: Path, device: torch.device) -> Work:
    """The work of a named shape; `samples` a task, None: as the suite's round of that shape has."""
    shape = SHAPES[name]
    if shape is None:
        return tiny_work(device, Recipe(samples_per_task=samples or 8))
    if shape is NANO:
        small = Recipe(steps=3, samples_per_task=samples or 2, rank=4, resolution=NANO.resolution)
        return random_work(device, NANO, small, folder)
    return random_work(device, shape, published_recipe(samples or 3, shape.resolution), folder)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Exits with a message for a value that is not known."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="sd35m-512" if cuda else "tiny")
    parser.add_argument("--samples", type=int, metavar="N", help="samples a task (default: 3; tiny: 8)")
    parser.add_argument("--rungs", default=",".join(RUNGS), help="of " + ", ".join(RUNGS))
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds of a rung and of the reference in turn")
    parser.add_argument(
        "--seconds", type=float, default=10.0 if cuda else 30.0, help="for the pairs of a rung, without --pairs"
    )
    parser.add_argument(
        "--compile-on-cpu",
        action="store_true",
        help="climb the rungs that compile on a CPU too, where it takes minutes",
    )
    parser.add_argument("--save-results", nargs="?", const=str(RESULTS), metavar="DIR", help="write DEVICE-DATE.json")
    options = parser.parse_args(argv)
    options.rungs = options.rungs.split(",")
    unknown = sorted(set(options.rungs) - set(RUNGS))
    if unknown:
        parser.error(f"unknown rung {', '.join(unknown)}; there are {', '.join(RUNGS)}")
    for name in ("samples", "pairs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give 1 or more")
    return options


def main(argv: Sequence[str]) -> int:
    """Climb; 1 where a rung failed or was not at work."""
    options = parse(argv)
    device = default_device()
    prefix = f"ladder/{options.shape}" + (f"/{options.samples}" if options.samples else "")
    save = _saver(options.save_results, device, shlex.join(["python", "-m", "benchmarks.ladder", *argv]))
    rows: list[Row] = []
    interrupted = False
    with tempfile.TemporaryDirectory() as folder:
        work = work_for(options.shape, options.samples, Path(folder), device)
        ladder = Ladder(
            work,
            prefix,
            pairs=options.pairs,
            seconds=options.seconds,
            compile_blocks=True if options.compile_on_cpu else None,
        )
        try:
            for row in ladder.rows(options.rungs):
                told = row.get("note") or f"{time_text(row['seconds']['p50'])}, {ratio_text(row['ratio_vs_reference'])}"
                print(f"{row['name']}: {told}", file=sys.stderr, flush=True)
                rows.append(row)
                save(rows)  # now: whoever stops this keeps what was measured
        except KeyboardInterrupt:
            interrupted = True
    rows.sort(key=lambda row: not row["name"].endswith("reference"))  # first what the others are held against
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table_of(rows, prefix))
    if interrupted:
        print(f"interrupted after {len(rows)} rows", file=sys.stderr)
        return 130
    return int(any(row.get("note") not in (None, "needs a GPU") for row in rows))


def _saver(folder: str | None, device: torch.device, command: str) -> Callable[[list[Row]], None]:
    """What writes rows to a results file; nothing for no folder."""
    if folder is None:
        return lambda rows: None
    found = environment(device, command)  # before the rows: what the device can do is measured while it is idle

    def save(rows: list[Row]) -> None:
        save_rows(found, rows, Path(folder))

    return save


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
