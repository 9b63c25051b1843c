"""Counter-based Gaussian noise on CUDA: the kernel of `philox.py`, whose header has the formulas.

Shape: keys (B,) int64 -> noise (B, elements) float32. Grid: one program for `BLOCK` elements of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _box_muller(c0, c1):
    """Make two normals of two words. Sine and cosine are computed here: the turn t is exact, and so is its reduction to
    an eighth of a turn, and unlike the library's code this has no slow path for large angles (which would spill)."""
    u = ((c0 >> 8) + 1).to(tl.float32) * 5.9604644775390625e-08
    r = tl.sqrt(-2.0 * tl.log(u))
    t = (c1.to(tl.int32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08
    quarter = tl.floor(4.0 * t + 0.5)
    y = (t - 0.25 * quarter) * 6.283185307179586  # |y| <= pi/4
    y2 = y * y
    # Minimax polynomials for |y| <= pi/4 (Cephes, sinf.c): error below one unit in the last place.
    s = y + y * y2 * (-1.6666654611e-1 + y2 * (8.3321608736e-3 + y2 * -1.9515295891e-4))
    c = 1.0 - 0.5 * y2 + y2 * y2 * (4.166664568298827e-2 + y2 * (-1.388731625493765e-3 + y2 * 2.443315711809948e-5))
    q = quarter.to(tl.int32) & 3
    odd = (q & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((q == 1) | (q == 2), -cos, cos)
    sin = tl.where(q >= 2, -sin, sin)
    return r * cos, r * sin


@triton.jit
def normal_block(key, counter, quads, BLOCK: tl.constexpr):
    """Return the (BLOCK,) normals of the counters `quads` (BLOCK // 4,): element 4i + k is word k of counter i.

    Joining on new last dimensions keeps the four words of a counter in one thread, next to each other, so a store of
    the result is one 16-byte access."""
    c0 = quads.to(tl.uint32)
    zero = c0 * 0
    c0, c1, c2, c3 = tl.philox(key, c0, zero + counter.to(tl.uint32), zero, zero)
    z0, z1 = _box_muller(c0, c1)
    z2, z3 = _box_muller(c2, c3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))


@triton.jit(do_not_specialize=["counter"])
def normal_kernel(
    keys_ptr,  # (B,) int64
    out_ptr,  # (B, elements) float32
    counter,  # uint32 value in an int64, used when counter_ptr is None
    counter_ptr,  # 0-dim int64, or None
    elements,
    blocks,  # programs a sample
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid % blocks
    if counter_ptr is not None:
        counter = tl.load(counter_ptr)
    key = tl.load(keys_ptr + sample)
    z = normal_block(key, tl.cast(counter, tl.int64), block * (BLOCK // 4) + tl.arange(0, BLOCK // 4), BLOCK)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample.to(tl.int64) * elements + offs, z, mask=offs < elements)


def launch_normal(keys: Tensor, elements: int, counter: int, counter_tensor: Tensor | None) -> Tensor:
    """Return (B, elements) float32 normals for keys (B,) int64; `counter_tensor` (0-dim int64) replaces `counter`."""
    batch = keys.shape[0]
    out = torch.empty((batch, elements), dtype=torch.float32, device=keys.device)
    if out.numel():
        blocks = triton.cdiv(elements, BLOCK)
        with torch.cuda.device_of(out):  # Triton launches on the current device, which may be another one
            normal_kernel[(batch * blocks,)](
                keys.contiguous(), out, counter, counter_tensor, elements, blocks, BLOCK=BLOCK, num_warps=4
            )
    return out
