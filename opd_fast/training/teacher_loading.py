"""Loading the teachers: their weights are found, checked and put where their bank wants them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from opd_fast.config import TeacherConfig
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import add_frozen
from opd_fast.models.lora.files import find_lora, read_lora
from opd_fast.models.lora.load import WeightsSource, check_weights, load_with_source
from opd_fast.training.teachers import BASE, MergedTeachers, SharedTeachers, Teacher, TeacherBank

Placement = Literal["merged", "shared"]


def load_teachers(
    model: DiffusionModel, configs: Sequence[TeacherConfig], placement: Placement = "merged", *, offload: bool = False
) -> TeacherBank:
    """Load and check every teacher; `offload` keeps merged ones in CPU memory, their blocks on the GPU while asked.

    Raises ValueError, naming the teacher, for weights that are missing, damaged, not finite or of another shape, for a
    LoRA of which only a part fits unless the teacher is `partial`, and for weights under `shared` that are not a LoRA.
    """
    teachers, offload = [], offload and placement == "merged"
    for config in configs:
        adapter = None
        with _naming(config):
            if placement == "shared":
                _need_lora(config)
                adapter = f"teacher_{config.name}".replace(".", "_")
                lora = read_lora(config.weights, model)
                modules = add_frozen(model.transformer, adapter, lora, allow_partial=config.partial)
                transformer, source = model.transformer, WeightsSource.of_lora(config.weights, lora, modules)
            else:
                transformer, source = load_with_source(model, config.weights, what="weights", partial=config.partial)
                if offload:
                    transformer.enable_group_offload(  # type: ignore[operator]
                        onload_device=model.device,
                        offload_device=torch.device("cpu"),
                        offload_type="block_level",
                        num_blocks_per_group=1,
                        use_stream=model.device.type == "cuda",
                    )
                else:
                    transformer.to(model.device)
        teachers.append(Teacher(config.name, config.guidance, transformer, adapter, source, config.weight))
    if placement == "shared":
        return SharedTeachers(model, teachers)
    return MergedTeachers(model, teachers, offloaded=offload)


def base_teacher(model: DiffusionModel, guidance: float | None) -> TeacherBank:
    """A bank of one: the base itself, whatever adapters sit on it. It takes no memory of its own."""
    source = WeightsSource(BASE, "transformer", 0, 0, 0, (), "")
    return SharedTeachers(model, [Teacher(BASE, guidance, model.transformer, BASE, source)])


def check_teachers(meta: DiffusionModel, configs: Sequence[TeacherConfig], placement: Placement = "merged") -> None:
    """Raise what `load_teachers` would for names and shapes, on a model without weights."""
    for config in configs:
        with _naming(config):
            if placement == "shared":
                _need_lora(config)
            check_weights(meta, config.weights, what="weights", partial=config.partial)


@contextlib.contextmanager
def _naming(config: TeacherConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"teacher {config.name!r}: {error}") from error


def _need_lora(config: TeacherConfig) -> None:
    if find_lora(config.weights) is None:
        raise ValueError(
            f"{config.weights} is not a LoRA, and engine.placement shared keeps teachers as adapters; use merged"
        )
