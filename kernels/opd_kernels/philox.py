"""Counter-based Gaussian noise: a sample's 64-bit key decides its noise, whatever batch, device or rank it sits in.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the one behind
`triton.language.philox`. Element e of a sample uses output word e % 4 of

    key = (low, high 32 bits of the sample's key),  counter = (e // 4, counter, 0, 0)

Box-Muller on the word pairs (c0, c1) and (c2, c3), in a form that float32 holds exactly up to the transcendentals:

    u = ((c0 >> 8) + 1) * 2^-24        in (0, 1]           r = sqrt(-2 ln u)     at most 5.77
    t = (int32(c1) >> 8) * 2^-24       in [-1/2, 1/2)      (z0, z1) = r * (cos 2*pi*t, sin 2*pi*t)

This file is the twin (numpy, for the CPU) and the public operator; `philox_triton.py` is the same on CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .operators import define

INITIAL_NOISE = 2**31 - 1
"""Counter reserved for the initial state, far above any step number."""

_ROUNDS = 10
_MUL = (0xD2511F53, 0xCD9E8D57)  # multipliers of (c0, c2)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # key increments of (k0, k1)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_CHUNK = 16384  # counters a pass: six uint64 arrays of this length stay in a core's cache

_U64 = NDArray[np.uint64]


@cache
def _multipliers() -> tuple[_U64, _U64]:
    """Return (A, B) and (B, A) as (2, 1, 1) arrays: the slot order alternates from round to round."""
    ab = np.array(_MUL, dtype=np.uint64).reshape(2, 1, 1)
    return ab, np.ascontiguousarray(ab[::-1])


def _round_keys(keys: NDArray[np.int64]) -> _U64:
    """Return k0 and k1 of every round, for every sample: (rounds, 2, B, 1) uint64."""
    k = keys.view(np.uint64)
    words = np.stack([k & _MASK, k >> _SHIFT])  # (2, B)
    steps = np.arange(_ROUNDS, dtype=np.uint64)[:, None] * np.array(_WEYL, dtype=np.uint64)  # (rounds, 2)
    return ((words + steps[:, :, None]) & _MASK)[..., None]


def _words(keys: _U64, start: int, stop: int, counter: int) -> tuple[_U64, _U64]:
    """Return the words x = (c0, c2) and y = (c1, c3), each (2, B, stop-start) uint64, of the counters
    (start..stop-1, counter, 0, 0).

    Only the low 32 bits of x and y count. The first two rounds are not run on whole arrays: with c2 = c3 = 0 most of
    their words depend on the sample alone or on the element alone. Afterwards each round is five array operations.
    """
    a, b = np.uint64(_MUL[0]), np.uint64(_MUL[1])
    k = keys
    batch = k.shape[2]
    product = np.arange(start, stop, dtype=np.uint64) * a  # round 1: A*c0, the same for every sample
    c0 = k[0, 0] ^ np.uint64(counter)  # (B, 1)
    x = np.empty((2, batch, stop - start), dtype=np.uint64)
    p, q = np.empty_like(x), np.empty_like(x)
    c2 = np.bitwise_xor(product >> _SHIFT, k[0, 1], out=x[0])  # (B, n); c1 = 0, c3 = low word of the product
    product &= _MASK
    np.multiply(c2, b, out=q[0])  # round 2
    p0 = c0 * a  # (B, 1)
    np.right_shift(q[0], _SHIFT, out=x[0])
    x[0] ^= k[1, 0]  # c0
    np.bitwise_xor(product, (p0 >> _SHIFT) ^ k[1, 1], out=x[1])  # c2
    q[1] = p0
    # Now slots are x = (c0, c2), and y = (c1, c3) = the low words of q. A round puts hi(B*c2) into c0 and hi(A*c0)
    # into c2; leaving the results where they are produced swaps the two slots instead of moving data.
    swapped = False
    multipliers = _multipliers()
    for i in range(2, _ROUNDS):
        key = k[i] if swapped else k[i, ::-1]
        np.multiply(x, multipliers[swapped], out=p)
        np.right_shift(p, _SHIFT, out=x)
        q &= _MASK
        x ^= q[::-1]
        x ^= key
        p, q = q, p
        swapped = not swapped
    return (x[::-1], q[::-1]) if swapped else (x, q)


def _fill(out: NDArray[np.float32], keys: _U64, start: int, stop: int, counter: int) -> None:
    """Write the normals of the counters into out (B, 4*(stop-start)) float32, by Box-Muller."""
    x, y = _words(keys, start, stop, counter)
    # The low words, read in place (little-endian halves), then the top 24 bits of each.
    low = 0 if np.little_endian else 1
    top = x.view(np.uint32)[..., low::2] >> np.uint32(8)
    top += np.uint32(1)
    r = top.astype(np.float32)
    r *= np.float32(2.0**-24)
    np.log(r, out=r)
    r *= np.float32(-2.0)
    np.sqrt(r, out=r)
    angle = (y.view(np.int32)[..., low::2] >> np.int32(8)).astype(np.float32)
    angle *= np.float32(2.0 * math.pi * 2.0**-24)
    z = out.reshape(out.shape[0], stop - start, 2, 2).transpose(2, 0, 1, 3)  # (pair, B, n, cos | sin)
    np.multiply(r, np.cos(angle), out=z[..., 0])
    np.multiply(r, np.sin(angle, out=angle), out=z[..., 1])


def _chunks(batch: int, quads: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first sample, last sample, first counter, last counter): whole samples together, or a sample in pieces."""
    if quads >= _CHUNK:
        for i in range(batch):
            for start in range(0, quads, _CHUNK):
                yield i, i + 1, start, min(start + _CHUNK, quads)
    else:
        rows = max(1, _CHUNK // quads)
        for i in range(0, batch, rows):
            yield i, min(i + rows, batch), 0, quads


def normal_reference(keys: Tensor, elements: int, counter: int) -> Tensor:
    """Return (B, elements) float32 standard normals for keys (B,) int64, on the CPU. numpy does the integer work."""
    batch = keys.shape[0]
    quads = (elements + 3) // 4
    out = np.empty((batch, 4 * quads), dtype=np.float32)
    if out.size == 0:
        return torch.empty(batch, elements)
    rounds = _round_keys(np.ascontiguousarray(keys.numpy()))

    for i, j, start, stop in _chunks(batch, quads):
        _fill(out[i:j, 4 * start : 4 * stop], rounds[:, :, i:j], start, stop, counter)
    noise = torch.from_numpy(out)
    return noise if elements == 4 * quads else noise[:, :elements].contiguous()


def _run(keys: Tensor, shape: Sequence[int], counter: int, counter_tensor: Tensor | None) -> Tensor:
    elements = math.prod(shape)
    if keys.is_cuda:
        from .philox_triton import launch_normal

        return launch_normal(keys, elements, counter, counter_tensor).view(keys.shape[0], *shape)
    if counter_tensor is not None:
        counter = int(counter_tensor)
    return normal_reference(keys, elements, counter).view(keys.shape[0], *shape)


def _fake(keys: Tensor, shape: Sequence[int], counter: int, counter_tensor: Tensor | None) -> Tensor:
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.float32)


