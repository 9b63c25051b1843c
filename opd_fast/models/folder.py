"""Diffusers pipeline folders: finding them, and loading their components with errors that say what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from opd_fast.models.base import ASSETS, DiffusionModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights are read from safetensors only: the other formats can run code when they are opened.
_NOT_NEEDED = ["*.bin", "*.msgpack", "*.onnx*", "*.ckpt", "*.pt", "*.gguf", "*.fp16.*", "*.fp16-*", "*.non_ema.*"]
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")


def resolve_pipeline(path: str | Path, components: Sequence[str] = ()) -> Path:
    """The pipeline folder that ``path`` names: a folder, "bundled", or a hub id (fetched, or found in the hub's cache).

    ``components`` limits what is fetched from the hub (folder names; empty: model_index.json alone).
    Raises ValueError when there is no such folder.
    """
    if str(path) == "bundled":
        folder = ASSETS / "pipeline"
        if not folder.is_dir():
            raise ValueError(f"the bundled pipeline is not at {folder}; build it with: python -m opd_fast.worlds.build")
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model path {folder} is a file; give the pipeline's folder (the one with model_index.json)")
    if HUB_ID.fullmatch(str(path)):
        return fetch(str(path), ["model_index.json", *(f"{name}/*" for name in components)])
    raise ValueError(
        f"model path {path} does not exist; give a diffusers pipeline folder, a hub id (owner/name), or bundled"
    )


def resolve_configs(path: str | Path) -> Path:
    """As ``resolve_pipeline``, where only configuration files are wanted; of a hub model nothing else is fetched, and
    nothing at all where the package has its configuration.
    """
    if not HUB_ID.fullmatch(str(path)) or Path(path).expanduser().exists():
        return resolve_pipeline(path)
    shipped = ASSETS / "configs" / str(path).replace("/", "--")
    if shipped.is_dir():
        return shipped
    return fetch(str(path), ["model_index.json", "*/config.json", "scheduler/*", "tokenizer*/tokenizer_config.json"])


def fetch(repo: str, patterns: Sequence[str]) -> Path:
    """The local folder of hub repository ``repo``, holding the files that match ``patterns``.

    Fetched if a network is allowed, else taken from the hub's cache.  Raises ValueError if neither has it.
    """
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), ignore_patterns=_NOT_NEEDED))
    except Exception as error:  # the hub's own errors, and those of whatever HTTP library it uses, share no base
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{repo} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE forbids fetching it; "
                f"unset HF_HUB_OFFLINE, or run `hf download {repo}` where there is a network"
            ) from None
        raise ValueError(
            f"{repo} is not a folder and could not be fetched from the hub ({_first_line(error)}); check the "
            f"name, the network, and whether the model needs `hf auth login`"
        ) from None


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json, with at least ``_class_name``.  Raises ValueError if missing or damaged."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no diffusers pipeline: it has no model_index.json; give the pipeline's top folder"
        )
    index = _read_json(file)
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{file} is damaged (it names no _class_name); fetch the pipeline again")
    return index


def check_index(folder: Path, family: type[DiffusionModel]) -> dict[str, Any]:
    """``read_index``, refusing a pipeline of another class than the family's."""
    index = read_index(folder)
    if index["_class_name"] != family.pipeline_class:
        raise ValueError(
            f"{folder} holds a {index['_class_name']!r} pipeline, family {family.name!r} needs "
            f"{family.pipeline_class}; use family auto, or name another folder"
        )
    return index


def check_components(folder: Path, index: dict[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError for a component of ``names`` that model_index.json does not list."""
    for name in names:
        if not has_component(index, name):
            raise ValueError(
                f"{folder}/model_index.json lists no {name!r}, which {index['_class_name']} needs; fetch it again"
            )


def check_present(folder: Path, names: Sequence[str], *, weights: bool) -> None:
    """Raise ValueError for a component without its configuration or, asked for ``weights``, without these: what is not
    there is named before anything large is read.  The package's own configurations leave the text encoders out.
    """
    if folder.parent == ASSETS / "configs":
        return
    for name in names:
        where = folder / name
        if not where.is_dir() or not any(where.iterdir()):
            raise ValueError(f"pipeline {folder} lacks its component {name!r}; fetch the pipeline again")
        if not any((where / file).is_file() for file in _CONFIGS):
            raise ValueError(
                f"pipeline {folder} lacks the configuration of its component {name!r}; fetch the pipeline again"
            )
        if weights and not name.startswith(("scheduler", "tokenizer")):
            _check_weights(where, name)


def _check_weights(where: Path, name: str) -> None:
    """Raise ValueError for a network's folder without weights, or without a shard of them."""
    if not any(where.glob("*.safetensors")):
        raise ValueError(
            f"component {name!r} in {where} has no weights in safetensors, the one format that is read; fetch the "
            f"pipeline again"
        )
    for index in where.glob("*.safetensors.index.json"):
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{index} is damaged (it has no weight_map); fetch the pipeline again")
        absent = sorted(shard for shard in set(shards.values()) if not (where / str(shard)).is_file())
        if absent:
            raise ValueError(f"component {name!r} in {where} lacks {absent[0]}; fetch the pipeline again")


def read_config(folder: Path, name: str) -> SimpleNamespace:
    """What stands for component ``name`` in an outline: its configuration file, as ``.config.KEY``."""
    for file in _CONFIGS:
        if (folder / name / file).is_file():
            return SimpleNamespace(config=SimpleNamespace(**_read_json(folder / name / file)))
    raise ValueError(f"pipeline {folder} lacks the configuration of its component {name!r}; fetch the pipeline again")


def meta_transformer(folder: Path, ours: type | None = None) -> nn.Module:
    """The pipeline's transformer without weights: shapes and names only.

    ``ours``: a family's own form of the class, in place of diffusers' of that name.
    """
    import diffusers

    config = _read_json(folder / "transformer" / "config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if ours is not None and ours.__name__ == config.get("_class_name"):
        kind = ours
    if kind is None:
        raise ValueError(
            f"{folder}/transformer/config.json names the class {config.get('_class_name')}, which diffusers does not "
            f"have; update diffusers, or fetch the pipeline again"
        )
    try:
        with torch.device("meta"):
            transformer: nn.Module = kind.from_config(config)
    except Exception as error:  # whatever a configuration of nonsense leads to
        raise ValueError(
            f"component 'transformer' in {folder}/transformer cannot be made ({type(error).__name__}: "
            f"{_first_line(error)}); its config.json is damaged: fetch the pipeline again"
        ) from None
    return transformer.eval().requires_grad_(False)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({_first_line(error)}); fetch the pipeline again") from None
    except ValueError as error:  # includes JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{file} is damaged ({_first_line(error)}); fetch the pipeline again") from None
    return found


def has_component(index: dict[str, Any], name: str) -> bool:
    """Whether model_index.json lists ``name`` with a class ([null, null] stands for an absent optional component)."""
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def load_component(cls: Any, folder: Path, name: str, *, exact: bool = False, **options: Any) -> Any:
    """``cls.from_pretrained(folder/name)``: the component, or ValueError naming the folder and the remedy.

    Classes with weights must find every one of them: diffusers and transformers fill a missing weight with random
    numbers and go on, which would distil noise.  ``exact`` also refuses weights that the component has no place for,
    as of layers that its configuration cuts off; text encoders often come with such, of a head that is not used.
    """
    where = folder / name
    if not where.is_dir() or not any(where.iterdir()):
        raise ValueError(f"pipeline {folder} lacks its component {name!r}; fetch the pipeline again")
    weighted = hasattr(cls, "forward")
    if weighted:
        options = {"output_loading_info": True, "use_safetensors": True, **options}
    try:
        loaded = cls.from_pretrained(where, local_files_only=True, **options)
    except Exception as error:  # safetensors, json, size mismatches, OSError: whatever it is, the folder is the cause
        raise ValueError(
            f"component {name!r} in {where} cannot be loaded ({type(error).__name__}: {_first_line(error)}); the files "
            f"are damaged or of another model: fetch the pipeline again"
        ) from None
    if not weighted:
        return loaded
    component, report = loaded
    for kind in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if exact else [])):
        if report.get(kind):
            keys = [str(key) for key in report[kind]]
            raise ValueError(
                f"component {name!r} in {where} has {len(keys)} {kind.replace('_', ' ')}, e.g. {min(keys)}; its "
                f"weights and its config.json do not belong together: fetch the pipeline again"
            )
    return component.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
