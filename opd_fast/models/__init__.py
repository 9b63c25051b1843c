"""Model families.  To add one: a file with a DiffusionModel subclass, and a line in FAMILIES (docs/families.md)."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from opd_fast.models.base import DiffusionModel
from opd_fast.models.flux import Flux
from opd_fast.models.pipeline_folder import read_index, resolve_configs, resolve_pipeline
from opd_fast.models.qwen_image import QwenImage
from opd_fast.models.sd3 import SD3
from opd_fast.models.text import TextEmbeds
from opd_fast.models.z_image import ZImage

FAMILIES: dict[str, type[DiffusionModel]] = {"sd3": SD3, "flux": Flux, "qwen_image": QwenImage, "z_image": ZImage}

__all__ = ["FAMILIES", "SD3", "DiffusionModel", "TextEmbeds", "find_family", "load_model", "meta_model"]


def load_model(
    path: str | Path,
    family: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    max_sequence_length: int | None = None,
    text_device: torch.device | str | None = None,
    guidance_convention: Literal["pipeline", "linear"] = "pipeline",
) -> DiffusionModel:
    """Load a model's frozen components onto ``device`` in ``dtype`` (the VAE stays float32).

    ``path``: a diffusers pipeline folder, a hub id, or "bundled".  ``family``: see ``find_family``.
    ``max_sequence_length``: tokens of the family's long text encoder; None takes the family's own default.
    ``text_device``: of the text encoders; None takes ``device``.  ``guidance_convention``: what a guidance means
    (``DiffusionModel.strength``).
    Raises ValueError, in one line that names the remedy, for anything missing, damaged or of another family.
    """
    kind = find_family(family, lambda: resolve_pipeline(path))
    model = kind.load(path, device=device, dtype=dtype, max_sequence_length=max_sequence_length)
    with contextlib.suppress(ValueError):  # a family from elsewhere may have no pipeline folder
        model.folder = resolve_pipeline(path)
    model.text_device = None if text_device is None else torch.device(text_device)
    model.guidance_convention = guidance_convention
    return model


def meta_model(
    path: str | Path,
    family: str = "auto",
    *,
    dtype: torch.dtype,
    max_sequence_length: int | None = None,
    guidance_convention: Literal["pipeline", "linear"] = "pipeline",
) -> DiffusionModel:
    """The model of ``path`` without weights, from its configuration files; see ``DiffusionModel.meta``.

    Of a hub model that is not in the hub's cache only those files are fetched; for the models in ``assets/configs``
    the package has them.  Raises ValueError as ``load_model`` does.
    """
    folder = resolve_configs(path)
    kind = find_family(family, lambda: folder)
    model = kind.meta(folder, dtype=dtype, max_sequence_length=max_sequence_length)
    model.folder = folder
    model.guidance_convention = guidance_convention
    return model


def find_family(name: str, folder: Callable[[], Path]) -> type[DiffusionModel]:
    """The class of a family: by its name, by "package.module:Class" for one from elsewhere, or, for "auto", by the
    pipeline class in the model_index.json of ``folder()``.

    Raises ValueError for an unknown name, a class that is no family, or a pipeline that none of them serves.
    """
    if name == "auto":
        where = folder()
        found = read_index(where)["_class_name"]
        known = {model.pipeline_class: model for model in FAMILIES.values()}
        if found not in known:
            raise ValueError(
                f"{where} holds a {found!r} pipeline; supported are {', '.join(known)} (families "
                f"{', '.join(FAMILIES)}); for another, give model.family as package.module:Class"
            )
        return known[found]
    if name in FAMILIES:
        return FAMILIES[name]
    if ":" in name:
        return _imported(name)
    guess = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
    hint = f"; did you mean {guess[0]!r}?" if guess else ""
    raise ValueError(
        f"unknown model family {name!r}; choose auto, one of {', '.join(FAMILIES)}, or package.module:Class{hint}"
    )


def _imported(name: str) -> type[DiffusionModel]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model family {name} cannot be imported ({error}); check the path and the name") from None
    if not (isinstance(found, type) and issubclass(found, DiffusionModel)) or inspect.isabstract(found):
        raise ValueError(f"model family {name} is no complete subclass of opd_fast.models.DiffusionModel")
    return found
