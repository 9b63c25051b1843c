"""The keys of LoRA files: from any layout to {module: (A, B)} and {module: scale}, by the transformer's own names.

| layout            | a key                                             | its alpha                  |
|-------------------|---------------------------------------------------|----------------------------|
| PEFT              | base_model.model.MODULE.lora_A.weight             | in adapter_config.json     |
| diffusers         | transformer.MODULE.lora_A.weight                  | in the header, or .alpha   |
| kohya, OneTrainer | lora_unet_MO_DU_LE.lora_down.weight               | lora_unet_MO_DU_LE.alpha   |
| original names    | diffusion_model.double_blocks.0.img_attn.qkv. ... | as kohya's                 |

Names are brought back to the transformer's own before anything is judged (``opd_fast.models.lora.module_names``).
The last kind names modules that diffusers' transformer does not have, such as fused projections: those files go
through the converter of the family's own pipeline in diffusers, and what it returns is compared with what went in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opd_fast.errors import one_line
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.module_names import DIFFUSERS_PREFIX, ModuleNames, bare, flat, is_underscored

Pairs = dict[str, tuple[Tensor, Tensor]]
Format = Literal["peft", "diffusers", "kohya", "converted"]

_TEXT_ENCODERS = ("text_encoder", "lora_te")  # text_encoder., text_encoder_2., text_encoders., lora_te1_
_HALVES = (
    re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight"),
    re.compile(r"(?P<module>.+)\.lora[._](?P<half>down|up)\.weight"),
    re.compile(r"(?P<module>.+\.processor\.\w+)\.(?P<half>down|up)\.weight"),  # XLabs
    re.compile(r"(?P<module>.+)\.(?P<half>alpha)"),
)
# What a key that is not a LoRA weight belongs to, by how its last part begins.
_ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "boft_": "BOFT",
    "diff": "full differences of weights",
    "lora_mid": "a Tucker decomposition",
    "lora_bias": "trained biases",
    "bias": "trained biases",
    "lora_embedding_": "an embedding's LoRA",
}
# Fused projections that some trainers write beside their parts, and diffusers' converter of the pipeline leaves out.
_REPEATED = {"ZImagePipeline": {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}}
_ALIKE = 0.999  # cosine of two deltas that are the same but for rounding
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
    """(module, "A" | "B" | "alpha") of a key, or None for what is not a LoRA weight."""
    for pattern in _HALVES:
        if found := pattern.fullmatch(key):
            return found["module"], {"down": "A", "up": "B"}.get(found["half"], found["half"])
    return None


def modules_of(tensors: Mapping[str, Tensor]) -> set[str]:
    """The modules that LoRA keys name, as they spell them."""
    return {found[0] for key in tensors if (found := _split(key)) is not None}


def plain_keys(file: Path, tensors: Mapping[str, Tensor], names: ModuleNames) -> dict[str, Tensor]:
    """The tensors under keys without wrappers' segments. Raises ValueError where two keys become one."""
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if plain.setdefault(short := names.plain(key), tensor) is not tensor:
            raise ValueError(f"{file} holds {short} twice under different names; keep one of them")
    return plain


