"""The reward `colour`: Hasler and Suesstrunk, Measuring colourfulness in natural images (2003), scaled to 0..1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt

SCALE = 250.0
"""The metric's value (pixels in 0..255) that earns 1; the paper calls 109 "extremely colourful"."""


def colourfulness(images: Tensor) -> Tensor:
    """Return M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2) in units of 0..255.

    `images` is (B, 3, H, W) in 0..1, the result (B,).
    """
    red, green, blue = (images.detach().float() * 255).unbind(1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue], 1).flatten(2)
    spread = opponents.var(2, unbiased=False).sum(1).sqrt()
    return spread + 0.3 * opponents.mean(2).square().sum(1).sqrt()


def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return colourfulness / SCALE, at most 1, as (B,) float32; the prompts do not matter."""
    return (colourfulness(images) / SCALE).clamp(max=1.0)
