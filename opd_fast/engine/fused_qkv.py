"""Query, key and value projections of a frozen transformer as one matrix product each: fewer, larger products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from opd_fast.models.techniques import AttentionSite


def fuse_projections(transformer: nn.Module, sites: Sequence[AttentionSite]) -> int:
    """Replace the separate projections of each attention of `sites` by one layer for each entry of its `fused`.

    The same sums are computed in another order. The weights are concatenated module by module and the separate ones
    freed, so no second copy of the model exists at any time. `to_q` and its like are gone afterwards: names in the
    state dict change, and no LoRA can be put on them. This is for frozen teachers, not for what is trained, saved or
    adapted. Call it before blocks are compiled, offloaded, sharded or captured.

    Returns the number of attention modules fused. Those whose forward reads separate projections only, or whose
    projections are not plain linear layers of one shape, are left alone and not counted.

    Raises ValueError, before anything is changed, where an attention carries PEFT adapters, has trainable weights, or
    is offloaded.
    """
    able = [site for site in sites if site.fused and not any(hasattr(site.module, name) for name in site.fused)]
    for site in able:
        for part, layer in site.module.named_modules():
            if hasattr(layer, "base_layer"):
                where = f"{site.name}.{part}"
                raise ValueError(f"{where} carries PEFT adapters; merge them into the weights, or do not fuse")
        for part, parameter in site.module.named_parameters():
            if parameter.requires_grad:
                raise ValueError(f"{site.name}.{part} is trainable; freeze the transformer, or do not fuse")
    if any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
        raise ValueError("the transformer is offloaded: its hooks hold the separate weights; fuse it before")
    return sum(_fuse(site) for site in able)


def _fuse(site: AttentionSite) -> bool:
    layers = {name: [getattr(site.module, part, None) for part in parts] for name, parts in site.fused.items()}
    layers = {name: found for name, found in layers.items() if any(layer is not None for layer in found)}
    if not layers or not all(_alike(found) for found in layers.values()):
        return False
    for name, found in layers.items():
        fused = _concatenated(found)
        for part in site.fused[name]:
            delattr(site.module, part)
        setattr(site.module, name, fused.train(site.module.training))
    site.use_fused()
    return True


def _alike(layers: list[Any]) -> bool:
    """Return whether these are plain linear layers of one input, width, bias, dtype and device."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    return len({(*x.weight.shape, x.bias is None, x.weight.dtype, x.weight.device) for x in layers}) == 1


@torch.no_grad()
def _concatenated(layers: list[Any]) -> nn.Linear:
    first = layers[0]
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, len(layers) * first.out_features, bias=first.bias is not None)
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return fused
