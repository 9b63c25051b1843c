"""The weights of a network's folder: which files hold them, what their headers say, and why they cannot be read.

diffusers and transformers save a network as one file or as shards with an index, each plain or as a named variant such
as fp16. Only headers and configurations are read here, but for `load_renamed`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_fast.errors import one_line
from opd_fast.models.lora.module_names import ModuleNames

Header = dict[str, tuple[str, tuple[int, ...]]]
"""Safetensors' name of each tensor's dtype, and its shape."""

TRANSFORMERS_STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
"""The beginnings of the names of the files that the two libraries write."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANT_OF = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_LIBRARIES = {name: name for name in ("bitsandbytes", "torchao", "gguf", "modelopt")}
_LIBRARIES |= {"quanto": "optimum.quanto", "gptq": "gptqmodel"}
"""The package that reads the weights of a quantisation method."""
_UNREAD = dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), "pickles, which can run code when they are opened")
_UNREAD |= {".gguf": "GGUF's quantised weights", ".msgpack": "Flax's weights", ".onnx": "an ONNX graph"}
SAVE_AGAIN = "load it in diffusers and save_pretrained(FOLDER), which writes safetensors"


@dataclass(frozen=True)
class WeightFiles:
    """One network's weights, of which `variant` is diffusers' name (None: plain) and `what` the name in errors."""

    files: tuple[Path, ...]
    variant: str | None
    what: str

    def header(self) -> Header:
        """Names, dtypes and shapes of all tensors. Raises ValueError for a file that is damaged or cut short."""
        return {key: entry for file in self.files for key, entry in read_header(file, self.what).items()}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a configuration file. Raises ValueError for one that is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({one_line(error)[:200]}); fetch it again") from None
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} is damaged ({one_line(error)[:200]}); fetch it again") from None
    return found


def read_header(file: Path, what: str) -> Header:
    """What a safetensors file holds. Raises ValueError for one that is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
            return {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{what} cannot be loaded: {file} is damaged or cut short ({one_line(error)[:200]}); fetch it again"
        ) from None


def find_weights(folder: Path, what: str, dtype: torch.dtype | None = None, stem: str = DIFFUSERS_STEM) -> WeightFiles:
    """Find the weights in a network's folder: the plain ones where there are any, else the only variant, else the
    variant of ``dtype``.

    ``what`` names the network in errors; ``stem`` is how its files begin.
    Raises ValueError, with the cause and the remedy, where there are none that can be read or a part is missing.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    indexed = {v: name for name in names if (v := _index_variant(name, stem)) is not None}
    single = {v: name for name in names if (v := _file_variant(name, stem)) is not None}
    found = {**single, **indexed}  # as diffusers has it, an index comes before a file
    if not found:
        raise ValueError(_nothing(what, stem, names))
    chosen = _choose(sorted(found), folder, what, dtype)
    variant = chosen or None
    if chosen not in indexed:
        return WeightFiles((folder / found[chosen],), variant, what)
    shards = _shards(folder / found[chosen])
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent and chosen in single:
        raise ValueError(
            f"{what} has its weights in {single[chosen]}, but its index {found[chosen]} names {absent[0]}, which is "
            f"not there; delete the index, or fetch the shards"
        )
    if absent:
        raise ValueError(f"{what} lacks {absent[0]}; fetch the missing shards again")
    return WeightFiles(tuple(folder / shard for shard in shards), variant, what)


def _file_variant(name: str, stem: str) -> str | None:
    """The variant of a whole network's file, "" for the plain one; None for another file."""
    found = re.fullmatch(rf"{re.escape(stem)}(?:\.([\w-]+))?\.safetensors", name)
    return None if found is None or _SHARD.search(name) else found[1] or ""


def _index_variant(name: str, stem: str) -> str | None:
    found = re.fullmatch(rf"{re.escape(stem)}\.safetensors(?:\.([\w-]+))?\.index(?:\.([\w-]+))?\.json", name)
    return None if found is None else found[1] or found[2] or ""


