"""What supervised fine-tuning says of itself; `opd_fast.training.methods.sft` has its mathematics."""

from __future__ import annotations

from opd_fast.config.methods.spec import MethodSpec, RoundSize, check_updates
from opd_fast.config.schema import Config
from opd_fast.errors import UserError


class FinetuningSpec(MethodSpec):
    """`train.method: sft`."""

    name = "sft"
    implementation = "opd_fast.training.methods.sft:SFT"
    reads = ("sft.*", "parallel.offload_teachers", "teachers.*")

    def check(self, config: Config) -> None:
        sft = config.sft
        super().check(config)
        check_updates(config, "sft.updates", sft.updates)
        for i in config.trained:
            if config.teachers[i].reward is None and sft.images_per_prompt > 1:
                why = f"is missing, which chooses among sft.images_per_prompt = {sft.images_per_prompt}"
                raise UserError(f"teachers[{i}].reward", why, "name a reward, or draw one image of each prompt")

    def learns_from_rewards(self, config: Config) -> bool:
        """The reward chooses among several images of a prompt."""
        return config.sft.images_per_prompt > 1

    def updates(self, config: Config) -> int:
        return config.sft.updates

    def trained_steps(self, config: Config) -> int:
        return 1

    def student_guidance(self, config: Config) -> float | None:
        return None  # the conditional branch is trained

    def base_weight(self, config: Config) -> float:
        return config.sft.base_weight

    def forward_rows(self, config: Config, size: RoundSize) -> dict[str, int]:
        updates = config.sft.updates
        learnt = round(size.rows * size.steps / updates)
        drawn = size.teacher_rows * config.sft.images_per_prompt * (config.sampler.steps / updates)
        rows = {"teacher rollout": round(drawn), "student forward": learnt, "student backward": learnt}
        return rows | ({"base forward": learnt} if self.base_weight(config) > 0 else {})


SPEC = FinetuningSpec()
