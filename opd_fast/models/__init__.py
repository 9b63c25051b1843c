"""Model families.  To add one: a file with a DiffusionModel subclass, and a line in FAMILIES."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from opd_fast.models.base import DiffusionModel, TextEmbeds
from opd_fast.models.folder import read_index, resolve_pipeline
from opd_fast.models.sd3 import SD3

FAMILIES: dict[str, type[DiffusionModel]] = {"sd3": SD3}

__all__ = ["FAMILIES", "SD3", "DiffusionModel", "TextEmbeds", "load_model"]


def load_model(
    path: str | Path,
    family: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    max_sequence_length: int | None = None,
) -> DiffusionModel:
    """Load a model's frozen components onto ``device`` in ``dtype`` (the VAE stays float32).

    ``path``: a diffusers pipeline folder, a hub id, or "bundled".  ``family``: "auto" reads the pipeline class from
    model_index.json.  ``max_sequence_length``: T5 tokens; None takes 128 with a T5 encoder and 0 without.
    Raises ValueError, in one line that names the remedy, for anything missing, damaged or of another family.
    """
    if family == "auto":
        folder = resolve_pipeline(path)
        found = read_index(folder)["_class_name"]
        known = {model.pipeline_class: model for model in FAMILIES.values()}
        if found not in known:
            raise ValueError(
                f"{folder} holds a {found!r} pipeline; supported are "
                f"{', '.join(known)} (families {', '.join(FAMILIES)})"
            )
        model = known[found]
    elif family in FAMILIES:
        model = FAMILIES[family]
    else:
        guess = difflib.get_close_matches(family, FAMILIES, n=1, cutoff=0.4)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"unknown model family {family!r}; choose auto or one of {', '.join(FAMILIES)}{hint}")
    return model.load(path, device=device, dtype=dtype, max_sequence_length=max_sequence_length)
