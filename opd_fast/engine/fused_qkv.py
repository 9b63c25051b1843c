"""Query, key and value projections of a frozen transformer as one matrix product each: fewer, larger products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from opd_fast.models.techniques import AttentionSite


def fuse_projections(transformer: nn.Module, sites: Sequence[AttentionSite]) -> int:
    """Replace the separate projections of each attention of `sites` by one layer for each entry of its `fused`.

    Returns the number of attention modules fused.

    The same sums in another order. The weights are concatenated module by module and the separate ones freed, so no
    second copy of the model exists at any time. `to_q` and its like are gone afterwards: names in the state dict
    change, and no LoRA can be put on them. This is for frozen teachers, not for what is trained, saved or adapted.
    Attentions whose forward reads separate projections only, and projections that are not plain linear layers of one
    shape, are left alone and not counted.

    Call it before blocks are compiled, offloaded, sharded or captured.
    Raises ValueError, before anything is changed, where an attention carries PEFT adapters, has trainable weights, or
    is offloaded.
    """
    able = [site for site in sites if site.fused and not any(hasattr(site.module, name) for name in site.fused)]
    for site in able:
        _check(site.name, site.module)
    if any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
        raise ValueError("the transformer is offloaded: its hooks hold the separate weights; fuse it before")
    return sum(_fuse(site) for site in able)


def _check(name: str, module: nn.Module) -> None:
    for part, layer in module.named_modules():
        if hasattr(layer, "base_layer"):
            raise ValueError(f"{name}.{part} carries PEFT adapters; merge them into the weights, or do not fuse")
    for part, parameter in module.named_parameters():
        if parameter.requires_grad:
            raise ValueError(f"{name}.{part} is trainable; freeze the transformer, or do not fuse")


def _fuse(site: AttentionSite) -> bool:
    groups = {n: parts for n, parts in site.fused.items() if any(layer is not None for layer in _layers(site, parts))}
    if not groups or not all(_alike(_layers(site, parts)) for parts in groups.values()):
        return False
    for name, parts in groups.items():
        _concatenate(site, name, parts)
    site.use_fused()
    return True


def _layers(site: AttentionSite, parts: tuple[str, ...]) -> list[Any]:
    return [getattr(site.module, part, None) for part in parts]


def _alike(layers: list[Any]) -> bool:
    """Whether these are plain linear layers of one input, width, bias, dtype and device."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    return len({(*x.weight.shape, x.bias is None, x.weight.dtype, x.weight.device) for x in layers}) == 1


@torch.no_grad()
def _concatenate(site: AttentionSite, name: str, parts: tuple[str, ...]) -> None:
    module, layers = site.module, _layers(site, parts)
    first = layers[0]
    with torch.device("meta"):
        fused = nn.Linear(first.in_features, len(layers) * first.out_features, bias=first.bias is not None)
    fused.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if first.bias is not None:
        fused.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    for part in parts:
        delattr(module, part)
    setattr(module, name, fused.train(module.training))
