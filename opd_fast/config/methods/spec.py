"""What a method of training says of itself: plan, validation, memory and setup ask these questions, never its name."""

from __future__ import annotations

import pkgutil
import re
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from opd_fast.config.methods import METHODS
from opd_fast.config.schema import Config, ObjectiveConfig, RLConfig, SFTConfig
from opd_fast.config.serialize import flatten, leaves, teacher_leaves
from opd_fast.errors import UserError


@dataclass(frozen=True)
class RoundSize:
    """The numbers that decide a round's transformer rows."""

    rows: int
    """The rows of one step of all of the student's samples: those of a round, or of a rollout that serves several."""
    teacher_rows: float
    """The rows of one step of all of the teachers' samples, on average over rounds."""
    steps: int
    """The steps at which a sample is learnt from."""
    queried_steps: float
    """The steps among them at which a round has a loss, on average."""


class MethodSpec:
    """One method of training. A method of its own overrides what differs."""

    name: str
    """As `train.method` gives it."""
    implementation: str
    """`module:Class`, a `opd_fast.training.methods.base.Method`; it is imported when a run begins."""
    reads: tuple[str, ...] = ()
    """Which of `METHOD_SETTINGS` it reads, as patterns of `fnmatch`. A run that sets any other is refused."""
    has_teachers: bool = True
    """Whether the entries of `teachers` are frozen models; else they are tasks, each with its reward."""
    distils: bool = False
    """Whether it trains the objective at every step of the student's own rollout, and keeps no images."""
    looks_at_images: bool = True
    """Whether training decodes images where tasks have rewards."""
    sums_rewards: bool = True
    """Whether a task's reward may be a sum."""
    guided: bool = True
    """Whether the student may draw with guidance."""
    shards: bool = False
    """Whether weights may be sharded over devices."""
    old_policy: bool = False
    """Whether a second set of the trained weights draws the images."""

    def check(self, config: Config) -> None:
        """Raise `UserError` for values that the method cannot work with; settings it does not read are at default."""
        strategy = config.parallel.strategy
        if not self.shards and strategy not in ("auto", "single", "ddp"):
            why = f"{strategy} under {self.name}, which shards no weights"
            raise UserError("parallel.strategy", why, "give auto or ddp")

    def learns_from_rewards(self, config: Config) -> bool:
        """Whether a reward decides what is learnt from the training prompts."""
        return False

    def updates(self, config: Config) -> int:
        """Rounds that the images of a rollout serve."""
        return 1

    def prompts_per_turn(self, config: Config) -> int:
        """Distinct prompts among a task's samples."""
        return config.train.samples_per_task

    def trained_steps(self, config: Config) -> int:
        """Solver steps, or noise levels, at which a sample is learnt from."""
        raise NotImplementedError

    def student_guidance(self, config: Config) -> float | None:
        """The guidance under which the student's forwards are trained."""
        return config.student.guidance

    def kept_latents(self, config: Config) -> int:
        """Latents that a drawn image keeps until its last round."""
        return 1

    def base_weight(self, config: Config) -> float:
        """Factor on what holds the student to the base; 0: nothing does."""
        return 0.0

    def forward_rows(self, config: Config, size: RoundSize) -> dict[str, int]:
        """Transformer rows of a round, by what they are for; a guided sample is two rows."""
        raise NotImplementedError


def method_spec(config: Config) -> MethodSpec:
    """The spec of `train.method`."""
    return pkgutil.resolve_name(METHODS[config.train.method])


# --- which settings are read ------------------------------------------------------------------------------------------

METHOD_SETTINGS = (
    *(f"objective.{f.name}" for f in fields(ObjectiveConfig)),
    "sampler.train_last",
    "parallel.offload_teachers",
    "teachers.guidance",
    "teachers.partial",
    *(f"rl.{f.name}" for f in fields(RLConfig)),
    *(f"sft.{f.name}" for f in fields(SFTConfig)),
)
"""The settings that only some methods read."""


def refuse_unread_settings(config: Config) -> None:
    """Raise `UserError` for the first of `METHOD_SETTINGS` that is set and that the method does not read."""
    spec = method_spec(config)
    unread = {key for key in METHOD_SETTINGS if not any(fnmatchcase(key, pattern) for pattern in spec.reads)}
    keys = [key for key in flatten(config) if re.sub(r"\[\d+\]", "", key) in unread]
    refuse_set(config, keys, f"is not read under train.method {spec.name}")


def refuse_set(config: Config, keys: list[str], problem: str, remedy: str = "leave it out") -> None:
    """Raise `UserError` for the first of the settings that is not at its default."""
    flat, known, of_teacher = flatten(config), leaves(), teacher_leaves()
    for key in keys:
        default: Any = (known[key] if key in known else of_teacher[key.rpartition(".")[2]])[1]
        if flat[key] != default:
            raise UserError(key, problem, remedy)


def check_updates(config: Config, key: str, updates: int) -> None:
    """Raise `UserError` for more rounds on the images of a rollout than there are images."""
    t = config.train
    images = t.samples_per_task * (t.tasks_per_round or len(config.trained))
    if updates > images:
        raise UserError(key, f"{updates} of {images} images, which leaves a round without any", f"give 1 to {images}")
