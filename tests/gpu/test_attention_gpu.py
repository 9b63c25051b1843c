"""The attention backends on a CUDA device: right at ragged lengths, really taken, compiled, captured, and chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opd_fast.engine import attention_choice as attention
from opd_fast.engine.attention import BACKENDS, route
from opd_fast.engine.attention_choice import Case, choose, unfit
from opd_fast.engine.fused_qkv import fuse_projections
from opd_kernels.recording import Recorder
from tests.techniques import sites
from tests.tiny import tiny_transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
# Ragged, and SD3.5-Medium at 512 pixels with 205 tokens of text.
TOKENS = [77, 1229]
OPERATIONS = {
    "flash": "aten::_scaled_dot_product_flash_attention",
    "cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "efficient": "aten::_scaled_dot_product_efficient_attention",
    "math": "aten::_scaled_dot_product_attention_math",
}
EXPECTED = {name: {operation} for name, operation in OPERATIONS.items()} | {
    name: set[str]() for name in ("products", "xformers", "flash_2", "flash_3")
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path))


def case(tokens: int = TOKENS[1], dtype: torch.dtype = torch.bfloat16, **more: Any) -> Case:
    return Case(CUDA, dtype, rows=2, heads=24, head_dim=64, tokens=tokens, products=True, **more)


def skip_unfit(backend: str, asked: Case) -> None:
    reason = unfit(backend, asked)
    if reason is not None:
        pytest.skip(f"{backend} {reason}")


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Two blocks with heads of 64, dual attention in the first, on the device."""
    model = tiny_transformer(attention_head_dim=64, num_attention_heads=2, caption_projection_dim=128)
    moved: nn.Module = model.to(CUDA, dtype)
    return moved


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 16, 16), (2, 9, 32), (2, 32)]
    return [torch.randn(shape, generator=generator).to(CUDA, dtype) for shape in shapes]


def call(model: nn.Module, x: Tensor, text: Tensor, pooled: Tensor, level: Tensor) -> Tensor:
    return model(x, text, pooled, level, return_dict=False)[0]


def run(model: nn.Module, x: Tensor, text: Tensor, pooled: Tensor, level: Tensor, slope: Tensor) -> list[Tensor]:
    """The output, the gradient of x and those of the trainable parameters."""
    out = call(model, x, text, pooled, level)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(out, [x, *trained], slope, allow_unused=True)
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


def operands(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    x, text, pooled = inputs(dtype)
    return [x.requires_grad_(), text, pooled, torch.full((2,), 500.0, device=CUDA), torch.randn_like(x)]


def assert_same(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    """Over all gradients together: some are zero but for rounding."""
    assert len(found) == len(wanted)
    for got, right in ((found[:1], wanted[:1]), (found[1:], wanted[1:])):
        one, other = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (got, right))
        assert (one - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [{}, {"needs_grad": True}, {"needs_grad": True, "mask": True}])
def test_against_float32(backend: str, tokens: int, dtype: torch.dtype, asked: dict[str, bool]) -> None:
    wanted = case(tokens, dtype, **asked)
    skip_unfit(backend, wanted)
    assert isinstance(attention._try(backend, wanted), attention._Trial)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sd3_routed(backend: str, fused: bool, compiled: bool) -> None:
    """Against the published processor in float32; and the operation named is the one that runs."""
    skip_unfit(backend, case(TOKENS[0], needs_grad=True))
    torch.compiler.reset()
    exact = network(torch.float32).requires_grad_(not fused)
    model = copy.deepcopy(exact).bfloat16()
    wanted = run(exact, *(t.float().detach().requires_grad_(t.requires_grad) for t in operands()[:4]), slope())
    if fused:
        fuse_projections(model, sites(model))
    assert route(sites(model), backend) == 3
    if compiled:
        for block in model.transformer_blocks:  # type: ignore[union-attr]
            block.compile(fullgraph=True)
    given = [*operands()[:4], slope().bfloat16()]
    assert_same(run(model, *given), wanted, 0.04)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model, *given)
    seen = {event.key for event in profile.key_averages()}
    if backend in EXPECTED and not (compiled and backend in ("math", "products")):
        # Compiled, these two are matrix products, which the compiler may put together in its own way.
        assert seen & set(OPERATIONS.values()) == EXPECTED[backend]


def slope() -> Tensor:
    return torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(3)).to(CUDA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured(backend: str) -> None:
    """Forward and backward in one CUDA graph, replayed on other inputs, give what they give outside it."""
    skip_unfit(backend, case(TOKENS[0], needs_grad=True))
    model = network().requires_grad_(False)
    fuse_projections(model, sites(model))
    route(sites(model), backend)
    given = operands()

    def work() -> list[Tensor]:
        return run(model, *given)

    recorder = Recorder(CUDA)
    recorder.warm_up(work, 3)
    graph, captured = recorder.record(work)
    with torch.no_grad():
        for tensor in given[:3]:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert_same(replayed, work(), 1e-2)  # a backward by atomic additions does not repeat itself


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend: str) -> None:
    skip_unfit(backend, case(TOKENS[0]))
    model, given = network().requires_grad_(False), inputs()
    level = torch.full((2,), 500.0, device=CUDA)
    route(sites(model), backend)
    attend: Callable[[], Tensor] = lambda: call(model, *given, level)  # noqa: E731
    before = torch.cuda.get_sync_debug_mode()
    with torch.no_grad():
        attend()
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("asked", [{}, {"needs_grad": True}, {"needs_grad": True, "mask": True}])
def test_auto(asked: dict[str, bool]) -> None:
    wanted = case(**asked)
    attention._measure(attention._candidates(wanted), wanted)  # the libraries' workspaces stay
    before = torch.cuda.memory_allocated()
    choice = choose("auto", wanted)
    assert torch.cuda.memory_allocated() == before
    assert not choice.dropped
    assert {"native", "efficient"} <= choice.milliseconds.keys()
    assert choice.milliseconds[choice.backend] <= 1.05 * min(choice.milliseconds.values())
    again = choose("auto", wanted)
    assert again.backend == choice.backend
    assert again.line.endswith("; measured earlier)")
