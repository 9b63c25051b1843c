"""Frozen weights in float8: the products of a teacher, or of the student's frozen base, on a GPU's fp8 matrix units.

A weight W (out, in) is kept as float8_e4m3fn with one float32 scale for each output row, the activations x are
quantised row by row as they come (`opd_kernels.quantize_rows`), and the scales multiply the sums:

    y_ij = s_i t_j sum_k qx_ik qw_jk + bias_j            x = s qx,  W = t qw, nearly

Where a gradient flows, dx = dy W is a product of the same kind, of dy quantised row by row with W^T quantised row by
row (one scale for each input column), or, without that second copy, one in dy's type: (t dy) qw.

Bytes a weight: 1, or 2 with the transposed copy; bfloat16 takes 2. Each operand is rounded to 4 significant bits, which
costs 2.7 % of it (root mean square, evenly spread logarithms), so that a product is off by about 3.8 %.
`benchmarks.fp8_error` measures it layer by layer, and `check_losses` what it does to a run's losses.

On devices without such units the same numbers come from an emulation in float32. It is what the tests hold the GPU to,
and is slower than no quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opd_fast.errors import UserError, one_line, short
from opd_kernels import FLOAT8, Quantized, quantize_rows
from opd_kernels.quantize import LONGEST_ROW

MULTIPLE = 16
"""Both sides of a weight must be multiples of it, for the matrix units."""
FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 matrix units (Ada; Hopper is 9.0)."""
STEP_LOSS_LIMIT = 0.01


# --- weights and products ---------------------------------------------------------------------------------------------


def _no_units(device: torch.device) -> str | None:
    """Return None where `device` has fp8 matrix units for this format; otherwise why not."""
    if device.type != "cuda":
        return f"a {device.type.upper()} has no fp8 matrix units"
    if torch.version.hip is not None:
        return "this build of torch is for AMD GPUs, whose float8 is another format"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        name, found = torch.cuda.get_device_name(device), "{}.{}".format(*capability)
        return f"{name} has compute capability {found} and fp8 matrix units begin with 8.9 (Ada, Hopper)"
    return None


def supported(device: torch.device | str) -> str | None:
    """Return None where `device` multiplies float8 matrices with row-wise scales; otherwise why not and what to do."""
    device, remedy = torch.device(device), "give engine.precision auto"
    if (missing := _no_units(device)) is not None:
        return f"{missing}; {remedy}"
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no float8 product; use 2.11 or later, or {remedy}"
    weight = torch.zeros(MULTIPLE, MULTIPLE, device=device, dtype=FLOAT8)
    ones = torch.ones(MULTIPLE, device=device)
    try:
        _on_units(Quantized(weight, ones), weight, ones, None, torch.bfloat16, fast=True)
    except RuntimeError as error:
        problem = f"torch {torch.__version__} cannot multiply float8 with row-wise scales here"
        return f"{problem} ({short(one_line(error), 200)}); {remedy}"
    return None


class Float8Weight(NamedTuple):
    """A weight W (out, in), quantised once, or once a round."""

    q: Tensor
    """(out, in) float8_e4m3fn."""
    scale: Tensor
    """(out,) float32."""
    columns: Tensor | None = None
    """(in, out) float8_e4m3fn: W^T quantised by itself, for dx = dy W on the matrix units."""
    column_scale: Tensor | None = None
    """(in,) float32."""


def fits(weight: Tensor) -> bool:
    """Return whether a matrix has sides that the matrix units and the quantisation of their rows take."""
    return weight.dim() == 2 and all(side % MULTIPLE == 0 and 0 < side <= LONGEST_ROW for side in weight.shape)


@torch.no_grad()
def quantize_weight(weight: Tensor, *, transposed: bool = False) -> Float8Weight:
    """Quantise weight (out, in) float32, bfloat16 or float16; `transposed` adds the copy for the data gradient."""
    return Float8Weight(*quantize_rows(weight), *(quantize_rows(weight.T.contiguous()) if transposed else ()))


@torch.no_grad()
def requantize(weight: Tensor, into: Float8Weight) -> Float8Weight:
    """Quantise weight (out, in) into the tensors of `into`, which stay where they are, as a captured graph needs."""
    found = quantize_weight(weight, transposed=into.columns is not None)
    for old, new in zip(into, found, strict=True):
        if old is not None and new is not None:
            old.copy_(new)
    return into


@torch.compiler.assume_constant_result
def _has_units(device: torch.device) -> bool:
    return _no_units(device) is None