def read_pairs(file: Path, tensors: Mapping[str, Tensor]) -> tuple[Pairs, dict[str, float]]:
    """Sort a file's tensors into {module: (A, B)} and {module: alpha}, refusing whatever is neither.

    A trainer may name a module differently in its weights and in its alpha: `rename` finds what belongs together.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.startswith(_TEXT_ENCODERS):
            raise ValueError(f"{file} also changes the text encoders ({key}), which stay as they are; strip those keys")
        found = _split(key)
        if found is None:
            leaf = key.removesuffix(".weight").rpartition(".")[2]
            kind = next((f" but of {kind}" for begin, kind in _ADAPTERS.items() if leaf.startswith(begin)), "")
            raise ValueError(
                f"{file}: key {key} is not a plain LoRA weight{kind}; supported are MODULE.lora_A.weight and "
                f"lora_B.weight (no DoRA, no biases, no other adapters): convert the file, or merge it into a full "
                f"transformer"
            )
        module, half = found
        if half == "alpha":
            if tensor.numel() != 1 or tensor.is_complex():
                raise ValueError(f"{file}: {key} is not a single number but {tuple(tensor.shape)}; save the LoRA again")
            alphas[module] = float(tensor)
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {key} is {tensor.dtype}, not a floating-point number; quantized weights are not read: save "
                f"it in bfloat16"
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
    return pairs, alphas


def read_keys(
    file: Path, tensors: Mapping[str, Tensor], model: DiffusionModel | None
) -> tuple[Pairs, dict[str, float], Format, str]:
    """Read a file outside PEFT's layout. Returns pairs and alphas by the modules' names in ``model.transformer``, the
    layout, and in words what the file repeats, which is left out.

    Names that the transformer does not have go through diffusers' converter for ``model.pipeline_class``; those that
    it does not know either are returned as they are.  Without a model only diffusers' layout is understood.
    Raises ValueError for keys of other adapters and where the converter fails or loses something.
    """
    names = transformer_names(model)
    tensors = plain_keys(file, tensors, names)
    pairs, alphas = read_pairs(file, tensors)
    if model is None:
        return *rename(file, pairs, alphas, lambda module: module.removeprefix(DIFFUSERS_PREFIX)), "diffusers", ""
    repeated = _repeated(pairs, _REPEATED.get(model.pipeline_class, {}), names)
    note = _account(pairs, alphas, repeated, names)
    gone = {flat(module) for module in repeated}
    pairs = {module: pair for module, pair in pairs.items() if module not in repeated}
    alphas = {module: alpha for module, alpha in alphas.items() if flat(module) not in gone}
    layout: Format = "kohya" if any(map(is_underscored, pairs)) else "diffusers"
    if not all(names.find(module) for module in pairs):
        pairs, alphas = rename(file, pairs, alphas, names.for_converter)
        plain = _for_converter(pairs, alphas, tensors, names)
        converted = _converted(file, plain, model.pipeline_class)
        layout = "diffusers" if set(converted) == set(plain) else "converted"
        before = _size(pairs, alphas)
        pairs, alphas = read_pairs(file, converted)
        if not math.isclose(before, _size(pairs, alphas), rel_tol=1e-3):
            raise ValueError(
                f"{file}: diffusers' {model.pipeline_class} converts only a part of it; save it with diffusers' or "
                f"PEFT's names"
            )
    pairs, alphas = rename(file, pairs, alphas, lambda module: names.find(module) or bare(module))
    return pairs, alphas, layout, note


def transformer_names(model: DiffusionModel | None) -> ModuleNames:
    """The names of the modules of a model's transformer; without a model there are none."""
    return ModuleNames(name for name, _ in model.transformer.named_modules()) if model is not None else ModuleNames()


def rename(
    file: Path, pairs: Pairs, alphas: Mapping[str, float], name: Callable[[str], str]
) -> tuple[Pairs, dict[str, float]]:
    """Put pairs and alphas under other names.

    Raises ValueError where two modules would get one name, and for an alpha without a module.
    """
    renamed: Pairs = {}
    for module, pair in pairs.items():
        if renamed.setdefault(new := name(module), pair) is not pair:
            raise ValueError(f"{file} holds {new} twice under different prefixes; keep one of them")
    numbers: dict[str, float] = {}
    for module, alpha in alphas.items():
        if (new := name(module)) not in renamed:
            raise ValueError(f"{file}: {module}.alpha belongs to no LoRA weight; the file is incomplete, copy it again")
        if numbers.setdefault(new, alpha) != alpha:
            raise ValueError(f"{file} gives the alpha of {new} twice; keep one of them")
    return renamed, numbers


def _repeated(pairs: Pairs, fused: Mapping[str, Sequence[str]], names: ModuleNames) -> dict[str, tuple[str, list[str]]]:
    """Find the fused modules of a file that holds all of their parts as well. Returns the kind of each, and the file's
    names of its parts."""
    in_file = {known: module for module in pairs if (known := names.find(module))}
    repeated: dict[str, tuple[str, list[str]]] = {}
    for module in pairs:
        for kind, parts in fused.items():
            beside = [names.part(module, kind, part) for part in parts]
            if names.find(module) is None and all(name in in_file for name in beside):
                repeated[module] = kind, [in_file[name] for name in beside if name is not None]
    return repeated


def _account(
    pairs: Pairs, alphas: Mapping[str, float], repeated: Mapping[str, tuple[str, list[str]]], names: ModuleNames
) -> str:
    """Say what is left out of a file because it stands there twice, and whether the two agree."""
    by_name = {flat(module): alpha for module, alpha in alphas.items()}

    def scaled(module: str) -> tuple[Tensor, Tensor]:
        return _scaled(pairs[module], by_name.get(flat(names.find(module) or module)))

    counts: dict[str, list[bool]] = {}
    for module, (kind, parts) in repeated.items():
        counts.setdefault(kind, []).append(_alike(scaled(module), [scaled(part) for part in parts]))
    repetitions = []
    for kind, alike in sorted(counts.items()):
        differ = "" if all(alike) else f", {alike.count(False)} of which differ from them"
        repetitions.append(f"{kind} in {len(alike)} blocks beside its parts{differ}")
    return f"left out, as diffusers leaves it out: {'; '.join(repetitions)}" if repetitions else ""


