"""Transformers by whatever name a user has for them: nothing, a LoRA, a transformer or pipeline folder, a file of all
its weights, a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from opd_fast.config.paths import resolve_source
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import plain_copy, unwrapped
from opd_fast.models.lora.files import LoraWeights, find_lora, match, merge_into, read_lora, sha256
from opd_fast.models.pipeline_folder import fetch, fetch_variants
from opd_fast.models.weight_files import (
    DIFFUSERS_STEM,
    SAVE_AGAIN,
    Header,
    check_quantization,
    check_state,
    find_weights,
    load_renamed,
    meta_network,
    network_keys,
    read_header,
    read_json,
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
    place, config, files, keys = _check_whole(model, weights, what)
    loaded = load_renamed(type(model.transformer), config, files, keys, model.dtype).to(model.device)
    for name, tensor in loaded.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{what}: {name} of {weights} has NaN or infinite values; take another checkpoint")
    changed = [name for name, m in loaded.named_modules() if any(True for _ in m.parameters(recurse=False))]
    digest = sha256(*sorted(place.glob("*.safetensors"))) if place.is_dir() else sha256(place)
    return loaded, WeightsSource(
        weights, "transformer", len(changed), len(changed), len(loaded.state_dict()), (), digest
    )


def check_weights(model: DiffusionModel, weights: str, *, what: str, partial: bool = False) -> None:
    """What `load_with_source` would refuse about names and shapes, without loading: `model` may be a meta model.

    A LoRA's own tensors are read; of a whole transformer only its configuration and its files' headers are.
    """
    if find_lora(weights) is not None:
        match(read_lora(weights, model), unwrapped(model.transformer), allow_partial=partial)
    else:
        _check_whole(model, weights, what)


def _check_whole(
    model: DiffusionModel, weights: str, what: str
) -> tuple[Path, dict[str, Any], tuple[Path, ...], dict[str, str]]:
    """Compare a whole transformer with the base by its configuration and its files' headers.

    Returns its folder or file, its configuration (the base's for a file), the files of its weights, and the base's name
    of each tensor.
    """
    try:
        place = _find_transformer(weights)
        if place.is_file():
            config: dict[str, Any] = dict(model.transformer.config)  # type: ignore[arg-type]
            return place, config, (place,), _check_header(model, read_header(place, weights), place)
        called = f"the transformer in {place}"
        config = read_json(place / "config.json")
        _check_config(model, config, weights, called)
        files = find_weights(place, called, model.dtype)
        return place, config, files.files, _check_header(model, files.header(), place)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _find_transformer(weights: str) -> Path:
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
        raise ValueError(f"{weights} {unread}, which is not read; {SAVE_AGAIN}")
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        loose = sorted(file.name for file in folder.glob("*.safetensors")) if folder.is_dir() else []
        instead = f"; it holds {loose[0]}: name that file" if len(loose) == 1 else ""
        raise ValueError(
            f"{weights} is neither a LoRA nor a transformer folder (no config.json in {folder}){instead}; give "
            f"a PEFT folder, a LoRA file (in a hub repository: owner/name/FILE.safetensors), a transformer or pipeline "
            f"folder"
        )
    return folder


def _check_config(model: DiffusionModel, config: dict[str, Any], weights: str, called: str) -> None:
    """Raise ValueError for a configuration of another architecture than the base's."""
    kind: Any = type(model.transformer)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(
            f"{weights} holds a {config.get('_class_name')}, the base is a {kind.__name__}; student and teachers must "
            f"share the model's architecture"
        )
    check_quantization(config, called, frozen=False)
    base, theirs = shapes_of(model.transformer), shapes_of(meta_network(kind, config, called))
    for key in sorted({**base, **theirs}):
        if base.get(key) != theirs.get(key):
            raise ValueError(
                f"{weights} has {key} of shape {list(theirs.get(key, ()))}, the base {list(base.get(key, ()))}; "
                f"student and teachers must share the model's architecture"
            )


def _check_header(model: DiffusionModel, header: Header, place: Path) -> dict[str, str]:
    """Compare tensors' names, shapes and dtypes with the base's. Returns the base's name of each."""
    known = shapes_of(model.transformer)
    unknown = sorted(
        key for key, name in network_keys(header, known).items() if name not in known and ".lora_" not in key
    )
    kind = type(model.transformer).__name__
    if len(unknown) > len(header) / 2:
        raise ValueError(
            f"{place} has none of the names of a {kind}, e.g. {unknown[0]}; convert a checkpoint in its original "
            f"layout by {kind}.from_single_file(FILE).save_pretrained(FOLDER), or take one of the base's kind"
        )
    remedy = "give a transformer of the base's own architecture"
    if unknown and ".base_layer." not in unknown[0]:
        raise ValueError(f"{place} holds {unknown[0]}, which the base does not have; {remedy}")
    return check_state(header, known, str(place), remedy)
