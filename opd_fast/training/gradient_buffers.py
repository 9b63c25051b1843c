"""Gradients at addresses that stay, as captured graphs need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientBuffers:
    """A buffer for the gradient of each of `parameters`, made when they are first asked for."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._buffers: list[Tensor] = []

    def in_place(self) -> list[Tensor]:
        """Every parameter's gradient, in the same buffer from round to round, holding what was there.

        Zeroing gradients to None is fine: the buffer comes back, zeroed.
        """
        if not self._buffers:
            self._buffers = [torch.zeros_like(p) for p in self._parameters]
        empty = []
        for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        return self._buffers
