"""Diffusers pipeline folders: finding them, and loading their components with errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from opd_fast.config.paths import ASSETS, resolve_source
from opd_fast.errors import one_line
from opd_fast.models.base import DiffusionModel
from opd_fast.models.weight_files import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    WeightFiles,
    check_quantization,
    check_state,
    find_weights,
    load_renamed,
    meta_network,
    read_json,
    shapes_of,
)

# Weights are read from safetensors only: the other formats can run code when they are opened.
_NEVER_READ = ["*.bin", "*.msgpack", "*.onnx*", "*.ckpt", "*.pt", "*.gguf"]
_VARIANTS = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*"]
_NOT_TOGETHER = "its weights and its config.json do not belong together: fetch the pipeline again"
_MODEL_TYPES = {
    "CLIPTextModel": "clip_text_model",
    "CLIPTextModelWithProjection": "clip_text_model",
    "T5EncoderModel": "t5",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3Model": "qwen3",
}
"""What the configuration of a class of transformers gives as its model type."""
_ENCODERS = ("text_encoder", "image_encoder")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")


def resolve_pipeline(path: str | Path, components: Sequence[str] = ()) -> Path:
    """The pipeline folder that ``path`` names: a folder, "bundled", or a hub id (fetched, or found in the hub's cache).

    ``components`` limits what is fetched from the hub (folder names; empty: model_index.json alone).
    Raises ValueError when there is no such folder.
    """
    source = resolve_source(path, "pipeline")
    folder = source.path
    if folder is None:
        fetched = fetch(source.repo, ["model_index.json", *(f"{name}/*" for name in components)])
        return fetch_variants(source.repo, fetched, components)
    if folder.is_dir():
        return folder
    if source.where == "package":
        raise ValueError(f"the bundled pipeline is not at {folder}; build it with: python -m opd_fast.worlds.build")
    if folder.exists():
        raise ValueError(f"model path {folder} is a file; give the pipeline's folder {_of_file(folder)}")
    raise ValueError(
        f"model path {path} does not exist; give a diffusers pipeline folder, a hub id (owner/name), or bundled"
    )


def _of_file(file: Path) -> str:
    """What to do about a file in a pipeline's place."""
    if file.suffix in (".safetensors", ".ckpt"):
        return (
            "(a single-file checkpoint is converted by from_single_file(FILE).save_pretrained(FOLDER) of the "
            "pipeline's class in diffusers)"
        )
    if file.suffix == ".gguf":
        return "of the model in bfloat16 or float16 (GGUF holds quantised weights, which are not read)"
    return "(the one with model_index.json)"


def fetch_variants(repo: str, folder: Path, components: Sequence[str]) -> Path:
    """``folder``, with the variants of those components that the hub has in no plain form fetched as well."""
    bare = [
        name
        for name in components
        if (folder / name / "config.json").is_file() and not any((folder / name).glob("*.safetensors"))
    ]
    return fetch(repo, [f"{name}/*.safetensors*" for name in bare], variants=True) if bare else folder


def resolve_configs(path: str | Path) -> Path:
    """As ``resolve_pipeline``, where only configuration files are wanted: nothing else of a hub model is fetched, and
    nothing at all where the package has its configuration.
    """
    repo = resolve_source(path, "pipeline").repo
    if not repo:
        return resolve_pipeline(path)
    shipped = ASSETS / "configs" / repo.replace("/", "--")
    if shipped.is_dir():
        return shipped
    return fetch(repo, ["model_index.json", "*/config.json", "scheduler/*", "tokenizer*/tokenizer_config.json"])


def fetch(repo: str, patterns: Sequence[str], *, variants: bool = False) -> Path:
    """The local folder of hub repository ``repo``, holding the files that match ``patterns``; weights in their variants
    (fp16 and the like) are left out unless ``variants`` asks for them.

    Fetched if a network is allowed, else taken from the hub's cache.  Raises ValueError if neither has it.
    """
    from huggingface_hub import constants, snapshot_download

    ignored = _NEVER_READ if variants else [*_NEVER_READ, *_VARIANTS]
    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=ignored))
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses, share no base
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{repo} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE forbids fetching it; "
                f"unset HF_HUB_OFFLINE, or run `hf download {repo}` where there is a network"
            ) from None
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{repo} is not a folder and could not be fetched from the hub ({cause[:200]}); check the "
            f"name, the network, and whether the model needs `hf auth login`"
        ) from None


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json, with at least ``_class_name``.  Raises ValueError if missing or damaged."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline: it has no model_index.json; {_instead(folder)}")
    index = read_json(file)
    named = index.get("_class_name")
    if isinstance(named, list):
        raise ValueError(
            f"{file} names a pipeline class of its own ({'.'.join(map(str, named))}), whose code is not run; give "
            f"model.family as package.module:Class, a family that knows it"
        )
    if not isinstance(named, str):
        raise ValueError(f"{file} is damaged (it names no _class_name); fetch the pipeline again")
    return index


