"""Row-wise float8 on CUDA: the kernel of the formulas in `quantize_ref.py`.

Shapes: x (rows, K) with any stride between rows; q (rows, K) and scale (rows,) contiguous. A program holds its rows
whole in registers, so that x is read once and q written once. Everything is float32 inside.

Grid: a program takes one row of more than `ELEMENTS` / 2 columns, or as many shorter ones as fill `ELEMENTS`.

The conversion is an instruction of compute capability 8.9 and above. Triton refuses to compile it for older ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize_ref import FLOAT8, LARGEST, SMALLEST_SCALE, Quantized

ELEMENTS = 2048

_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,  # float8_e4m3fn; of any other type, it gets the numbers before their rounding
    scale_ptr,
    x_stride,
    rows,
    columns,  # K
    ROWS: tl.constexpr,  # rows a program
    BLOCK: tl.constexpr,  # K, up to the next power of two
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    base = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + base * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    # Divisions rounded as the twin's are; there is one a row.
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1), _LARGEST)
    scale = tl.where(scale >= _SMALLEST_SCALE, scale, 1.0)
    q = x * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale)[:, None]
    q = tl.clamp(q, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(q_ptr + base * columns + column, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


def tiling(columns: int) -> tuple[int, int, int]:
    """Return ROWS, BLOCK and the number of warps for rows of `columns` elements: 16 a thread, up to 16 warps."""
    block = triton.next_power_of_2(columns)
    rows = max(1, ELEMENTS // block)
    return rows, block, min(16, max(4, rows * block // (16 * 32)))


def launch_quantize_rows(x: Tensor) -> Quantized:
    """Launch the kernel; x as in `quantize_rows`, already checked. One launch, no host sync."""
    if x.stride(1) != 1:
        x = x.contiguous()
    count, columns = x.shape
    q = torch.empty((count, columns), dtype=FLOAT8, device=x.device)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    if count == 0:
        return Quantized(q, scale)
    rows, block, warps = tiling(columns)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which may be another one
        quantize_rows_kernel[(triton.cdiv(count, rows),)](
            x, q, scale, x.stride(0), count, columns, ROWS=rows, BLOCK=block, num_warps=warps
        )
    return Quantized(q, scale)
