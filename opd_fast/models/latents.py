"""Latents as the families share them: their size, packed tokens of 2x2 patches, and decoding in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PATCH = 2  # latents that a packed token holds in each direction
_DECODE_IMAGES = 64  # the most images that are decoded at once, however small they are


def latent_size(resolution: int, factor: int, patch: int) -> int:
    """Return the latents along the side of an image. Raises ValueError unless they divide into patches.

    ``resolution``: pixels along the side; ``factor``: pixels that a latent stands for.
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
    """Pack latents (B, C, H, W) into tokens (B, H/2 * W/2, 4C), each a channel-major 2x2 patch."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo ``pack``: tokens to latents (B, C, height, width)."""
    rows, _, size = tokens.shape
    patches = tokens.view(rows, height // PATCH, width // PATCH, size // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, height, width)


def weight_dtype(module: Any, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of ``module``'s weight, or ``otherwise`` where a wrapper (DDP, say) hides the weight."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else otherwise


def decode_in_chunks(z: Tensor, decode: Callable[[Tensor], Tensor], factor: int, pixels: int) -> Tensor:
    """Decode latents (B, C, H, W) to images (B, 3, H', W') in [0, 1], at most ``pixels`` pixels at once, because the
    VAE's float32 activations take much memory.

    ``decode`` makes images in [-1, 1]; ``factor``: pixels that a latent stands for, along each side.
    """
    chunk = max(1, min(_DECODE_IMAGES, pixels // (z.shape[-2] * z.shape[-1] * factor**2)))
    return (torch.cat([decode(part) for part in z.split(chunk)]) / 2 + 0.5).clamp(0, 1)
