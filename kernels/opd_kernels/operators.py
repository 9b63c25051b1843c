"""What the operators share as PyTorch sees them: how they are registered, and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

ROW = ("a", "b", "h", "std", "weight", "sigma")
"""Columns of a solver's table."""
Reduction = Literal["mean", "sum"]
VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `run` as the operator of the schema `NAME(...) -> ...` for the CPU and CUDA, and return the operator.

    It takes `torch.library.define` and `impl`, because the wrapper of the `custom_op` decorator costs as much as a
    whole step on a CPU at small latents. `fake` takes the arguments of `run` and returns empty outputs.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"opd_kernels::{name}", schema.removeprefix(name))
    torch.library.impl(f"opd_kernels::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"opd_kernels::{name}", fake)
    return getattr(torch.ops.opd_kernels, name).default


def check_tensor(name: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `t` is absent, or has the shape, one of the dtypes, and the device of `x`."""
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(t.shape)}; x has shape {tuple(x.shape)}")
    if t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {t.dtype}; convert it with {name}.to({dtypes[0]})")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move it with {name}.to(x.device)")


def check_state(x: Tensor) -> None:
    """Raise ValueError for a state that no operator on a solver row takes."""
    if x.dim() < 2 or x.dtype != torch.float32:
        raise ValueError(f"x must be (B, C, H, W) float32, got {tuple(x.shape)} {x.dtype}; the state stays in float32")
    if not 0 < math.prod(x.shape[1:]) <= 2**30:
        raise ValueError(f"x must have between 1 and 2^30 elements a sample, got shape {tuple(x.shape)}")


def check_row(x: Tensor, table: Tensor, step: int | Tensor, reduction: str) -> tuple[int, Tensor | None]:
    """Check what every operator on a solver row takes, and return the step as (row, None) or as (0, its tensor)."""
    if table.dim() != 2 or table.shape[1] != len(ROW):
        raise ValueError(f"table must be (N, {len(ROW)}) with columns {ROW}, got {tuple(table.shape)}; use .rows()")
    check_tensor("table", table, x, table.shape, torch.float32)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    if isinstance(step, Tensor):
        if step.dim() != 0 or step.dtype != torch.int64 or step.device != x.device:
            raise ValueError(
                f"step must be an int or a 0-dim int64 tensor on {x.device}, got {step.dtype} {step.device}"
            )
        return 0, step
    if not 0 <= step < table.shape[0]:
        raise ValueError(f"step must lie in [0, {table.shape[0]}), the rows of table, got {step}")
    return step, None
