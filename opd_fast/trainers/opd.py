"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): the gradients of one round.

A round takes the next prompts of every task, rolls the student out on all of them together, and asks each task's
teacher at the states the student visits. The loss is the mean over a task's samples of the steps' summed KL, averaged
over the tasks by their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_fast.objectives import step_weights
from opd_fast.rollout import RoundBatch, RoundOutput, one_pass
from opd_fast.seeds import noise_keys
from opd_fast.trainers.setup import Setup

ROLLOUT_STREAM = 1
"""Sets the rollouts' noise apart from any other noise drawn from the same seed."""


class OPD:
    """The method `opd` of the training loop."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.config
        self.weight = step_weights(setup.table, config.objective.kind)
        per_task = config.train.samples_per_task
        total = sum(teacher.weight for teacher in config.teachers)
        shares = [teacher.weight / total / per_task for teacher in config.teachers]
        self.scale = torch.tensor(shares, device=setup.model.device).repeat_interleave(per_task)
        self.tasks = tuple((i, slice(i * per_task, (i + 1) * per_task)) for i in range(len(config.teachers)))
        self.samples = len(self.scale)

    def batch(self, index: int) -> RoundBatch:
        """The samples of round `index`; they follow from (seed, round, task, sample) alone."""
        setup, seed, per_task = self.setup, self.setup.config.train.seed, self.setup.config.train.samples_per_task
        texts = [
            prompts[i].text
            for prompts, source in zip(setup.prompts, setup.sources, strict=True)
            for i in source.batch(index, per_task)
        ]
        keys = [noise_keys(seed, ROLLOUT_STREAM, index, task, samples=per_task) for task, _ in self.tasks]
        return RoundBatch(
            text=setup.text.rows(texts),
            negative=setup.text.negative,
            tasks=self.tasks,
            keys=torch.cat(keys).to(setup.model.device),
            scale=self.scale,
            shape=setup.shape,
        )

    def accumulate(self, index: int) -> RoundOutput:
        """Add the gradient of round `index` to the student's parameters."""
        config, setup = self.setup.config, self.setup
        return one_pass(
            setup.model,
            setup.student,
            setup.teachers,
            self.batch(index),
            setup.table,
            self.weight,
            train_last=config.sampler.train_last,
            reduction=config.objective.reduction,
            micro_batch=config.train.micro_batch,
        )

    def metrics(self, output: RoundOutput) -> dict[str, float]:
        """The round's loss, whole, by step and by task; raises FloatingPointError naming where it is not finite."""
        losses = output.losses.double().cpu()
        names = [teacher.name for teacher in self.setup.config.teachers]
        self._refuse_nonfinite(losses, names)
        metrics = {"loss": float(losses.sum())}
        # Steps differ in weight by orders of magnitude, so that a sum alone would show only the heaviest.
        metrics |= {f"loss/step_{j:02d}": float(value) for j, value in enumerate(losses.sum(1))}
        metrics |= {f"loss/task_{names[i]}": float(losses[:, rows].sum()) for i, rows in self.tasks}
        return metrics

    def _refuse_nonfinite(self, losses: Tensor, names: list[str]) -> None:
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            step, sample = bad[0].tolist()
            task = next(names[i] for i, rows in self.tasks if rows.start <= sample < rows.stop)
            raise FloatingPointError(f"the loss of task {task!r} is not finite at step {step}")
