"""The only training loop: rounds, optimizer, average, evaluation, checkpoints. Methods supply a round's gradients."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from opd_fast.config import Config
from opd_fast.config.run_dir import make_run_dir, write_settings
from opd_fast.config.serialize import to_dict
from opd_fast.config.validate import validate
from opd_fast.distributed.world import World, whole
from opd_fast.errors import UserError
from opd_fast.files import replace_folder
from opd_fast.reporting.profiler import RoundProfiler
from opd_fast.reporting.results import gain_recovered, image_grid, new_results, print_table, write_report, write_results
from opd_fast.reporting.reward_keys import reward_keys
from opd_fast.reporting.telemetry import Silence, Telemetry, annotate, read_metrics
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.evaluation import Evaluation, evaluate
from opd_fast.training.identity import compare, identify, judged_otherwise
from opd_fast.training.methods.grpo import GRPO
from opd_fast.training.methods.nft import NFT
from opd_fast.training.methods.opd import OPD
from opd_fast.training.methods.sft import SFT
from opd_fast.training.preflight import ANCHOR
from opd_fast.training.problems import check_paths
from opd_fast.training.resuming import check_rounds, ended, finished
from opd_fast.training.setup import Setup, prepare
from opd_fast.training.student import Student
from opd_fast.training.teachers import BASE

METHODS: dict[str, Any] = {"opd": OPD, "grpo": GRPO, "nft": NFT, "sft": SFT}
GRID_COLUMNS = 8


def train(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    profile: bool = False,
    world: World | None = None,
    within: Path | None = None,
    told: set[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Run `config` to its end in `run_dir`, or on from its newest checkpoint; returns the content of results.json.

    `run_dir` is made where it does not exist. `profile` records some rounds of rank 0
    (`opd_fast.reporting.profiler`); `within` is the run that this one is a stage of, and `told` what its other
    stages have printed of rewards that failed (`evaluate`). Every process of `world` calls it alike. Ctrl-C or
    SIGTERM ends it after the round in hand, everything learnt saved. A run that is finished is told at once and not
    loaded again. Raises ValueError for what cannot run, before anything is loaded where that can be seen then.
    """
    started = time.monotonic()
    world = world or World()
    run_dir = Path(run_dir).expanduser()
    validate(config)
    check_paths(config)
    if resume and (results := world.on_first(partial(finished, run_dir, config))) is not None:
        if world.first:
            _say(ended(run_dir, results))
        return results
    world.on_first(partial(make_run_dir, run_dir, resume=resume))
    say = _say if world.first else _silent
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, world)
    saved = checkpoints.find() if resume and world.on_first(lambda: checkpoints.latest() is not None) else None
    staged, notes = within is not None, list[str]()
    if saved is not None:
        check_rounds(run_dir, config, saved[1]["round"])
        notes = compare(*saved, config, world.on_first(partial(identify, config)), staged=staged)
        for line in notes:
            say(line)
    world.on_first(partial(write_settings, run_dir, config))
    backends = () if saved is None else saved[1].get("attention", ())
    setup = prepare(config, say, world, backends)
    run = Run(setup, run_dir, checkpoints, started, told)
    if saved is not None:
        for line in compare(*saved, config, run.sources, staged=staged):  # what loading fetched from the hub among them
            if line not in notes:
                say(line)
        run.load(*saved)
    elif resume and world.first:
        print(f"no checkpoint in {run_dir} yet: starting from round 0", file=sys.stderr, flush=True)
    rounds, begun = config.train.rounds, run.rounds
    telemetry = Telemetry(run_dir, config.logging, rounds=rounds, start_round=begun) if world.first else Silence()
    with telemetry, RoundProfiler(run_dir, say=telemetry.message) if profile and world.first else nullcontext() as p:
        try:
            run.go(telemetry, p.round if p is not None else nullcontext)
        except UserError:
            checkpoints.wait()  # what is being written shall be there for --resume
            raise
    return run.finish(within or run_dir)


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


