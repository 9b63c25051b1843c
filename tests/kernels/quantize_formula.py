"""What row-wise float8 must be, in float64 and without any cast to float8."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_kernels import Quantized


def hard_rows(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Rows of sizes from 1e-3 to 1e3, one with an outlier, one of zeros, one below what a scale can hold."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    x[1 % rows, columns // 2] = 300.0
    x[2 % rows] = 0.0
    x[3 % rows] = 1e-40
    return x.to(device, dtype)


def assert_quantized(out: Quantized, x: Tensor) -> None:
    """Scales as the formula has them, and every element the nearest number of the format."""
    q, scale = out
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, x.shape, torch.float32, x.shape[:1])
    exact = wanted_scale(x)
    torch.testing.assert_close(scale.double(), exact, rtol=2**-23, atol=0)
    wanted = x.double() / exact[:, None]
    # Three bits after the leading one; below 2^-6 the format's spacing stays as it is there.
    spacing = torch.exp2(wanted.abs().clamp_min(2.0**-6).log2().floor() - 3)
    gap = (q.float().double() - wanted).abs()
    assert bool((gap <= spacing / 2 + wanted.abs() * 2**-21).all())


def wanted_scale(x: Tensor) -> Tensor:
    """(rows,) float64."""
    scale = x.double().abs().amax(1) / 448
    return torch.where(scale >= 2.0**-126, scale, 1.0)
