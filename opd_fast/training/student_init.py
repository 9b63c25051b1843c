"""Where a student begins, if not at the base: at a LoRA, or at its teachers' merged weight differences D.

D is by default the mean in the ratio of teachers[].weight; `opd_fast.training.merging` has the other merges. A LoRA
student takes each module's D as its best approximation of the student's rank, the truncated singular value
decomposition D = U S V^T (Eckart and Young): with the adapter's scale s = alpha / rank, A = (S/s)^(1/2) V^T and
B = U (S/s)^(1/2), so that s*B@A = D where the rank suffices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from opd_fast.config import StudentConfig
from opd_fast.config.paths import MERGED as MERGED
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import factors_by_module
from opd_fast.models.lora.files import LoraWeights, find_lora, read_lora
from opd_fast.training.merging import MergedDifference


@torch.no_grad()
def add_merged(transformer: nn.Module, merged: MergedDifference) -> None:
    """Add D in full to a transformer's own float32 weights."""
    parameters = dict(transformer.named_parameters())
    for name in merged.names:
        parameters[name].add_(merged(name))


@torch.no_grad()
def start_from_merged(transformer: nn.Module, adapter: str, config: StudentConfig, merged: MergedDifference) -> float:
    """Put D into the adapter's factors. Returns the share of its square that they hold.

    What lies outside the adapter's modules or beyond its rank is left out. Rows that D does not need keep their random
    A and zero B, so that they can still learn. Raises ValueError where the adapter has none of the modules.
    """
    adapters = factors_by_module(dict(transformer.named_parameters()), adapter)
    scale = config.alpha / config.rank
    kept = total = 0.0
    for name in merged.names:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in adapters:
            total += float(merged(name).double().square().sum())
            continue
        left, size, right = merged.singular(name)
        count = min(config.rank, int((size > size[0] * size.numel() * torch.finfo(torch.float32).eps).sum()))
        root = (size[:count] / scale).sqrt()
        a, b = adapters[module]
        a[:count] = root[:, None] * right[:count]
        b[:, :count] = left[:, :count] * root
        kept += float(size[:count].double().square().sum())
        total += float(size.double().square().sum())
    check_merged(config, bool(kept) or not total)
    return kept / total if total else 1.0


def check_merged(config: StudentConfig, trained: bool) -> None:
    """Raise ValueError unless the student trains something of what the teachers change."""
    if not trained:
        raise ValueError(
            f"student.start {MERGED}: the teachers change nothing in student.targets {config.targets}; add the modules "
            f"that they change"
        )


@torch.no_grad()
def start_from_lora(model: DiffusionModel, adapter: str, config: StudentConfig) -> None:
    """Put a LoRA of the same or a lower rank into the first rows of the student's."""
    adapters = factors_by_module(dict(model.transformer.named_parameters()), adapter)
    lora = check_start(model, config, {m: (a.shape[1], b.shape[0]) for m, (a, b) in adapters.items()})
    for module, (a, b) in lora.tensors.items():
        student_a, student_b = adapters[module]
        student_a[: len(a)] = a
        student_b[:, : len(a)] = b.float() * (lora.scale[module] * config.rank / config.alpha)


def check_start(model: DiffusionModel, config: StudentConfig, layers: Mapping[str, tuple[int, int]]) -> LoraWeights:
    """Read the LoRA that a LoRA student begins at. ``layers`` has (inputs, outputs) of each layer that the student
    trains; ``model`` may be a meta model. Raises ValueError for what is not a LoRA, or has no room in the student.
    """
    assert config.start is not None
    if find_lora(config.start) is None:
        raise ValueError(
            f"student.start {config.start} is not a LoRA, so that a LoRA student cannot begin there and still be "
            f"exported on this base; name a LoRA, or merge it into model.path"
        )
    lora = read_lora(config.start, model)
    for module, (a, b) in lora.tensors.items():
        if module not in layers:
            raise ValueError(f"student.start changes {module}, which student.targets leave out; add it there")
        if len(a) > config.rank:
            raise ValueError(f"student.start has rank {len(a)}, the student {config.rank}; raise student.rank")
        if layers[module] != (a.shape[1], b.shape[0]):
            raise ValueError(f"student.start was made for another width at {module}; name a LoRA of this model")
    return lora
