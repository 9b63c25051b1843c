"""The fused step on CUDA: the kernel of the formulas in `step_ref.py`.

Shapes: x, velocities, noise, history (B, D) with D = C*H*W contiguous and any stride between samples; outputs (B, D)
contiguous. Each tensor is read or written once. Everything is float32 inside.

Grid: `blocks` programs a sample, each `TILES` tiles of `BLOCK` elements. Every program leaves its partial sum of the
squared velocity gap; the sample's last program to arrive adds them up in a fixed order, so the loss is the same bit for
bit in every run, and one launch does the step.
"""

# Kernel arguments have no Python types; Triton takes them from the call.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox_triton import normal_block
from .step_ref import Reduction, StepOutput

__all__ = ["launch_step"]

BLOCK = 1024
WARPS = 4


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
    step,
    scale_mean,  # 1/D or 1
    TILES: tl.constexpr,  # tiles a program
    PASSES: tl.constexpr,  # of BLOCK partial sums
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = pid // blocks
    block = pid % blocks
    base = sample.to(tl.int64)
    if step_ptr is not None:
        step = tl.load(step_ptr)
    step = tl.cast(step, tl.int64)
    inside = (step >= 0) & (step < rows)
    nan = float("nan")  # a row outside the table must not look like a result
    row = table_ptr + step * 6
    a = tl.load(row, mask=inside, other=nan)
    b = tl.load(row + 1, mask=inside, other=nan)
    h = tl.load(row + 2, mask=inside, other=nan)
    std = tl.load(row + 3, mask=inside, other=nan)
    weight = tl.load(row + 4, mask=inside, other=nan)
    sigma = tl.load(row + 5, mask=inside, other=nan)
    g_s = tl.load(guidance_s_ptr + sample)
    g_t = tl.load(guidance_t_ptr + sample)
    weight = tl.load(scale_ptr + sample) * (weight * scale_mean)
    # An operand whose factor is zero is not read (it may hold anything): its last element moves to the front instead of
    # a second mask, which keeps the alignment that the compiler derives from `elements`.
    end_u_s = tl.where(g_s != 1.0, elements, 0)
    end_u_t = tl.where(g_t != 1.0, elements, 0)
    end_history = tl.where(h != 0.0, elements, 0)
    end_noise = tl.where(std != 0.0, elements, 0)

    squares = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.static_range(TILES):
        first = (block * TILES + tile) * BLOCK
        offs = first + tl.arange(0, BLOCK)
        mask = offs < elements
        x = tl.load(x_ptr + base * x_stride + offs, mask=mask, other=0.0)
        v_s = tl.load(cond_s_ptr + base * cond_s_stride + offs, mask=mask, other=0.0).to(tl.float32)
        v_t = tl.load(cond_t_ptr + base * cond_t_stride + offs, mask=mask, other=0.0).to(tl.float32)
        # Where g = 1 nothing is read and u = 0: then u + g*(c - u) is c exactly.
        if uncond_s_ptr is not None:
            u = tl.load(uncond_s_ptr + base * uncond_s_stride + offs, mask=offs < end_u_s, other=0.0).to(tl.float32)
            v_s = u + g_s * (v_s - u)
        if uncond_t_ptr is not None:
            u = tl.load(uncond_t_ptr + base * uncond_t_stride + offs, mask=offs < end_u_t, other=0.0).to(tl.float32)
            v_t = u + g_t * (v_t - u)

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
        if grad_uncond_ptr is None:
            tl.store(grad_cond_ptr + base * elements + offs, slope, mask=mask)
        else:
            tl.store(grad_cond_ptr + base * elements + offs, slope * g_s, mask=mask)
            tl.store(grad_uncond_ptr + base * elements + offs, slope * (1.0 - g_s), mask=mask)
        squares += gap * gap  # masked lanes: 0 - 0

    total = tl.sum(squares, axis=0)
    if blocks > 1:
        tl.store(partial_ptr + pid, total)
        tl.debug_barrier()
        earlier = tl.atomic_add(arrived_ptr + sample, 1, sem="acq_rel", scope="gpu")
        if earlier == blocks - 1:
            tl.store(arrived_ptr + sample, 0)
            sums = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(PASSES):
                at = i * BLOCK + tl.arange(0, BLOCK)
                sums += tl.load(partial_ptr + sample * blocks + at, mask=at < blocks, other=0.0, cache_modifier=".cg")
            tl.store(loss_ptr + sample, weight * tl.sum(sums, axis=0))
    else:
        tl.store(loss_ptr + sample, weight * total)


