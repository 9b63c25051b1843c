"""The pieces that the kernels on a solver's row share: the row, a guided velocity, its gradients, a sample's sum.

Pointers are of the whole tensors; `start` is where the sample begins in each, and `offs` are elements of the sample.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def step_number(step_ptr, step):
    """Return the step as int64: the number that lies at `step_ptr`, or `step` where that is None."""
    if step_ptr is not None:
        step = tl.load(step_ptr)
    return tl.cast(step, tl.int64)


@triton.jit
def table_row(table_ptr, step, rows):
    """Return (a, b, h, std, weight, sigma) of the row; NaN for one outside the table, where there is no result."""
    inside = (step >= 0) & (step < rows)
    nan = float("nan")
    row = table_ptr + step * 6
    a = tl.load(row, mask=inside, other=nan)
    b = tl.load(row + 1, mask=inside, other=nan)
    h = tl.load(row + 2, mask=inside, other=nan)
    std = tl.load(row + 3, mask=inside, other=nan)
    weight = tl.load(row + 4, mask=inside, other=nan)
    sigma = tl.load(row + 5, mask=inside, other=nan)
    return a, b, h, std, weight, sigma


@triton.jit
def velocity_block(cond_ptr, cond_start, uncond_ptr, uncond_start, g, offs, elements):
    """Return u + g*(c - u) at `offs`, float32. Where g = 1 or u is None it is c, and u is not read."""
    v = tl.load(cond_ptr + cond_start + offs, mask=offs < elements, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        # The last element moves to the front instead of a second mask: this keeps the alignment that the compiler
        # derives from `elements`. With u = 0, u + 1*(c - u) is c exactly.
        end = tl.where(g != 1.0, elements, 0)
        u = tl.load(uncond_ptr + uncond_start + offs, mask=offs < end, other=0.0).to(tl.float32)
        v = u + g * (v - u)
    return v


@triton.jit
def store_gradients(cond_ptr, uncond_ptr, start, offs, slope, g, mask):
    """Store the gradients at c and u of what has the gradient `slope` at u + g*(c - u)."""
    if uncond_ptr is None:
        tl.store(cond_ptr + start + offs, slope, mask=mask)
    else:
        tl.store(cond_ptr + start + offs, slope * g, mask=mask)
        tl.store(uncond_ptr + start + offs, slope * (1.0 - g), mask=mask)


@triton.jit
def sum_partials(partial_ptr, blocks, PASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of a sample's partial sums, taken in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PASSES):
        at = i * BLOCK + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + at, mask=at < blocks, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, axis=0)