class Run:
    """The state of a run between rounds."""

    def __init__(
        self,
        setup: Setup,
        run_dir: Path,
        checkpoints: Checkpoints,
        started: float,
        told: set[tuple[str, str]] | None = None,
    ) -> None:
        self.setup, self.config, self.run_dir, self.checkpoints = setup, setup.config, run_dir, checkpoints
        self.sources = self.world.on_first(partial(identify, self.config))
        """What identifies the files and prompts that the numbers follow from."""
        self.method = METHODS[self.config.train.method](setup)
        self.optimizer = make_optimizer(setup.student, self.config)
        # Half precision has no room for small gradients: scale them up, and leave out a round that overflows.
        self.scaler = torch.amp.GradScaler(setup.model.device.type, enabled=setup.model.dtype == torch.float16)
        # The scaler begins at the first number it is given, and a process without images gives it none in its rounds.
        self.scaler.scale(torch.zeros((), device=setup.model.device))
        self.rounds = 0
        self.keys = reward_keys((task.name, reward) for task in setup.tasks for reward in task.rewards)
        """(task, reward) to its key in `rows`."""
        self.rows: dict[str, dict[str, float]] = {}
        """Mean rewards of base and teachers, measured once; the student's at the end."""
        self.images: dict[str, dict[str, Tensor]] = {}
        self.failures: dict[tuple[str, str], str] = {}
        """(reward, reason) to what evaluations found wrong, in words."""
        self.told: set[tuple[str, str]] = set() if told is None else told
        """Which of them this process has printed."""
        self.train_seconds, self.seconds_before, self.started = 0.0, 0.0, started
        self.interrupted = False
        self.judged_again = ""
        """Why base and teachers are judged again after a resume, in words."""
        self.skipped, self.skipped_in_a_row = 0, 0

    @property
    def world(self) -> World:
        return self.setup.world

    def go(
        self, telemetry: Telemetry | Silence, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """All rounds that are left, each within `around()`."""
        every = self.config.evaluation.every
        if not self.rows and self.setup.tasks:
            again = f" again, since {self.judged_again}" if self.judged_again else ""
            telemetry.message(f"judging the base and the teachers{again}")
            self._judge_frozen()
            if not again and self.config.student.start is None:  # the student is the base
                telemetry.evaluation(0, self._by_task(self.rows["base"]))
            elif not again and self.rounds == 0:
                telemetry.evaluation(0, self._judge_student().rewards)
        with _interruption() as interrupted:
            while self.rounds < self.config.train.rounds:
                with around():
                    self._round(telemetry)
                last = self.rounds == self.config.train.rounds
                if every and self.setup.tasks and not last and self.rounds % every == 0:
                    telemetry.evaluation(self.rounds, self._judge_student().rewards)
                if self.world.any(interrupted(), self.setup.model.device):  # each rank gets its own signal
                    self.interrupted = True
                    telemetry.message(f"stopping after round {self.rounds}: saving what was learnt")
                    break
                if not last and self.config.checkpoint.every and self.rounds % self.config.checkpoint.every == 0:
                    self.save()
        self.save()
        if self.setup.tasks and not self.interrupted:
            evaluation = self._judge_student()
            telemetry.evaluation(self.rounds, evaluation.rewards)
            self.rows["student"] = self._flat(evaluation)
        self.checkpoints.wait()

    def _round(self, telemetry: Telemetry | Silence) -> None:
        begun = time.monotonic()
        with annotate("round"):
            losses = self.method.accumulate(self.rounds, self.scaler)
        with annotate("optimizer"):
            self.scaler.unscale_(self.optimizer)
            parameters = self.setup.student.parameters()
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.config.train.clip))
            rate = learning_rate(self.config, self.rounds)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses = losses.double().cpu()
            metrics = {**self.method.metrics(self.rounds, losses), "lr": rate}
            if math.isfinite(norm):
                metrics["gradient_norm"] = float(norm)
            fault = self.method.fault(self.rounds, losses)
            if fault is None and not math.isfinite(norm) and not self.scaler.is_enabled():
                fault = "its gradient is not finite, though its loss is"
            if fault is None:
                self.scaler.step(self.optimizer)  # where half precision overflowed, the scaler leaves the round out
                self.setup.student.update_ema(self.rounds, self.config.train.ema)
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

    def _skip(self, telemetry: Telemetry | Silence, fault: str) -> None:
        """Count a round that was left out; too many in a row end the run, its weights as they were before them."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        telemetry.message(f"round {self.rounds}: {fault}; left out, {self.skipped} so far")
        if self.skipped_in_a_row < self.config.train.skip_limit:
            return
        self.checkpoints.wait()
        last = self.checkpoints.latest()
        raise UserError(
            f"round {self.rounds}",
            f"{fault}, as in {self.skipped_in_a_row} rounds in a row; the weights are unharmed",
            f"lower train.lr, then go on with --resume {self.run_dir}"
            if last
            else "lower train.lr or set model.dtype float32",
        )

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judge(self, transformer: Any, guidance: float | None) -> Evaluation:
        evaluation = evaluate(
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
            world=self.world,
            told=self.told,
        )
        for reason, words in evaluation.failed.items():
            self.failures.setdefault(reason, words)
        return evaluation

    def _guidance(self) -> float | None:
        """The guidance of base and student; a teacher is judged with its own, as it teaches."""
        asked = self.config.evaluation.guidance
        return self.config.student.guidance if asked is None else asked

    def _judge_frozen(self) -> None:
        with self.setup.student.base() as transformer:
            base = self._judge(transformer, self._guidance())
        if self.config.evaluation.reward_failure == "stop":
            self._refuse_unjudged(base)
        self._keep("base", base)
        for index, teacher in enumerate(self.setup.teachers.teachers):
            with self.setup.teachers.active(index) as transformer:
                self._keep(f"teacher:{teacher.name}", self._judge(transformer, teacher.guidance))

    def _refuse_unjudged(self, base: Evaluation) -> None:
        """Raise UserError where a reward gave a task no value at all: no one could judge what the run trains."""
        unjudged = base.unjudged()
        if not unjudged:
            return
        rewards = dict.fromkeys(name for _, name in unjudged)
        reasons = [next(said for (reward, _), said in base.failed.items() if reward == name) for name in rewards]
        raise UserError(
            f"teachers.{unjudged[0][0]}.reward",
            f"{'; '.join(reasons)}; so no image of the first judging has a value",
            "fix the reward and go on with --resume, or train without its values by evaluation.reward_failure continue",
        )

    def _keep(self, row: str, evaluation: Evaluation) -> None:
        self.rows[row] = self._flat(evaluation)
        self.images[row] = evaluation.images

    def _judge_student(self) -> Evaluation:
        with self.setup.student.averaged() as transformer:
            evaluation = self._judge(transformer, self._guidance())
        if self.world.first:
            self._grids(evaluation.images)
        return evaluation

    def _grids(self, student: dict[str, Tensor]) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for task in self.setup.tasks:
            rows = {_label(row): images[task.name] for row, images in self.images.items()}
            prompts = [p.text for p in task.prompts[:GRID_COLUMNS]]
            path = folder / f"{task.name}-round-{self.rounds:04d}.png"
            image_grid({**rows, "student": student[task.name]}, prompts, path)

    def _by_task(self, row: dict[str, float]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {task.name: {} for task in self.setup.tasks}
        for (task, reward), key in self.keys.items():
            found[task][reward] = row[key]
        return found

    def _flat(self, evaluation: Evaluation) -> dict[str, float]:
        return {key: evaluation.rewards[task][reward] for (task, reward), key in self.keys.items()}

    # --- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint of everything a resumed run needs, and then the student's export beside it.

        Nothing random is kept: noise, prompts and schedules follow from the seed and the round's number.
        """
        tensors = {**self.setup.student.state(), **optimizer_state(self.optimizer)}
        tensors |= {f"method.{name}": tensor for name, tensor in self.method.state().items()}
        for row, images in self.images.items():
            tensors |= {f"images.{row}/{task}": pixels for task, pixels in images.items()}
        meta = {
            "rows": self.rows,
            "failures": [[*reason, said] for reason, said in self.failures.items()],
            "train_seconds": self.train_seconds,
            "total_seconds": self._total_seconds(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": self.scaler.state_dict(),
            "teachers": self._frozen(),
            "settings": to_dict(self.config),
            "sources": self.sources,
            "attention": list(self.setup.engaged.backends),
        }
        write = self.setup.student.exporter()
        self.checkpoints.save(
            self.rounds, tensors, meta, afterwards=lambda: replace_folder(self.run_dir / "student", write)
        )

    def _frozen(self) -> dict[str, str]:
        """What identifies the teachers and the anchor, by name."""
        banks = (self.setup.teachers, self.setup.anchor)
        frozen = [teacher for bank in banks if bank is not None for teacher in bank.teachers]
        return {teacher.name: teacher.origin.sha256 for teacher in frozen if teacher.adapter != BASE}

    def _judged_otherwise(self, folder: Path, meta: dict[str, Any]) -> str:
        """Why a checkpoint's rewards of base and teachers are not what this run would measure; empty where they are.

        An earlier version kept no settings beside them: it had one mean for all tasks of a reward, and filled
        `evaluation.prompts` images from a short file.
        """
        rows, count = meta["rows"], self.config.evaluation.prompts
        known = all(key in row for row in rows.values() for key in self.keys.values())
        if rows and not (known and ("settings" in meta or all(task.count == count for task in self.setup.tasks))):
            return f"{folder.name} has rewards of another evaluation"
        changed = judged_otherwise(meta, self.config, self.sources)
        return f"{', '.join(changed)} changed" if changed else ""

    def load(self, folder: Path, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises ValueError for one of another student or other teachers."""
        for name, digest in self._frozen().items():
            before = meta["teachers"].get(name)
            if before != digest:
                raise UserError(
                    "objective.anchor" if name == ANCHOR else f"teachers.{name}.weights",
                    f"changed since {folder.name} was saved (sha256 {str(before)[:12]} then, {digest[:12]} now)",
                    "put the former file back, or start a new run",
                )
        images, method = (self.checkpoints.blanks(folder, prefix) for prefix in ("images.", "method."))
        rows, self.judged_again = meta["rows"], self._judged_otherwise(folder, meta)
        if self.judged_again:  # beside the rewards of base and teachers the student's would mean nothing
            rows, images = {}, {}
        for name, pixels in images.items():
            place = name.removeprefix("images.")
            row, slash, task = place.partition("/")
            if not slash:  # of an earlier version, joined by a point, which the names may have as well
                row = max((row for row in rows if place.startswith(f"{row}.")), key=len)
                task = place.removeprefix(f"{row}.")
            self.images.setdefault(row, {})[task] = pixels
        targets = {**self.setup.student.state(), **optimizer_state(self.optimizer), **images, **method}
        self.checkpoints.restore(folder, targets)
        self.method.load_state({name.removeprefix("method."): tensor for name, tensor in method.items()})
        self.scaler.load_state_dict(meta["scaler"])
        self.rounds, self.rows = meta["round"], rows
        self.failures = {(reward, reason): said for reward, reason, said in meta.get("failures", ())}
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        self.train_seconds, self.seconds_before = meta["train_seconds"], meta["total_seconds"]

    def _total_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def finish(self, resume: Path) -> dict[str, Any]:
        """results.json, the table and the report; an interrupted run only says that `resume` goes on."""
        results = new_results(self.config)
        results["rows"] = self.rows
        results["failures"] = list(self.failures.values())
        results["rounds"] = self.rounds
        results["seconds"] = {"train": round(self.train_seconds, 2), "total": round(self._total_seconds(), 2)}
        if not self.world.first:
            return results
        if self.interrupted:
            print(f"stopped after round {self.rounds}; go on with --resume {resume}", flush=True)
            return results
        for row in ("base", "student"):
            self.rows.setdefault(row, {})  # a run without rewards has no numbers to show
        for task in self.setup.tasks if len(self.setup.teachers) else ():
            key = self.keys[task.name, task.rewards[0]]
            base, teacher = self.rows["base"][key], self.rows[f"teacher:{task.name}"][key]
            results["recovered"][task.name] = gain_recovered(base, teacher, self.rows["student"][key])
        write_results(self.run_dir, results)
        if self.setup.tasks:
            print_table(results)
        write_report(self.run_dir, results, read_metrics(self.run_dir / "metrics.jsonl"))
        print(f"student: {self.run_dir / 'student'}   report: {self.run_dir / 'report.html'}", flush=True)
        return results


def _label(row: str) -> str:
    """A row's name beside its images: a teacher's own, unless it is that of another row."""
    name = row.removeprefix("teacher:")
    return f"teacher {name}" if name != row and name in ("base", "student") else name


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(student: Student, config: Config) -> torch.optim.AdamW:
    t = config.train
    return torch.optim.AdamW(
        student.parameters(), lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, fused=True
    )


def learning_rate(config: Config, index: int) -> float:
    """The rate of round `index` (0-based): a linear warm-up to train.lr, then constant, cosine or linear to 0."""
    t = config.train
    if index < t.warmup:
        return t.lr * (index + 1) / t.warmup
    progress = (index - t.warmup) / max(1, t.rounds - t.warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return t.lr * factor[t.schedule]


def optimizer_state(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's moments and step counts by name, made where there are none yet: the tensors themselves, for a checkpoint
    to read or fill."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    return tensors


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
