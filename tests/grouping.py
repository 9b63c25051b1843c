"""Small models with frozen adapters of several ranks, for the tests of what is asked of one base by rows."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import add_frozen
from opd_fast.models.lora.files import LoraWeights
from opd_fast.models.text import TextEmbeds
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux

FAMILIES = ["sd3", "flux"]
SHAPE, TOKENS, WIDTH = (4, 8, 8), 6, 32
POOLED = {"sd3": 32, "flux": 16}
# Suffixes of the layers of each teacher, and its rank: projections of both streams; fewer; what modulates too.
ADAPTERS = {
    "first": (("attn.to_q", "attn.to_v", "attn.add_k_proj"), 3),
    "second": (("attn.to_q",), 5),
    "third": (("attn.to_q", "attn.add_k_proj", "norm1.linear", "context_embedder", "timestep_embedder.linear_1"), 2),
}


def small(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    save = {"sd3": save_tiny, "flux": save_tiny_flux}[family]
    return load_model(save(folder), device="cpu", dtype=dtype)


def add(model: DiffusionModel, name: str, targets: tuple[str, ...], rank: int, scale: float = 1.5) -> None:
    """A random frozen adapter on the modules that end in `targets`."""
    generator = torch.Generator().manual_seed(len(name) + rank)
    tensors = {}
    for module, layer in list(model.transformer.named_modules()):
        base = getattr(layer, "base_layer", layer)
        if module.endswith(targets) and isinstance(base, nn.Linear):
            a = torch.randn(rank, base.in_features, generator=generator) * 0.3
            tensors[module] = (a, torch.randn(base.out_features, rank, generator=generator) * 0.3)
    add_frozen(model.transformer, name, LoraWeights(Path(name), "peft", tensors, dict.fromkeys(tensors, scale), ""))


def add_all(model: DiffusionModel) -> list[str]:
    for name, (targets, rank) in ADAPTERS.items():
        add(model, name, targets, rank)
    return list(ADAPTERS)


def text(model: DiffusionModel, rows: int, seed: int = 0) -> TextEmbeds:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(rows, POOLED[model.name], generator=generator)
    return TextEmbeds(torch.randn(rows, TOKENS, WIDTH, generator=generator), pooled)


def states(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))
