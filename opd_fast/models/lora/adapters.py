"""Several LoRAs on one transformer, by PEFT's layers: put one in, switch between them."""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from opd_fast.models.lora.files import LoraWeights, match

T = TypeVar("T")


def injected(transformer: nn.Module) -> tuple[str, ...]:
    """The adapters on the transformer, in the order in which they were put there."""
    return tuple(getattr(transformer, "peft_config", None) or ())


@contextlib.contextmanager
def use_adapter(transformer: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """Within the block `name` is the one active adapter of the transformer (None: none is), then what was before.

    PEFT's own `set_adapter` also flips requires_grad of every adapter, which would freeze the student between steps.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = layer._active_adapter if name is None else [name]
    try:
        yield transformer
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def add_frozen(transformer: nn.Module, name: str, lora: LoraWeights, *, allow_partial: bool = False) -> list[str]:
    """Put `lora` on the transformer as the frozen adapter `name`, in float32, beside those already there.

    Returns the changed modules. Raises ValueError where it does not fit (see `lora.match`).
    """
    from peft import LoraConfig

    modules = match(lora, unwrapped(transformer), allow_partial=allow_partial)
    # One expression of whole names: in a list, PEFT takes `proj_out` for the ending of every block's proj_out too.
    targets = "|".join(re.escape(module) for module in modules)
    ranks = {f"^{re.escape(module)}": lora.tensors[module][0].shape[0] for module in modules}
    settings = LoraConfig(r=max(ranks.values()), rank_pattern=ranks, target_modules=targets, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        transformer.add_adapter(settings, adapter_name=name)  # type: ignore[operator]
    with torch.no_grad():
        for module in modules:
            halves = lora.tensors[module]
            layer = transformer.get_submodule(module)
            layer.scaling[name] = lora.scale[module]  # type: ignore[operator, index]
            for kind, value in zip(("lora_A", "lora_B"), halves, strict=True):
                weight = getattr(layer, kind)[name].weight
                weight.data = value.to(weight.device, torch.float32)
                weight.requires_grad_(False)
    return modules


def factors_by_module(tensors: Mapping[str, T], adapter: str) -> dict[str, tuple[T, T]]:
    """A and B of an adapter by module, of tensors by their PEFT names."""
    suffix = f".lora_A.{adapter}.weight"
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {m: (tensors[m + suffix], tensors[m + suffix.replace("lora_A", "lora_B")]) for m in modules}


def plain_copy(transformer: nn.Module) -> nn.Module:
    """A copy of the frozen weights alone, whatever adapters sit on the original."""
    duplicate = copy.deepcopy(transformer)
    if getattr(duplicate, "peft_config", None):
        duplicate.unload_lora()  # type: ignore[operator]
    return duplicate.requires_grad_(False)


class _Renamed(nn.Module):
    """Modules under the names that they had before any were wrapped."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self._named = modules

    def named_modules(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Module]]:
        yield from self._named.items()


def unwrapped(transformer: nn.Module) -> nn.Module:
    """The transformer as a LoRA file names it, where PEFT's layers stand for the ones they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = transformer.named_modules()
    return _Renamed({n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in layers})
