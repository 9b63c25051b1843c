"""Transformers by whatever name a user has for them: nothing, a LoRA, a transformer or pipeline folder, a hub id."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from opd_fast.adapters import plain_copy
from opd_fast.lora import find_lora, merge_into, read_lora
from opd_fast.models.base import DiffusionModel
from opd_fast.models.folder import fetch, load_component


def load_transformer(model: DiffusionModel, weights: str | None, *, what: str) -> nn.Module:
    """A frozen transformer of its own, in the model's dtype: the base with a LoRA merged, or loaded whole.

    `weights` None gives a copy of the base. `what` names the setting in errors. Raises
    ValueError where the weights are missing, damaged, or of another shape than the base.
    """
    if weights is None:
        return plain_copy(model.transformer)
    if find_lora(weights) is not None:
        lora = read_lora(weights)
        transformer = plain_copy(model.transformer)
        merge_into(transformer, lora)
        return transformer
    path = Path(weights).expanduser()
    if not path.exists() and len(weights.split("/")) == 2:
        path = fetch(weights, ["transformer/*", "config.json", "*.safetensors"])
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{what}: {weights} is neither a LoRA nor a transformer folder (no config.json in {folder}); give a PEFT "
            f"folder, a diffusers LoRA file, or a transformer or pipeline folder"
        )
    kind = type(model.transformer)
    transformer = load_component(kind, folder.parent, folder.name, torch_dtype=model.dtype).to(model.device)
    # Adapters that already sit on the base are no part of its architecture.
    base = model.transformer.state_dict()
    mine = {k.replace(".base_layer.", "."): v.shape for k, v in base.items() if ".lora_" not in k}
    theirs = {k: v.shape for k, v in transformer.state_dict().items()}
    if mine != theirs:
        key = next(k for k in sorted({**mine, **theirs}) if mine.get(k) != theirs.get(k))
        raise ValueError(
            f"{what}: {weights} has {key} of shape {list(theirs.get(key, ()))}, the base {list(mine.get(key, ()))}; "
            f"student and teachers must share the model's architecture"
        )
    loaded: nn.Module = transformer
    return loaded