def _on_units(x: Quantized, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Compute `_product` by torch's own kernels. With row-wise scales they give and add bfloat16 alone."""
    outside = bias if dtype != torch.bfloat16 else None
    y = torch._scaled_mm(
        x.q,
        q.t(),
        scale_a=x.scale.unsqueeze(1),
        scale_b=scale.unsqueeze(0),
        bias=bias if outside is None else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    ).to(dtype)
    return y if outside is None else y + outside


def _product(x: Quantized, q: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """Return x (rows, K) times the transpose of q (columns, K) with scale (columns,), plus bias (columns,).

    `fast` lets Hopper's units add up in their own registers, about 14 bits wide, instead of going over to float32 every
    128 terms: right for a forward, whose rounding to 4 bits is coarser by far, and not taken for gradients.
    """
    bias = None if bias is None else bias.to(dtype)
    if _has_units(x.q.device):
        return _on_units(x, q, scale, bias, dtype, fast=fast)
    with torch.autocast(x.q.device.type, enabled=False):
        y = x.q.float() @ q.float().t() * x.scale.unsqueeze(1) * scale
        return (y if bias is None else y + bias.float()).to(dtype)


def float8_linear(x: Tensor, weight: Float8Weight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x (..., in) W^T + bias (out,) as (..., out) in `dtype`, without autograd."""
    y = _product(quantize_rows(x.flatten(0, -2)), weight.q, weight.scale, bias, dtype, fast=True)
    return y.unflatten(0, x.shape[:-1])


def data_gradient(dy: Tensor, weight: Float8Weight) -> Tensor:
    """Return dx (..., in) = dy (..., out) W in dy's type."""
    slopes = dy.flatten(0, -2)
    if weight.columns is not None and weight.column_scale is not None:
        dx = _product(quantize_rows(slopes), weight.columns, weight.column_scale, None, dy.dtype, fast=False)
    else:
        # The scales go to the slopes: float8 numbers are bfloat16 numbers, so that the weight is not rounded again.
        with torch.autocast(dy.device.type, enabled=False):
            dx = (slopes.float() * weight.scale).to(dy.dtype) @ weight.q.to(dy.dtype)
    return dx.unflatten(0, dy.shape[:-1])


# --- a frozen layer ---------------------------------------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """Gradient of the activations alone; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dtype: torch.dtype, *weight: Any) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.dtype = x.dtype
        return float8_linear(x, Float8Weight(*weight), bias, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        return data_gradient(dy, Float8Weight(*ctx.saved_tensors)).to(ctx.dtype), *[None] * 6


class Float8Linear(nn.Module):
    """A frozen `nn.Linear` with its weight in float8.

    x (..., in) of any type becomes y (..., out) in the type that the weight had; gradients reach x and nothing else.
    `to(dtype)` changes that type and the bias, never the quantised weight or its scales.
    """

    q: Tensor
    scale: Tensor
    columns: Tensor | None
    column_scale: Tensor | None
    like: Tensor

    def __init__(self, linear: nn.Linear, *, transposed: bool = False) -> None:
        """`transposed` keeps W^T as well, for a data gradient on the matrix units. Raises ValueError for a weight that
        is trainable, or whose sides do not fit (see `fits`)."""
        super().__init__()
        if linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad):
            raise ValueError("a trainable layer cannot be kept in float8: freeze it with requires_grad_(False)")
        if not fits(linear.weight):
            raise ValueError(
                f"float8 products take sides that are multiples of {MULTIPLE} up to {LONGEST_ROW}, not "
                f"{tuple(linear.weight.shape)}; leave the layer as it is"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, value in quantize_weight(linear.weight, transposed=transposed)._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("like", linear.weight.new_empty(0), persistent=False)  # of the outputs' type
        self.bias = linear.bias

    @property
    def quantized(self) -> Float8Weight:
        return Float8Weight(self.q, self.scale, self.columns, self.column_scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.bias, self.like.dtype, *self.quantized)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        held = self.quantized._asdict()
        super()._apply(fn, recurse)
        for name, old in held.items():
            if old is not None and self._buffers[name].dtype != old.dtype:  # type: ignore[union-attr]
                self._buffers[name] = old.to(self.like.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, transposed={self.columns is not None}, {self.like.dtype}"


def frozen_layers(layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return those of a family's `DiffusionModel.token_layers` that can be kept in float8.

    Left out are trainable and sharded ones, and those with a side that is not a multiple of 16.
    """

    def frozen(layer: nn.Linear) -> bool:
        return not any(p.requires_grad or isinstance(p, DTensor) for p in layer.parameters())

    return {name: layer for name, layer in layers.items() if frozen(layer) and fits(layer.weight)}


def quantize_frozen(transformer: nn.Module, layers: Mapping[str, nn.Linear], *, transposed: bool = False) -> int:
    """Replace the `frozen_layers` among `layers` of the transformer by `Float8Linear`; returns how many there were.

    Call it once the weights are final and on their device, before blocks are compiled and before hooks (offloading,
    sharding) hold the parameters. `transposed` keeps both copies (see `Float8Linear`), for a transformer that gradients
    flow through.
    """
    chosen = frozen_layers(layers)
    for name, layer in chosen.items():
        transformer.set_submodule(name, Float8Linear(layer, transposed=transposed))
    return len(chosen)


# --- what it costs in accuracy ----------------------------------------------------------------------------------------


def check_losses(exact: Tensor, quantized: Tensor, *, limit: float = STEP_LOSS_LIMIT) -> str:
    """Return a line for the log that says how far quantisation moves the step losses.

    Args:
        exact, quantized: losses (steps,) or (steps, B) on the same states and noise; those of the samples are summed.
        limit: largest relative change of any step's loss.

    Raises UserError for `engine.precision` where a step's loss moves by more, or is not finite.
    """
    if exact.shape != quantized.shape or exact.dim() not in (1, 2) or exact.shape[0] == 0:
        raise ValueError(f"losses must be (steps,) or (steps, B) alike, got {exact.shape} and {quantized.shape}")
    before, after = (losses.detach().double().reshape(len(losses), -1).sum(1).cpu() for losses in (exact, quantized))
    moved = torch.where(before == after, 0.0, (after - before) / before.abs())
    remedy = "give auto, or leave the layers out that are off most"
    if not bool(torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise UserError("engine.precision", "fp8 gives step losses that are not finite", remedy)
    step = int(moved.abs().argmax())
    worst, whole = float(moved[step]), float((after.sum() - before.sum()) / before.sum().abs())
    if not abs(worst) <= limit:
        problem = f"fp8 moves the loss of step {step} by {worst:+.2%} on the same states, where {limit:.0%} is allowed"
        if not float(before[step]) > 0:
            problem = f"fp8 gives step {step} a loss where there is none: the student is its teacher there"
        raise UserError("engine.precision", problem, remedy)
    return f"precision: fp8 (step losses move by {worst:+.2%} at most, at step {step}; their sum by {whole:+.2%})"
