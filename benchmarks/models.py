"""Models with random weights, random teachers, and the bridge that gives engine and reference the same student."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.models.sd3 import SD3
from opd_fast.models.text import TextEmbeds


@dataclass(frozen=True)
class Shape:
    """An SD3-family transformer by its sizes."""

    layers: int
    heads: int
    head_dim: int
    dual_layers: tuple[int, ...]
    text_dim: int
    pooled_dim: int
    channels: int
    sample_size: int
    position_size: int
    resolution: int
    text_tokens: int
    vae_levels: int = 4  # the VAE halves the resolution `vae_levels - 1` times

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


# Stable Diffusion 3.5 Medium, 77 CLIP and 128 T5 tokens.
SD35M_512 = Shape(24, 24, 64, tuple(range(13)), 4096, 2048, 16, 128, 384, 512, 205)
SD35M_1024 = replace(SD35M_512, resolution=1024)
# The same anatomy (dual attention, query and key norms, a context-only last block) in a test's size.
NANO = Shape(2, 2, 16, (0,), 24, 16, 4, 8, 8, 64, 5)


def random_model(shape: Shape, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SD3:
    """An SD3 family model with random weights; text encoders and VAE are not there, only the VAE's scale factor.

    The weights come from torch's global generator.
    """
    from diffusers import SD3Transformer2DModel

    device = torch.device(device)
    with torch.device(device):
        transformer = SD3Transformer2DModel(
            sample_size=shape.sample_size,
            patch_size=2,
            in_channels=shape.channels,
            out_channels=shape.channels,
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            joint_attention_dim=shape.text_dim,
            caption_projection_dim=shape.width,
            pooled_projection_dim=shape.pooled_dim,
            pos_embed_max_size=shape.position_size,
            dual_attention_layers=shape.dual_layers,
            qk_norm="rms_norm",
        )
    if dtype != torch.float32:
        transformer = transformer.to(dtype)
    transformer.eval().requires_grad_(False)
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * shape.vae_levels))
    return SD3("random", transformer, vae, {"shift": 3.0}, shape.text_tokens, device, dtype)


def random_text(count: int, shape: Shape, *, device: torch.device | str = "cpu") -> TextEmbeds:
    """`count` rows of random text embeddings, float32."""
    return TextEmbeds(
        torch.randn(count, shape.text_tokens, shape.text_dim, device=device),
        torch.randn(count, shape.pooled_dim, device=device),
    )


def write_random_lora(
    transformer: nn.Module, folder: str | Path, *, rank: int, alpha: float, targets: Iterable[str], std: float
) -> Path:
    """Write a LoRA folder in PEFT's layout whose A is PEFT's initial one and whose B is normal with `std`."""
    from peft import LoraConfig, get_peft_model

    skeleton = get_peft_model(
        copy.deepcopy(transformer), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    )
    for name, parameter in skeleton.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    skeleton.save_pretrained(str(folder))
    return Path(folder)


_LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.\w+)*$", re.IGNORECASE)
_WRAPPERS = ("base_model.model.", "_orig_mod.", "module.")


def canonical(name: str) -> str:
    """A parameter's name without the wrappers' and the adapter's: `transformer_blocks.0.attn.to_q.A`, say."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    match = _LORA_NAME.fullmatch(name)
    return f"{match['module']}.{match['factor'].upper()}" if match else name


def matched(
    left: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    right: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of tensors with the same canonical name and shape. Raises ValueError if any is left without a partner."""
    a = {canonical(name): tensor for name, tensor in _items(left)}
    b = {canonical(name): tensor for name, tensor in _items(right)}
    if a.keys() != b.keys():
        raise ValueError(f"parameters without a partner: {sorted(a.keys() ^ b.keys())[:6]}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"{name} has shape {tuple(a[name].shape)} here and {tuple(b[name].shape)} there")
    return {name: (a[name], b[name]) for name in sorted(a)}


@torch.no_grad()
def copy_parameters(source: Any, target: Any) -> None:
    """Copy every value of `source` into the parameter of `target` with the same canonical name."""
    for value, parameter in matched(source, target).values():
        parameter.copy_(value)


def gradients(parameters: Any) -> dict[str, Tensor]:
    """Copies of the gradients by canonical name, zeros where there is none; the gradients are cleared."""
    collected = {}
    for name, parameter in _items(parameters):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        collected[canonical(name)] = gradient
        parameter.grad = None
    return collected


def relative_error(value: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """||value - truth|| / ||truth|| over all tensors together, in float64."""
    gap = total = 0.0
    for a, b in matched(value, truth).values():
        gap += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    return (gap / total) ** 0.5


def _items(named: Any) -> Iterable[tuple[str, Tensor]]:
    return named.items() if isinstance(named, Mapping) else named
