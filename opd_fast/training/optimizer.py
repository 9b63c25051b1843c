"""AdamW as a run uses it: what it is made with, its learning rate by round, and its state by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_fast.config import Config
from opd_fast.training.student import Student


def make_optimizer(student: Student, config: Config) -> torch.optim.AdamW:
    """AdamW over what the student trains, as `train` sets it."""
    t = config.train
    return torch.optim.AdamW(
        student.parameters(), lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay, fused=True
    )


def learning_rate(config: Config, index: int) -> float:
    """The rate of round `index` (0-based): a linear warm-up to train.lr, then constant, cosine or linear to 0."""
    t = config.train
    if index < t.warmup:
        return t.lr * (index + 1) / t.warmup
    progress = (index - t.warmup) / max(1, t.rounds - t.warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return t.lr * factor[t.schedule]


def optimizer_state(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's moments and step counts by name, made where there are none yet: the tensors themselves, for a checkpoint
    to read or fill."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    return tensors