def _alike(whole: tuple[Tensor, Tensor], parts: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the parts' deltas, one below the other, equal the fused module's but for rounding and a common factor,
    because an alpha is often written for one of the two alone."""
    a, b = whole
    if len(b) != sum(len(up) for _, up in parts):
        return False
    rows = b.split([len(up) for _, up in parts])
    product = sum(_inner((a, row), part) for row, part in zip(rows, parts, strict=True))
    return product > _ALIKE * math.sqrt(_inner(whole, whole) * sum(_inner(part, part) for part in parts))


def _scaled(pair: tuple[Tensor, Tensor], alpha: float | None) -> tuple[Tensor, Tensor]:
    """A and B in float64, alpha / rank taken into B; without an alpha the scale is 1."""
    a, b = (half.double() for half in pair)
    return a, b if alpha is None else b * (alpha / a.shape[0])


def _inner(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The inner product of two deltas B@A, without making them."""
    return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())


def _size(pairs: Pairs, alphas: Mapping[str, float]) -> float:
    """Sum of the squares of every delta's elements, which splitting or permuting rows keeps and losing one lowers."""
    scaled = (_scaled(pair, alphas.get(module)) for module, pair in pairs.items())
    return sum(_inner(pair, pair) for pair in scaled)


def _for_converter(
    pairs: Pairs, alphas: Mapping[str, float], tensors: Mapping[str, Tensor], names: ModuleNames
) -> dict[str, Tensor]:
    """The tensors that pairs and alphas came from, under keys of their new names; each keeps how its half is spelt.

    Alphas are taken into B, and equal the rank: each converter treats alpha in its own way, and some leave it out for
    some modules, but an alpha equal to the rank is the same to all of them.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, half = _split(key) or ("", "")
        new = names.for_converter(module)
        if new not in (alphas if half == "alpha" else pairs):
            continue
        if new in alphas and half != "A":
            rank = pairs[new][0].shape[0]
            tensor = torch.tensor(float(rank)) if half == "alpha" else tensor.float() * (alphas[new] / rank)
        renamed[new + key.removeprefix(module)] = tensor
    return renamed


def _converted(file: Path, tensors: dict[str, Tensor], pipeline_class: str) -> dict[str, Tensor]:
    """The tensors as the pipeline's ``lora_state_dict`` names them."""
    import diffusers

    try:
        found: dict[str, Tensor] = getattr(diffusers, pipeline_class).lora_state_dict(dict(tensors))
    except Exception as error:  # whatever a converter stumbles over, the file's keys are the cause
        raise ValueError(
            f"{file}: diffusers' {pipeline_class} cannot convert its keys ({type(error).__name__}: "
            f"{one_line(error)[:160]}); save it with diffusers' or PEFT's names, or take the LoRA of this model"
        ) from None
    return found


def scales_from_config(
    file: Path, config: Mapping[str, Any], pairs: Pairs, spelt: Mapping[str, str] | None = None
) -> dict[str, float]:
    """alpha/r per module (alpha/sqrt(r) with rsLoRA), patterns as PEFT resolves them.

    ``spelt``: the modules' names when the adapter was saved, which its patterns are made of, where they differ.
    """
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        raise ValueError(f"{file}: a {kind} adapter; only LORA is supported: merge it into a full transformer")
    for option in _OTHER_ADAPTERS:
        if config.get(option):
            raise ValueError(f"{file}: {option} is set, which is not a plain LoRA; merge it into a full transformer")
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
        called = {module, (spelt or {}).get(module, module)}
        r = int(_by_pattern(config.get("rank_pattern") or {}, called, rank))
        if r != a.shape[0]:
            raise ValueError(
                f"{file} gives module {module} rank {r}, its lora_A has {a.shape[0]} rows {tuple(a.shape)}; "
                f"configuration and weights belong to different adapters"
            )
        module_alpha = float(_by_pattern(config.get("alpha_pattern") or {}, called, alpha))
        scales[module] = module_alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return scales


def _by_pattern(pattern: Mapping[str, Any], names: Collection[str], default: float) -> Any:
    # PEFT: the first key that matches the module's name, or a tail of it that starts after a dot, as an expression.
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default
