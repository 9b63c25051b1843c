"""What GRPO says of itself; `opd_fast.training.methods.grpo` has its mathematics."""

from __future__ import annotations

from opd_fast.config.methods.reinforcement import ReinforcementSpec
from opd_fast.config.methods.spec import refuse_set
from opd_fast.config.schema import DETERMINISTIC, Config
from opd_fast.errors import UserError


class GRPOSpec(ReinforcementSpec):
    """`train.method: grpo`: Flow-GRPO, and GRPO-Guard with `rl.guard`."""

    name = "grpo"
    implementation = "opd_fast.training.methods.grpo:GRPO"
    reads = (*ReinforcementSpec.GROUPS, "rl.guard", "rl.clip", "rl.log_prob", "rl.window", "rl.window_range")
    published_kl = 0.04

    def check(self, config: Config) -> None:
        rl, s = config.rl, config.sampler
        if rl.window is None:
            refuse_set(config, ["rl.window_range"], "is not read under rl.window null")
        if s.solver != "cps":  # the other solvers' published log-probability is the exact one
            refuse_set(config, ["rl.log_prob"], f"is not read under sampler.solver {s.solver}")
        super().check(config)
        if s.solver in DETERMINISTIC:
            raise UserError("sampler.solver", f"{s.solver} draws nothing that {self.name} could judge", "use flow_sde")
        if rl.guard and s.solver != "flow_sde":
            raise UserError("rl.guard", f"is made for flow_sde, not {s.solver}", "use flow_sde, or set it false")
        if rl.window is not None:
            most = s.steps // 2 if rl.window_range is None else rl.window_range
            if not 1 <= most < s.steps:
                raise UserError("rl.window_range", f"{most} of {s.steps} steps", f"give 1 to {s.steps - 1}")
            if not 1 <= rl.window <= most:
                raise UserError("rl.window", f"{rl.window} of the first {most} steps", f"give 1 to {most}")

    def trained_steps(self, config: Config) -> int:
        return config.sampler.steps - 1 if config.rl.window is None else config.rl.window

    def kept_latents(self, config: Config) -> int:
        """State, next state and mean of every trained step."""
        return 3 * self.trained_steps(config)


SPEC = GRPOSpec()
