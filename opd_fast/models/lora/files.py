"""LoRA files: read, check, merge, write.  W' = W + scale*B@A, scale = alpha/r (https://arxiv.org/abs/2106.09685).

PEFT's folder holds adapter_config.json (rank, alpha) and adapter_model.safetensors; every other layout is one
safetensors file, by its own name or as diffusers' pytorch_lora_weights.safetensors.  Where such a file gives no alpha,
alpha = r is what diffusers assumes, and what is assumed here.  Their keys: ``opd_fast.models.lora.keys``.  Nothing
is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.config.paths import bundled_choices, is_bundled, resolve_source
from opd_fast.files import open_to_umask, replace_text, replacing
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.keys import (
    Format,
    modules_of,
    plain_keys,
    read_keys,
    read_pairs,
    rename,
    scales_from_config,
    transformer_names,
)
from opd_fast.models.lora.module_names import DIFFUSERS_PREFIX, PEFT_PREFIX, bare
from opd_fast.models.pipeline_folder import fetch
from opd_fast.models.weight_files import read_header, read_json

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

_NAMES = (PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)
_METADATA_KEY = "lora_adapter_metadata"  # diffusers' name of the header entry


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as read: ``tensors[module] = (A (r, in), B (out, r))`` in the file's dtype on the CPU.

    ``scale[module]`` multiplies B@A.  ``sha256`` is over the weights file and, in PEFT's layout, its configuration.
    """

    path: Path
    format: Format
    tensors: dict[str, tuple[Tensor, Tensor]]
    scale: dict[str, float]
    sha256: str
    note: str = ""
    """What was left out of the file, in words; empty where nothing was."""


# --- reading ---------------------------------------------------------------------------------------------------------


def find_lora(path: str | Path) -> Path | None:
    """Find the file or folder of the LoRA that ``path`` names. Returns None if it names something else, or nothing.

    ``path``: a PEFT folder, a LoRA file, a folder with diffusers', ``bundled/NAME``, or a hub id, ``owner/name``, with
    an optional folder or file after it (fetched, or found in the hub's cache; ValueError if it can be neither).
    """
    source = resolve_source(path, "teachers")
    local = source.path
    if local is None:
        inside = source.inside
        within = f"{inside}/" if inside else ""
        wanted = [inside] if inside.endswith(".safetensors") else [within + file for file in _NAMES]
        local = fetch(source.repo, wanted) / inside
    if local.is_file():
        return local if local.suffix == ".safetensors" and _holds_lora(local) else None
    return local if any((local / file).is_file() for file in _NAMES) else None


def read_lora(path: str | Path, model: DiffusionModel | None = None) -> LoraWeights:
    """Read a LoRA; a folder with PEFT's and diffusers' layouts is read as PEFT's.

    ``model`` is the one that it will change, or its meta model: files in layouts other than these two are read by its
    modules' names and its family's converter, and without it not at all.
    Raises ValueError, in one line with the file and the remedy, for a missing or damaged file, for what is not a plain
    LoRA of the transformer (DoRA, biases, text-encoder weights, half a pair), and for NaN or infinite weights.
    """
    found = find_lora(path)
    if found is None:
        raise ValueError(f"{path} is not a LoRA: {_why_not(path)}")
    if found.is_file():
        return _read_peft(found.parent, model) if found.name == PEFT_WEIGHTS else _read_file(found, model)
    is_peft = (found / PEFT_CONFIG).is_file() or (found / PEFT_WEIGHTS).is_file()
    return _read_peft(found, model) if is_peft else _read_file(found / DIFFUSERS_WEIGHTS, model)


