"""The only training loop: rounds, optimizer, average, evaluation, checkpoints. Methods supply a round's gradients."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from opd_fast.checkpoint import Checkpoints
from opd_fast.config import Config
from opd_fast.errors import UserError
from opd_fast.evaluate import Evaluation, evaluate
from opd_fast.report import gain_recovered, image_grid, new_results, print_table, write_report, write_results
from opd_fast.student import Student
from opd_fast.telemetry import Telemetry, annotate, read_metrics
from opd_fast.trainers.grpo import GRPO
from opd_fast.trainers.nft import NFT
from opd_fast.trainers.opd import OPD
from opd_fast.trainers.setup import Setup, prepare

METHODS: dict[str, Any] = {"opd": OPD, "grpo": GRPO, "nft": NFT}
GRID_COLUMNS = 8


def train(config: Config, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run `config` to its end in `run_dir`, or on from its newest checkpoint; returns the content of results.json.

    Ctrl-C or SIGTERM ends it after the round in hand, everything learnt saved. Raises ValueError for what cannot run.
    """
    started = time.monotonic()
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep)
    saved = checkpoints.load() if resume else None
    setup = prepare(config, say=lambda text: print(text, flush=True))
    run = _Run(setup, run_dir, checkpoints, started)
    if saved is not None:
        run.load(*saved)
    with Telemetry(run_dir, config.logging, rounds=config.train.rounds, start_round=run.rounds) as telemetry:
        run.go(telemetry)
    return run.finish()


