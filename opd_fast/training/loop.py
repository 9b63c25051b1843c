"""The only training loop: rounds, optimizer, average, evaluation, checkpoints. Methods supply a round's gradients."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd_fast.config import Config
from opd_fast.config.run_dir import make_run_dir, write_settings
from opd_fast.config.validate import validate
from opd_fast.distributed.plan import Planner
from opd_fast.distributed.world import World, full_tensor
from opd_fast.errors import UserError
from opd_fast.reporting.profiler import RoundProfiler
from opd_fast.reporting.telemetry import NullTelemetry, Telemetry, annotate
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.identity import compare, identify
from opd_fast.training.interruption import interruption
from opd_fast.training.optimizer import learning_rate
from opd_fast.training.problems import check_paths
from opd_fast.training.resuming import ended, finished
from opd_fast.training.run_state import RunState
from opd_fast.training.setup import prepare


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    profile: bool = False,
    world: World | None = None,
    planner: Planner | None = None,
    within: Path | None = None,
    printed: set[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Run `config` to its end in `run_dir`, or on from its newest checkpoint. Returns the content of results.json.

    Every process of `world` calls it alike. Ctrl-C or SIGTERM ends it after the round in hand, with everything learnt
    saved. A resumed run that is finished is reported at once and not loaded again. Raises ValueError for what cannot
    run, before anything is loaded where that can be seen then.

    Args:
        profile: record some rounds of rank 0 (`opd_fast.reporting.profiler`).
        planner: that of `config`, where the caller has one.
        within: the run that this one is a stage of.
        printed: (reward, reason) of the failing rewards that its other stages have printed (`Judging`).
    """
    started = time.monotonic()
    world = world or World()
    run_dir = Path(run_dir).expanduser()
    validate(config)
    check_paths(config)
    if resume and (results := world.on_first(partial(finished, run_dir, config))) is not None:
        if world.is_main:
            print(ended(run_dir, results), flush=True)
        return results
    world.on_first(partial(make_run_dir, run_dir, resume=resume))
    log: Callable[[str], None] = partial(print, flush=True) if world.is_main else lambda text: None
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, world)
    saved = checkpoints.find() if resume and world.on_first(lambda: checkpoints.latest() is not None) else None
    staged, notes = within is not None, list[str]()
    if saved is not None:
        notes = compare(*saved, config, world.on_first(partial(identify, config)), staged=staged)
        for line in notes:
            log(line)
    world.on_first(partial(write_settings, run_dir, config))
    backends = () if saved is None else saved[1].get("attention", ())
    setup = prepare(config, log, world, backends, planner)
    run = Run(setup, run_dir, checkpoints, started, printed)
    if saved is not None:
        for line in compare(*saved, config, run.sources, staged=staged):  # what loading fetched from the hub among them
            if line not in notes:
                log(line)
        run.load(*saved)
    elif resume and world.is_main:
        print(f"no checkpoint in {run_dir} yet: starting from round 0", file=sys.stderr, flush=True)
    telemetry: Telemetry | NullTelemetry = NullTelemetry()
    if world.is_main:
        rounds, resumed = config.train.rounds, saved is not None
        telemetry = Telemetry(run_dir, config.logging, rounds=rounds, start_round=run.rounds, resumed=resumed)
    with telemetry, RoundProfiler(run_dir, log=telemetry.message) if profile and world.is_main else nullcontext() as p:
        try:
            run.go(telemetry, p.round if p is not None else nullcontext)
        except UserError:
            checkpoints.wait()  # what is being written shall be there for --resume
            raise
    return run.finish(within or run_dir)


class Run(RunState):
    """A run and its rounds."""

    def go(
        self, telemetry: Telemetry | NullTelemetry, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Train all rounds that are left, each within `around()`."""
        self.judging.begin(telemetry, self.rounds)
        with interruption() as interrupted:
            while self.rounds < self.config.train.rounds:
                with around():
                    self._round(telemetry)
                if self._due(self.config.evaluation.every) and self.setup.tasks:
                    self.judging.judge_student(telemetry, self.rounds)
                if self.world.any(interrupted(), self.setup.model.device):  # each rank gets its own signal
                    self.interrupted = True
                    telemetry.message(f"stopping after round {self.rounds}: saving what was learnt")
                    break
                if self._due(self.config.checkpoint.every):
                    self.save()
        self.save()
        if self.setup.tasks and not self.interrupted:
            self.judging.rows["student"] = self.judging.judge_student(telemetry, self.rounds)
        self.checkpoints.wait()

    def _due(self, every: int) -> bool:
        """Whether what comes after every `every` rounds comes now; the end of the run has its own."""
        return every > 0 and self.rounds % every == 0 and self.rounds < self.config.train.rounds

    def _round(self, telemetry: Telemetry | NullTelemetry) -> None:
        begun = time.monotonic()
        with annotate("round"):
            losses = self.method.accumulate(self.rounds, self.scaler)
        with annotate("optimizer"):
            self.scaler.unscale_(self.optimizer)
            parameters = self.setup.student.parameters()
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip))
            rate = learning_rate(self.config, self.rounds)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = losses.double().cpu()
            metrics = {**self.method.metrics(self.rounds, losses), "lr": rate}
            if math.isfinite(norm):
                metrics["gradient_norm"] = float(norm)
            fault, bad = None, torch.nonzero(~torch.isfinite(losses))
            if len(bad):
                fault = self.method.fault(self.rounds, *bad[0].tolist())
            elif not math.isfinite(norm) and not self.scaler.is_enabled():
                fault = "its gradient is not finite, though its loss is"
            if fault is None:
                self.scaler.step(self.optimizer)  # where half precision overflowed, the scaler leaves the round out
                self.setup.student.ema.update(self.rounds, self.config.train.ema)
            self.scaler.update()
            self.optimizer.zero_grad()
        if fault is not None:
            self._skip(telemetry, fault)
            metrics = {key: value for key, value in metrics.items() if math.isfinite(value)} | {"skipped": 1.0}
        else:
            self.skipped_in_a_row = 0
        seconds = time.monotonic() - begun
        self.train_seconds += seconds
        metrics |= {"seconds": seconds, "samples_per_second": self.method.samples / seconds}
        telemetry.round(self.rounds, metrics)
        self.rounds += 1

    def _skip(self, telemetry: Telemetry | NullTelemetry, fault: str) -> None:
        """Count a round that was left out; too many in a row end the run, its weights as they were before them."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        telemetry.message(f"round {self.rounds}: {fault}; left out, {self.skipped} so far")
        if self.skipped_in_a_row < self.config.train.skip_limit:
            return
        self.checkpoints.wait()
        remedy = "lower train.lr or set model.dtype float32"
        if self.checkpoints.latest():
            remedy = f"lower train.lr, then go on with --resume {self.run_dir}"
        problem = f"{fault}, as in {self.skipped_in_a_row} rounds in a row; the weights are unharmed"
        raise UserError(f"round {self.rounds}", problem, remedy)
