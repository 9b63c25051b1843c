"""The fused step: guidance, solver mean, noise, next state, loss and its gradients in one pass over the tensors.

`step_ref.py` has the formulas and the CPU path, `step_triton.py` the CUDA kernel. This file has the operator as PyTorch
sees it (custom op, fake, autograd) and checks its arguments. On CUDA nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .operators import VELOCITY_DTYPES, Reduction, check_row, check_state, check_tensor, define
from .step_ref import StepOutput, fused_step_reference

_SCHEMA = (
    "fused_step(Tensor x, Tensor cond_s, Tensor? uncond_s, Tensor cond_t, Tensor? uncond_t, Tensor guidance_s, "
    "Tensor guidance_t, Tensor table, SymInt step, Tensor? step_tensor, Tensor scale, Tensor? noise, Tensor? keys, "
    "Tensor? history, bool want_x0, bool return_means, bool sum_elements) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _run(x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Return StepOutput as seven tensors; an absent output is an empty one, because an operator cannot return None."""
    run: Any = fused_step_reference
    if x.is_cuda:
        from .step_triton import launch_step as run
    *state, step, step_tensor, scale, noise, keys, history, want_x0, return_means, sum_elements = operands
    optional: Any = {"noise": noise, "keys": keys, "history": history}
    optional |= {"want_x0": want_x0, "return_means": return_means, "reduction": "sum" if sum_elements else "mean"}
    out = run(x, *state, step if step_tensor is None else step_tensor, scale, **optional)
    return tuple(x.new_empty(0) if t is None else t for t in out)


def _fake(x: Tensor, cond_s: Tensor, uncond_s: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    *_, history, want_x0, return_means, _sum_elements = others

    def state(wanted: bool) -> Tensor:
        return x.new_empty(x.shape if wanted else (0,))

    return (
        state(True),
        x.new_empty(x.shape[:1]),
        cond_s.new_empty(x.shape),
        x.new_empty(0) if uncond_s is None else uncond_s.new_empty(x.shape),
        state(want_x0 or history is not None),
        state(return_means),
        state(return_means),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.guided = inputs[2] is not None
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(output[0], *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, _x: Any, grad_loss: Tensor | None, *_rest: Any) -> tuple[Tensor | None, ...]:
    none: list[Tensor | None] = [None] * 17
    if grad_loss is not None:
        grad_cond, grad_uncond = ctx.saved_tensors
        upstream = grad_loss.view(-1, *[1] * (grad_cond.dim() - 1))
        none[1] = (grad_cond * upstream).to(grad_cond.dtype)
        if ctx.guided:
            none[2] = (grad_uncond * upstream).to(grad_uncond.dtype)
    return tuple(none)


_OP = define(_SCHEMA, _run, _fake)
torch.library.register_autograd("opd_kernels::fused_step", _backward, setup_context=_setup_context)


def fused_step(
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
    """Take one solver step of student and teacher from the state `x`, with the distillation loss and its gradients.

    Args:
        x: (B, C, H, W) float32, the state at row `step`.
        cond_s, uncond_s: (B, C, H, W) float32, bfloat16 or float16, the student's velocities with and without the
            prompt; uncond_s may be None. Rows whose guidance is 1 never read it. Any batch stride is read in place.
        cond_t, uncond_t: the teacher's, likewise.
        guidance_s, guidance_t: (B,) float32; v = u + g*(c - u).
        table: (N, 6) float32, columns `ROW`.
        step: row of the table, an int or a 0-dim int64 tensor on x's device (read there; a row outside the table gives
            NaN on CUDA and IndexError on the CPU). Also the noise counter.
        scale: (B,) float32, weight of each sample's loss.
        noise: (B, C, H, W) float32, read where std != 0. At most one of noise and keys; with neither, x_next is the
            mean (right for rows with std = 0 only: the caller's duty, since looking would wait for the device).
        keys: (B,) int64, to draw the noise `philox_normal(keys, (C, H, W), step)` in the kernel.
        history: (B, C, H, W) float32, x0 of the previous step, for rows with h != 0.
        want_x0: return x0 even without history.
        return_means: return both means.
        reduction: "mean" or "sum" over the elements of a sample.

    Returns:
        StepOutput. Only `loss` carries autograd: `loss.sum().backward()` reaches cond_s and uncond_s. A training loop
        that needs no upstream gradient passes `grad_cond`, `grad_uncond` to `torch.autograd.backward` itself.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.

    Source: DiffusionOPD (arXiv 2605.15055); the folding of means, guidance and KL is derived in `step_ref.py`.
    """
    check_state(x)
    for name, t in (("cond_s", cond_s), ("uncond_s", uncond_s), ("cond_t", cond_t), ("uncond_t", uncond_t)):
        check_tensor(name, t, x, x.shape, *VELOCITY_DTYPES)
    for name, t in (("guidance_s", guidance_s), ("guidance_t", guidance_t), ("scale", scale)):
        check_tensor(name, t, x, x.shape[:1], torch.float32)
    if noise is not None and keys is not None:
        raise ValueError("noise and keys are both given; pass the noise tensor, or the keys to draw it from")
    check_tensor("noise", noise, x, x.shape, torch.float32)
    check_tensor("keys", keys, x, x.shape[:1], torch.int64)
    check_tensor("history", history, x, x.shape, torch.float32)
    row, tensor = check_row(x, table, step, reduction)
    state = (x, cond_s, uncond_s, cond_t, uncond_t, guidance_s, guidance_t, table)
    run = _OP
    if tensor is None and type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling():
        grads = cond_s.requires_grad or (uncond_s is not None and uncond_s.requires_grad)
        if not (grads and torch.is_grad_enabled()):
            run = _run  # there is nothing to record, and the operator's dispatch takes as long as half a small step
    out = run(*state, row, tensor, scale, noise, keys, history, want_x0, return_means, reduction == "sum")
    wanted = (True, True, True, uncond_s is not None, want_x0 or history is not None, return_means, return_means)
    present: list[Any] = [t if given else None for t, given in zip(out, wanted, strict=True)]
    return StepOutput(*present)
