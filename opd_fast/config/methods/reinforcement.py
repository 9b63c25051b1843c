"""What the methods of reinforcement learning have in common: tasks instead of teachers, and images in groups."""

from __future__ import annotations

from opd_fast.config.methods.spec import MethodSpec, RoundSize, check_updates, refuse_set
from opd_fast.config.schema import Config
from opd_fast.errors import UserError


class ReinforcementSpec(MethodSpec):
    """A method whose rollouts are judged by rewards; `opd_fast.training.methods.reward_learning` draws and judges."""

    GROUPS = ("rl.images_per_prompt", "rl.updates", "rl.std", "rl.statistics", "rl.advantage_clip", "rl.kl")
    """The settings that `reward_learning` reads."""
    reads: tuple[str, ...] = GROUPS
    has_teachers = False
    published_kl = 0.0
    """`base_weight` where `rl.kl` is null."""

    def check(self, config: Config) -> None:
        rl, method = config.rl, self.name
        if rl.std == "group":
            refuse_set(config, ["rl.statistics"], "is not read under rl.std group")
        super().check(config)
        samples, images = config.train.samples_per_task, rl.images_per_prompt
        if samples % images:
            why = f"{samples} is not a multiple of rl.images_per_prompt = {images}"
            raise UserError("train.samples_per_task", why, f"give {images * max(1, samples // images)}")
        check_updates(config, "rl.updates", rl.updates)
        for i, task in enumerate(config.teachers):
            if task.weights != "base":
                raise UserError(
                    f"teachers[{i}].weights", f"{task.weights} teaches nothing under {method}", "write base"
                )
            if task.reward is None:
                raise UserError(f"teachers[{i}].reward", f"is missing, which {method} learns from", "name a reward")
        if config.student.start == "merged":
            why = f"merged is the mean of teachers, of which {method} has none"
            raise UserError("student.start", why, "name weights")

    def learns_from_rewards(self, config: Config) -> bool:
        return True

    def updates(self, config: Config) -> int:
        return config.rl.updates

    def prompts_per_turn(self, config: Config) -> int:
        """One for each group."""
        return config.train.samples_per_task // config.rl.images_per_prompt

    def trained_steps(self, config: Config) -> int:
        return config.sampler.steps

    def base_weight(self, config: Config) -> float:
        return self.published_kl if config.rl.kl is None else config.rl.kl

    def forward_rows(self, config: Config, size: RoundSize) -> dict[str, int]:
        """At most these: a method may leave images out, such as those of groups without variance."""
        updates = config.rl.updates
        learnt = round(size.rows * size.steps / updates)
        rows = {"rollout": round(size.rows * (config.sampler.steps / updates))}
        rows |= {"student forward": learnt, "student backward": learnt}
        if self.old_policy:
            rows["old policy forward"] = learnt
        return rows | ({"base forward": learnt} if self.base_weight(config) > 0 else {})