def _instead(folder: Path) -> str:
    """What to give in place of a folder that is not a pipeline."""
    if (folder / "config.json").is_file():
        return "it holds one component alone: give the folder above, the pipeline's"
    if files := sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".ckpt", ".gguf")):
        return f"it holds {files[0]}: give the pipeline's folder {_of_file(folder / files[0])}"
    return "give the pipeline's top folder"


def check_index(folder: Path, family: type[DiffusionModel]) -> dict[str, Any]:
    """``read_index``, refusing a pipeline of another class than the family's."""
    index = read_index(folder)
    if index["_class_name"] != family.pipeline_class:
        raise ValueError(
            f"{folder} holds a {index['_class_name']!r} pipeline, family {family.name!r} needs "
            f"{family.pipeline_class}; use family auto, or name another folder"
        )
    return index


def check_components(folder: Path, index: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError for a component of ``names`` that model_index.json does not list."""
    for name in names:
        if has_component(index, name):
            continue
        entry, needs = index.get(name), f"which {index['_class_name']} needs"
        if isinstance(entry, list) and len(entry) == 2:
            raise ValueError(
                f"{folder}/model_index.json lists no {name!r}, {needs}: the pipeline was saved without it; take one "
                f"that was saved whole"
            )
        if entry is None and (folder / name).is_dir():
            raise ValueError(
                f"{folder}/model_index.json lists no {name!r}, {needs}, though its folder is there; add the line "
                f'"{name}": [LIBRARY, CLASS] to it, as in the published pipeline'
            )
        raise ValueError(f"{folder}/model_index.json lists no {name!r}, {needs}; fetch it again")


def check_present(folder: Path, classes: Mapping[str, str], *, weights: bool, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError for a component that has no configuration, is of another class than ``classes`` has, is
    quantised, or, with ``weights``, has no weights that fit.  Only configurations and the files' headers are read.  The
    package's own configurations leave the text encoders out.

    ``classes``: diffusers' or transformers' class of each component but the scheduler.  ``dtype``: that the model will
    have.
    """
    if folder.parent == ASSETS / "configs":
        return
    for name in (*classes, "scheduler"):
        where = folder / name
        if not where.is_dir() or not any(where.iterdir()):
            raise ValueError(f"pipeline {folder} lacks its component {name!r}; fetch the pipeline again")
        read_config(folder, name)
        if name.startswith(("scheduler", "tokenizer")):
            continue
        _check_kind(where, _MODEL_TYPES.get(classes[name], classes[name]))
        if not weights:
            continue
        if name.startswith(_ENCODERS):  # transformers renames some tensors as it loads them
            _find(where, dtype).header()
        else:
            _check_weights(where, classes[name], torch.float32 if name == "vae" else dtype)


def _called(where: Path) -> str:
    return f"component {where.name!r} in {where}"


def _check_kind(where: Path, kind: str) -> None:
    """Raise ValueError for a network that is quantised, or of another class or model type than ``kind``."""
    config = read_json(where / "config.json")
    frozen = where.name.startswith(_ENCODERS)
    check_quantization(config, _called(where), frozen=frozen)
    found = config.get("model_type" if frozen else "_class_name")
    if found is None or found == kind:
        return
    if frozen and (kind.startswith(str(found)) or str(found).startswith(kind)):  # clip and clip_text_model
        return
    raise ValueError(
        f"{_called(where)} is a {found}, and this family needs a {kind}; take the component of the family's own "
        f"pipeline, or give model.family as package.module:Class where the class is one of yours"
    )


def _find(where: Path, dtype: torch.dtype | None) -> WeightFiles:
    stem = TRANSFORMERS_STEM if where.name.startswith(_ENCODERS) else DIFFUSERS_STEM
    return find_weights(where, _called(where), dtype, stem)


def _check_weights(where: Path, kind: str, dtype: torch.dtype | None) -> tuple[WeightFiles, dict[str, str]]:
    """The weights of a network of diffusers, and the network's name of each tensor. Raises ValueError for weights that
    cannot be read, of which a part is missing, or that do not fit the configuration.
    """
    import diffusers

    files = _find(where, dtype)
    header = files.header()
    if where.name == "vae" and any(".query." in key or ".proj_attn." in key for key in header):
        return files, {}  # names of old autoencoders, which diffusers itself renames
    known = shapes_of(meta_network(getattr(diffusers, kind), read_json(where / "config.json"), _called(where)))
    return files, check_state(header, known, _called(where), _NOT_TOGETHER, exact=where.name == "transformer")


def read_config(folder: Path, name: str) -> SimpleNamespace:
    """What stands for component ``name`` in a meta model: its configuration file, as ``.config.KEY``."""
    for file in _CONFIGS:
        if (folder / name / file).is_file():
            return SimpleNamespace(config=SimpleNamespace(**read_json(folder / name / file)))
    raise ValueError(f"pipeline {folder} lacks the configuration of its component {name!r}; fetch the pipeline again")


def has_component(index: dict[str, Any], name: str) -> bool:
    """Whether model_index.json lists ``name`` with a class ([null, null] stands for an absent optional component)."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def load_transformer(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a pipeline's transformer, on the CPU and in ``dtype``. Raises ValueError naming the folder and the remedy.

    Every weight must be there and have its place: a configuration that cuts layers off is refused. The weights' names
    may be those that a wrapper gave them.
    """
    where = folder / "transformer"
    files, names = _check_weights(where, cls.__name__, dtype)
    return load_renamed(cls, read_json(where / "config.json"), files.files, names, dtype)


def load_component(cls: Any, folder: Path, name: str, **options: Any) -> Any:
    """Load a component by ``cls.from_pretrained(folder/name)``. Raises ValueError naming the folder and the remedy.

    Classes with weights must find every one of them: diffusers and transformers fill a missing weight with random
    numbers and go on, which would distil noise.  Weights that have no place are left out: text encoders often come with
    a head that is not used.  ``find_weights`` chooses among variants.
    """
    where = folder / name
    weighted = hasattr(cls, "forward")
    if weighted:
        variant = _find(where, options.get("torch_dtype", options.get("dtype"))).variant
        options |= {"output_loading_info": True, "use_safetensors": True, "variant": variant}
    try:
        loaded = cls.from_pretrained(where, local_files_only=True, **options)
    except Exception as error:  # safetensors, json, size mismatches, OSError: whatever it is, the folder is the cause
        raise ValueError(
            f"{_called(where)} cannot be loaded ({type(error).__name__}: {one_line(error)[:200]}); the files are "
            f"damaged or of another model: fetch the pipeline again"
        ) from None
    if not weighted:
        return loaded
    component, report = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := [str(key) for key in report.get(kind) or ()]:
            raise ValueError(
                f"{_called(where)} has {len(keys)} {kind.replace('_', ' ')}, e.g. {min(keys)}; {_NOT_TOGETHER}"
            )
    return component.eval().requires_grad_(False)
