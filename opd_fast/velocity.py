"""One call of a transformer for a batch: with guidance, the prompt's and the negative prompt's branch side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel, TextEmbeds


@dataclass(frozen=True)
class Velocities:
    """What one transformer predicts at one state: v = uncond + g * (cond - uncond), or cond alone."""

    cond: Tensor
    """(B, C, H, W) in the model's dtype."""
    uncond: Tensor | None


@dataclass(frozen=True)
class Conditioning:
    """The text rows of a call and its guidance, made once and used at every step."""

    text: TextEmbeds
    """B rows, or 2B when guided: all prompts, then the negative prompt B times."""
    guided: bool
    """Whether there are two branches (classifier-free guidance)."""
    embedded: float = 1.0
    """Guidance that goes into the transformer, where the family has it there."""

    @classmethod
    def build(
        cls, model: DiffusionModel, text: TextEmbeds, negative: TextEmbeds | None, guidance: float
    ) -> Conditioning:
        """Conditioning of B prompts; guidance 1 needs no negative branch and makes none.

        Raises ValueError when two branches are asked for and `negative` (one row) is missing, and for any guidance of a
        model that has none.
        """
        if model.guidance_kind == "embedded":
            return cls(text, guided=False, embedded=guidance)
        if guidance == 1.0:
            return cls(text, guided=False)
        if model.guidance_kind == "none":
            raise ValueError(f"guidance {guidance} with family {model.name!r}, which has none; give 1")
        if negative is None:
            raise ValueError(f"guidance {guidance} needs the negative prompt's embedding: give RoundBatch.negative")
        return cls(TextEmbeds.cat([text, negative.expand(len(text))]), guided=True)


def in_rows(parts: Sequence[tuple[slice, Velocities]]) -> Velocities:
    """The velocities of a batch from those of its parts, which follow one another: (rows, what is theirs).

    Rows of unguided parts are left unset in `uncond`, which is None where no part is guided.
    """
    if len(parts) == 1:
        return parts[0][1]
    cond = torch.cat([v.cond for _, v in parts])
    if all(v.uncond is None for _, v in parts):
        return Velocities(cond, None)
    uncond = torch.empty_like(cond)
    for rows, v in parts:
        if v.uncond is not None:
            uncond[rows] = v.uncond
    return Velocities(cond, uncond)


def velocities(
    model: DiffusionModel, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
) -> Velocities:
    """Both guidance branches of `transformer` at x (B, C, H, W) float32 and sigma (0-dim float32), in one forward."""
    if not conditioning.guided:
        return Velocities(model.velocity(transformer, x, sigma, conditioning.text, conditioning.embedded), None)
    both = model.velocity(transformer, torch.cat([x, x]), sigma, conditioning.text)
    return Velocities(both[: len(x)], both[len(x) :])