def _choose(variants: list[str], folder: Path, what: str, dtype: torch.dtype | None) -> str:
    if "" in variants or len(variants) == 1:
        return variants[0]
    if dtype is not None and (variant := _VARIANT_OF.get(dtype)) in variants:
        return variant
    raise ValueError(
        f"{what} has no plain weights but the variants {', '.join(variants)}; set model.dtype to that of one of them, "
        f"or keep one alone in {folder}"
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted({str(shard) for shard in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError):
        raise ValueError(f"{index} is damaged (it has no weight_map); fetch it again") from None


def _nothing(what: str, stem: str, names: list[str]) -> str:
    """Why a folder of these files holds no weights that can be read."""
    if loose := [name for name in names if name.endswith(".safetensors")]:
        if any(_SHARD.search(name) and name.startswith(stem) for name in loose):
            return f"{what} has the shard {loose[0]} but no {stem}.safetensors.index.json; fetch the index"
        return (
            f"{what} has {loose[0]}, but diffusers reads {stem}.safetensors; rename it, or where it is a checkpoint in "
            f"its original layout convert it with from_single_file"
        )
    for name in names:
        if (kind := _UNREAD.get(Path(name).suffix)) is not None:
            return f"{what} has no weights in safetensors but {kind} ({name}); {SAVE_AGAIN}"
    return f"{what} has no weights in safetensors, the one format that is read; fetch the pipeline again"


# --- quantisation ----------------------------------------------------------------------------------------------------


def check_quantization(config: Mapping[str, Any], what: str, *, frozen: bool) -> None:
    """Raise ValueError for a network whose configuration quantises it, naming the method.

    A network that only ever stands frozen, as a text encoder, may be quantised where the method's library is installed.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else {}
    method = str(settings.get("quant_method") or "a method without a name")
    library = _LIBRARIES.get(method)
    if frozen and library is not None and _installed(library):
        return
    missing = f", and {library} is not installed; install {library}" if frozen and library is not None else ""
    raise ValueError(
        f"{what} is quantised by {method}{_detail(settings)}, whose weights cannot be read here{missing}; take it in "
        f"bfloat16 or float16, or dequantize() it in diffusers and save it again"
    )


def _installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False


def _detail(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return f" ({settings.get('bnb_4bit_quant_type', 'fp4')}, 4 bits)"
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return " (int8)"
    kinds = ("quant_type", "weights_dtype", "bits")
    return next((f" ({settings[kind]})" for kind in kinds if isinstance(settings.get(kind), str | int)), "")


# --- names and shapes ------------------------------------------------------------------------------------------------


def network_keys(header: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The name that each tensor of a file has in the network, whatever wrapped the network when it was saved."""
    names = ModuleNames(known)
    return {key: names.find(names.plain(key)) or names.plain(key) for key in header}


def check_state(
    header: Header, known: Mapping[str, tuple[int, ...]], what: str, remedy: str, *, exact: bool = True
) -> dict[str, str]:
    """Compare a file's tensors with a network's. Returns the network's name of each.

    Raises ValueError for missing and mismatched ones, for those that are not floating-point numbers, and, if ``exact``,
    for those that the network has no place for.
    """
    keys = network_keys(header, known)
    if adapters := sorted(key for key in keys if ".lora_" in key or ".base_layer." in key):
        raise ValueError(
            f"{what} was saved with PEFT's adapters on it ({adapters[0]}); merge them (merge_and_unload, or fuse_lora "
            f"and unload_lora_weights) and save it again"
        )
    if len(set(keys.values())) < len(keys):
        twice = next(name for name in keys.values() if list(keys.values()).count(name) > 1)
        raise ValueError(f"{what} holds {twice} twice under different names; keep one of them")
    shapes = {keys[key]: shape for key, (_, shape) in header.items()}
    unexpected = sorted(set(shapes) - set(known)) if exact else []
    missing = sorted(set(known) - set(shapes))
    for kind, found in (("unexpected", unexpected), ("missing", missing)):
        if found:
            raise ValueError(f"{what} has {len(found)} {kind} keys, e.g. {found[0]}; {remedy}")
    for name, shape in known.items():
        if shapes[name] != tuple(shape):
            raise ValueError(f"{what} has {name} of shape {list(shapes[name])}, not {list(shape)}; {remedy}")
    for key, (dtype, _) in header.items():
        if keys[key] in known and not dtype.startswith(("F", "BF")):
            raise ValueError(f"{what}: {key} is {dtype}, not a floating-point number; take it in bfloat16 or float16")
    return keys


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's state, without the adapters that sit on it."""
    state = module.state_dict()
    return {k.replace(".base_layer.", "."): tuple(v.shape) for k, v in state.items() if ".lora_" not in k}


def meta_network(kind: Any, config: Mapping[str, Any], what: str) -> nn.Module:
    """A network of diffusers' class ``kind`` on the meta device: shapes and names only. Raises ValueError where the
    configuration makes none.
    """
    try:
        with torch.device("meta"):
            network: nn.Module = kind.from_config(config)
    except Exception as error:  # whatever a configuration of nonsense leads to
        raise ValueError(
            f"{what} cannot be made ({type(error).__name__}: {one_line(error)[:200]}); its config.json is damaged: "
            f"fetch it again"
        ) from None
    return network.eval().requires_grad_(False)


def load_renamed(
    kind: Any, config: Mapping[str, Any], files: Iterable[Path], keys: Mapping[str, str], dtype: torch.dtype
) -> nn.Module:
    """Load a network from tensors under other names, on the CPU and in ``dtype``, as ``from_pretrained`` would.

    ``keys``: the network's name of each tensor in ``files``.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from safetensors import safe_open

    with init_empty_weights():
        network: nn.Module = kind.from_config(dict(config))
    kept = tuple(getattr(kind, "_keep_in_fp32_modules", None) or ())
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                name = keys[key]
                wide = any(segment in kept for segment in name.split("."))
                state[name] = opened.get_tensor(key).to(torch.float32 if wide else dtype)
    network.load_state_dict(state, assign=True)
    if not kept:
        nn.Module.to(network, dtype)  # buffers outside the state; diffusers' own `to` warns of every dtype
    return network.eval().requires_grad_(False)
