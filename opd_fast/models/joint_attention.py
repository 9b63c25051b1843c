"""SD3's attention (MMDiT, https://arxiv.org/abs/2403.03206) by a backend of choice.

SD3's published processor calls SDPA by itself, and not diffusers' dispatcher; `JointAttention` takes its place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd_fast.models.techniques import FUSED_QKV, AttentionBackend, AttentionSite, attention_site


def _native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


PUBLISHED = AttentionBackend("native", "native", _native)
"""What the published processor computes by."""


class JointAttention:
    """A processor for diffusers' `Attention`, in the place of `JointAttnProcessor2_0`.

    Image (B, L, D), and text (B, M, D') where there is any: their queries, keys and values, each normalised where the
    module has norms, attend to each other as one sequence, image first. Projections may be separate, fused
    (`opd_fast.engine.fused_qkv`) or wrapped by PEFT. Without text it is the self-attention of SD3.5's dual blocks.
    """

    def __init__(self, backend: AttentionBackend = PUBLISHED) -> None:
        self.backend, self.attend, self.heads_first = backend.name, backend.attend, backend.heads_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Returns image (B, L, D), and with it text (B, M, D') where given, unprojected if `context_pre_only`.

        Raises ValueError for a mask: the published processor ignores it.
        """
        if attention_mask is not None:
            raise ValueError("SD3's attention has no mask; pad no text, or leave the mask out")
        tensors = _qkv(attn, hidden_states, "to_qkv", "norm_q", "norm_k")
        if encoder_hidden_states is not None:
            text_qkv = _qkv(attn, encoder_hidden_states, "to_added_qkv", "norm_added_q", "norm_added_k")
            tensors = [self._join(pair) for pair in zip(tensors, text_qkv, strict=True)]
        joint = self.attend(*tensors).flatten(2, 3)
        image, text = joint, None
        if encoder_hidden_states is not None:
            tokens = hidden_states.shape[1]
            image, text = joint[:, :tokens], joint[:, tokens:]
            if not attn.context_pre_only:
                text = attn.to_add_out(text)
        image = attn.to_out[1](attn.to_out[0](image))
        return image if text is None else (image, text)

    def _join(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Two (B, ., heads, d) one after the other, laid out in memory as the backend reads them."""
        if self.heads_first:
            return torch.cat([t.transpose(1, 2) for t in pair], 2).transpose(1, 2)
        return torch.cat(pair, 1)


def _qkv(attn: Any, x: Tensor, fused: str, norm_q: str, norm_k: str) -> list[Tensor]:
    if hasattr(attn, fused):
        q, k, v = getattr(attn, fused)(x).unflatten(-1, (3, attn.heads, -1)).unbind(2)
    else:
        q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)) for name in FUSED_QKV[fused])
    return [_normed(getattr(attn, norm_q), q), _normed(getattr(attn, norm_k), k), v]


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x).to(x.dtype)  # some norms compute in float32 under autocast


def joint_attentions(transformer: nn.Module) -> list[AttentionSite]:
    """The attentions of an SD3 transformer, both of a dual block; a processor of another kind (an IP adapter's) is left
    alone."""
    return [
        attention_site(name, m, partial(_use, m), takes_functions=True, fusing=True, use_fused=partial(_use_fused, m))
        for name, m in transformer.named_modules()
        if _is_joint(getattr(m, "processor", None))
    ]


def _use(module: Any, backend: AttentionBackend) -> None:
    module.set_processor(JointAttention(backend))


def _use_fused(module: Any) -> None:
    module.fused_projections = True
    if not isinstance(module.processor, JointAttention):
        module.set_processor(JointAttention())  # the published one reads separate projections only


def _is_joint(processor: object) -> bool:
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    return isinstance(processor, JointAttention) or type(processor) is JointAttnProcessor2_0
