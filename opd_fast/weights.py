"""Transformers by whatever name a user has for them: nothing, a LoRA, a transformer or pipeline folder, a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_fast.adapters import plain_copy, unwrapped
from opd_fast.errors import one_line
from opd_fast.lora import LoraWeights, find_lora, match, merge_into, read_lora, sha256
from opd_fast.models.base import DiffusionModel
from opd_fast.models.folder import HUB_ID, fetch, load_component

_FORMATS = {
    "peft": "PEFT LoRA",
    "diffusers": "diffusers LoRA",
    "kohya": "kohya LoRA",
    "converted": "LoRA converted by diffusers",
    "transformer": "whole transformer",
}


@dataclass(frozen=True)
class Origin:
    """Where weights come from, and what of them was taken.  ``sha256`` identifies their files."""

    source: str
    """As the user named it."""
    format: str
    """A LoRA's `peft`, `diffusers`, `kohya` or `converted` layout, or `transformer`: all of the weights."""
    modules: int
    """Modules that it changes."""
    held: int
    """Modules that its files hold: more than `modules` where a partial match was asked for."""
    tensors: int
    """Tensors taken from the files."""
    ranks: tuple[int, ...]
    """A LoRA's, ascending; empty for a whole transformer."""
    sha256: str
    note: str = ""
    """What of the files was left out beside modules that the model does not have."""

    @classmethod
    def of_lora(cls, source: str, lora: LoraWeights, modules: list[str]) -> Origin:
        ranks = tuple(sorted({lora.tensors[module][0].shape[0] for module in modules}))
        return cls(
            source, lora.format, len(modules), len(lora.tensors), 2 * len(modules), ranks, lora.sha256, lora.note
        )

    def __str__(self) -> str:
        matched = f"{self.modules} modules"
        if self.modules != self.held:
            matched = f"{self.modules} of its {self.held} modules"
        rank = f"rank {', '.join(map(str, self.ranks))}, " if self.ranks else ""
        note = f"; {self.note}" if self.note else ""
        return f"{_FORMATS[self.format]}, {matched} ({self.tensors} tensors), {rank}sha256 {self.sha256[:12]}{note}"


def load_transformer(model: DiffusionModel, weights: str | None, *, what: str) -> nn.Module:
    """A frozen transformer of its own, in the model's dtype: the base with a LoRA merged, or loaded whole.

    `weights` None gives a copy of the base. `what` names the setting in errors. Raises
    ValueError where the weights are missing, damaged, or of another shape than the base.
    """
    return plain_copy(model.transformer) if weights is None else load_with_origin(model, weights, what=what)[0]


def load_with_origin(
    model: DiffusionModel, weights: str, *, what: str, partial: bool = False
) -> tuple[nn.Module, Origin]:
    """As `load_transformer`, with the account of it; `partial` takes a LoRA of which only some modules exist."""
    if find_lora(weights) is not None:
        lora = read_lora(weights, model)
        match(lora, unwrapped(model.transformer), allow_partial=partial)  # before the copy
        transformer = plain_copy(model.transformer)
        modules = merge_into(transformer, lora, allow_partial=partial)
        return transformer, Origin.of_lora(weights, lora, modules)
    folder = _find_transformer(weights, what)
    _check_whole(model, folder, weights, what)
    _check_files(model, folder, what)
    kind = type(model.transformer)
    loaded: nn.Module = load_component(kind, folder.parent, folder.name, exact=True, torch_dtype=model.dtype)
    loaded = loaded.to(model.device)
    for name, tensor in loaded.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}: {name} of {weights} has NaN or infinite values; take another checkpoint")
    modules = [name for name, m in loaded.named_modules() if any(True for _ in m.parameters(recurse=False))]
    count = len(loaded.state_dict())
    digest = sha256(*sorted(folder.glob("*.safetensors")))
    return loaded, Origin(weights, "transformer", len(modules), len(modules), count, (), digest)


def check_weights(model: DiffusionModel, weights: str, *, what: str, partial: bool = False) -> None:
    """What `load_with_origin` would refuse about names and shapes, without loading: `model` may be an outline.

    A LoRA's own tensors are read, a whole transformer's configuration alone.
    """
    if find_lora(weights) is not None:
        match(read_lora(weights, model), unwrapped(model.transformer), allow_partial=partial)
    else:
        _check_whole(model, _find_transformer(weights, what), weights, what)


def _find_transformer(weights: str, what: str) -> Path:
    """The folder of a whole transformer, fetched where `weights` is a hub id."""
    path = Path(weights).expanduser()
    if not path.exists() and HUB_ID.fullmatch(weights):
        path = fetch(weights, ["transformer/*", "config.json", "diffusion_pytorch_model*"])
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{what}: {weights} is neither a LoRA nor a transformer folder (no config.json in {folder}); give a PEFT "
            f"folder, a LoRA file (in a hub repository: owner/name/FILE.safetensors), a transformer or pipeline folder"
        )
    return folder


def _check_whole(model: DiffusionModel, folder: Path, weights: str, what: str) -> None:
    """Hold a transformer's configuration against the base; that its weights fit it is seen when they are loaded."""
    kind: Any = type(model.transformer)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what}: {file} is damaged ({error}); fetch the transformer again") from None
    if name != kind.__name__:
        raise ValueError(
            f"{what}: {weights} holds a {name}, the base is a {kind.__name__}; student and teachers must share the "
            f"model's architecture"
        )
    try:
        with torch.device("meta"):
            outline = kind.from_config(config)
    except Exception as error:  # whatever a configuration of nonsense leads to
        raise ValueError(f"{what}: {file} is damaged ({one_line(error)}); fetch the transformer again") from None
    # Adapters that already sit on the base are no part of its architecture.
    base = model.transformer.state_dict()
    mine = {k.replace(".base_layer.", "."): v.shape for k, v in base.items() if ".lora_" not in k}
    theirs = {k: v.shape for k, v in outline.state_dict().items()}
    if mine != theirs:
        key = next(k for k in sorted({**mine, **theirs}) if mine.get(k) != theirs.get(k))
        raise ValueError(
            f"{what}: {weights} has {key} of shape {list(theirs.get(key, ()))}, the base {list(mine.get(key, ()))}; "
            f"student and teachers must share the model's architecture"
        )


def _check_files(model: DiffusionModel, folder: Path, what: str) -> None:
    """Raise ValueError for tensors that the base has no place for, which diffusers passes over, and for such as are no
    floating-point numbers, which it converts."""
    from safetensors import SafetensorError, safe_open

    known = {name.replace(".base_layer.", ".") for name in model.transformer.state_dict()}
    for file in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                dtypes = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{what}: {file} is damaged ({one_line(error)}); fetch the transformer again") from None
        for key, dtype in dtypes.items():
            if key not in known:
                raise ValueError(f"{what}: {file} holds {key}, which the base does not have; give its own transformer")
            if not dtype.startswith(("F", "BF")):
                raise ValueError(f"{what}: {key} in {file} is {dtype}, no floating-point number; fetch it again")
