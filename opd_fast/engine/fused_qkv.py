"""Query, key and value projections of a frozen transformer as one matrix product each: fewer, larger products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opd_fast.engine.attention import JointAttention

_SELF = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def fuse_projections(transformer: nn.Module) -> int:
    """Replace each attention's separate projections by `to_qkv`, those of the text by `to_added_qkv`.

    Returns the number of attention modules fused.

    The same sums in another order. The weights are concatenated module by module and the separate ones freed, so no
    second copy of the model exists at any time. `to_q` and its like are gone afterwards: names in the state dict
    change, and no LoRA can be put on them. Fit for frozen teachers, not for what is trained, saved or adapted.
    SD3's attention and FLUX's are fused; left alone, and not counted, are modules whose processor asks for the
    separate projections (Qwen-Image, Z-Image), cross-attention, and projections that are not plain linear layers alike.

    Before blocks are compiled, offloaded, sharded or captured.
    Raises ValueError, before anything is changed, where an attention carries PEFT adapters, has trainable weights, or
    is offloaded.
    """
    modules = [(name, module) for name, module in transformer.named_modules() if _reads_fused(module)]
    for name, module in modules:
        _check(name, module)
    if any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
        raise ValueError("the transformer is offloaded: its hooks hold the separate weights; fuse it before")
    return sum(_fuse(module) for _, module in modules)


def _reads_fused(module: nn.Module) -> bool:
    """Whether the module's processor can compute with fused projections, and has not got them yet."""
    from diffusers.models.attention_processor import JointAttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    known = (JointAttention, JointAttnProcessor2_0, FluxAttnProcessor)
    return type(getattr(module, "processor", None)) in known and not hasattr(module, "to_qkv")


def _check(name: str, module: nn.Module) -> None:
    for part, layer in module.named_modules():
        if hasattr(layer, "base_layer"):
            raise ValueError(f"{name}.{part} carries PEFT adapters; merge them into the weights, or do not fuse")
    for part, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"{name}.{part} is trainable; freeze the transformer, or do not fuse")


def _fuse(module: Any) -> bool:
    own, added = ([getattr(module, part, None) for part in parts] for parts in (_SELF, _ADDED))
    has_added = any(layer is not None for layer in added)
    if not _alike(own) or (has_added and not _alike(added)):
        return False
    _concatenate(module, "to_qkv", _SELF)
    if has_added:
        _concatenate(module, "to_added_qkv", _ADDED)
    module.fused_projections = True  # FLUX's processor asks
    if type(module.processor).__name__ == "JointAttnProcessor2_0":
        module.set_processor(JointAttention())  # the published one knows separate projections only
    return True


def _alike(layers: list[Any]) -> bool:
    """Whether these are plain linear layers of one input, width, bias, dtype and device."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    return len({(*x.weight.shape, x.bias is None, x.weight.dtype, x.weight.device) for x in layers}) == 1


@torch.no_grad()
def _concatenate(module: nn.Module, name: str, parts: tuple[str, ...]) -> None:
    layers: list[nn.Linear] = [getattr(module, part) for part in parts]
    first = layers[0]
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, 3 * first.out_features, bias=first.bias is not None)
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    for part in parts:
        delattr(module, part)
    setattr(module, name, fused.train(module.training))
