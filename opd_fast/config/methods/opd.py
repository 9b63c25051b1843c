"""What on-policy distillation says of itself; `opd_fast.training.methods.opd` has its mathematics."""

from __future__ import annotations

from opd_fast.config.methods.spec import MethodSpec, RoundSize
from opd_fast.config.schema import Config


class DistillationSpec(MethodSpec):
    """`train.method: opd`. `opd_fast.config.validate` checks its objective."""

    name = "opd"
    implementation = "opd_fast.training.methods.opd:OPD"
    reads = ("objective.*", "sampler.train_last", "parallel.offload_teachers", "teachers.*")
    distils = True
    looks_at_images = False
    sums_rewards = False
    shards = True

    def trained_steps(self, config: Config) -> int:
        return config.sampler.steps if config.sampler.train_last else config.sampler.steps - 1

    def forward_rows(self, config: Config, size: RoundSize) -> dict[str, int]:
        """Queries end a rollout at the last queried step, which is not taken off the student's forwards."""
        o = config.objective
        rollouts = 2 if o.kind == "ppo" and o.reward_gradient == "return_to_go" else 1  # one without gradient before
        learnt = round(size.rows * size.queried_steps)
        rows = {
            "student forward": size.rows * size.steps * rollouts,
            "student backward": learnt,
            "teacher forward": round(size.teacher_rows * size.queried_steps * rollouts),
        }
        return rows | ({"anchor forward": learnt} if o.anchor is not None else {})


SPEC = DistillationSpec()
