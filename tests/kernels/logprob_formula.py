"""Log-probability and ratio written plainly in float64, with autograd: the judge of both kernel and twin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd_kernels import log_prob
from tests.kernels.formula import ROWS, STOCHASTIC

SCALARS = ("logp", "log_ratio", "drift")


def operands(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    guided: bool = True,
    compared: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of `log_prob`, without step: a sample drawn around `mean_old`, which lies a tenth of the noise
    from the mean. Every second row has guidance 1 and NaN in its unconditional velocity."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator)

    x, cond, uncond = draw(), draw().to(dtype), draw().to(dtype)
    guidance = 1.5 + 4 * torch.rand(shape[0], generator=generator)
    guidance[::2] = 1.0
    uncond[::2] = float("nan")
    a, b, _, std = ROWS[STOCHASTIC, :4].tolist()
    v = cond.float()
    if guided:
        g = guidance.view(-1, *[1] * (len(shape) - 1))
        v = torch.where(g == 1, v, uncond.float() + g * (v - uncond.float()))
    mean_old = a * x + b * v + 0.1 * std * draw()
    found = {
        "x": x,
        "sample": mean_old + std * draw(),
        "cond": cond,
        "uncond": uncond if guided else None,
        "guidance": guidance,
        "table": ROWS,
        "mean_old": mean_old if compared else None,
    }
    return {name: None if t is None else t.to(device) for name, t in found.items()}


def plain_log_prob(o: dict[str, Any], step: int, reduction: str = "mean") -> dict[str, Tensor]:
    """The outputs in float64 on the CPU and, as `grad_NAME` and `grad_uncond_NAME`, the gradient of each scalar's sum,
    sample i weighed 1 + i."""

    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().cpu().double()

    x, sample, cond, uncond, g, old = (
        double(o[name]) for name in ("x", "sample", "cond", "uncond", "guidance", "mean_old")
    )
    assert x is not None
    assert sample is not None
    assert cond is not None
    assert g is not None
    a, b, _, std, _, _ = o["table"][step].cpu().double().unbind()
    leaves = [cond.requires_grad_()]
    v = cond
    if uncond is not None:
        g = g.view(-1, *[1] * (x.dim() - 1))
        leaves.append(uncond := torch.where(g == 1, 0.0, uncond).requires_grad_())
        v = torch.where(g == 1, cond + 0 * uncond, uncond + g * (cond - uncond))
    mean = a * x + b * v

    def over(t: Tensor) -> Tensor:
        return t.flatten(1).mean(1) if reduction == "mean" else t.flatten(1).sum(1)

    def density(mean: Tensor) -> Tensor:
        return over(-((sample - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi))

    out = {"logp": density(mean), "mean": mean}
    if old is not None:
        out |= {"log_ratio": density(mean) - density(old), "drift": over((mean - old) ** 2) / (2 * std**2)}
    upstream = 1.0 + torch.arange(len(x), dtype=torch.float64)
    for name in [name for name in SCALARS if name in out]:
        grads = torch.autograd.grad((upstream * out[name]).sum(), leaves, retain_graph=True)
        out |= dict(zip((f"grad_{name}", f"grad_uncond_{name}"), grads, strict=False))
    return {name: t.detach() for name, t in out.items()}


def assert_log_prob(
    o: dict[str, Any],
    wanted: dict[str, Tensor],
    dtype: torch.dtype,
    run: Callable[..., Any] = log_prob,
    ulps: float = 0.51,
    **options: Any,
) -> None:
    """Values of `run` and its gradients through autograd agree with `plain_log_prob`, to the rounding of float32."""
    leaves = [t.requires_grad_() for t in (o["cond"], o["uncond"]) if t is not None]
    out = run(**o, **options, return_mean=True)
    assert (out.log_ratio is None) == (out.drift is None) == (o["mean_old"] is None)
    torch.testing.assert_close(out.mean.cpu().double(), wanted["mean"], rtol=0, atol=3e-7 * 8)
    # The differences of sample and means carry the rounding of the means themselves.
    rounding = 4e-7 * wanted["mean"].abs().max() / (o["sample"].cpu().double() - wanted["mean"]).abs().max()
    upstream = (1.0 + torch.arange(len(o["x"]))).to(o["x"].device)
    for name in SCALARS:
        value = getattr(out, name)
        if value is None:
            continue
        assert value.dtype == torch.float32
        size = wanted["logp"].abs().max()
        assert float((value.detach().cpu().double() - wanted[name]).abs().max()) <= 2e-6 * size, name
        grads = torch.autograd.grad((upstream * value).sum(), leaves, retain_graph=True)
        for key, leaf, grad in zip(("grad", "grad_uncond"), leaves, grads, strict=False):
            assert grad.dtype == leaf.dtype == dtype
            want = wanted[f"{key}_{name}"]
            eps = torch.finfo(dtype).eps
            floor = torch.finfo(dtype).smallest_normal * eps if dtype == torch.float16 else 0.0
            bound = rounding * wanted[f"{key}_logp"].abs().max() + ulps * eps * want.abs() + floor
            assert bool(((grad.cpu().double() - want).abs() <= bound).all()), f"{key} of {name}"
