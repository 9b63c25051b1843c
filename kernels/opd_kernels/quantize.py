"""Row-wise float8 quantisation: a matrix and one scale a row, in one read and one write.

`quantize_ref.py` has the formulas and the CPU path, `quantize_triton.py` the CUDA kernel. This file has the operator as
PyTorch sees it (custom op, fake) and checks its argument. On CUDA nothing here waits for the device. The operator has
no derivative: what multiplies with its result brings its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import VELOCITY_DTYPES, define
from .quantize_ref import FLOAT8, Quantized, quantize_rows_reference

LONGEST_ROW = 32768
"""Elements that a program holds in registers."""


def _run(x: Tensor) -> tuple[Tensor, Tensor]:
    run = quantize_rows_reference
    # Older devices have no instruction for the conversion: there the twin runs, in several passes over x.
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9):
        from .quantize_triton import launch_quantize_rows as run
    q, scale = run(x)
    return q, scale


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FLOAT8), x.new_empty(x.shape[:1], dtype=torch.float32)


_OP = define("quantize_rows(Tensor x) -> (Tensor, Tensor)", _run, _fake)


def quantize_rows(x: Tensor) -> Quantized:
    """Quantise x to float8_e4m3fn with one float32 scale a row, so that x = scale[:, None] * q nearly.

    Args:
        x: (rows, K) float32, bfloat16 or float16, 1 <= K <= 32768; any stride between rows is read in place.

    Returns:
        Quantized, without gradient. A row that holds a NaN or an infinity has a NaN in q.

    Raises:
        ValueError: x of another shape or dtype.

    Source: the format E4M3 of arXiv 2209.05433; formulas in `quantize_ref.py`.
    """
    if x.dim() != 2 or not 0 < x.shape[1] <= LONGEST_ROW:
        raise ValueError(f"x must be (rows, K) with K from 1 to {LONGEST_ROW}, got {tuple(x.shape)}; flatten it")
    if x.dtype not in VELOCITY_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}; convert it with x.float()")
    return Quantized(*_OP(x.detach()))
