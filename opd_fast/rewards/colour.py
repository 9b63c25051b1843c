"""Colourfulness of Hasler and Suesstrunk (Measuring colourfulness in natural images, 2003), scaled to 0..1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt

SCALE = 250.0
"""The metric's value (pixels in 0..255) that earns 1; the paper calls 109 "extremely colourful"."""


def colourfulness(images: Tensor) -> Tensor:
    """M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) in units of 0..255; (B, 3, H, W) -> (B,)."""
    red, green, blue = (images.detach().float() * 255).unbind(1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue], 1).flatten(2)
    spread = opponents.var(2, unbiased=False).sum(1).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()


def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Colourfulness / SCALE, at most 1; the prompts do not matter. (B,) float32."""
    return (colourfulness(images) / SCALE).clamp(max=1.0)