class _Run:
    """The state of a run between rounds."""

    def __init__(self, setup: Setup, run_dir: Path, checkpoints: Checkpoints, started: float) -> None:
        self.setup, self.config, self.run_dir, self.checkpoints = setup, setup.config, run_dir, checkpoints
        self.method = METHODS[self.config.train.method](setup)
        self.optimizer = make_optimizer(setup.student, self.config)
        # Half precision has no room for small gradients: scale them up, and leave out a round that overflows.
        self.scaler = torch.amp.GradScaler(setup.model.device.type, enabled=setup.model.dtype == torch.float16)
        self.rounds = 0
        self.rows: dict[str, dict[str, float]] = {}
        """Mean rewards of base and teachers, measured once."""
        self.images: dict[str, dict[str, Tensor]] = {}
        self.train_seconds, self.seconds_before, self.started = 0.0, 0.0, started
        self.interrupted = False

    def go(self, telemetry: Telemetry) -> None:
        """All rounds that are left."""
        every = self.config.evaluation.every
        if not self.rows and self.setup.tasks:
            telemetry.message("judging the base and the teachers")
            self._judge_frozen()
            telemetry.evaluation(0, self._by_task(self.rows["base"]))
        with _interruption() as interrupted:
            while self.rounds < self.config.train.rounds:
                self._round(telemetry)
                last = self.rounds == self.config.train.rounds
                if every and self.setup.tasks and not last and self.rounds % every == 0:
                    telemetry.evaluation(self.rounds, self._judge_student().rewards)
                if interrupted():
                    self.interrupted = True
                    telemetry.message(f"stopping after round {self.rounds}: saving what was learnt")
                    break
                if not last and self.config.checkpoint.every and self.rounds % self.config.checkpoint.every == 0:
                    self.save()
        self.save()
        if self.setup.tasks and not self.interrupted:
            evaluation = self._judge_student()
            telemetry.evaluation(self.rounds, evaluation.rewards)
            self.rows["student"] = _flat(evaluation)

    def _round(self, telemetry: Telemetry) -> None:
        begun = time.monotonic()
        with annotate("round"):
            output = self.method.accumulate(self.rounds, self.scaler)
        with annotate("optimizer"):
            self.scaler.unscale_(self.optimizer)
            parameters = self.setup.student.parameters()
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip)
            rate = learning_rate(self.config, self.rounds)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            metrics = {**self._metrics(output), "lr": rate}
            if math.isfinite(norm):  # else the scaler leaves the round out
                metrics["gradient_norm"] = float(norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.setup.student.update_ema(self.rounds, self.config.train.ema)
        seconds = time.monotonic() - begun
        self.train_seconds += seconds
        metrics |= {"seconds": seconds, "samples_per_second": self.method.samples / seconds}
        telemetry.round(self.rounds, metrics)
        self.rounds += 1

    def _metrics(self, output: Any) -> dict[str, float]:
        """The method's metrics; numbers that are not finite end the run before they reach the weights."""
        try:
            return self.method.metrics(self.rounds, output)
        except FloatingPointError as error:
            raise UserError(
                f"round {self.rounds}",
                f"{error}; the weights of round {self.rounds} are unharmed",
                f"lower train.lr, then go on with --resume {self.run_dir}"
                if self.checkpoints.latest()
                else "lower train.lr or set model.dtype float32",
            ) from error

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, transformer: Any, guidance: float) -> Evaluation:
        return evaluate(
            self.setup.model,
            transformer,
            self.setup.tasks,
            self.setup.evaluation_table,
            shape=self.setup.shape,
            guidance=guidance,
            seed=self.config.train.seed,
            text=self.setup.text,
            batch=self.config.evaluation.batch,
            keep_images=GRID_COLUMNS,
            reward_timeout=self.config.evaluation.reward_timeout,
        )

    def _guidance(self) -> float:
        """The guidance of base and student; a teacher is judged with its own, as it teaches."""
        asked = self.config.evaluation.guidance
        return self.config.student.guidance if asked is None else asked

    def _judge_frozen(self) -> None:
        with self.setup.student.base() as transformer:
            self._keep("base", self._judge(transformer, self._guidance()))
        for index, teacher in enumerate(self.setup.teachers.teachers):
            with self.setup.teachers.active(index) as transformer:
                self._keep(f"teacher:{teacher.name}", self._judge(transformer, teacher.guidance))

    def _keep(self, row: str, evaluation: Evaluation) -> None:
        self.rows[row] = _flat(evaluation)
        self.images[row] = evaluation.images

    def _judge_student(self) -> Evaluation:
        with self.setup.student.averaged() as transformer:
            evaluation = self._judge(transformer, self._guidance())
        self._grids(evaluation.images)
        return evaluation

    def _grids(self, student: dict[str, Tensor]) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for task in self.setup.tasks:
            rows = {name.removeprefix("teacher:"): images[task.name] for name, images in self.images.items()}
            prompts = [p.text for p in task.prompts[:GRID_COLUMNS]]
            path = folder / f"{task.name}-round-{self.rounds:04d}.png"
            image_grid({**rows, "student": student[task.name]}, prompts, path)

    def _by_task(self, row: dict[str, float]) -> dict[str, dict[str, float]]:
        return {task.name: {name: row[name] for name in task.rewards} for task in self.setup.tasks}

    # --- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything a resumed run needs, and the student's export beside it."""
        tensors = {**self.setup.student.state(), **optimizer_tensors(self.optimizer)}
        tensors |= {f"method.{name}": tensor for name, tensor in self.method.state().items()}
        for row, images in self.images.items():
            tensors |= {f"images.{row}.{task}": pixels for task, pixels in images.items()}
        meta = {"rows": self.rows, "train_seconds": self.train_seconds, "total_seconds": self._total_seconds()}
        meta["scaler"] = self.scaler.state_dict()
        self.checkpoints.save(self.rounds, tensors, meta)
        self.setup.student.export(self.run_dir / "student")

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.setup.student.load_state(tensors)
        load_optimizer(self.optimizer, tensors)
        prefix = "method."
        self.method.load_state({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.scaler.load_state_dict(meta.get("scaler", {}))
        for name, pixels in tensors.items():
            if name.startswith("images."):
                _, row, task = name.split(".", 2)
                self.images.setdefault(row, {})[task] = pixels
        self.rounds, self.rows = meta["round"], meta["rows"]
        self.train_seconds, self.seconds_before = meta["train_seconds"], meta["total_seconds"]

    def _total_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def finish(self) -> dict[str, Any]:
        """results.json, the table and the report; an interrupted run only says how to go on."""
        results = new_results(self.config)
        results["rows"] = self.rows
        results["rounds"] = self.rounds
        results["seconds"] = {"train": round(self.train_seconds, 2), "total": round(self._total_seconds(), 2)}
        if self.interrupted:
            print(f"stopped after round {self.rounds}; go on with --resume {self.run_dir}", flush=True)
            return results
        for row in ("base", "student"):
            self.rows.setdefault(row, {})  # a run without rewards has no numbers to show
        for task in self.setup.tasks if len(self.setup.teachers) else ():
            reward = task.rewards[0]
            base, teacher = self.rows["base"][reward], self.rows[f"teacher:{task.name}"][reward]
            results["recovered"][task.name] = gain_recovered(base, teacher, self.rows["student"][reward])
        write_results(self.run_dir, results)
        if self.setup.tasks:
            print_table(results)
        write_report(self.run_dir, results, read_metrics(self.run_dir / "metrics.jsonl"))
        print(f"student: {self.run_dir / 'student'}   report: {self.run_dir / 'report.html'}", flush=True)
        return results


def _flat(evaluation: Evaluation) -> dict[str, float]:
    return {reward: value for means in evaluation.rewards.values() for reward, value in means.items()}


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(student: Student, config: Config) -> torch.optim.AdamW:
    t = config.train
    return torch.optim.AdamW(student.parameters(), lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay)


def learning_rate(config: Config, index: int) -> float:
    """The rate of round `index` (0-based): a linear warm-up to train.lr, then constant, cosine or linear to 0."""
    t = config.train
    if index < t.warmup:
        return t.lr * (index + 1) / t.warmup
    progress = (index - t.warmup) / max(1, t.rounds - t.warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return t.lr * factor[t.schedule]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, for a checkpoint without pickle."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": torch.as_tensor(v) for i, values in state.items() for key, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over the state that `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextlib.contextmanager
def _interruption() -> Iterator[Any]:
    """Turns the first SIGINT or SIGTERM into a question the loop asks; a second SIGINT ends at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever owns it handles signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