def _why_not(source: str | Path) -> str:
    if is_bundled(str(source)):
        return bundled_choices("teachers")
    path = Path(source).expanduser()
    if path.is_file():
        return "the file holds no LoRA weights in safetensors; give a PEFT folder or a LoRA's .safetensors file"
    if not path.is_dir():
        return f"there is no such file or folder; give a folder with {PEFT_CONFIG}, or a .safetensors file"
    pickled = [p.name for p in path.glob("*.bin")] + [p.name for p in path.glob("*.pt")]
    if pickled:
        return f"{pickled[0]} is a pickle, which can run code when opened; save the LoRA as safetensors"
    inside = sorted({p.parent for name in (PEFT_CONFIG, DIFFUSERS_WEIGHTS) for p in path.glob(f"*/{name}")})
    if inside:
        return f"but {inside[0]} is one; name that folder"
    if files := sorted(file for file in path.glob("*.safetensors") if _holds_lora(file)):
        return f"but {files[0]} is one; name that file"
    return f"the folder has neither {PEFT_CONFIG} with {PEFT_WEIGHTS} nor {DIFFUSERS_WEIGHTS}"


def _read_peft(folder: Path, model: DiffusionModel | None) -> LoraWeights:
    for name in (PEFT_CONFIG, PEFT_WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"LoRA {folder} lacks {name}; copy the whole adapter folder again")
    file = folder / PEFT_CONFIG
    config = read_json(file)
    weights = folder / PEFT_WEIGHTS
    names = transformer_names(model)
    tensors = _load(weights)[0]
    raw, alphas = read_pairs(weights, plain_keys(weights, tensors, names))
    if alphas:
        raise ValueError(f"{weights} holds .alpha tensors, which PEFT does not write; convert it again")

    def transformer_name(module: str) -> str:
        return names.find(module) or module.removeprefix(PEFT_PREFIX)

    pairs, _ = rename(weights, raw, {}, transformer_name)
    spelt = {transformer_name(names.plain(module)): module.removeprefix(PEFT_PREFIX) for module in modules_of(tensors)}
    return LoraWeights(folder, "peft", pairs, scales_from_config(file, config, pairs, spelt), sha256(weights, file))


def _read_file(file: Path, model: DiffusionModel | None) -> LoraWeights:
    tensors, header = _load(file)
    pairs, alphas, layout, note = read_keys(file, tensors, model)
    if header.get(_METADATA_KEY):
        if alphas:
            raise ValueError(f"{file} gives alpha twice, in its header and as .alpha tensors; keep one of them")
        try:
            metadata = json.loads(header[_METADATA_KEY])
            config = {k.removeprefix(DIFFUSERS_PREFIX): v for k, v in metadata.items()}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: damaged {_METADATA_KEY} in its header ({error}); save the LoRA again") from None
        names = transformer_names(model)
        spelt = {names.find(names.plain(m)) or bare(names.plain(m)): bare(m) for m in modules_of(tensors)}
        scale = scales_from_config(file, config, pairs, spelt)
    else:
        scale = {module: alphas.get(module, a.shape[0]) / a.shape[0] for module, (a, _) in pairs.items()}
    return LoraWeights(file, layout, pairs, scale, sha256(file), note)


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; every tensor finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            header = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}); it is damaged or cut short: copy it again"
        ) from None
    if not tensors:
        raise ValueError(f"{file} holds no tensors; save the LoRA again")
    for key, tensor in tensors.items():
        # In float32, in which it is applied.
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{file}: tensor {key} has NaN or infinite values; take another checkpoint")
    return tensors, header


def _holds_lora(file: Path) -> bool:
    try:
        keys = read_header(file, str(file))
    except ValueError:
        return True  # damaged: reading it says so
    words = ("lora", "lokr", "hada", "oft_", "lycoris_")  # reading refuses other adapters by name
    return any(word in key for key in keys for word in words)


