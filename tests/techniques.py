"""What the families say of their transformers' attentions, for tests of techniques that have a transformer alone."""

from __future__ import annotations

from torch import nn

from opd_fast.models.flux import flux_attentions
from opd_fast.models.joint_attention import joint_attentions
from opd_fast.models.techniques import AttentionSite


def sites(transformer: nn.Module) -> list[AttentionSite]:
    """The attentions of a transformer of any family."""
    return [*joint_attentions(transformer), *flux_attentions(transformer)]
