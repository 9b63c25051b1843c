"""What a run is between two rounds, and what outlives it: checkpoints, from which it goes on, and its results.

Nothing random is kept: noise, prompts and schedules follow from the seed and the round's number.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_fast.config.serialize import to_dict
from opd_fast.errors import UserError
from opd_fast.files import replace_folder
from opd_fast.reporting.html import write_report
from opd_fast.reporting.results import gain_recovered, new_results, write_results
from opd_fast.reporting.table import print_table
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.identity import identify, judged_otherwise
from opd_fast.training.judging import Judging
from opd_fast.training.methods.base import make_method
from opd_fast.training.optimizer import make_optimizer, optimizer_state
from opd_fast.training.preflight import ANCHOR
from opd_fast.training.setup import Setup
from opd_fast.training.student_export import student_writer
from opd_fast.training.teachers import BASE


class RunState:
    """The state of a run between rounds, which began or was resumed at `time.monotonic()` = `started`."""

    def __init__(
        self,
        setup: Setup,
        run_dir: Path,
        checkpoints: Checkpoints,
        started: float,
        printed: set[tuple[str, str]] | None = None,
    ) -> None:
        self.setup, self.config, self.world = setup, setup.config, setup.world
        self.run_dir, self.checkpoints = run_dir, checkpoints
        self.sources = self.world.on_first(partial(identify, self.config))
        """What identifies the files and prompts that the numbers follow from."""
        self.method = make_method(setup)
        self.optimizer = make_optimizer(setup.student, self.config)
        # Half precision has no room for small gradients: scale them up, and leave out a round that overflows.
        self.scaler = torch.amp.GradScaler(setup.model.device.type, enabled=setup.model.dtype == torch.float16)
        # The scaler begins at the first number it is given, and a process without images gives it none in its rounds.
        self.scaler.scale(torch.zeros((), device=setup.model.device))
        self.judging = Judging(setup, run_dir, printed)
        self.rounds = 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.train_seconds, self.started = 0.0, started
        self.interrupted = False

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything a resumed run needs, and then the student's export beside it."""
        tensors = {**self.setup.student.state(), **optimizer_state(self.optimizer)}
        tensors |= {f"method.{name}": tensor for name, tensor in self.method.state().items()}
        for row, images in self.judging.images.items():
            tensors |= {f"images.{row}/{task}": pixels for task, pixels in images.items()}
        meta = {
            "rows": self.judging.rows,
            "failures": [[*reason, words] for reason, words in self.judging.failures.items()],
            "train_seconds": self.train_seconds,
            "total_seconds": time.monotonic() - self.started,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.scaler.state_dict(),
            "teachers": self._frozen_hashes(),
            "settings": to_dict(self.config),
            "sources": self.sources,
            "attention": list(self.setup.active.backends),
        }
        export = partial(replace_folder, self.run_dir / "student", student_writer(self.setup.student))
        self.checkpoints.save(self.rounds, tensors, meta, afterwards=export)

    def load(self, folder: Path, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises ValueError for one of another student or other teachers."""
        for name, digest in self._frozen_hashes().items():
            before = str(meta["teachers"].get(name))
            if before != digest:
                key = "objective.anchor" if name == ANCHOR else f"teachers.{name}.weights"
                problem = f"changed since {folder.name} was saved (sha256 {before[:12]} then, {digest[:12]} now)"
                raise UserError(key, problem, "put the former file back, or start a new run")
        images, method = (self.checkpoints.blanks(folder, prefix) for prefix in ("images.", "method."))
        rows, self.judging.judged_again = meta["rows"], self._judged_otherwise(folder, meta)
        if self.judging.judged_again:  # beside the rewards of base and teachers the student's would mean nothing
            rows, images = {}, {}
        for name, pixels in images.items():
            row, task = _row_and_task(name.removeprefix("images."), rows)
            self.judging.images.setdefault(row, {})[task] = pixels
        targets = {**self.setup.student.state(), **optimizer_state(self.optimizer), **images, **method}
        self.checkpoints.restore(folder, targets)
        self.method.load_state({name.removeprefix("method."): tensor for name, tensor in method.items()})
        self.scaler.load_state_dict(meta["scaler"])
        self.rounds, self.judging.rows = meta["round"], rows
        self.judging.failures = {(reward, reason): words for reward, reason, words in meta.get("failures", ())}
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        self.train_seconds = meta["train_seconds"]
        self.started -= meta["total_seconds"]

    def _frozen_hashes(self) -> dict[str, str]:
        """What identifies the teachers and the anchor, by name."""
        frozen = self.setup.teachers.teachers + (self.setup.anchor.teachers if self.setup.anchor else [])
        return {teacher.name: teacher.source.sha256 for teacher in frozen if teacher.adapter != BASE}

    def _judged_otherwise(self, folder: Path, meta: dict[str, Any]) -> str:
        """Why a checkpoint's rewards of base and teachers are not what this run would measure; empty where they are.

        An earlier version kept no settings beside them: it had one mean for all tasks of a reward, and filled
        `evaluation.prompts` images from a short file.
        """
        rows, count = meta["rows"], self.config.evaluation.prompts
        known = all(key in row for row in rows.values() for key in self.judging.keys.values())
        full = "settings" in meta or all(task.count == count for task in self.setup.tasks)
        if rows and not (known and full):
            return f"{folder.name} has rewards of another evaluation"
        changed = judged_otherwise(meta, self.config, self.sources)
        return f"{', '.join(changed)} changed" if changed else ""

    # --- results -----------------------------------------------------------------------------------------------------

    def finish(self, resume: Path) -> dict[str, Any]:
        """Write results.json and the report and print the table; an interrupted run only says that `resume` goes on.

        Returns the content of results.json.
        """
        rows, seconds = self.judging.rows, {"train": self.train_seconds, "total": time.monotonic() - self.started}
        results = new_results(self.config) | {"rows": rows, "failures": list(self.judging.failures.values())}
        results |= {"rounds": self.rounds, "seconds": {key: round(value, 2) for key, value in seconds.items()}}
        if not self.world.is_main:
            return results
        if self.interrupted:
            print(f"stopped after round {self.rounds}; go on with --resume {resume}", flush=True)
            return results
        for row in ("base", "student"):
            rows.setdefault(row, {})  # a run without rewards has no numbers to show
        for task in self.setup.tasks if len(self.setup.teachers) else ():
            key = self.judging.keys[task.name, task.rewards[0]]
            base, teacher = rows["base"][key], rows[f"teacher:{task.name}"][key]
            results["recovered"][task.name] = gain_recovered(base, teacher, rows["student"][key])
        write_results(self.run_dir, results)
        if self.setup.tasks:
            print_table(results)
        write_report(self.run_dir, results, read_metrics(self.run_dir / "metrics.jsonl"))
        print(f"student: {self.run_dir / 'student'}   report: {self.run_dir / 'report.html'}", flush=True)
        return results


def _row_and_task(name: str, rows: dict[str, Any]) -> tuple[str, str]:
    """Whose images a checkpoint has under `name`, which is the row and the task joined by a slash."""
    row, slash, task = name.partition("/")
    if slash:
        return row, task
    # An earlier version joined them by a point, which the names may have as well.
    row = max((row for row in rows if name.startswith(f"{row}.")), key=len)
    return row, name.removeprefix(f"{row}.")