def sha256(*files: Path) -> str:
    """The hash over the files' content, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**24):
                digest.update(part)
    return digest.hexdigest()


# --- applying --------------------------------------------------------------------------------------------------------


def match(lora: LoraWeights, transformer: nn.Module, *, allow_partial: bool = False) -> list[str]:
    """Match a LoRA with a transformer. Returns the modules that it changes, in the transformer's order.

    Raises ValueError if it fits none of them, if some of its modules do not exist (unless ``allow_partial``), or if a
    shape differs.
    """
    modules = {name: m for name, m in transformer.named_modules() if name in lora.tensors}
    absent = sorted(set(lora.tensors) - set(modules))
    if not modules:
        raise ValueError(
            f"LoRA {lora.path} fits no module of the transformer (its first: {absent[0]}); "
            f"it was made for another model family, or diffusers does not convert its names for this one"
        )
    if absent and not allow_partial:
        raise ValueError(
            f"LoRA {lora.path} fits {len(modules)} of its {len(lora.tensors)} modules; the transformer has no "
            f"{absent[0]}: it was made for another model of the family; take this model's LoRA (teachers[].partial "
            f"takes the {len(modules)} that fit and leaves out the other {len(absent)})"
        )
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(
                f"LoRA {lora.path} changes {name}, a {type(module).__name__}; only linear layers are supported"
            )
        a, b = lora.tensors[name]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"LoRA {lora.path} changes {name} by ({b.shape[0]}, {a.shape[1]}), the transformer's weight is "
                f"{tuple(weight.shape)}; take the LoRA of this model, or the model of this LoRA"
            )
    return list(modules)


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale*B@A: (out, in) float32 on A's device.  a (r, in), b (out, r), any floating dtype."""
    return torch.mm(b.to(torch.float32), a.to(torch.float32)) * scale


@torch.no_grad()
def merge_into(transformer: nn.Module, lora: LoraWeights, *, allow_partial: bool = False) -> list[str]:
    """W <- W + scale*B@A in place, computed in float32 and rounded once to W's dtype.  Returns the changed modules.

    Nothing is changed when ``match`` raises.
    """
    names = match(lora, transformer, allow_partial=allow_partial)
    for name in names:
        weight = transformer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        a, b = (t.to(weight.device) for t in lora.tensors[name])
        weight.copy_(weight.to(torch.float32) + delta(a, b, lora.scale[name]))
    return names


# --- writing ---------------------------------------------------------------------------------------------------------


def save_lora(
    directory: str | Path,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a LoRA in PEFT's and in diffusers' layout side by side, alpha kept in both; returns the folder.

    ``tensors[module] = (A (rank, in), B (out, rank))``, any device; ``targets``: PEFT's target_modules, the full module
    names if None.  ``peft.PeftModel.from_pretrained(transformer, directory)`` and ``load_lora_weights(directory)`` of
    the family's diffusers pipeline both give the scale alpha/rank.  Each file is written beside its place and moved
    there whole.
    Raises ValueError for no tensors, for one of another rank, and for NaN or infinite values.
    """
    if not tensors:
        raise ValueError("a LoRA without tensors cannot be saved; check the student's targets")
    for module, (a, b) in tensors.items():
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"module {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, not of rank {rank}")
        if not bool(a.isfinite().all() & b.isfinite().all()):
            raise ValueError(f"module {module} has NaN or infinite LoRA weights; take an earlier checkpoint")
    # Only settings that every PEFT knows: a reader of another version refuses names it has not heard of.
    config: dict[str, Any] = {"r": rank, "target_modules": sorted(tensors if targets is None else targets)}
    config |= {"lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha)}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "bias": "none"}
    config |= {"use_rslora": False, "use_dora": False, "init_lora_weights": True}
    of_peft = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": base_model, "inference_mode": True}
    prefixed = {DIFFUSERS_PREFIX + key: value for key, value in config.items()}
    header = {"format": "pt", _METADATA_KEY: json.dumps(prefixed, indent=2, sort_keys=True)}

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / PEFT_WEIGHTS, tensors, PEFT_PREFIX, {"format": "pt"})
    _write_tensors(folder / DIFFUSERS_WEIGHTS, tensors, DIFFUSERS_PREFIX, header)
    replace_text(folder / PEFT_CONFIG, json.dumps(of_peft | config, indent=2, sort_keys=True) + "\n")
    return folder


def _write_tensors(
    file: Path, tensors: Mapping[str, tuple[Tensor, Tensor]], prefix: str, header: dict[str, str]
) -> None:
    from safetensors.torch import save_file

    flat = {
        f"{prefix}{module}.lora_{half}.weight": tensor.detach().cpu().contiguous()
        for module, pair in tensors.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    with replacing(file) as part:
        save_file(flat, part, metadata=header)
        open_to_umask(part)
