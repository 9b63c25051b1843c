"""The keys of LoRA files: from any layout to {module: (A, B)} and {module: scale}, by the transformer's own names.

| layout            | a key                                             | its alpha                  |
|-------------------|---------------------------------------------------|----------------------------|
| PEFT              | base_model.model.MODULE.lora_A.weight             | in adapter_config.json     |
| diffusers         | transformer.MODULE.lora_A.weight                  | in the header, or .alpha   |
| kohya, OneTrainer | lora_unet_MO_DU_LE.lora_down.weight               | lora_unet_MO_DU_LE.alpha   |
| original names    | diffusion_model.double_blocks.0.img_attn.qkv. ... | as kohya's                 |

The last kind names modules that diffusers' transformer does not have, such as fused projections: those files go through
the converter of the family's own pipeline in diffusers, and what it makes of them is held against what they held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opd_fast.errors import one_line
from opd_fast.models.base import DiffusionModel

Pairs = dict[str, tuple[Tensor, Tensor]]
Format = Literal["peft", "diffusers", "kohya", "converted"]

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
_DOTTED = ("", DIFFUSERS_PREFIX, "diffusion_model.", PEFT_PREFIX)
_UNDERSCORED = ("lora_unet_", "lora_transformer_")
_TEXT_ENCODERS = ("text_encoder", "lora_te")  # text_encoder., text_encoder_2., text_encoders., lora_te1_
_HALVES = (
    re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora[._](?P<half>down|up)\.weight"),
    re.compile(r"(?P<module>.+\.processor\.\w+)\.(?P<half>down|up)\.weight"),  # XLabs
    re.compile(r"(?P<module>.+)\.(?P<half>alpha)"),
)
# How PEFT's init_lora_weights begin that also change the base: B@A is then no difference to the base as published.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of PEFT's LoRA that change the forward beyond scale*B@A.
_OTHER_ADAPTERS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "arrow_config",
)


def _split(key: str) -> tuple[str, str] | None:
    """(module, "A" | "B" | "alpha") of a key, or None for what is no LoRA weight."""
    for pattern in _HALVES:
        if found := pattern.fullmatch(key):
            return found["module"], {"down": "A", "up": "B"}.get(found["half"], found["half"])
    return None


def read_pairs(file: Path, tensors: Mapping[str, Tensor]) -> tuple[Pairs, dict[str, float]]:
    """Sort a file's tensors into {module: (A, B)} and {module: alpha}, refusing whatever is neither."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.startswith(_TEXT_ENCODERS):
            raise ValueError(f"{file} also changes the text encoders ({key}), which stay as they are; strip those keys")
        found = _split(key)
        if found is None:
            raise ValueError(
                f"{file}: key {key} is no plain LoRA weight; supported are MODULE.lora_A.weight and lora_B.weight "
                f"(no DoRA, no biases, no other adapters): convert the file, or merge it into a full transformer"
            )
        module, half = found
        if half == "alpha":
            if tensor.numel() != 1 or tensor.is_complex():
                raise ValueError(f"{file}: {key} is no single number but {tuple(tensor.shape)}; save the LoRA again")
            alphas[module] = float(tensor)
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {key} is {tensor.dtype}, no floating-point number; quantized weights are not read: save it "
                f"in bfloat16"
            )
        if halves.setdefault(module, {}).setdefault(half, tensor) is not tensor:
            raise ValueError(f"{file}: module {module} has lora_{half} twice (the second: {key}); keep one adapter")
    pairs: Pairs = {}
    for module, half_of in halves.items():
        if set(half_of) != {"A", "B"}:
            raise ValueError(f"{file}: module {module} has only lora_{next(iter(half_of))}; the file is incomplete")
        a, b = half_of["A"], half_of["B"]
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] > 0:
            raise ValueError(
                f"{file}: module {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, not (r, in) and (out, r); "
                f"only LoRA of linear layers is supported"
            )
        pairs[module] = (a, b)
    if stray := sorted(set(alphas) - set(pairs)):
        raise ValueError(f"{file}: {stray[0]}.alpha belongs to no LoRA weight; the file is incomplete, copy it again")
    return pairs, alphas


