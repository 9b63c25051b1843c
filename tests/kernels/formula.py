"""The step written plainly in float64, with autograd for the gradients: the judge of both kernel and twin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# a, b, h, std, weight, sigma: a stochastic row, a deterministic one, and one with history.
ROWS = torch.tensor(
    [
        [0.912, -0.131, 0.0, 0.353, 0.0688, 0.707],
        [1.0, -0.105, 0.0, 0.0, 0.0055, 0.602],
        [1.4, -0.31, -0.4, 0.0, 0.048, 0.465],
        [0.8, -0.2, 0.25, 0.5, 0.9, 0.3],
    ]
)
STOCHASTIC, DETERMINISTIC, HISTORY, BOTH = range(4)


def operands(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    guided: str = "both",
    history: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of `fused_step`, without step and noise. Guidance differs from sample to sample, every second
    one has 1 and NaN in its unconditional velocity; `guided` in {"both", "student", "teacher", "none"}."""
    generator = torch.Generator().manual_seed(seed)
    batch = shape[0]

    def draw(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def side(guided: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        cond, uncond = draw(dtype), draw(dtype)
        guidance = 1.5 + 4 * torch.rand(batch, generator=generator)
        guidance[::2] = 1.0
        uncond[::2] = float("nan")
        return cond, uncond if guided else None, guidance.to(device)

    x = draw()
    cond_s, uncond_s, guidance_s = side(guided in ("both", "student"))
    cond_t, uncond_t, guidance_t = side(guided in ("both", "teacher"))
    return {
        "x": x,
        "cond_s": cond_s,
        "uncond_s": uncond_s,
        "cond_t": cond_t,
        "uncond_t": uncond_t,
        "guidance_s": guidance_s,
        "guidance_t": guidance_t.roll(1),
        "table": ROWS.to(device),
        "scale": (0.1 + torch.rand(batch, generator=generator)).to(device),
        "history": draw() if history else None,
    } | ({"uncond_t": uncond_t.roll(1, 0)} if uncond_t is not None else {})


def plain_step(o: dict[str, Any], step: int, noise: Tensor | None = None, reduction: str = "mean") -> dict[str, Tensor]:
    """Every output of the step in float64 on the CPU, for the operands `o`; gradients by autograd."""

    def double(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().cpu().double()

    x, history, scale = double(o["x"]), double(o["history"]), double(o["scale"])
    assert x is not None
    assert scale is not None
    a, b, h, std, weight, sigma = o["table"][step].cpu().double().unbind()
    leaves: dict[str, Tensor] = {}

    def velocity(side: str) -> Tensor:
        c, u, g = double(o[f"cond_{side}"]), double(o[f"uncond_{side}"]), double(o[f"guidance_{side}"])
        assert c is not None
        assert g is not None
        if side == "s":
            leaves["grad_cond"] = c.requires_grad_()
        if u is None:
            return c
        g = g.view(-1, *[1] * (c.dim() - 1))
        u = torch.where(g == 1, 0.0, u)
        if side == "s":
            leaves["grad_uncond"] = u.requires_grad_()
        return torch.where(g == 1, c + 0 * u, u + g * (c - u))

    v_s, v_t = velocity("s"), velocity("t")
    common = a * x if history is None or h == 0 else a * x + h * history
    gap = (v_s - v_t).square().flatten(1)
    loss = scale * weight * (gap.mean(1) if reduction == "mean" else gap.sum(1))
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    mean = common + b * v_s
    drawn = torch.zeros_like(x) if noise is None or std == 0 else noise.cpu().double()
    out = {
        "x_next": mean + std * drawn,
        "loss": loss,
        "x0": x - sigma * v_s,
        "mean_s": mean,
        "mean_t": common + b * v_t,
        **dict(zip(leaves, gradients, strict=True)),
    }
    return {name: t.detach() for name, t in out.items()}


def assert_step(
    out: Any,
    wanted: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    names: set[str] | None = None,
    ulps: float = 0.51,
) -> None:
    """Every output that is present agrees, to float32 rounding of the largest element.

    `names`: the outputs that must be present, and no others. `ulps`: rounding of the gradients to `dtype`, in units in
    the last place: half of one, and the float32 error may tip it."""
    present = {name for name, t in out._asdict().items() if t is not None}
    if names is not None:
        assert present == names
    for name in present:
        got, want = getattr(out, name).detach().cpu(), wanted[name]
        rounded = name.startswith("grad_")
        assert got.dtype == (dtype if rounded else torch.float32), name
        assert got.shape == want.shape, name
        eps = torch.finfo(dtype).eps if rounded else 0.0
        floor = torch.finfo(dtype).smallest_normal * eps if rounded and dtype == torch.float16 else 0.0
        bound = 3e-7 * want.abs().max() + ulps * eps * want.abs() + floor
        # Sums of squares, and states that take in the drawn noise, carry a few more roundings.
        bound = bound * 4 if name in ("loss", "x_next") else bound * (1 + 1e-3)
        worst = ((got.double() - want).abs() - bound).max()
        assert worst <= 0, f"{name} is off by {worst:.3g} more than rounding allows"


def assert_identical(first: Iterable[Tensor | None], second: Iterable[Tensor | None]) -> None:
    """The same outputs, bit for bit."""
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
