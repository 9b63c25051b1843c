"""The shortest look at a machine: kernels against their twins, a capture, a float8 product, attention, Inductor.

python -m benchmarks.smoke

Seconds on a GPU whose Triton cache is empty. Prints the versions, then a line for each check; 1 where one failed. On a
CPU the checks that need a GPU are left out, and the rest compare the twins with themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.environment import default_device, device_name
from opd_fast.engine import float8 as fp8
from opd_kernels import (
    fused_step,
    fused_step_reference,
    log_prob,
    log_prob_reference,
    philox_normal,
    quantize_rows,
    quantize_rows_reference,
)

SHAPE = (9, 16, 64, 64)
# a, b, h, std, weight, sigma of step 5 of ten under Flow-SDE at eta 0.7.
TABLE = torch.tensor([[0.91201, -0.13088, 0.0, 0.35280, 0.0688, 0.70728]])


class LeftOut(Exception):
    """The device has no such thing."""


def main(argv: Sequence[str]) -> int:
    """Run every check; 1 where one failed."""
    device = default_device()
    print(f"{device_name(device)}; torch {torch.__version__}; python {sys.version.split()[0]}")
    failed = 0
    for check in (step, log_probability, noise, float8, replay, attention, compiled, refusal):
        begun = time.perf_counter()
        try:
            told = check(device)
        except LeftOut as reason:
            told = f"left out: {reason}"
        except Exception as error:  # the next check may still tell something
            failed += 1
            told = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{check.__name__:<16} {told}  ({time.perf_counter() - begun:.1f} s)", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    return int(failed > 0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def velocities(device: torch.device | str = "cpu") -> list[Tensor]:
    """Four velocities in bfloat16: of the student, of the teacher, each with and without the prompt."""
    return [draw(*SHAPE, seed=i, dtype=torch.bfloat16).to(device) for i in range(4)]


def far(found: Tensor, wanted: Tensor, most: float) -> str:
    """The relative error in words. Raises ValueError above `most`."""
    difference = found.detach().cpu().double() - wanted.detach().cpu().double()
    error = float(difference.norm() / wanted.detach().cpu().double().norm())
    if not error <= most:
        raise ValueError(f"relative error {error:.2g}, more than {most:.0e}")
    return f"{error:.1e}"


def stepped(device: torch.device | str, run: Callable[..., object] = fused_step) -> Callable[[], object]:
    """The fused step on `device` as a call without arguments."""
    cond_s, uncond_s, cond_t, uncond_t = velocities(device)
    g = torch.full(SHAPE[:1], 4.5, device=device)
    x, noise, scale = draw(*SHAPE, seed=8).to(device), draw(*SHAPE, seed=9).to(device), torch.ones_like(g)
    row = torch.zeros((), dtype=torch.int64, device=device)
    table = TABLE.to(device)
    return lambda: run(x, cond_s, uncond_s, cond_t, uncond_t, g, g, table, row, scale, noise=noise)


def step(device: torch.device) -> str:
    """The fused step against its twin on the CPU."""
    found, wanted = stepped(device)(), stepped("cpu", fused_step_reference)()
    parts = ("x_next", "loss", "grad_cond", "grad_uncond")
    return ", ".join(f"{name} {far(getattr(found, name), getattr(wanted, name), 1e-3)}" for name in parts)


def log_probability(device: torch.device) -> str:
    """The log-probability against its twin on the CPU."""

    def run(function: Callable[..., object], where: torch.device | str) -> Tensor:
        cond, uncond, _, _ = velocities(where)
        x, sample = draw(*SHAPE, seed=8).to(where), draw(*SHAPE, seed=9).to(where)
        g = torch.full(SHAPE[:1], 4.5, device=where)
        out: Tensor = function(x, sample, cond, uncond, g, TABLE.to(where), 0).logp  # type: ignore[attr-defined]
        return out

    return far(run(log_prob, device), run(log_prob_reference, "cpu"), 1e-5)


def noise(device: torch.device) -> str:
    """Philox on the device against numpy's."""
    keys = torch.arange(4) << 33
    return far(philox_normal(keys.to(device), SHAPE[1:], 3), philox_normal(keys, SHAPE[1:], 3), 1e-5)


def float8(device: torch.device) -> str:
    """Rows quantised against the twin, and a product in float8 against the one in float32."""
    x = draw(512, 1536, seed=1, dtype=torch.bfloat16)
    found, wanted = quantize_rows(x.to(device)), quantize_rows_reference(x)
    rows = far(found.q.float() * found.scale[:, None], wanted.q.float() * wanted.scale[:, None], 1e-6)
    why = fp8.supported(device)
    if why is not None:
        return f"rows {rows}; no product: {why}"
    weight = fp8.quantize_weight(draw(768, 1536, seed=2, dtype=torch.bfloat16).to(device))
    product = fp8._forward(x.to(device), weight.q, weight.scale, None, torch.bfloat16)
    return f"rows {rows}, product {far(product, x.float() @ draw(768, 1536, seed=2).bfloat16().float().t(), 6e-2)}"


def replay(device: torch.device) -> str:
    """A captured step gives the step's bits again."""
    _needs_cuda(device)
    from opd_kernels.recording import Recorder

    run = stepped(device)
    wanted = run()
    recorder = Recorder(device)
    recorder.warm_up(run)
    graph, found = recorder.record(run)
    graph.replay()
    if not torch.equal(found.x_next, wanted.x_next):  # type: ignore[attr-defined]
        raise ValueError("a replay gives other bits")
    return "the same bits"


def attention(device: torch.device) -> str:
    """cuDNN's attention, forward and backward, against the plain one."""
    _needs_cuda(device)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(backend: SDPBackend) -> list[Tensor]:
        q, k, v = (draw(2, 24, 333, 64, seed=i, dtype=torch.bfloat16).to(device).requires_grad_() for i in range(3))
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

    pairs = zip(run(SDPBackend.CUDNN_ATTENTION), run(SDPBackend.MATH), strict=True)
    return ", ".join(far(found, wanted, 2e-2) for found, wanted in pairs)


def compiled(device: torch.device) -> str:
    """Inductor and Triton make a kernel of a normalisation."""
    _needs_cuda(device)

    def function(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:]) * 2 + x

    x = draw(64, 1536, seed=5).to(device)
    return far(torch.compile(function, dynamic=False)(x), function(x), 1e-5)


def refusal(device: torch.device) -> str:
    """A capture that is refused leaves the process whole."""
    _needs_cuda(device)
    from opd_kernels.recording import Recorder

    recorder, x = Recorder(device), draw(64, 64).to(device)
    try:
        recorder.record(lambda: float((x @ x).sum()))
    except RuntimeError as error:
        told = " ".join(str(error).split())[:60]
    else:
        raise ValueError("a capture that reads a number back was not refused")
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        raise ValueError("the capture's stream stayed the current one")
    torch.randn(3, device=device)
    graph, _ = recorder.record(lambda: x @ x)
    graph.replay()
    torch.cuda.synchronize(device)
    return f"refused ({told}) and captured after it"


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise LeftOut("needs a GPU")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
