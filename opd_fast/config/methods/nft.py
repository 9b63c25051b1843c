"""What DiffusionNFT says of itself; `opd_fast.training.methods.nft` has its mathematics."""

from __future__ import annotations

from opd_fast.config.methods.reinforcement import ReinforcementSpec
from opd_fast.config.schema import Config
from opd_fast.errors import UserError


class NFTSpec(ReinforcementSpec):
    """`train.method: nft`."""

    name = "nft"
    implementation = "opd_fast.training.methods.nft:NFT"
    reads = (*ReinforcementSpec.GROUPS, "rl.beta", "rl.decay", "rl.timestep_fraction")
    published_kl = 1e-4
    guided = False
    old_policy = True

    def check(self, config: Config) -> None:
        super().check(config)
        rl, steps = config.rl, config.sampler.steps
        if (config.student.guidance or 0) > 1:  # up to 1 the model's pipeline decides: plan.check_guidance
            why = f"{config.student.guidance} under {self.name}, which has none"
            raise UserError("student.guidance", why, "leave it out")
        if not 1 <= steps * rl.timestep_fraction <= steps:
            why = f"{rl.timestep_fraction} of {steps} steps trains no step, or more than there are"
            raise UserError("rl.timestep_fraction", why, f"give {1 / steps:.3g} to 1")

    def trained_steps(self, config: Config) -> int:
        return int(config.sampler.steps * config.rl.timestep_fraction)


SPEC = NFTSpec()
