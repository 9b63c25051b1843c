"""The rewards of a run: base and teachers are judged once and the student again and again, on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from opd_fast.errors import UserError
from opd_fast.reporting.image_grid import image_grid
from opd_fast.reporting.reward_keys import reward_keys
from opd_fast.reporting.telemetry import NullTelemetry, Telemetry
from opd_fast.training.evaluation import Evaluation, ImageSampler, evaluate
from opd_fast.training.setup import Setup

GRID_COLUMNS = 8


class Judging:
    """Rows of rewards and the images beside them.

    Args:
        printed: (reward, reason) of the failures that this process has printed already; it grows.
    """

    def __init__(self, setup: Setup, run_dir: Path, printed: set[tuple[str, str]] | None = None) -> None:
        self.setup, self.run_dir = setup, run_dir
        self.keys = reward_keys((task.name, reward) for task in setup.tasks for reward in task.rewards)
        """(task, reward) to its key in `rows`."""
        self.rows: dict[str, dict[str, float]] = {}
        """Mean rewards of base and teachers, measured once; the student's at the end."""
        self.images: dict[str, dict[str, Tensor]] = {}
        """The first images of base and teachers, by row and task."""
        self.failures: dict[tuple[str, str], str] = {}
        """(reward, reason) to what evaluations found wrong, in words."""
        self.printed: set[tuple[str, str]] = set() if printed is None else printed
        self.judged_again = ""
        """Why base and teachers are judged again after a resume, in words."""

    def begin(self, telemetry: Telemetry | NullTelemetry, rounds: int) -> None:
        """Judge what does not train, and the student that training begins from, unless a checkpoint had their rows."""
        if self.rows or not self.setup.tasks:
            return
        again = f" again, since {self.judged_again}" if self.judged_again else ""
        telemetry.message(f"judging the base and the teachers{again}")
        self._judge_frozen()
        if again or self.setup.config.train.rounds == 0:  # a run without rounds judges its student at the end alone
            return
        if self.setup.config.student.start is None:  # the student is the base
            telemetry.evaluation(0, self._by_task(self.rows["base"]))
        elif rounds == 0:
            self.judge_student(telemetry, 0)

    def judge_student(self, telemetry: Telemetry | NullTelemetry, rounds: int) -> dict[str, float]:
        """Judge the averaged student after `rounds` rounds and draw its images beside the others.

        Returns its row.
        """
        with self.setup.student.ema_weights() as transformer:
            evaluation = self.judge(transformer, self._guidance())
        if self.setup.world.is_main:
            self._draw_grids(evaluation.images, rounds)
        telemetry.evaluation(rounds, evaluation.rewards)
        return self._flat(evaluation)

    def judge(self, transformer: Any, guidance: float | None) -> Evaluation:
        """One model's images on all tasks, with their rewards."""
        config = self.setup.config
        evaluation = evaluate(
            ImageSampler(
                self.setup.model,
                self.setup.evaluation_table,
                self.setup.shape,
                guidance,
                config.train.seed,
                self.setup.text,
                config.evaluation.batch,
            ),
            transformer,
            self.setup.tasks,
            keep_images=GRID_COLUMNS,
            reward_timeout=config.evaluation.reward_timeout,
            reward_models=config.reward_models,
            world=self.setup.world,
            reported=self.printed,
        )
        for reason, words in evaluation.failed.items():
            self.failures.setdefault(reason, words)
        return evaluation

    def _guidance(self) -> float | None:
        """The guidance of base and student; a teacher is judged with its own, as it teaches."""
        guidance = self.setup.config.evaluation.guidance
        return self.setup.config.student.guidance if guidance is None else guidance

    def _judge_frozen(self) -> None:
        with self.setup.student.base() as transformer:
            base = self.judge(transformer, self._guidance())
        if self.setup.config.evaluation.reward_failure == "stop":
            _refuse_unjudged(base)
        self._keep("base", base)
        for index, teacher in enumerate(self.setup.teachers.teachers):
            with self.setup.teachers.active(index) as transformer:
                self._keep(f"teacher:{teacher.name}", self.judge(transformer, teacher.guidance))

    def _keep(self, row: str, evaluation: Evaluation) -> None:
        self.rows[row] = self._flat(evaluation)
        self.images[row] = evaluation.images

    def _draw_grids(self, student: dict[str, Tensor], rounds: int) -> None:
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        for task in self.setup.tasks:
            rows = {_label(row): images[task.name] for row, images in self.images.items()}
            prompts = [p.text for p in task.prompts[:GRID_COLUMNS]]
            path = folder / f"{task.name}-round-{rounds:04d}.png"
            image_grid({**rows, "student": student[task.name]}, prompts, path)

    def _by_task(self, row: dict[str, float]) -> dict[str, dict[str, float]]:
        by_task: dict[str, dict[str, float]] = {task.name: {} for task in self.setup.tasks}
        for (task, reward), key in self.keys.items():
            by_task[task][reward] = row[key]
        return by_task

    def _flat(self, evaluation: Evaluation) -> dict[str, float]:
        return {key: evaluation.rewards[task][reward] for (task, reward), key in self.keys.items()}


def _refuse_unjudged(base: Evaluation) -> None:
    """Raise `UserError` where a reward gave a task no value at all: no one could judge what the run trains."""
    unjudged = base.unjudged()
    if not unjudged:
        return
    rewards = dict.fromkeys(name for _, name in unjudged)
    reasons = [next(words for (reward, _), words in base.failed.items() if reward == name) for name in rewards]
    raise UserError(
        f"teachers.{unjudged[0][0]}.reward",
        f"{'; '.join(reasons)}; so no image of the first judging has a value",
        "fix the reward and go on with --resume, or train without its values by evaluation.reward_failure continue",
    )


def _label(row: str) -> str:
    """A row's name beside its images: a teacher's own, unless it is that of another row."""
    name = row.removeprefix("teacher:")
    return f"teacher {name}" if name != row and name in ("base", "student") else name
