"""What a family tells the engine's techniques about its transformer, and what most transformers of diffusers answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.models.text import TextEmbeds

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v, each (B, L, heads, d), to (B, L, heads, d)."""


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation of softmax(Q K^T / sqrt(d)) V."""

    name: str
    dispatched: str | None
    """Its name in diffusers' dispatcher; None where the dispatcher does not have it."""
    attend: Attend
    heads_first: bool = False
    """Whether it reads q, k and v laid out in memory as (B, heads, L, d), and copies what is not."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a transformer: how its backend is set, and which of its projections can be one product."""

    name: str
    """Its module's name in the transformer."""
    module: nn.Module
    heads: int
    head_dim: int
    use: Callable[[AttentionBackend], None]
    """Let the module compute by a backend from now on."""
    takes_functions: bool = False
    """Whether `use` takes any `AttentionBackend.attend`; otherwise only backends of diffusers' dispatcher."""
    mixed_dtypes: bool = False
    """Whether autocast leaves queries and keys in float32 beside values that are not."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The linear layers that the module's forward can read as one, by the name of the fused one: {"to_qkv": ("to_q",
    "to_k", "to_v")}. Empty where the forward reads the separate ones only. Names that are absent are passed over."""
    use_fused: Callable[[], None] = lambda: None
    """Called when the fused layers are in place and the separate ones are gone."""


@dataclass(frozen=True)
class Modulation:
    """The modules of a transformer that depend on noise level, prompt and guidance alone, and not on the state."""

    embedder: nn.Module
    """A forward calls it once, before the layers, and gives it tensors whose dimension 0 is the batch; its result is
    the embedding (B, D)."""
    embed: Callable[[Tensor, TextEmbeds, float], Tensor]
    """(levels (N,) float32, text of U rows, guidance) to the embeddings (U, N, D) that `embedder` would return. Rows
    come first, because LoRA by rows needs them there."""
    layers: Sequence[tuple[nn.Module | None, nn.Module]]
    """Each linear layer that takes the embedding (B, D), after the activation beside it (None: as it is)."""
    text: nn.Module | None
    """The linear layer that makes the blocks' text tokens from the sequence (B, L, D'); None where there is none."""
    dtype: torch.dtype
    """The type in which `velocity` gives text to the transformer."""


# --- what transformers of diffusers answer ----------------------------------------------------------------------------

FUSED_QKV = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_NORMS = ("norm1", "norm1_context", "norm")
_MODULATION = re.compile(r"norm.*|.*mod|.*modulation")


def dispatched_attentions(transformer: nn.Module, fusing: tuple[type, ...] = ()) -> list[AttentionSite]:
    """The attentions whose processor goes through diffusers' dispatcher; processors of the types `fusing` can compute
    with fused projections."""
    return [
        attention_site(
            name,
            module,
            partial(_dispatch, module.processor),
            mixed_dtypes=isinstance(getattr(module, "norm_q", None), nn.RMSNorm),
            fusing=type(module.processor) in fusing,
        )
        for name, module in transformer.named_modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]


def attention_site(
    name: str, module: Any, use: Callable[[AttentionBackend], None], *, fusing: bool, **other: Any
) -> AttentionSite:
    """The site of a module that is built as diffusers' `Attention`; `fusing`: whether it can read fused projections."""

    def use_fused() -> None:
        module.fused_projections = True  # FLUX's processor asks

    more: dict[str, Any] = {"fused": FUSED_QKV if fusing else {}, "use_fused": use_fused} | other
    return AttentionSite(name, module, module.heads, module.inner_dim // module.heads, use, **more)


def _dispatch(processor: Any, backend: AttentionBackend) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    processor._attention_backend = AttentionBackendName(backend.dispatched)


def token_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers, by name, of what the transformer's own lists hold. Left out are layers that PEFT wraps, and
    those in modules that are called norm..., ...mod or ...modulation: they work on a sample's embedding.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def within(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Linear]]:
        for name, child in module.named_children():
            if isinstance(child, BaseTunerLayer) or _MODULATION.fullmatch(name.lower()):
                continue
            if type(child) is nn.Linear:
                yield f"{path}.{name}", child
            else:
                yield from within(child, f"{path}.{name}")

    lists = ((name, child) for name, child in transformer.named_children() if isinstance(child, nn.ModuleList))
    return dict(layer for name, child in lists for layer in within(child, name))


def ada_modulation(
    transformer: nn.Module,
    blocks: Iterable[nn.Module],
    numbers: Callable[[Tensor, torch.dtype, float], Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]],
    dtype: torch.dtype,
) -> Modulation:
    """The modulation of SD3's and FLUX's transformers (adaLN-zero, DiT, arXiv 2212.09748, section 3.2).

    `numbers(levels, dtype, guidance)`: the numbers that are embedded beside the pooled prompt, as the transformer
    scales them, each with its embedder.
    """
    parts: Any = transformer
    norms = [getattr(block, name, None) for block in blocks for name in _NORMS]

    def embed(levels: Tensor, text: TextEmbeds, guidance: float) -> Tensor:
        pooled = text.pooled
        assert pooled is not None
        embedded: list[Tensor] = []
        for values, embedder in numbers(levels, pooled.dtype, guidance):
            waves = parts.time_text_embed.time_proj(values).to(pooled.dtype)
            embedded.append(embedder(waves.expand(len(pooled), *waves.shape)))
        return sum(embedded[1:], embedded[0]) + parts.time_text_embed.text_embedder(pooled[:, None])

    return Modulation(
        embedder=parts.time_text_embed,
        embed=embed,
        layers=[(norm.silu, norm.linear) for norm in (*norms, parts.norm_out) if norm is not None],
        text=parts.context_embedder,
        dtype=dtype,
    )
