"""Flow matching on a CPU, which makes the bundled world's generalist and base."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def flow_matching(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    name: str,
    on_step: Callable[[int], None],
) -> None:
    """Minimise E ||v(x_t, t) - (eps - x0)||^2 over `batches` of (x0, token ids).

    The learning rate warms up to `lr`, then falls as a cosine to a twentieth of it.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    total, start = 0.0, time.time()
    compiled = torch.compile(model)
    for step in range(steps):
        x0, ids = next(batches)
        noise, t = torch.randn_like(x0), sample_times(len(x0))
        x = torch.lerp(x0, noise, t[:, None, None, None])
        attention = mock.patch.object(nn.functional, "scaled_dot_product_attention", plain_attention)
        with attention, torch.autocast("cpu", dtype=torch.bfloat16):
            v = compiled(x, t, ids)
        loss = (v.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        on_step(step)
        if (step + 1) % 100 == 0:
            log(f"{name} {step + 1}/{steps} loss {total / 100:.4f} {100 / (time.time() - start):.2f} steps/s")
            total, start = 0.0, time.time()


def sample_times(n: int) -> Tensor:
    """Draw n logit-normal times (SD3, arXiv 2403.03206, section 3.1), shifted toward noise as the sampler's steps."""
    u = torch.sigmoid(torch.randn(n))
    return 1.8 * u / (1 + 0.8 * u)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, is_causal: bool = False, **__: Any
) -> Tensor:
    """Compute attention as two products; q, k, v and the result are (B, heads, tokens, width).

    On a CPU, in bfloat16, the backward pass of torch's own attention takes seven times as long.
    """
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2]) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).to(v.dtype)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])
