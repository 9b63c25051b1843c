"""What the families do alike with latents: their size, tokens of 2x2 patches, the way to pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PATCH = 2  # latents that a packed token holds in each direction
_DECODE_IMAGES = 64  # decoded at once, however small


def latent_size(resolution: int, factor: int, patch: int) -> int:
    """Latents along the side of an image of ``resolution`` pixels, of a VAE of that factor.

    Raises ValueError unless they divide into patches.
    """
    unit = factor * patch
    if resolution <= 0 or resolution % unit:
        below = max(resolution // unit, 1) * unit
        raise ValueError(
            f"resolution {resolution} is not a multiple of {unit} (VAE factor {factor} x patch {patch}); "
            f"try {below} or {below + unit}"
        )
    return resolution // factor


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) to tokens (B, H/2 * W/2, 4C), each a channel-major 2x2 patch."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``, to latents of ``height`` x ``width``."""
    rows, _, size = tokens.shape
    patches = tokens.view(rows, height // PATCH, width // PATCH, size // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, height, width)


def weight_dtype(module: Any, otherwise: torch.dtype) -> torch.dtype:
    """What ``module`` computes in: its weight's dtype, or ``otherwise`` where a wrapper (DDP, say) hides it."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else otherwise


def decode_in_chunks(z: Tensor, decode: Callable[[Tensor], Tensor], factor: int, pixels: int) -> Tensor:
    """Images (B, 3, H', W') in [0, 1] of ``decode``, which makes some in [-1, 1], ``pixels`` of them at once.

    ``factor``: pixels that a latent stands for, along each side.  The VAE's float32 activations set the limit.
    """
    chunk = max(1, min(_DECODE_IMAGES, pixels // (z.shape[-2] * z.shape[-1] * factor**2)))
    return (torch.cat([decode(part) for part in z.split(chunk)]) / 2 + 0.5).clamp(0, 1)
