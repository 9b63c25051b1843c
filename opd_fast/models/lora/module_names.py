"""Module names as trainers write them into files, brought back to the names of the transformer's own modules.

A name may carry the segments of wrappers (torch.compile, activation checkpointing, FSDP, DDP), the prefix of a layout,
and underscores for dots. All of that is taken off before a name is compared with the model, so that how a file was
saved never makes it look like another model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "transformer."
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module", "_forward_module")
"""Segments that torch.compile, activation checkpointing, FSDP, fairscale and Lightning put into a name."""
DATA_PARALLEL = "module"
"""The segment of DDP, DataParallel and DeepSpeed."""
_DOTTED = (PEFT_PREFIX, "model.diffusion_model.", "diffusion_model.", DIFFUSERS_PREFIX)
_KOHYA = "lora_unet_"
UNDERSCORED = (_KOHYA, "lora_transformer_", "lora_dit_", "lycoris_")
"""Prefixes of names in which underscores stand for dots: those of kohya, OneTrainer, sd-scripts, LyCORIS."""


class ModuleNames:
    """The names of a transformer's modules (or parameters), and how names in files lead to them."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._exact = {name for name in names if name}
        self._by_flat = {_underscored(name): name for name in self._exact}
        segments = {segment for name in self._exact for segment in name.split(".")}
        self._dropped = {*WRAPPERS, DATA_PARALLEL} - segments

    def plain(self, key: str) -> str:
        """A key of a file without the segments of wrappers."""
        for prefix in UNDERSCORED:
            if key.startswith(prefix):
                module, dot, rest = key.partition(".")
                for wrapper in WRAPPERS:
                    module = module.replace(f"{wrapper}_", "").removesuffix(f"_{wrapper}")
                module = prefix + module.removeprefix(prefix).removeprefix(f"{DATA_PARALLEL}_")
                return self._without(module + dot + rest)
        return self._without(key)

    def _without(self, key: str) -> str:
        return ".".join(segment for segment in key.split(".") if segment not in self._dropped)

    def find(self, module: str) -> str | None:
        """The transformer's name of a module that a file names; None for one that it does not have."""
        name = module
        while True:
            if known := name if name in self._exact else self._by_flat.get(_underscored(name)):
                return known
            if (shorter := _stripped(name)) == name:
                return None
            name = shorter

    def part(self, module: str, fused: str, part: str) -> str | None:
        """The transformer's name of the module `part` beside a module of a file that ends in `fused`."""
        name = flat(module)
        return self._by_flat.get(name.removesuffix(fused) + _underscored(part)) if name.endswith(f"_{fused}") else None

    def for_converter(self, module: str) -> str:
        """A name of a file as diffusers' converters know its layout: it has one prefix, and where the transformer has
        underscores (`to_q`) its dots become underscores again."""
        name = module
        while (shorter := _stripped(name)) != name and _stripped(shorter) != shorter:
            name = shorter
        name = name.replace("model.diffusion_model.", "diffusion_model.", 1)
        if prefix := next((prefix for prefix in UNDERSCORED if name.startswith(prefix)), None):
            return _KOHYA + name.removeprefix(prefix)
        known = self.find(name)
        return name if known is None else name.removesuffix(bare(name)) + known


def bare(module: str) -> str:
    """A name without the prefixes of layouts."""
    while (shorter := _stripped(module)) != module:
        module = shorter
    return module


def flat(module: str) -> str:
    """A name without the prefixes of layouts and with underscores for dots, by which spellings can be compared."""
    return _underscored(bare(module))


def is_underscored(module: str) -> bool:
    """Whether a name has a layout's prefix under which underscores stand for dots."""
    return any(re.match(rf"(\w+\.)*{prefix}", module) for prefix in UNDERSCORED)


def _stripped(name: str) -> str:
    """A name without its first prefix."""
    for prefix in (*_DOTTED, *UNDERSCORED):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _underscored(name: str) -> str:
    return name.replace(".", "_")
