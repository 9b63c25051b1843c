"""The student's LoRA merged for a round: its weights stand still while the round runs, so W' = W + s*B*A is made once.

The forward is then one product, as of a plain layer, and so is the gradient of the input; only dA and dB are formed
apart, by products of the rank's width:

    y = x W'^T + bias        dx = dy W'        dA = s (dy B)^T x        dB = s dy^T (x A^T)

These are the gradients of y = x W^T + s (x A^T) B^T + bias (LoRA, arXiv 2106.09685) up to the rounding of W'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _MergedLinear(torch.autograd.Function):
    """x (..., in), weight = W' (out, in), a (r, in) and b (out, r) float32; the rank's products run in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, a, b = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, None, *factor_gradients(x, dy, a, b, ctx.scale), None


def factor_gradients(x: Tensor, dy: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dA = s (dy B)^T x and dB = s dy^T (x A^T) in the factors' types; x (..., in), dy (..., out)."""
    rows, slopes = x.flatten(0, -2), dy.flatten(0, -2)
    da = ((slopes @ b.to(dy.dtype)).T @ rows).to(a.dtype).mul_(scale)
    db = (slopes.T @ (rows @ a.to(x.dtype).T)).to(b.dtype).mul_(scale)
    return da, db


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W'^T + bias with the gradients of the factors: x (..., in), weight = W' (out, in), a (r, in) and b (out, r)."""
    y: Tensor = _MergedLinear.apply(x, weight, bias, a, b, scale)
    return y


class MergedLayers:
    """The LoRA layers of `adapter` on an injected transformer.

    Inside `active()` each of them computes with W' wherever `adapter` is the one switched on, and as PEFT has it
    otherwise, so that teachers' adapters may share the base.
    """

    def __init__(self, transformer: nn.Module, adapter: str) -> None:
        from peft.tuners.lora import Linear

        self.adapter = adapter
        self.layers: list[Any] = [m for m in transformer.modules() if isinstance(m, Linear) and adapter in m.lora_A]
        self._weights: list[Tensor] | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Merge now, compute with the merged weights until the block ends; the adapter must not change in it."""
        weights = self._merge()
        originals = [layer.forward for layer in self.layers]
        for layer, weight, original in zip(self.layers, weights, originals, strict=True):
            layer.forward = self._forward(layer, weight, original)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own shows again

    @torch.no_grad()
    def _merge(self) -> list[Tensor]:
        if self._weights is None:
            self._weights = [torch.empty_like(layer.get_base_layer().weight) for layer in self.layers]
        for layer, merged in zip(self.layers, self._weights, strict=True):
            a, b = (half[self.adapter].weight for half in (layer.lora_A, layer.lora_B))
            base = layer.get_base_layer().weight
            # In float32, rounded once to the base's type.
            merged.copy_(torch.addmm(base.float(), b.float(), a.float(), alpha=layer.scaling[self.adapter]))
        return self._weights

    def _forward(self, layer: Any, weight: Tensor, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        a, b = (half[self.adapter].weight for half in (layer.lora_A, layer.lora_B))
        bias, scale, mine = layer.get_base_layer().bias, layer.scaling[self.adapter], [self.adapter]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if layer._disable_adapters or layer._active_adapter not in (mine, self.adapter):
                return original(x, *args, **kwargs)
            return merged_linear(x.to(weight.dtype), weight, bias, a, b, scale)

        return forward
