"""The cost of one row: operations of a forward, and bytes that autograd keeps, counted in a forward without numbers.

The transformer of a meta model lies on the meta device, where a forward computes shapes alone. The count covers the
matrix products that really happen and the tensors that a student's forward leaves for its backward. (2 x parameters
x tokens counts far too many operations: in an MMDiT image tokens and text tokens meet different weights, and
modulation runs once a row.)
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from opd_fast.engine.merged_lora import merged_linear
from opd_fast.engine.patching import patched_forward
from opd_fast.models.base import DiffusionModel
from opd_fast.models.text import TextEmbeds

# The widths of a text row, by the names that diffusers' transformers give them.
_SEQUENCE = ("joint_attention_dim", "cap_feat_dim")
_POOLED = "pooled_projection_dim"

SAVED_PER_BLOCK = {"lora": 26, "full": 46}
"""Values of the model's dtype that autograd keeps for each token, unit of width and block, for families that cannot be
traced. SD3.5-Medium keeps so many in bfloat16, where the norms run in float32; FLUX.1-dev keeps 18 and 31, float32
models 14 and 25."""


@dataclass(frozen=True)
class RowCost:
    """The cost of one row of a forward."""

    flops: int
    """Operations of the forward; a multiplication and an addition count as two."""
    saved: int
    """Bytes kept for the backward, weights left out."""


def row_cost(model: DiffusionModel, lora: dict[str, int] | None, resolution: int) -> RowCost:
    """Trace the cost of one row in a student's forward as it runs in a round, uncompiled (torch.compile keeps less).

    LoRA is merged, attention keeps no matrix of scores, and half-precision models run under autocast as CUDA has it.

    Args:
        model: on the meta device.
        lora: rank by module name, None for full weights.
        resolution: pixels.

    Raises:
        ValueError: a family whose forward needs numbers, or text of a form that is not known here.
    """
    transformer: Any = model.transformer
    text = _text(model)
    x = torch.empty(1, *model.latent_shape(resolution), device="meta")
    autocast = model.dtype if model.dtype != torch.float32 else None
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no storage takes another's place
        return tensor

    counter, engine = FlopCounterMode(display=False), _Engine(autocast)
    try:
        with (
            _as_trained(transformer, model.dtype if lora is not None else torch.float32, lora is None) as weights,
            _adapted(transformer, lora or {}) as factors,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            counter,
            engine,
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # as in the real one
            model.velocity(transformer, x, torch.empty((), device="meta"), text, 1.0)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise ValueError(f"a forward of {model.name} cannot be traced without numbers ({error})") from error
    weights |= factors | {weight.untyped_storage()._cdata for weight in engine.cast.values()}
    saved = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)
    return RowCost(int(counter.get_total_flops()) + engine.attention, saved)


def row_cost_or_estimate(model: DiffusionModel, lora: dict[str, int] | None, resolution: int) -> tuple[RowCost, bool]:
    """Return `row_cost`, or an estimate from the size of a family that cannot be traced; and whether it was traced."""
    try:
        return row_cost(model, lora, resolution), True
    except ValueError:
        tokens = model.image_tokens(resolution) + model.text_tokens
        parameters = sum(p.numel() for p in model.transformer.parameters())
        saved = SAVED_PER_BLOCK["full" if lora is None else "lora"] * len(model.blocks(model.transformer))
        return RowCost(2 * parameters * tokens, saved * block_input(model, resolution)), False


def block_input(model: DiffusionModel, resolution: int) -> int:
    """Return the bytes of one row at the entrance of a block."""
    # Most of the linear layers read it.
    width = statistics.mode([m.in_features for m in model.transformer.modules() if isinstance(m, nn.Linear)])
    return (model.image_tokens(resolution) + model.text_tokens) * width * model.dtype.itemsize


def _text(model: DiffusionModel) -> TextEmbeds:
    config: Any = getattr(model.transformer, "config", {})
    width = next((config[name] for name in _SEQUENCE if name in config), None)
    if width is None:
        raise ValueError(f"the transformer of {model.name} names no text width")
    with torch.device("meta"):
        sequence = torch.empty(1, model.text_tokens, width, dtype=model.dtype)
        pooled = torch.empty(1, config[_POOLED], dtype=model.dtype) if config.get(_POOLED) else None
        return TextEmbeds(sequence, pooled, torch.empty(1, model.text_tokens, dtype=torch.bool))


@contextlib.contextmanager
def _as_trained(transformer: nn.Module, dtype: torch.dtype, trained: bool) -> Iterator[set[int]]:
    """Keep the weights as a student does, in `dtype` and with a gradient where they are trained, until the block ends.

    Yields their storages.
    """
    before = [(p, p.data, p.requires_grad) for p in transformer.parameters()]
    try:
        for parameter, data, _ in before:
            parameter.data = data.to(dtype)
            parameter.requires_grad_(trained)
        yield {parameter.untyped_storage()._cdata for parameter, _, _ in before}
    finally:
        for parameter, data, needs_gradient in before:
            parameter.data = data
            parameter.requires_grad_(needs_gradient)


@contextlib.contextmanager
def _adapted(transformer: nn.Module, lora: dict[str, int]) -> Iterator[set[int]]:
    """Run LoRA on the named layers as `opd_fast.engine.merged_lora` does; yields the storages of its factors."""
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    storages: set[int] = set()
    for name, rank in lora.items():
        layer: Any = transformer.get_submodule(name)
        a = torch.empty(rank, layer.in_features, device="meta", requires_grad=True)
        b = torch.empty(layer.out_features, rank, device="meta", requires_grad=True)
        forwards.append((layer, partial(_merged, layer, a, b)))
        storages |= {t.untyped_storage()._cdata for t in (a, b)}
    with patched_forward(forwards):
        yield storages


def _merged(layer: Any, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return merged_linear(x.to(layer.weight.dtype), layer.weight, layer.bias, a, b, 1.0)


class _Engine(TorchFunctionMode):
    """Fused attention, and autocast's casts where `dtype` is given, for tensors without numbers."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.attention = 0
        """Operations of attention so far."""
        self.cast: dict[int, Tensor] = {}
        """Weights in `dtype`, by the identity of the float32 ones: autocast keeps one copy of each."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        convert = {F.layer_norm: _float32, F.linear: self._lower, F.conv2d: self._lower}.get(function)
        if self.dtype is not None and convert is not None:
            args, kwargs = tuple(map(convert, args)), {key: convert(a) for key, a in kwargs.items()}
        return function(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == self.dtype or self.dtype is None:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.cast:
            self.cast[id(value)] = value.to(self.dtype)
        return self.cast[id(value)]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = (self._lower(t) for t in (query, key, value))
        rows = math.prod(q.shape[:-1])
        self.attention += 2 * rows * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        attended: Tensor = _Attention.apply(q, k, v)
        return attended


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


class _Attention(torch.autograd.Function):
    """Keeps what flash attention (arXiv 2205.14135) does: q (..., L, E), k, v, the result, and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Laid out as the query is: (B, L, H, E) in memory where heads were split from tokens.
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
