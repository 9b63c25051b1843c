"""Where a student begins, if not at the base: at a LoRA, or at the mean of its teachers.

The mean task vector is that of the teachers' weight differences, D = sum_i share_i * (W_i - W), with the shares in the
ratio of teachers[].weight. A LoRA student takes each module's D as its best approximation of the student's rank, the
truncated singular value decomposition D = U S V^T (Eckart and Young): with the adapter's scale s = alpha / rank,
A = (S/s)^(1/2) V^T and B = U (S/s)^(1/2), so that s*B@A = D where the rank suffices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opd_fast.config import StudentConfig
from opd_fast.config.paths import MERGED as MERGED
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import factors_by_module
from opd_fast.models.lora.files import LoraWeights, delta, find_lora, read_lora
from opd_fast.training.teachers import TeacherBank

Factors = list[tuple[Tensor, Tensor, float]]


class MeanTaskVector:
    """D of every parameter that some teacher changes, one at a time; names are those of the base without adapters.

    A LoRA counts by its own factors, unrounded; a whole transformer by its weights less the base's.
    """

    def __init__(self, model: DiffusionModel, bank: TeacherBank) -> None:
        self._base = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in model.transformer.named_parameters()
            if ".lora_" not in name
        }
        self._device = model.device
        self._loras: dict[str, Factors] = {}
        self._whole: list[tuple[dict[str, nn.Parameter], float]] = []
        total = sum(teacher.weight for teacher in bank.teachers)
        for teacher in bank.teachers:
            share = teacher.weight / total
            if teacher.source.format == "transformer":
                self._whole.append((dict(teacher.transformer.named_parameters()), share))
                continue
            lora = read_lora(teacher.source.name, model)
            for module, (a, b) in lora.tensors.items():
                name = f"{module}.weight"
                if name in self._base:  # else a partial match, which the bank was asked for
                    self._loras.setdefault(name, []).append((a, b, lora.scale[module] * share))

    @property
    def names(self) -> list[str]:
        """The parameters that may differ, in the base's order."""
        return [name for name in self._base if self._whole or name in self._loras]

    def _factors(self, name: str) -> Factors:
        """What the LoRAs add: (A (r, in), B (out, r), scale) in float32 on the model's device."""
        return [
            (a.to(self._device, torch.float32), b.to(self._device, torch.float32), scale)
            for a, b, scale in self._loras.get(name, [])
        ]

    def __call__(self, name: str) -> Tensor:
        """D of one parameter, in its shape, float32."""
        base = self._base[name].detach().float()
        difference = torch.zeros_like(base)
        for parameters, share in self._whole:
            difference.add_(parameters[name].detach().float() - base, alpha=share)
        for factor in self._factors(name):
            difference += delta(*factor)
        return difference

    def singular(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, n), S (n,) descending and V^T (n, in) of D of one parameter.

        D is not formed where LoRAs alone change the parameter. Then n is at most the sum of their ranks.
        """
        if self._whole:
            u, s, vt = torch.linalg.svd(self(name), full_matrices=False)
            return u, s, vt
        factors = self._factors(name)
        a = torch.cat([a.double() for a, _, _ in factors])
        b = torch.cat([b.double() * scale for _, b, scale in factors], dim=1)
        (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ u, s, vt @ qa.T


@torch.no_grad()
def add_mean(transformer: nn.Module, mean: MeanTaskVector) -> None:
    """Add D in full to a transformer's own float32 weights."""
    parameters = dict(transformer.named_parameters())
    for name in mean.names:
        parameters[name].add_(mean(name))


@torch.no_grad()
def start_from_mean(transformer: nn.Module, adapter: str, config: StudentConfig, mean: MeanTaskVector) -> float:
    """Put D into the adapter's factors. Returns the share of its square that they hold.

    What lies outside the adapter's modules or beyond its rank is left out. Rows that D does not need keep their random
    A and zero B, so that they can still learn. Raises ValueError where the adapter has none of the modules.
    """
    adapters = factors_by_module(dict(transformer.named_parameters()), adapter)
    scale = config.alpha / config.rank
    kept = total = 0.0
    for name in mean.names:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in adapters:
            total += float(mean(name).double().square().sum())
            continue
        left, size, right = mean.singular(name)
        count = min(config.rank, int((size > size[0] * size.numel() * torch.finfo(torch.float32).eps).sum()))
        root = (size[:count] / scale).sqrt()
        a, b = adapters[module]
        a[:count] = root[:, None] * right[:count]
        b[:, :count] = left[:, :count] * root
        kept += float(size[:count].double().square().sum())
        total += float(size.double().square().sum())
    check_mean(config, bool(kept) or not total)
    return kept / total if total else 1.0


def check_mean(config: StudentConfig, trained: bool) -> None:
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
