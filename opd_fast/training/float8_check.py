"""How float8 changes a run's losses, measured before its first round on the same states with the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opd_fast.config import Config
from opd_fast.data.prompt_files import Prompt
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.engine.float8 import check_losses, supported
from opd_fast.models.base import DiffusionModel
from opd_fast.objectives import step_weights
from opd_fast.seeds import Stream, noise_keys
from opd_fast.solvers import SolverTable
from opd_fast.training.batch import RoundBatch
from opd_fast.training.rollout import losses_at
from opd_fast.training.student import Student
from opd_fast.training.teachers import TeacherBank

SAMPLES = 4
"""Samples of each task. A step's loss is a mean over all of them: float8 may move that of a single one by more."""


def float8_loss_check(
    config: Config,
    model: DiffusionModel,
    student: Student,
    teachers: TeacherBank,
    table: SolverTable,
    text: EmbeddingCache,
    prompts: Sequence[Sequence[Prompt]],
) -> Callable[[], str] | None:
    """Measure the losses before anything is quantised.

    Returns a function that measures them again and gives a line for the log. It raises UserError where a step's loss
    moved by more than is accepted. None for a run in which nothing will be quantised, or that has no round.
    """
    quantised = config.engine.precision == "fp8" and supported(model.device) is None
    if not quantised or not len(teachers) or config.train.rounds == 0:
        return None
    count = SAMPLES * len(prompts)
    batch = RoundBatch(
        text=text.rows([line for own in prompts for line in _encoded(own, text)]),
        negative=text.negative,
        tasks=tuple((i, slice(i * SAMPLES, (i + 1) * SAMPLES)) for i in range(len(prompts))),
        keys=noise_keys(config.train.seed, Stream.FLOAT8_CHECK, samples=count).to(model.device),
        scale=torch.full((count,), 1 / count, device=model.device),
        shape=model.latent_shape(model.resolution(config.model.resolution)),
    )
    weight = step_weights(table, config.objective.kind).clone()
    if not config.sampler.train_last:
        weight[-1] = 0
    parts = [part for _, part in batch.split(config.train.micro_batch)]
    found = [losses_at(model, student, teachers, part, table, weight) for part in parts]
    losses = torch.cat([losses for losses, _ in found], 1)

    def again() -> Tensor:
        pairs = zip(parts, found, strict=True)
        return torch.cat(
            [losses_at(model, student, teachers, part, table, weight, states)[0] for part, (_, states) in pairs], 1
        )

    return lambda: check_losses(losses, again(), limit=config.engine.fp8_tolerance)


def _encoded(prompts: Sequence[Prompt], text: EmbeddingCache) -> list[str]:
    """Return `SAMPLES` texts of a task, the first of those that the run encodes: a long file has many that it never
    meets. A task that the run only judges may have none; the empty prompt stands for its own.
    """
    found = [prompt.text for prompt in prompts if prompt.text in text][:SAMPLES] or [""]
    return [found[i % len(found)] for i in range(SAMPLES)]
