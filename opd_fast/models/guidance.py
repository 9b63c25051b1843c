"""One call of a transformer for a batch: with guidance, the prompt's and the negative prompt's branch side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel
from opd_fast.models.text import TextEmbeds


@dataclass(frozen=True)
class Velocities:
    """What one transformer predicts at one state: v = uncond + g * (cond - uncond), or cond alone."""

    cond: Tensor
    """(B, C, H, W) in the model's dtype; float32 where it is the guided velocity itself, rescaled by the family."""
    uncond: Tensor | None


@dataclass(frozen=True)
class Guidance:
    """How the two branches of a prediction become one velocity."""

    strength: float
    """g of v = u + g (c - u)."""
    rescaled: bool = False
    """Whether the family rescales v then (`DiffusionModel.rescale_guided`)."""


@dataclass(frozen=True)
class Conditioning:
    """The text rows of a call and its guidance, made once and used at every step."""

    text: TextEmbeds
    """B rows, or 2B when guided: all prompts, then the negative prompt B times."""
    guidance: Guidance | None = None
    """How two branches combine (classifier-free guidance); None where there is one branch."""
    embedded: float = 1.0
    """Guidance that goes into the transformer, where the family has it there."""

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.guidance is not None

    @property
    def branch_guidance(self) -> float:
        """g with which the branches of `predict_velocities` combine; 1 where it returns the guided velocity alone."""
        return 1.0 if self.guidance is None or self.guidance.rescaled else self.guidance.strength

    @classmethod
    def build(
        cls, model: DiffusionModel, text: TextEmbeds, negative: TextEmbeds | None, guidance: float | None
    ) -> Conditioning:
        """Conditioning of B prompts under a guidance setting (`DiffusionModel.strength`); None is unguided.

        Raises ValueError when two branches are asked for and `negative` (one row) is missing, and for any guidance of a
        model that has none.
        """
        strength = model.strength(guidance)
        if model.guidance_kind == "embedded":
            return cls(text, embedded=strength)
        if strength == 1.0:
            return cls(text)
        if negative is None:
            raise ValueError(f"guidance {guidance} needs the negative prompt's embedding: give RoundBatch.negative")
        rescaled = model.rescales_guidance and model.guidance_convention == "pipeline"
        return cls(TextEmbeds.cat([text, negative.expand(len(text))]), Guidance(strength, rescaled))


def in_rows(parts: Sequence[tuple[slice, Velocities]]) -> Velocities:
    """Join the velocities of a batch's parts, (rows, their velocities), which follow one another.

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


def predict_velocities(
    model: DiffusionModel, transformer: nn.Module, x: Tensor, sigma: Tensor, conditioning: Conditioning
) -> Velocities:
    """What `transformer` predicts at x (B, C, H, W) float32 and sigma (0-dim float32), both branches in one forward."""
    if conditioning.guidance is None:
        return Velocities(model.velocity(transformer, x, sigma, conditioning.text, conditioning.embedded), None)
    both = model.velocity(transformer, torch.cat([x, x]), sigma, conditioning.text)
    return combined(model, conditioning.guidance, both[: len(x)], both[len(x) :])


def combined(model: DiffusionModel, guidance: Guidance, cond: Tensor, uncond: Tensor) -> Velocities:
    """Leave both branches as they are, for the step's kernel to combine, or rescale the guided velocity into one.

    The kernel's guidance is linear, so that a rescaled velocity is formed here, in float32 and with autograd.
    """
    if not guidance.rescaled:
        return Velocities(cond, uncond)
    c, u = cond.float(), uncond.float()
    return Velocities(model.rescale_guided(torch.lerp(u, c, guidance.strength), c), None)
