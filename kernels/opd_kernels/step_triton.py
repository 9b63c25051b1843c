"""The fused step on CUDA: the kernel of the formulas in `step_ref.py`.

Shapes: x, velocities, noise, history (B, D) with D = C*H*W contiguous and any stride between samples; outputs (B, D)
contiguous. Each tensor is read or written once. Everything is float32 inside.

Grid: `blocks` programs a sample, each `TILES` tiles of `BLOCK` elements (`tuning.py` chooses both). Every program
leaves its partial sum of the squared velocity gap; the sample's last program to arrive adds them up in a fixed order,
so that the loss is the same bit for bit in every run, and one launch does the step.
"""

# Kernel arguments have no Python types; Triton takes them from the call.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import BoundLaunch, batch_stride, in_place, on_device_of, remember, scratch
from .operator import Reduction
from .philox_triton import normal_block
from .row_triton import step_number, store_gradients, sum_partials, table_row, velocity_block
from .step_ref import StepOutput
from .tuning import Launch, Problem, tuner

__all__ = ["launch_step"]


@triton.jit(do_not_specialize=["step"])
def step_kernel(
    x_ptr,
    cond_s_ptr,
    uncond_s_ptr,  # or None
    cond_t_ptr,
    uncond_t_ptr,  # or None
    noise_ptr,  # or None
    keys_ptr,  # (B,) int64, or None
    history_ptr,  # or None
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
    scale_mean,  # 1/D or 1
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
    weight = tl.load(scale_ptr + sample) * (weight * scale_mean)
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


_bound: dict[Any, BoundLaunch] = {}


def _bind(
    launch: Launch,
    given: tuple[Tensor | None, ...],
    reduction: Reduction,
) -> BoundLaunch:
    """Return the launch with its constants, in the kernel's order, for the 13 operands `given`."""
    x, table = given[0], given[11]
    assert x is not None
    assert table is not None
    elements = x[0].numel()
    blocks = launch.blocks(elements)
    constants = (
        *(batch_stride(t) for t in (*given[:6], given[7])),
        elements,
        blocks,
        table.shape[0],
        1.0 / elements if reduction == "mean" else 1.0,
        launch.tiles,
        triton.cdiv(blocks, launch.block),
        launch.block,
    )
    copied = [i for i, t in enumerate(given) if t is not None and not _readable(i, t)]
    return BoundLaunch(step_kernel, x.shape[0] * blocks, launch.warps, constants, copied)


def _readable(i: int, t: Tensor) -> bool:
    return in_place(t) if i < 6 or i == 7 else t.is_contiguous()


def _problem(given: tuple[Tensor | None, ...], want_x0: bool, return_means: bool) -> Problem:
    x = given[0]
    assert x is not None
    names = ("cond_s", "uncond_s", "cond_t", "uncond_t", "noise", "keys", "history")
    present = [
        name if name in ("noise", "keys", "history") else f"{name}={str(t.dtype).removeprefix('torch.')}"
        for name, t in zip(names, given[1:8], strict=True)
        if t is not None
    ]
    outputs = ["x0"] * want_x0 + ["means"] * return_means
    return Problem("step", x.shape[0], x[0].numel(), " ".join((*present, *outputs)))


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
    """Launch the kernel; arguments as in `fused_step`, already checked. One launch, no host sync (but for a launch
    inside `tuning.measuring()` that is the first of its kind)."""
    shape, device, float32 = x.shape, x.device, torch.float32
    batch = shape[0]
    want_x0 = want_x0 or history is not None
    x_next = torch.empty(shape, dtype=float32, device=device)
    loss = torch.empty(batch, dtype=float32, device=device)
    grad_cond = torch.empty(shape, dtype=cond_s.dtype, device=device)
    grad_uncond = None if uncond_s is None else torch.empty(shape, dtype=uncond_s.dtype, device=device)
    x0 = torch.empty(shape, dtype=float32, device=device) if want_x0 else None
    mean_s = torch.empty(shape, dtype=float32, device=device) if return_means else None
    mean_t = torch.empty(shape, dtype=float32, device=device) if return_means else None
    out = StepOutput(x_next, loss, grad_cond, grad_uncond, x0, mean_s, mean_t)
    if batch == 0:
        return out
    step_ptr, row = (step, 0) if isinstance(step, Tensor) else (None, step)
    given = (
        *(x, cond_s, uncond_s, cond_t, uncond_t, noise, keys, history),
        *(guidance_s, guidance_t, scale, table, step_ptr),
    )
    layout = [None if t is None else (t.dtype, t.stride()) for t in given]
    key = (tuner.epoch, device, shape, table.shape[0], want_x0, return_means, reduction, *layout)
    with on_device_of(x):
        bound = _bound.get(key)
        if bound is None:

            def attempt(launch: Launch) -> Callable[[], None]:
                trial = _bind(launch, given, reduction)
                tensors = (*given, *out, *scratch.take(device, batch, trial.programs, trial.programs > batch))
                return lambda: trial(tensors, row)

            problem = _problem(given, want_x0, return_means)
            bound = _bind(tuner.choose(problem, device, attempt), given, reduction)
            remember(_bound, key, bound)
        bound((*given, *out, *scratch.take(device, batch, bound.programs, bound.programs > batch)), row)
    return out
