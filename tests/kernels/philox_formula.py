"""The generator behind the noise as its authors define it (Salmon et al., SC 2011)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_kernels.philox import _MASK, _MUL, _ROUNDS, _SHIFT, _U64, _WEYL


def philox4x32(
    key: tuple[int, int], counter: tuple[int | _U64, int, int, int] | Sequence[Any], rounds: int = _ROUNDS
) -> tuple[_U64, _U64, _U64, _U64]:
    """Philox4x32 by the book; `philox_normal` computes the same words with fewer operations.

    `counter` entries and `key` are uint32 values (ints or uint64 arrays that broadcast); returns four uint64 arrays
    holding uint32 values.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = (int(k) & 0xFFFFFFFF for k in key)
    for _ in range(rounds):
        p0 = c0 * np.uint64(_MUL[0])
        p1 = c2 * np.uint64(_MUL[1])
        c0, c1 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _MASK
        c2, c3 = (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3
