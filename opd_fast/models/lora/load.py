"""Transformers by whatever name a user has for them: nothing, a LoRA, a transformer or pipeline folder, a file of all
its weights, a hub id."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opd_fast.config.paths import resolve_source
from opd_fast.errors import one_line
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import plain_copy, unwrapped
from opd_fast.models.lora.files import LoraWeights, find_lora, match, merge_into, read_lora, sha256
from opd_fast.models.pipeline_folder import fetch, fetch_variants, load_component
from opd_fast.models.weight_files import (
    DIFFUSERS_STEM,
    SAVE_AGAIN,
    Header,
    check_quantization,
    check_state,
    find_weights,
    load_renamed,
    network_keys,
    read_header,
    shapes_of,
)

_FORMATS = {
    "peft": "PEFT LoRA",
    "diffusers": "diffusers LoRA",
    "kohya": "kohya LoRA",
    "converted": "LoRA converted by diffusers",
    "transformer": "whole transformer",
}


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from, and what was taken from there.  ``sha256`` identifies their files."""

    name: str
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
    """What was left out of the files, beside modules that the model does not have."""

    @classmethod
    def of_lora(cls, source: str, lora: LoraWeights, modules: list[str]) -> WeightsSource:
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
    """Load a frozen transformer of its own, in the model's dtype: the base with a LoRA merged, or all of its weights.

    `weights` None gives a copy of the base. `what` names the setting in errors. Raises ValueError where the weights are
    missing, damaged, or of another shape than the base.
    """
    return plain_copy(model.transformer) if weights is None else load_with_source(model, weights, what=what)[0]


def load_with_source(
    model: DiffusionModel, weights: str, *, what: str, partial: bool = False
) -> tuple[nn.Module, WeightsSource]:
    """As `load_transformer`, and where it came from; `partial` takes a LoRA of which only some modules exist."""
    if find_lora(weights) is not None:
        lora = read_lora(weights, model)
        match(lora, unwrapped(model.transformer), allow_partial=partial)  # before the copy
        transformer = plain_copy(model.transformer)
        modules = merge_into(transformer, lora, allow_partial=partial)
        return transformer, WeightsSource.of_lora(weights, lora, modules)
    place = _find_transformer(weights, what)
    keys = _check_whole(model, place, weights, what)
    kind: Any = type(model.transformer)
    if place.is_file():
        config = dict(model.transformer.config)  # type: ignore[arg-type]
        loaded = load_renamed(kind, config, [place], keys, model.dtype)
        digest = sha256(place)
    else:
        loaded = load_component(kind, place.parent, place.name, exact=True, torch_dtype=model.dtype)
        digest = sha256(*sorted(place.glob("*.safetensors")))
    loaded = loaded.to(model.device)
    for name, tensor in loaded.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}: {name} of {weights} has NaN or infinite values; take another checkpoint")
    modules = [name for name, m in loaded.named_modules() if any(True for _ in m.parameters(recurse=False))]
    count = len(loaded.state_dict())
    return loaded, WeightsSource(weights, "transformer", len(modules), len(modules), count, (), digest)


def check_weights(model: DiffusionModel, weights: str, *, what: str, partial: bool = False) -> None:
    """What `load_with_source` would refuse about names and shapes, without loading: `model` may be a meta model.

    A LoRA's own tensors are read; of a whole transformer only its configuration and its files' headers are.
    """
    if find_lora(weights) is not None:
        match(read_lora(weights, model), unwrapped(model.transformer), allow_partial=partial)
    else:
        _check_whole(model, _find_transformer(weights, what), weights, what)


def _find_transformer(weights: str, what: str) -> Path:
    """The folder of a whole transformer, or the file of its weights; fetched where `weights` names the hub's."""
    source = resolve_source(weights, "teachers")
    path = Path(weights) if source.path is None else source.path
    if source.repo and not source.inside:
        path = fetch(source.repo, ["transformer/*", "config.json", "diffusion_pytorch_model*"])
        path = fetch_variants(source.repo, path, ["transformer"])
        if (path / "config.json").is_file() and not any(path.glob(f"{DIFFUSERS_STEM}*.safetensors")):
            path = fetch(source.repo, [f"{DIFFUSERS_STEM}*"], variants=True)  # a transformer's own repository
    elif source.inside.endswith(".safetensors"):
        path = fetch(source.repo, [source.inside]) / source.inside
    if path.is_file():
        if path.suffix == ".safetensors":
            return path
        unread = "holds GGUF's quantised weights" if path.suffix == ".gguf" else "is not a safetensors file"
        raise ValueError(f"{what}: {weights} {unread}, which is not read; {SAVE_AGAIN}")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        loose = sorted(file.name for file in folder.glob("*.safetensors")) if folder.is_dir() else []
        instead = f"; it holds {loose[0]}: name that file" if len(loose) == 1 else ""
        raise ValueError(
            f"{what}: {weights} is neither a LoRA nor a transformer folder (no config.json in {folder}){instead}; give "
            f"a PEFT folder, a LoRA file (in a hub repository: owner/name/FILE.safetensors), a transformer or pipeline "
            f"folder"
        )
    return folder


def _check_whole(model: DiffusionModel, place: Path, weights: str, what: str) -> dict[str, str]:
    """Compare a transformer's configuration and its files' headers with the base. Returns the base's names."""
    base = shapes_of(model.transformer)
    if place.is_file():
        return _check_header(model, read_header(place, f"{what}: {weights}"), place, what)
    file = place / "config.json"
    kind: Any = type(model.transformer)
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
    check_quantization(config, f"{what}: the transformer in {place}", frozen=False)
    try:
        with torch.device("meta"):
            meta = kind.from_config(config)
    except Exception as error:  # whatever a configuration of nonsense leads to
        raise ValueError(f"{what}: {file} is damaged ({one_line(error)}); fetch the transformer again") from None
    theirs = shapes_of(meta)
    if base != theirs:
        key = next(k for k in sorted({**base, **theirs}) if base.get(k) != theirs.get(k))
        raise ValueError(
            f"{what}: {weights} has {key} of shape {list(theirs.get(key, ()))}, the base {list(base.get(key, ()))}; "
            f"student and teachers must share the model's architecture"
        )
    files = find_weights(place, f"{what}: the transformer in {place}", model.dtype, DIFFUSERS_STEM)
    return _check_header(model, files.header(), place, what)


def _check_header(model: DiffusionModel, header: Header, place: Path, what: str) -> dict[str, str]:
    """Compare tensors' names, shapes and dtypes with the base's. Returns the base's name of each."""
    known = shapes_of(model.transformer)
    unknown = sorted(
        key for key, name in network_keys(header, known).items() if name not in known and ".lora_" not in key
    )
    kind = type(model.transformer).__name__
    if len(unknown) > len(header) / 2:
        raise ValueError(
            f"{what}: {place} has none of the names of a {kind}, e.g. {unknown[0]}; convert a checkpoint in its "
            f"original layout by {kind}.from_single_file(FILE).save_pretrained(FOLDER), or take one of the base's kind"
        )
    remedy = "give a transformer of the base's own architecture"
    if unknown and ".base_layer." not in unknown[0]:
        raise ValueError(f"{what}: {place} holds {unknown[0]}, which the base does not have; {remedy}")
    return check_state(header, known, f"{what}: {place}", remedy)
