"""Row-wise float8 in plain torch: the specification of the kernel in `quantize_triton.py`, and the CPU path.

For row i of x (rows, K), in float32 whatever comes in:

    scale_i = max_k |x_ik| / 448, or 1 where that is below 2^-126 (a row of zeros, or nearly)
    q_ik    = x_ik * (1 / scale_i), clamped to [-448, 448], rounded to the nearest float8_e4m3fn (ties to even)

so that x_ik = scale_i * q_ik up to 1/16 of itself, or scale_i / 1024 where that is more. 448 is the format's largest
number (FP8 formats for deep learning, arXiv 2209.05433, table 1). A NaN or an infinity in x is a NaN in q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32: below it 1 / scale may overflow."""


class Quantized(NamedTuple):
    """x = scale[:, None] * q, nearly."""

    q: Tensor
    """(rows, K) float8_e4m3fn, contiguous."""
    scale: Tensor
    """(rows,) float32."""


def quantize_rows_reference(x: Tensor) -> Quantized:
    """Quantise x (rows, K) by the formulas above, on any device. x in float64 is computed in float64, scale too."""
    with torch.no_grad():
        x = x if x.dtype == torch.float64 else x.float()
        scale = x.abs().amax(dim=1).div_(LARGEST)
        scale = torch.where(scale >= SMALLEST_SCALE, scale, 1.0)
        # Torch's own cast saturates in some versions and makes a NaN of what is too large in others.
        q = (x * scale.reciprocal().unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(FLOAT8)
        return Quantized(q, scale)
