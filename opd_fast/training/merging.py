"""The teachers' weight differences D_i = W_i - W merged into one D, a parameter at a time.

With a coefficient c_i for each teacher, and entries taken one by one:

    linear            D = sum_i c_i D_i, task arithmetic (Ilharco et al., arXiv 2212.04089)
    magnitude_prune   the same of the largest `density` of each D_i's entries, the others set to 0
    ties              of those pruned D_i, the mean of c_i D_i over the teachers whose sign is that of the sum of all
                      (TIES, Yadav et al., arXiv 2306.01708; the paper has c_i = 1 for all)
    dare_linear       linear, of a random `density` of each D_i's entries, divided by `density` (DARE, Yu et al.,
                      arXiv 2311.03099)
    dare_ties         ties, of D_i that are pruned and rescaled as in dare_linear

The functions are PEFT's, on the product B @ A of a LoRA and not on its factors, since pruning or electing signs among
the factors does not do so in the weights. PEFT calls these forms of `add_weighted_adapter` svd, magnitude_prune_svd,
ties_svd, dare_linear_svd and dare_ties_svd.
"""

from __future__ import annotations

import warnings
import zlib

import torch
from torch import Tensor, nn

from opd_fast.config import StudentConfig
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import delta, read_lora
from opd_fast.seeds import Stream, noise_keys
from opd_fast.training.teachers import TeacherBank

Factors = tuple[Tensor, Tensor, float]


class MergedDifference:
    """D of every parameter that some teacher changes, one at a time; names are those of the base without adapters.

    A LoRA counts by its own factors, unrounded; a whole transformer by its weights less the base's. The random masks of
    DARE follow from `seed` and the parameter's name, and are drawn on the CPU, so that they are the same on any device.
    """

    def __init__(self, model: DiffusionModel, bank: TeacherBank, config: StudentConfig, seed: int) -> None:
        self._base = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in model.transformer.named_parameters()
            if ".lora_" not in name
        }
        self._device, self._method, self._density, self._seed = model.device, config.merge, config.merge_density, seed
        self.coefficients = coefficients(bank, config)
        """c_i, in the order of the teachers."""
        self._loras: dict[str, list[tuple[int, Factors]]] = {}
        self._whole: list[tuple[int, dict[str, nn.Parameter]]] = []
        for i, teacher in enumerate(bank.teachers):
            if teacher.source.format == "transformer":
                self._whole.append((i, dict(teacher.transformer.named_parameters())))
                continue
            lora = read_lora(teacher.source.name, model)
            for module, (a, b) in lora.tensors.items():
                name = f"{module}.weight"
                if name in self._base:  # else a partial match, which the bank was asked for
                    self._loras.setdefault(name, []).append((i, (a, b, lora.scale[module])))

    @property
    def names(self) -> list[str]:
        """The parameters that may differ, in the base's order."""
        return [name for name in self._base if self._whole or name in self._loras]

    def _factors(self, name: str) -> list[tuple[int, Factors]]:
        """What the LoRAs add: teacher, and (A (r, in), B (out, r), scale) in float32 on the model's device."""
        return [
            (i, (a.to(self._device, torch.float32), b.to(self._device, torch.float32), scale))
            for i, (a, b, scale) in self._loras.get(name, [])
        ]

    def __call__(self, name: str) -> Tensor:
        """D of one parameter, in its shape, float32, on the model's device."""
        if self._method != "linear":
            return self._merged(name)
        base = self._base[name].detach().float()
        difference = torch.zeros_like(base)
        for i, parameters in self._whole:
            difference.add_(parameters[name].detach().float() - base, alpha=self.coefficients[i])
        for i, (a, b, scale) in self._factors(name):
            difference += delta(a, b, scale * self.coefficients[i])
        return difference

    def _merged(self, name: str) -> Tensor:
        from peft.utils import merge_utils

        base = self._base[name].detach().float()
        parts = {i: parameters[name].detach().float() - base for i, parameters in self._whole}
        parts |= {i: delta(*factors) for i, factors in self._factors(name)}
        random = self._method.startswith("dare")
        device = torch.device("cpu") if random else base.device
        differences = [parts[i].to(device) for i in sorted(parts)]
        shares = torch.tensor([self.coefficients[i] for i in sorted(parts)], device=device)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="The density .* no pruning will be performed")
            if random:
                key = noise_keys(self._seed, Stream.MERGE, zlib.crc32(name.encode()), samples=1)
                torch.default_generator.manual_seed(int(key))
            merged: Tensor = getattr(merge_utils, self._method)(differences, shares, self._density)
        return merged.to(base.device)

    def singular(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, n), S (n,) descending and V^T (n, in) of D of one parameter.

        A linear D is not formed where LoRAs alone change the parameter. Then n is at most the sum of their ranks.
        """
        if self._whole or self._method != "linear":
            u, s, vt = torch.linalg.svd(self(name), full_matrices=False)
            return u, s, vt
        factors = self._factors(name)
        a = torch.cat([a.double() for _, (a, _, _) in factors])
        b = torch.cat([b.double() * (scale * self.coefficients[i]) for i, (_, b, scale) in factors], dim=1)
        (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return qb @ u, s, vt @ qa.T


def coefficients(bank: TeacherBank, config: StudentConfig) -> list[float]:
    """The factor on each teacher's difference: as set, else its share of the sum of teachers[].weight."""
    given = config.merge_coefficients
    if given is None:
        total = sum(teacher.weight for teacher in bank.teachers)
        return [teacher.weight / total for teacher in bank.teachers]
    return list(given) if isinstance(given, list) else [given] * len(bank.teachers)


def merge_in_words(config: StudentConfig) -> str:
    """How the teachers were merged, for the log."""
    given = config.merge_coefficients
    if config.merge == "linear" and given is None:
        return "the mean of its teachers"
    density = "" if config.merge_density is None else f", density {config.merge_density:g}"
    numbers = given if isinstance(given, list) else [given]
    shares = "shares by weight" if given is None else f"coefficients {', '.join(f'{c:g}' for c in numbers)}"
    return f"its teachers merged ({config.merge}{density}, {shares})"
