"""Log-probability and ratio of a drawn step on CUDA: the kernels of the formulas in `logprob_ref.py`.

Shapes: x, sample, velocities, mean_old (B, D) with D = C*H*W contiguous and any stride between samples; outputs (B, D)
contiguous, or (B,). Each tensor is read or written once a launch. Everything is float32 inside.

Grid: `blocks` programs a sample, each `TILES` tiles of `BLOCK` elements (`tuning.py` chooses both). As in
`step_triton.py` every program leaves its partial sums, and the sample's last to arrive adds them up in a fixed order.
The backward is elementwise.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch, present
from .logprob_ref import HALF_LOG_2PI, LogProb
from .operators import Reduction
from .row_triton import step_number, store_gradients, sum_partials, table_row, velocity_block


@triton.jit
def drawn_row(table_ptr, step_ptr, step, rows):
    """Return (a, b, std) of the row; NaN for one outside the table or without noise, where there is no result."""
    a, b, h, std, _, _ = table_row(table_ptr, step_number(step_ptr, step), rows)
    return a, b, tl.where((std > 0) & (h == 0), std, float("nan"))


@triton.jit(do_not_specialize=["step"])
def log_prob_kernel(
    x_ptr,
    sample_ptr,
    cond_ptr,
    uncond_ptr,  # or None
    mean_old_ptr,  # or None
    guidance_ptr,  # (B,)
    table_ptr,  # (rows, 6): a, b, h, std, weight, sigma
    step_ptr,  # 0-dim int64, or None: then `step`
    logp_ptr,  # (B,)
    log_ratio_ptr,  # (B,), or None
    drift_ptr,  # (B,), or None
    mean_ptr,  # or None
    partial_ptr,  # (3, B, blocks)
    arrived_ptr,  # (B,) int32, zero before and after
    step,
    x_stride,
    sample_stride,
    cond_stride,
    uncond_stride,
    mean_old_stride,
    elements,  # D
    blocks,
    rows,
    share,  # 1/D or 1
    constant,  # (1 or D) * ln(2 pi) / 2
    counted,  # 1 or D
    TILES: tl.constexpr,  # tiles a program
    PASSES: tl.constexpr,  # of BLOCK partial sums
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    index = pid // blocks
    block = pid % blocks
    base = index.to(tl.int64)
    a, b, std = drawn_row(table_ptr, step_ptr, step, rows)
    g = tl.load(guidance_ptr + index)

    squares = tl.zeros((BLOCK,), tl.float32)
    ratios = tl.zeros((BLOCK,), tl.float32)
    drifts = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        offs = (block * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < elements
        x = tl.load(x_ptr + base * x_stride + offs, mask=mask, other=0.0)
        v = velocity_block(cond_ptr, base * cond_stride, uncond_ptr, base * uncond_stride, g, offs, elements)
        mean = a * x + b * v
        sample = tl.load(sample_ptr + base * sample_stride + offs, mask=mask, other=0.0)
        away = tl.where(mask, sample - mean, 0.0)
        squares += away * away
        if mean_old_ptr is not None:
            old = tl.load(mean_old_ptr + base * mean_old_stride + offs, mask=mask, other=0.0)
            moved = tl.where(mask, mean - old, 0.0)
            ratios += moved * (away + (sample - old))
            drifts += moved * moved
        if mean_ptr is not None:
            tl.store(mean_ptr + base * elements + offs, mean, mask=mask)

    factor = share / (2.0 * std * std)
    offset = counted * tl.log(std) + constant
    square = tl.sum(squares, axis=0)
    ratio = tl.sum(ratios, axis=0)
    drift = tl.sum(drifts, axis=0)
    if blocks > 1:
        plane = tl.num_programs(0)
        tl.store(partial_ptr + pid, square)
        if mean_old_ptr is not None:
            tl.store(partial_ptr + plane + pid, ratio)
            tl.store(partial_ptr + 2 * plane + pid, drift)
        tl.debug_barrier()
        earlier = tl.atomic_add(arrived_ptr + index, 1, sem="acq_rel", scope="gpu")
        if earlier == blocks - 1:
            tl.store(arrived_ptr + index, 0)
            first_ptr = partial_ptr + index * blocks
            tl.store(logp_ptr + index, -factor * sum_partials(first_ptr, blocks, PASSES, BLOCK) - offset)
            if mean_old_ptr is not None:
                tl.store(log_ratio_ptr + index, factor * sum_partials(first_ptr + plane, blocks, PASSES, BLOCK))
                tl.store(drift_ptr + index, factor * sum_partials(first_ptr + 2 * plane, blocks, PASSES, BLOCK))
    else:
        tl.store(logp_ptr + index, -factor * square - offset)
        if mean_old_ptr is not None:
            tl.store(log_ratio_ptr + index, factor * ratio)
            tl.store(drift_ptr + index, factor * drift)


@triton.jit(do_not_specialize=["step"])
def log_prob_backward_kernel(
    x_ptr,
    sample_ptr,
    cond_ptr,
    uncond_ptr,  # or None
    mean_old_ptr,  # or None
    grad_logp_ptr,  # (B,)
    grad_drift_ptr,  # (B,), or None without mean_old
    guidance_ptr,  # (B,)
    table_ptr,  # (rows, 6)
    step_ptr,  # 0-dim int64, or None: then `step`
    grad_cond_ptr,
    grad_uncond_ptr,  # or None
    step,
    x_stride,
    sample_stride,
    cond_stride,
    uncond_stride,
    mean_old_stride,
    elements,  # D
    blocks,
    rows,
    share,  # 1/D or 1
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    index = pid // blocks
    base = index.to(tl.int64)
    a, b, std = drawn_row(table_ptr, step_ptr, step, rows)
    g = tl.load(guidance_ptr + index)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    x = tl.load(x_ptr + base * x_stride + offs, mask=mask, other=0.0)
    v = velocity_block(cond_ptr, base * cond_stride, uncond_ptr, base * uncond_stride, g, offs, elements)
    mean = a * x + b * v
    sample = tl.load(sample_ptr + base * sample_stride + offs, mask=mask, other=0.0)
    slope = tl.load(grad_logp_ptr + index) * (sample - mean)
    if mean_old_ptr is not None:
        old = tl.load(mean_old_ptr + base * mean_old_stride + offs, mask=mask, other=0.0)
        slope += tl.load(grad_drift_ptr + index) * (mean - old)
    slope *= share * b / (std * std)
    store_gradients(grad_cond_ptr, grad_uncond_ptr, base * elements, offs, slope, g, mask)


def launch_log_prob(
    x: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    mean_old: Tensor | None = None,
    return_mean: bool = False,
    reduction: Reduction = "mean",
) -> LogProb:
    """Launch the forward (see `launching.launch`); arguments as in `log_prob`, already checked."""

    def vector(wanted: bool) -> Tensor | None:
        return torch.empty(x.shape[:1], dtype=torch.float32, device=x.device) if wanted else None

    def operands() -> str:
        return present({"cond": cond, "uncond": uncond}, {"mean_old": mean_old is not None, "mean": return_mean})

    logp = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    mean = torch.empty(x.shape, dtype=torch.float32, device=x.device) if return_mean else None
    out = LogProb(logp, vector(mean_old is not None), vector(mean_old is not None), mean)
    counted = 1 if reduction == "mean" else math.prod(x.shape[1:])
    given = (x, sample, cond, uncond, mean_old, guidance, table)
    extra = (counted * HALF_LOG_2PI, float(counted))
    launch(log_prob_kernel, given, out, step, reduction, operands, states=5, sums=3, extra=extra)
    return out


def launch_log_prob_backward(
    grad_logp: Tensor,
    grad_drift: Tensor | None,
    x: Tensor,
    sample: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    table: Tensor,
    step: int | Tensor,
    *,
    mean_old: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward (see `launching.launch`); arguments as in the twin."""
    grad_cond = torch.empty(x.shape, dtype=cond.dtype, device=x.device)
    grad_uncond = None if uncond is None else torch.empty(x.shape, dtype=uncond.dtype, device=x.device)
    if mean_old is None or grad_drift is None:  # the drift has no share: its operand is not read
        mean_old = grad_drift = None

    def operands() -> str:
        return present({"cond": cond, "uncond": uncond}, {"mean_old": mean_old is not None})

    given = (x, sample, cond, uncond, mean_old, grad_logp, grad_drift, guidance, table)
    launch(log_prob_backward_kernel, given, (grad_cond, grad_uncond), step, reduction, operands, states=5, sums=0)
    return grad_cond, grad_uncond
