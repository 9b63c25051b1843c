"""The averaged student as files: a LoRA in PEFT's and diffusers' layouts, or a transformer folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from opd_fast.distributed.world import full_tensor
from opd_fast.files import open_to_umask
from opd_fast.models.lora.adapters import factors_by_module
from opd_fast.models.lora.files import save_lora
from opd_fast.training.student import ADAPTER, Student


def student_writer(student: Student) -> Callable[[Path], object]:
    """Copy the averaged student as it is now to the CPU. Collective; rank 0 alone holds the copy and may write.

    Returns a function that writes it to a directory, at any later time and in any thread.
    """
    average = {}
    for (name, _), values in zip(student.named_parameters(), student.ema.values, strict=True):
        full = full_tensor(values)
        if student.world.is_main:
            average[name] = full.cpu().clone()
    if student.config.kind == "lora":
        factors, config = factors_by_module(average, ADAPTER), student.config
        return partial(save_lora, tensors=factors, rank=config.rank, alpha=config.alpha, base_model=student.model.path)
    # Now, not when it is written: taking a state dict shards again whatever is gathered.
    trained, state = dict(student.named_parameters()), student.transformer.state_dict()
    frozen = {name: tensor.cpu().clone() for name, tensor in state.items() if name not in trained}
    return partial(_write_full, student, {**frozen, **average})


def _write_full(student: Student, state: dict[str, Tensor], directory: Path) -> None:
    with torch.device("meta"):
        transformer = cast(Any, student.transformer_class).from_config(student.transformer.config)
    transformer.load_state_dict(state, assign=True)
    transformer.save_pretrained(directory / "transformer")
    open_to_umask(*(directory / "transformer").iterdir())
