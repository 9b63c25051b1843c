"""Log-probability of a drawn step and its ratio to the policy that drew it, in one pass over the tensors.

`logprob_ref.py` has the formulas and the CPU path, `logprob_triton.py` the CUDA kernels. This file has the operators as
PyTorch sees them (custom op, fake, autograd) and checks their arguments. On CUDA nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .logprob_ref import LogProb, log_prob_backward_reference, log_prob_reference
from .operators import VELOCITY_DTYPES, Reduction, check_row, check_state, check_tensor, define

_OPERANDS = (
    "Tensor x, Tensor sample, Tensor cond, Tensor? uncond, Tensor guidance, Tensor table, SymInt step, "
    "Tensor? step_tensor, Tensor? mean_old"
)
_SCHEMA = f"log_prob({_OPERANDS}, bool return_mean, bool sum_elements) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    f"log_prob_backward(Tensor grad_logp, Tensor? grad_drift, {_OPERANDS}, bool sum_elements) -> (Tensor, Tensor)"
)


def _run(x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Return LogProb as four tensors; an absent output is an empty one, because an operator cannot return None."""
    run: Any = log_prob_reference
    if x.is_cuda:
        from .logprob_triton import launch_log_prob as run
    *given, step, step_tensor, mean_old, return_mean, sum_elements = operands
    row, reduction = step if step_tensor is None else step_tensor, "sum" if sum_elements else "mean"
    out = run(x, *given, row, mean_old=mean_old, return_mean=return_mean, reduction=reduction)
    return tuple(x.new_empty(0) if t is None else t for t in out)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, mean_old, return_mean, _sum_elements = others
    compared = x.shape[:1] if mean_old is not None else (0,)
    shapes = (x.shape[:1], compared, compared, x.shape if return_mean else (0,))
    return tuple(x.new_empty(shape) for shape in shapes)


def _run_backward(grad_logp: Tensor, grad_drift: Tensor | None, x: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
    run: Any = log_prob_backward_reference
    if x.is_cuda:
        from .logprob_triton import launch_log_prob_backward as run
    *given, step, step_tensor, mean_old, sum_elements = operands
    row, reduction = step if step_tensor is None else step_tensor, "sum" if sum_elements else "mean"
    grad_cond, grad_uncond = run(grad_logp, grad_drift, x, *given, row, mean_old=mean_old, reduction=reduction)
    return grad_cond, x.new_empty(0) if grad_uncond is None else grad_uncond


def _fake_backward(
    grad_logp: Tensor, grad_drift: Tensor | None, x: Tensor, sample: Tensor, cond: Tensor, uncond: Any, *_rest: Any
) -> tuple[Tensor, Tensor]:
    return cond.new_empty(x.shape), x.new_empty(0) if uncond is None else uncond.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, sample, cond, uncond, guidance, table, ctx.step, step_tensor, mean_old, _, ctx.sum_elements = inputs
    ctx.save_for_backward(x, sample, cond, uncond, guidance, table, step_tensor, mean_old)
    ctx.mark_non_differentiable(*(output[1:] if mean_old is None else output[3:]))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logp: Tensor | None, grad_log_ratio: Tensor | None, grad_drift: Tensor | None, _mean: Any
) -> tuple[Tensor | None, ...]:
    x, sample, cond, uncond, guidance, table, step_tensor, mean_old = ctx.saved_tensors
    none: list[Tensor | None] = [None] * 11
    if grad_logp is None and grad_log_ratio is None and grad_drift is None:
        return tuple(none)
    upstream = x.new_zeros(x.shape[:1])
    for grad in (grad_logp, grad_log_ratio):  # the two have the same gradient
        upstream = upstream if grad is None else upstream + grad
    operands = (x, sample, cond, uncond, guidance, table, ctx.step, step_tensor, mean_old)
    grad_cond, grad_uncond = _BACKWARD(upstream, grad_drift, *operands, ctx.sum_elements)
    none[2] = grad_cond
    none[3] = None if uncond is None else grad_uncond
    return tuple(none)


_BACKWARD = define(_BACKWARD_SCHEMA, _run_backward, _fake_backward)
_OP = define(_SCHEMA, _run, _fake)
torch.library.register_autograd("opd_kernels::log_prob", _backward, setup_context=_setup_context)


def log_prob(
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
    """Compute the log-probability of `sample`, drawn from the state `x` at row `step`, under the velocities given.

    Args:
        x: (B, C, H, W) float32, the state at row `step`.
        sample: (B, C, H, W) float32, the next state as it was drawn; no gradient goes to it.
        cond, uncond: (B, C, H, W) float32, bfloat16 or float16, the velocities with and without the prompt; uncond may
            be None. Rows whose guidance is 1 never read it. Any batch stride is read in place.
        guidance: (B,) float32; v = u + g*(c - u).
        table: (N, 6) float32, columns `ROW`.
        step: row of the table, an int or a 0-dim int64 tensor on x's device. Its std must be above 0 and its h 0: NaN
            on CUDA, ValueError on the CPU. A row outside the table: NaN on CUDA, IndexError on the CPU.
        mean_old: (B, C, H, W) float32, the mean it was drawn around (`return_mean` of the policy that drew), for
            log_ratio and drift.
        reduction: "mean" or "sum" over the elements of a sample, of all three outputs alike.

    Returns:
        LogProb. logp, log_ratio and drift carry autograd to cond and uncond.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or range.

    Source: Flow-GRPO (arXiv 2505.05470) for the mean over elements; GRPO-Guard (arXiv 2510.22319) for the drift.
    """
    check_state(x)
    check_tensor("sample", sample, x, x.shape, torch.float32)
    check_tensor("cond", cond, x, x.shape, *VELOCITY_DTYPES)
    check_tensor("uncond", uncond, x, x.shape, *VELOCITY_DTYPES)
    check_tensor("guidance", guidance, x, x.shape[:1], torch.float32)
    check_tensor("mean_old", mean_old, x, x.shape, torch.float32)
    index, tensor = check_row(x, table, step, reduction)
    logp, log_ratio, drift, mean = _OP(
        x, sample, cond, uncond, guidance, table, index, tensor, mean_old, return_mean, reduction == "sum"
    )
    compared = mean_old is not None
    return LogProb(logp, log_ratio if compared else None, drift if compared else None, mean if return_mean else None)
