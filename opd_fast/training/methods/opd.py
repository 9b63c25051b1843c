"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the gradients of one round.

A round takes the next prompts of its tasks, rolls the student out on all of them together, and asks each task's
teacher at the states the student visits. The loss is the mean over a task's samples of the steps' KL, summed or
averaged over the steps, and averaged over the tasks by their weights. Where a round leaves tasks out, that average is
the mean over rounds: each task counts by its weight and by how often it comes.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import torch
from torch import Tensor

from opd_fast.device import to_device
from opd_fast.objectives import Surrogate, query_law, step_queries, step_weights
from opd_fast.seeds import Stream, noise_keys
from opd_fast.training.batch import RoundBatch
from opd_fast.training.methods.base import Method
from opd_fast.training.rollout import one_pass
from opd_fast.training.setup import Setup


class OPD(Method):
    """The method `opd` of the training loop."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.config
        self.weight = step_weights(setup.table, config.objective.kind)
        o = config.objective
        self.surrogate = Surrogate(o.reward_gradient, o.kl_scale, o.clamp, o.log_prob) if o.kind == "ppo" else None
        self.anchor = None if setup.anchor is None else (setup.anchor, o.anchor_weight)
        per_task = config.train.samples_per_task
        trained = setup.table.steps if config.sampler.train_last else setup.table.steps - 1
        self.law = query_law(trained, o.query_law, o.query_alpha, o.query_beta)
        expected = setup.schedule.expected
        total = sum(teacher.weight * turns for teacher, turns in zip(config.teachers, expected, strict=True))
        total *= trained if config.objective.steps == "mean" else 1
        self.scales = [teacher.weight / total / per_task for teacher in config.teachers]
        """The factor on a sample of each task in the round's loss."""
        self.samples = per_task * setup.schedule.per_round

    def tasks(self, index: int) -> tuple[tuple[int, slice], ...]:
        """Returns the tasks of round `index` and the rows of the whole batch that each has."""
        per_task, start = self.setup.config.train.samples_per_task, 0
        tasks = []
        for task, turns in self.setup.schedule.round(index):
            tasks.append((task, slice(start, start := start + per_task * len(turns))))
        return tuple(tasks)

    def batch(self, index: int) -> RoundBatch:
        """Returns this process's samples of round `index`, which follow from (seed, round, task, sample) alone."""
        setup, seed, per_task = self.setup, self.setup.config.train.seed, self.setup.config.train.samples_per_task
        texts = [
            setup.prompts[task][i].text
            for task, turns in setup.schedule.round(index)
            for turn in turns
            for i in setup.sources[task].batch(turn, per_task)
        ]
        tasks = self.tasks(index)
        counts = [(task, rows.stop - rows.start) for task, rows in tasks]
        keys = torch.cat([noise_keys(seed, Stream.ROLLOUT, index, task, samples=count) for task, count in counts])
        scale = torch.tensor([self.scales[task] for task, count in counts for _ in range(count)])
        world = setup.world
        indices, rank_samples = world.rows(len(texts))
        scale = scale[indices] * world.size  # reductions average over the ranks
        scale[rank_samples:] = 0.0  # of the samples that only fill this process up
        return RoundBatch(
            text=setup.text.rows([texts[i] for i in indices]),
            negative=setup.text.negative,
            tasks=tuple(
                (task, slice(bisect_left(indices, span.start), bisect_left(indices, span.stop))) for task, span in tasks
            ),
            keys=to_device(keys[indices], setup.model.device),
            scale=to_device(scale, setup.model.device),
            shape=setup.shape,
        )

    def weights(self, index: int) -> Tensor:
        """Returns the step weights of round `index`, (N,) float64; with queried steps, 0 at those not drawn."""
        o = self.setup.config.objective
        if o.queries is None:
            return self.weight
        key = int(noise_keys(self.setup.config.train.seed, Stream.QUERY, index, samples=1))
        drawn = step_queries(self.law, o.queries, (key >> 11) % 2**53 / 2**53, o.query_weights)
        return self.weight * torch.nn.functional.pad(drawn, (0, len(self.weight) - len(drawn)))

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        config, setup = self.setup.config, self.setup
        batch = self.batch(index)
        output = one_pass(
            setup.model,
            setup.student,
            setup.teachers,
            replace(batch, scale=scaler.scale(batch.scale)),
            setup.table,
            self.weights(index),
            train_last=config.sampler.train_last,
            reduction=config.objective.reduction,
            micro_batch=config.train.micro_batch,
            surrogate=self.surrogate,
            anchor=self.anchor,
            graphs=setup.active.graphs,
        )
        setup.student.average_gradients()
        losses = output.losses / (scaler.get_scale() * setup.world.size)
        return setup.world.gather_samples(losses, int(self.samples), dim=1)

    def fault(self, index: int, row: int, sample: int) -> str:
        task = next(i for i, rows in self.tasks(index) if rows.start <= sample < rows.stop)
        return f"the loss of task {self.setup.config.teachers[task].name!r} is not finite at step {row}"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """Returns the round's loss, whole, by step and by task."""
        names = [teacher.name for teacher in self.setup.config.teachers]
        metrics = {"loss": float(losses.sum())}
        # Steps differ in weight by orders of magnitude, so that a sum alone would show only the heaviest.
        metrics |= {f"loss/step_{j:02d}": float(value) for j, value in enumerate(losses.sum(1))}
        metrics |= {f"loss/task_{names[i]}": float(losses[:, rows].sum()) for i, rows in self.tasks(index)}
        return metrics
