"""`Request`: which models draw which prompts, how, and what judges the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opd_fast.config import Config, RewardModelsConfig, Solver
from opd_fast.config.command_line import parse
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import MERGED
from opd_fast.config.run_dir import newest_round
from opd_fast.errors import UserError
from opd_fast.rewards.metadata import check_metadata
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.preflight import evaluation_task

DRAWING = (
    *("family", "solver", "steps", "resolution", "guidance_convention", "seed", "dtype", "precision"),
    *("max_sequence_length", "vae_tiling"),
)
"""Attributes of a request that its images follow from."""
RUNS = Path("runs")
"""Where runs lie whose folder was not named."""


@dataclass(frozen=True)
class ModelRow:
    """One model of the table.

    Attributes:
        name: the row's name.
        weights: a LoRA, or whatever form a teacher may have; None stands for the pipeline's own weights.
        guidance: as the pipeline takes it; None is unguided.
        frozen: whether its judgements are kept for other evaluations, as those of the base and of teachers are.
    """

    name: str
    weights: str | None
    guidance: float | None
    frozen: bool = True


@dataclass(frozen=True)
class Request:
    """An evaluation: `rows` times `tasks`, drawn as the other attributes say; `opd_fast.evaluate` explains them."""

    model: str
    rows: list[ModelRow]
    tasks: list[EvalTask]
    out: Path
    family: str = "auto"
    solver: Solver = "ode"
    eta: float = 0.7
    steps: int = 20
    resolution: int | None = None
    guidance_convention: Literal["pipeline", "linear"] = "pipeline"
    seed: int = 0
    batch: int = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    precision: str = "auto"
    text_cache: str = "auto"
    max_sequence_length: int | None = None
    vae_tiling: bool = False
    reward_timeout: float | None = 300.0
    reward_models: RewardModelsConfig = field(default_factory=RewardModelsConfig)
    judgement_cache: str = "auto"
    save_images: bool = False
    grid: int = 8

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings that the images follow from, beside weights and prompts."""
        chosen = {name: getattr(self, name) for name in DRAWING}
        return chosen | ({} if self.solver == "ode" else {"eta": self.eta})


def of_run(run_dir: Path, *, limit: int | None = None, rewards: Sequence[str] = (), **changes: Any) -> Request:
    """Return the evaluation of a run: base, teachers and student, drawn and judged as the run's own evaluations.

    Args:
        run_dir: the folder of a run that has a student.
        limit: prompts taken of each task's; None takes those of the run.
        rewards: in place of the run's own, for every task.
        changes: attributes of the request in place of what the run's settings say; None changes nothing.

    Raises:
        UserError: the folder holds no run, or no student yet, or the run has no rewards.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError("RUN", f"{run_dir} holds no config.yaml", "name the folder of a run or of an evaluation")
    configs = parse([str(run_dir / "config.yaml")]).configs
    student = run_dir / "student"
    if not student.is_dir():
        done = newest_round(run_dir / "checkpoints")
        state = "has not begun" if done is None else f"stopped after round {done}"
        raise UserError("RUN", f"{run_dir} {state} and has no student yet", f"finish it with --resume {run_dir}")
    request = of_configs(configs, run_dir / "evaluation", limit=limit, rewards=rewards, **changes)
    name = run_dir.resolve().name
    row = ModelRow("student", str(student), _base_guidance(configs[-1], changes.get("guidance")), frozen=False)
    if not request.tasks:
        raise UserError("RUN", f"{name} has no task with a reward", "name rewards with --rewards")
    return replace(request, rows=[*request.rows, row])


def of_configs(
    configs: Sequence[Config], out: Path, *, limit: int | None = None, rewards: Sequence[str] = (), **changes: Any
) -> Request:
    """Return the evaluation of what the stages of a run do not train: the base and the teachers, under all tasks."""
    config = configs[0]
    guidance = changes.pop("guidance", None)
    rows = {"base": ModelRow("base", None, _base_guidance(config, guidance))}
    tasks: dict[str, EvalTask] = {}
    for stage in configs:
        if rewards:
            for teacher in stage.teachers:
                teacher.reward = None
            stage.evaluation.rewards = list(rewards)
        for teacher in stage.teachers:
            if (task := evaluation_task(teacher, stage, lambda _: None)) is not None:
                tasks.setdefault(task.name, task)
            if method_spec(stage).has_teachers and teacher.weights not in ("base", MERGED):
                its_own = teacher.guidance if guidance is None else guidance
                rows.setdefault(
                    f"teacher:{teacher.name}", ModelRow(f"teacher:{teacher.name}", teacher.weights, its_own)
                )
    if limit is not None:
        tasks = {name: limited(task, limit) for name, task in tasks.items()}
    drawn: dict[str, Any] = {
        "family": config.model.family,
        "steps": config.evaluation.steps,
        "resolution": config.model.resolution,
        "guidance_convention": config.model.guidance_convention,
        "seed": config.train.seed,
        "batch": config.evaluation.batch,
        "dtype": config.model.dtype,
        "precision": config.engine.precision,
        "text_cache": config.model.text_cache,
        "max_sequence_length": config.model.max_sequence_length,
        "vae_tiling": config.evaluation.vae_tiling,
        "reward_timeout": config.evaluation.reward_timeout,
        "reward_models": config.reward_models,
    }
    for task in tasks.values():
        for reward in task.rewards:
            check_metadata(reward, task.prompts, "rewards" if rewards else f"teachers.{task.name}.reward")
    given = {name: value for name, value in changes.items() if value is not None}
    return Request(config.model.path, list(rows.values()), list(tasks.values()), out, **(drawn | given))


def limited(task: EvalTask, limit: int) -> EvalTask:
    """Return the task with its first `limit` prompts and as many images of each as before."""
    each = max(task.count // len(task.prompts), 1)
    prompts = task.prompts[:limit]
    return replace(task, prompts=prompts, images=len(prompts) * each)


def newest_run() -> Path | None:
    """Return the newest finished run on the bundled pipeline in `runs/`; None where there is none."""
    found = []
    for student in RUNS.glob("*/student"):
        try:
            configs = parse([str(student.parent / "config.yaml")]).configs
        except (UserError, OSError):
            continue
        if all(config.model.path == "bundled" for config in configs):
            found.append((student.stat().st_mtime, student.parent))
    return max(found)[1] if found else None


def _base_guidance(config: Config, given: float | None) -> float | None:
    """The guidance of base and student: as given, else as the run's evaluations have it."""
    if given is not None:
        return given
    return config.student.guidance if config.evaluation.guidance is None else config.evaluation.guidance