_SCHEMA = "philox_normal(Tensor keys, SymInt[] shape, SymInt counter, Tensor? counter_tensor) -> Tensor"
_OP = define(_SCHEMA, _run, _fake)


def philox_normal(keys: Tensor, shape: Sequence[int], counter: int | Tensor) -> Tensor:
    """Draw standard normal noise (B, *shape) float32 on the device of `keys`.

    Args:
        keys: (B,) int64, one key a sample. Equal keys give equal noise wherever they stand.
        shape: shape of one sample, without the batch dimension; at most 2^31 - 1 elements.
        counter: which draw of the key: a step number in [0, 2^32), or `INITIAL_NOISE` for the initial state. A 0-dim
            int64 tensor on the same device is read there, without a host sync.

    Raises:
        ValueError: keys, shape or counter of the wrong type, shape or range.

    Source: Salmon et al., SC 2011 (Philox4x32-10); Box and Muller, 1958. CPU and CUDA agree to float32 rounding.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"keys must be (B,) int64, got {tuple(keys.shape)} {keys.dtype}; use keys.to(torch.int64)")
    if math.prod(shape) >= 2**31:
        raise ValueError(f"shape {tuple(shape)} has 2^31 elements or more a sample; draw it in parts")
    if isinstance(counter, Tensor):
        if counter.dtype != torch.int64 or counter.dim() != 0 or counter.device != keys.device:
            raise ValueError(f"counter must be an int, or a 0-dim int64 tensor on {keys.device} like keys")
        return _OP(keys, list(shape), 0, counter)
    if not 0 <= counter < 2**32:
        raise ValueError(f"counter must lie in [0, 2^32), got {counter}")
    return _OP(keys, list(shape), counter, None)
