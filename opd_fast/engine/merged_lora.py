"""The student's LoRA merged for a round: its weights stand still while the round runs, so W' = W + s*B*A is made once.

The forward is then one product, as of a plain layer, and so is the gradient of the input; only dA and dB are formed
apart, by products of the rank's width:

    y = x W'^T + bias        dx = dy W'        dA = s (dy B)^T x        dB = s dy^T (x A^T)

W' has the type of W, or is kept in float8 (`opd_fast.engine.float8`), where the two products with it are float8's and
the rank's products see x and dy unquantised.

These are the gradients of y = x W^T + s (x A^T) B^T + bias (LoRA, arXiv 2106.09685) up to the rounding of W'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd_fast.engine.float8 import Float8Weight, data_gradient, fits, float8_linear, quantize_weight, requantize
from opd_fast.engine.patching import patched_forward


class _MergedLinear(torch.autograd.Function):
    """`weight`: W' alone, or the parts of a `Float8Weight`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *weight: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, *weight)
        ctx.scale = scale
        if len(weight) == 1:
            return F.linear(x, weight[0], bias)  # type: ignore[arg-type]
        return float8_linear(x, Float8Weight(*weight), bias, x.dtype)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, a, b, *weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight[0] if len(weight) == 1 else data_gradient(dy, Float8Weight(*weight))
        # The factors' gradients in their types, by products of the rank's width.
        rows, slopes = x.flatten(0, -2), dy.flatten(0, -2)
        da = ((slopes @ b.to(dy.dtype)).T @ rows).to(a.dtype).mul_(ctx.scale)
        db = (slopes.T @ (rows @ a.to(x.dtype).T)).to(b.dtype).mul_(ctx.scale)
        return dx, None, da, db, None, *[None for _ in weight]


def merged_linear(
    x: Tensor, weight: Tensor | Float8Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """Return x W'^T + bias in x's dtype, with gradients that reach x and the factors.

    x (..., in), weight = W' = W + scale*B*A (out, in), a (r, in) and b (out, r) float32; the rank's products run in x's
    dtype. With a `Float8Weight`, dx comes from its transposed copy where it has one.
    """
    parts = (weight,) if isinstance(weight, Tensor) else weight
    y: Tensor = _MergedLinear.apply(x, bias, a, b, scale, *parts)
    return y


class MergedLayers:
    """The LoRA layers of `adapter` on an injected transformer.

    Inside `active()` each of them computes with W' wherever `adapter` is the one switched on. Otherwise it computes as
    PEFT has it, so that teachers' adapters may share the base.
    """

    def __init__(self, transformer: nn.Module, adapter: str, *, float8: bool = False) -> None:
        """`float8`: W' is float8 with its transposed copy, two bytes a weight, quantised from float32 at each
        `active()`; layers whose sides do not fit (`float8.fits`) have it in the base's type all the same."""
        from peft.tuners.lora import Linear

        self.adapter = adapter
        self.layers: list[Any] = [m for m in transformer.modules() if isinstance(m, Linear) and adapter in m.lora_A]
        self._float8 = float8
        self._weights: list[Tensor | Float8Weight] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Merge now, compute with the merged weights until the block ends; the adapter must not change in it."""
        pairs = zip(self.layers, self._merge(), strict=True)
        with patched_forward([(layer, self._forward(layer, weight)) for layer, weight in pairs]):
            yield

    @torch.no_grad()
    def _merge(self) -> list[Tensor | Float8Weight]:
        if self._weights is None:
            self._weights = [self._room(layer.get_base_layer().weight) for layer in self.layers]
        for layer, held in zip(self.layers, self._weights, strict=True):
            a, b, scale = self._factors(layer)
            # In float32, rounded once to the base's type or to float8.
            merged = torch.addmm(layer.get_base_layer().weight.float(), b.float(), a.float(), alpha=scale)
            if isinstance(held, Tensor):
                held.copy_(merged)
            else:
                requantize(merged, held)
        return self._weights

    def _room(self, weight: Tensor) -> Tensor | Float8Weight:
        in_float8 = self._float8 and fits(weight)
        return quantize_weight(weight, transposed=True) if in_float8 else torch.empty_like(weight)

    def _factors(self, layer: Any) -> tuple[Tensor, Tensor, float]:
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight, layer.scaling[self.adapter]

    def _forward(self, layer: Any, weight: Tensor | Float8Weight) -> Callable[..., Tensor]:
        (a, b, scale), base, original = self._factors(layer), layer.get_base_layer(), layer.forward
        bias, dtype, switched_on = base.bias, base.weight.dtype, ([self.adapter], self.adapter)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer._disable_adapters or layer._active_adapter not in switched_on:
                return original(x, *args, **kwargs)
            return merged_linear(x.to(dtype), weight, bias, a, b, scale)

        return forward
