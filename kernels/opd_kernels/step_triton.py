"""The fused step on CUDA: the kernel of the formulas in `step_ref.py`.

Shapes: x, velocities, noise, history (B, D) with D = C*H*W contiguous and any stride between samples; outputs (B, D)
contiguous. Each tensor is read or written once. Everything is float32 inside.

Grid: `blocks` programs a sample, each `TILES` tiles of `BLOCK` elements (`tuning.py` chooses both). Every program
leaves its partial sum of the squared velocity gap; the sample's last program to arrive adds them up in a fixed order,
so that the loss is the same bit for bit in every run, and one launch does the step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch, present
from .operators import Reduction
from .philox_triton import normal_block
from .row_triton import step_number, store_gradients, sum_partials, table_row, velocity_block
from .step_ref import StepOutput


@triton.jit(do_not_specialize=["step"])
def step_kernel(
    x_ptr,
    cond_s_ptr,
    uncond_s_ptr,  # or None
    cond_t_ptr,
    uncond_t_ptr,  # or None
    noise_ptr,  # or None
    history_ptr,  # or None
    keys_ptr,  # (B,) int64, or None
    guidance_s_ptr,  # (B,)
    guidance_t_ptr,  # (B,)
    scale_ptr,  # (B,)
    table_ptr,  # (rows, 6): a, b, h, std, weight, sigma
    step_ptr,  # 0-dim int64, or None: then `step`
    x_next_ptr,
    loss_ptr,  # (B,)
    grad_cond_ptr,
    grad_uncond_ptr,  # or None
    x0_ptr,  # or None
    mean_s_ptr,  # or None
    mean_t_ptr,  # or None
    partial_ptr,  # (B, blocks)
    arrived_ptr,  # (B,) int32, zero before and after
    step,
    x_stride,
    cond_s_stride,
    uncond_s_stride,
    cond_t_stride,
    uncond_t_stride,
    noise_stride,
    history_stride,
    elements,  # D
    blocks,
    rows,
    share,  # 1/D or 1
    TILES: tl.constexpr,  # tiles a program
    PASSES: tl.constexpr,  # of BLOCK partial sums
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid % blocks
    base = sample.to(tl.int64)
    step = step_number(step_ptr, step)
    a, b, h, std, weight, sigma = table_row(table_ptr, step, rows)
    g_s = tl.load(guidance_s_ptr + sample)
    g_t = tl.load(guidance_t_ptr + sample)
    weight = tl.load(scale_ptr + sample) * (weight * share)
    # An operand whose factor is zero is not read, as in `velocity_block`.
    end_history = tl.where(h != 0.0, elements, 0)
    end_noise = tl.where(std != 0.0, elements, 0)

    squares = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        first = (block * TILES + tile) * BLOCK
        offs = first + tl.arange(0, BLOCK)
        mask = offs < elements
        x = tl.load(x_ptr + base * x_stride + offs, mask=mask, other=0.0)
        v_s = velocity_block(
            cond_s_ptr, base * cond_s_stride, uncond_s_ptr, base * uncond_s_stride, g_s, offs, elements
        )
        v_t = velocity_block(
            cond_t_ptr, base * cond_t_stride, uncond_t_ptr, base * uncond_t_stride, g_t, offs, elements
        )
        common = a * x
        if history_ptr is not None:
            common += h * tl.load(history_ptr + base * history_stride + offs, mask=offs < end_history, other=0.0)
        x_next = common + b * v_s
        if mean_s_ptr is not None:
            tl.store(mean_s_ptr + base * elements + offs, x_next, mask=mask)
            tl.store(mean_t_ptr + base * elements + offs, common + b * v_t, mask=mask)
        if x0_ptr is not None:
            tl.store(x0_ptr + base * elements + offs, x - sigma * v_s, mask=mask)
        if noise_ptr is not None:
            x_next += std * tl.load(noise_ptr + base * noise_stride + offs, mask=offs < end_noise, other=0.0)
        elif keys_ptr is not None:  # noqa: SIM102 (this is decided when compiling, the next when running)
            if std != 0.0:
                key = tl.load(keys_ptr + sample)
                x_next += std * normal_block(key, step, first // 4 + tl.arange(0, BLOCK // 4), BLOCK)
        tl.store(x_next_ptr + base * elements + offs, x_next, mask=mask)

        gap = v_s - v_t
        slope = (2.0 * weight) * gap
        store_gradients(grad_cond_ptr, grad_uncond_ptr, base * elements, offs, slope, g_s, mask)
        squares += gap * gap  # masked lanes: 0 - 0

    total = tl.sum(squares, axis=0)
    if blocks > 1:
        tl.store(partial_ptr + pid, total)
        tl.debug_barrier()
        earlier = tl.atomic_add(arrived_ptr + sample, 1, sem="acq_rel", scope="gpu")
        if earlier == blocks - 1:
            tl.store(arrived_ptr + sample, 0)
            whole = sum_partials(partial_ptr + sample * blocks, blocks, PASSES, BLOCK)
            tl.store(loss_ptr + sample, weight * whole)
    else:
        tl.store(loss_ptr + sample, weight * total)


def launch_step(
    x: Tensor,
    cond_s: Tensor,
    uncond_s: Tensor | None,
    cond_t: Tensor,
    uncond_t: Tensor | None,
    guidance_s: Tensor,
    guidance_t: Tensor,
    table: Tensor,
    step: int | Tensor,
    scale: Tensor,
    *,
    noise: Tensor | None = None,
    keys: Tensor | None = None,
    history: Tensor | None = None,
    want_x0: bool = False,
    return_means: bool = False,
    reduction: Reduction = "mean",
) -> StepOutput:
    """Launch the kernel (see `launching.launch`); arguments as in `fused_step`, already checked."""

    def state(dtype: torch.dtype = torch.float32, wanted: bool = True) -> Any:
        return torch.empty(x.shape, dtype=dtype, device=x.device) if wanted else None

    def operands() -> str:
        velocities = {"cond_s": cond_s, "uncond_s": uncond_s, "cond_t": cond_t, "uncond_t": uncond_t}
        others = {"noise": noise is not None, "keys": keys is not None, "history": history is not None}
        return present(velocities, others | {"x0": want_x0, "means": return_means})

    want_x0 = want_x0 or history is not None
    loss = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grads = state(cond_s.dtype), None if uncond_s is None else state(uncond_s.dtype)
    out = StepOutput(state(), loss, *grads, state(wanted=want_x0), *(state(wanted=return_means) for _ in range(2)))
    given = (x, cond_s, uncond_s, cond_t, uncond_t, noise, history, keys, guidance_s, guidance_t, scale, table)
    launch(step_kernel, given, out, step, reduction, operands, states=7, sums=1)
    return out
