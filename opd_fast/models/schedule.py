"""Noise levels that equal those which diffusers' FlowMatchEulerDiscreteScheduler makes of linspace(1, 1/N, N)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TIMESTEPS = 1000
_CLASS = "FlowMatchEulerDiscreteScheduler"
# Options under which the levels are not those of flow_sigmas, nor SD3's.
_OTHER_SCHEDULES = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"]
_OTHER_SCHEDULES += ["stochastic_sampling"]


def flow_sigmas(steps: int, image_tokens: int, config: Mapping[str, Any]) -> Tensor:
    """Make the noise levels, (steps+1,) float64 from 1 to 0, by the keys of scheduler_config.json. Absent keys have
    diffusers' defaults.

    The levels u = linspace(1, 1/steps, steps) are shifted to sigma = s*u / (1 + (s - 1)*u). With
    ``use_dynamic_shifting``, s grows with the image: s is exp(mu), or mu for the linear kind, where mu lies on the line
    through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift). ``shift_terminal`` then stretches
    1 - sigma so that the last level before 0 has that value; a single step has no level to stretch. diffusers computes
    in float32, and the two agree to about 1e-7.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, got steps={steps}")
    u = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    shift = float(config.get("shift", 1.0))
    if config.get("use_dynamic_shifting"):
        tokens, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
        mu = low + (high - low) * (image_tokens - tokens) / (most - tokens)
        shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    sigmas = shift * u / (1 + (shift - 1) * u)
    # The first level is 1 exactly, without rounding, because the solvers treat sigma == 1 apart.
    sigmas[0] = 1.0
    terminal = config.get("shift_terminal")
    if terminal and steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def check_schedule(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler of another class, or with options that ``flow_sigmas`` does not follow."""
    check_options(folder, config, "the published schedule")
    # The pipelines divide the scheduler's timesteps by 1000, whatever their number; the engine feeds sigma itself.
    timesteps = config.get("num_train_timesteps", _TIMESTEPS)
    if timesteps != _TIMESTEPS:
        raise ValueError(
            f"{folder}/scheduler sets num_train_timesteps={timesteps}, the published schedule {_TIMESTEPS}; put that "
            f"into scheduler_config.json"
        )


def check_options(folder: Path, config: Mapping[str, Any], schedule: str, more: Sequence[str] = ()) -> None:
    """Raise ValueError for a scheduler of another class, or for one that sets an option of ``_OTHER_SCHEDULES`` or of
    ``more``. ``schedule`` names the expected schedule in the message.
    """
    kind = config.get("_class_name", _CLASS)
    if kind != _CLASS:
        raise ValueError(f"{folder}/scheduler is a {kind}, supported is {_CLASS}; put the published scheduler back")
    for option in (*_OTHER_SCHEDULES, *more):
        if config.get(option):
            raise ValueError(
                f"{folder}/scheduler sets {option}={config[option]}, which {schedule} does not; switch it off in "
                f"scheduler_config.json"
            )