def _batched(t: Tensor) -> tuple[Tensor, int]:
    """`t` and the stride between its samples; copied only if a sample itself is not contiguous."""
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            t = t.contiguous()
            break
        expected *= size
    return t, t.stride(0)


class _Arrivals:
    """Counters of arrived programs. The kernel leaves them at zero, so they are filled once and not at every launch.

    Launches on one stream run in order and share counters. A captured launch may be replayed beside anything else, so
    each gets counters of its own, from a reserve that was filled before the capture began.
    """

    RESERVE = 1 << 16

    def __init__(self) -> None:
        self._streams: dict[tuple[int, int], Tensor] = {}
        self._reserve: dict[int, Tensor] = {}

    def take(self, device: torch.device, count: int) -> Tensor:
        """(count,) int32 zeros on `device` that no concurrent launch uses."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        index = device.index if device.index is not None else torch.cuda.current_device()
        if torch.cuda.is_current_stream_capturing():
            reserve = self._reserve.get(index)
            if reserve is None or reserve.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)  # one more node in the graph
            self._reserve[index] = reserve[count:]
            return reserve[:count]
        if index not in self._reserve:
            self._reserve[index] = torch.zeros(self.RESERVE, dtype=torch.int32, device=device)
        key = (index, torch.cuda.current_stream(device).cuda_stream)
        counters = self._streams.get(key)
        if counters is None or counters.numel() < count:
            counters = self._streams[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        return counters


_arrivals = _Arrivals()


def _tiles(tiles: int) -> int:
    """Tiles a program: one while they all fit on the chip at once, more when a program's fixed cost would show."""
    return 1 if tiles < 8192 else 2 if tiles < 32768 else 4


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
    """Launch the kernel; arguments as in `fused_step`, already checked. One launch, no host sync."""
    shape, batch = x.shape, x.shape[0]

    def state(wanted: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=x.device) if wanted else None

    x_next = torch.empty(shape, dtype=torch.float32, device=x.device)
    loss = torch.empty(batch, dtype=torch.float32, device=x.device)
    grad_cond = torch.empty(shape, dtype=cond_s.dtype, device=x.device)
    grad_uncond = None if uncond_s is None else torch.empty(shape, dtype=uncond_s.dtype, device=x.device)
    x0, mean_s, mean_t = state(want_x0 or history is not None), state(return_means), state(return_means)
    out = StepOutput(x_next, loss, grad_cond, grad_uncond, x0, mean_s, mean_t)
    if batch == 0:
        return out
    elements = x[0].numel()
    tiles = _tiles(batch * triton.cdiv(elements, BLOCK))
    blocks = triton.cdiv(elements, BLOCK * tiles)
    partial = torch.empty((batch, blocks), dtype=torch.float32, device=x.device) if blocks > 1 else None
    states = (x, cond_s, uncond_s, cond_t, uncond_t, noise, history)
    pairs = [(None, 0) if t is None else _batched(t) for t in states]
    tensors, strides = [t for t, _ in pairs], [stride for _, stride in pairs]
    on_device = isinstance(step, Tensor)
    with torch.cuda.device_of(x_next):  # Triton launches on the current device, which may be another one
        arrived = _arrivals.take(x_next.device, batch) if blocks > 1 else None
        step_kernel[(batch * blocks,)](
            *tensors[:6],
            None if keys is None else keys.contiguous(),
            tensors[6],
            guidance_s.contiguous(),
            guidance_t.contiguous(),
            scale.contiguous(),
            table.contiguous(),
            step if on_device else None,
            x_next,
            loss,
            grad_cond,
            grad_uncond,
            x0,
            mean_s,
            mean_t,
            partial,
            arrived,
            *strides,
            elements,
            blocks,
            table.shape[0],
            0 if on_device else step,
            1.0 / elements if reduction == "mean" else 1.0,
            TILES=tiles,
            PASSES=triton.cdiv(blocks, BLOCK),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out