def read_keys(
    file: Path, tensors: Mapping[str, Tensor], model: DiffusionModel | None
) -> tuple[Pairs, dict[str, float], Format]:
    """Pairs and alphas of a file outside PEFT's layout, by the modules' names in ``model.transformer``.

    Names that the transformer does not have go through diffusers' converter for ``model.pipeline_class``; those that
    it does not know either are returned as they are.  Without a model only diffusers' layout is understood.
    Raises ValueError for keys of other adapters and where the converter fails or loses something.
    """
    pairs, alphas = read_pairs(file, tensors)
    if model is None:
        return *rename(file, pairs, alphas, {m: m.removeprefix(DIFFUSERS_PREFIX) for m in pairs}), "diffusers"
    own = _own_names(model.transformer)
    if all(_own_name(module, own) for module in pairs):
        layout: Format = "kohya" if any(module.startswith(_UNDERSCORED) for module in pairs) else "diffusers"
    else:
        converted = _converted(file, tensors, pairs, alphas, model.pipeline_class)
        layout = "diffusers" if set(converted) == set(tensors) else "converted"
        before = _size(pairs, alphas)
        pairs, alphas = read_pairs(file, converted)
        if not math.isclose(before, _size(pairs, alphas), rel_tol=1e-3):
            raise ValueError(
                f"{file}: diffusers' {model.pipeline_class} converts only a part of it; save it with diffusers' or "
                f"PEFT's names"
            )
    names = {module: _own_name(module, own) or module.removeprefix(DIFFUSERS_PREFIX) for module in pairs}
    return *rename(file, pairs, alphas, names), layout


def rename(
    file: Path, pairs: Pairs, alphas: Mapping[str, float], names: Mapping[str, str]
) -> tuple[Pairs, dict[str, float]]:
    """Pairs and alphas under other names. Raises ValueError where two modules would get one name."""
    if len(set(names.values())) != len(pairs):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(f"{file} holds {twice} twice under different prefixes; keep one of them")
    return {names[m]: pair for m, pair in pairs.items()}, {names[m]: alpha for m, alpha in alphas.items()}


def _own_names(transformer: nn.Module) -> dict[str, str]:
    """A transformer's modules, by their names and by these with underscores for dots."""
    names = [name for name, _ in transformer.named_modules() if name]
    return {name.replace(".", "_"): name for name in names} | {name: name for name in names}


def _own_name(module: str, own: Mapping[str, str]) -> str | None:
    for prefix in (*_DOTTED, *_UNDERSCORED):
        if module.startswith(prefix) and (name := own.get(module.removeprefix(prefix))):
            return name
    return None


def _converted(
    file: Path, tensors: Mapping[str, Tensor], pairs: Pairs, alphas: Mapping[str, float], pipeline_class: str
) -> dict[str, Tensor]:
    """The tensors as the pipeline's ``lora_state_dict`` names them, alphas taken into B first.

    Each converter treats alpha in its own way, and some leave it out for some modules; an alpha equal to the rank is
    the same to all of them.
    """
    import diffusers

    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, half = _split(key) or ("", "")
        if module in alphas:
            rank = pairs[module][0].shape[0]
            if half == "alpha":
                tensor = torch.tensor(float(rank))
            elif half == "B":
                tensor = tensor.float() * (alphas[module] / rank)
        plain[key] = tensor
    try:
        found: dict[str, Tensor] = getattr(diffusers, pipeline_class).lora_state_dict(plain)
    except Exception as error:  # whatever a converter stumbles over, the file's keys are the cause
        raise ValueError(
            f"{file}: diffusers' {pipeline_class} cannot convert its keys ({type(error).__name__}: "
            f"{one_line(error)[:160]}); save it with diffusers' or PEFT's names, or take the LoRA of this model"
        ) from None
    return found


def _size(pairs: Pairs, alphas: Mapping[str, float]) -> float:
    """Sum of the squares of every delta's elements: splitting and permuting rows keep it, losing any lowers it."""
    total = 0.0
    for module, (a, b) in pairs.items():
        a, b = a.double(), b.double() * (alphas.get(module, a.shape[0]) / a.shape[0])
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return total


def scales_from_config(
    file: Path, config: Mapping[str, Any], pairs: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """alpha/r per module (alpha/sqrt(r) with rsLoRA), patterns as PEFT resolves them."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ValueError(f"{file}: a {kind} adapter; only LORA is supported: merge it into a full transformer")
    for option in _OTHER_ADAPTERS:
        if config.get(option):
            raise ValueError(f"{file}: {option} is set, which is no plain LoRA; merge it into a full transformer")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_BASE_CHANGING):
        raise ValueError(
            f"{file}: init_lora_weights is {begun!r}, which also changes the base's weights; convert it to a plain "
            f"LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {config['bias']!r}; only LoRA without trained biases is supported")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} gives no rank r and lora_alpha; the adapter's configuration is incomplete") from None
    scales: dict[str, float] = {}
    for module, (a, _) in pairs.items():
        r = int(_by_pattern(config.get("rank_pattern") or {}, module, rank))
        if r != a.shape[0]:
            raise ValueError(
                f"{file} gives module {module} rank {r}, its lora_A has {a.shape[0]} rows {tuple(a.shape)}; "
                f"configuration and weights belong to different adapters"
            )
        module_alpha = float(_by_pattern(config.get("alpha_pattern") or {}, module, alpha))
        scales[module] = module_alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return scales


def _by_pattern(pattern: Mapping[str, Any], module: str, default: float) -> Any:
    # PEFT: the first key that matches the module's name, or a tail of it that starts after a dot, as an expression.
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
