"""Frozen weights in float8: the emulated products, their gradients, which layers, the gate, and the bundled model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from benchmarks.fp8_error import (
    OUTLIER,
    ask,
    bundled,
    in_float8,
    layer_errors,
    outliers,
    quantize_student,
    relative,
    run,
)
from opd_fast.config import StudentConfig
from opd_fast.engine import float8 as fp8
from opd_fast.engine.float8 import (
    Float8Linear,
    check_losses,
    frozen_layers,
    quantize_frozen,
    quantize_weight,
    requantize,
    supported,
)
from opd_fast.engine.merged_lora import MergedLayers, merged_linear
from opd_fast.errors import UserError
from opd_fast.models import load_model, meta_model
from opd_fast.models.techniques import token_layers
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import ADAPTER, Student
from opd_kernels import quantize_rows
from tests.tiny import save_tiny, tiny_transformer

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 0.038
"""Relative error of a product of two operands rounded to 4 significant bits, without cancellation."""


def linear(inside: int = 64, outside: int = 48, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inside, outside, bias=bias, dtype=dtype).requires_grad_(False)


def dequantized(x: Tensor) -> Tensor:
    """x (rows, K) as its quantised rows say, float64."""
    q, scale = quantize_rows(x)
    return q.double() * scale.double()[:, None]


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product_of_the_quantised_operands(dtype: torch.dtype, bias: bool) -> None:
    plain = linear(dtype=dtype, bias=bias)
    layer, x = Float8Linear(plain), torch.randn(2, 5, 64).to(dtype)
    y = layer(x)
    assert (y.shape, y.dtype) == ((2, 5, 48), dtype)
    wanted = dequantized(x.flatten(0, 1)) @ dequantized(plain.weight).T
    wanted = wanted + (plain.bias.double() if bias else 0.0)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.flatten(0, 1).double(), wanted, rtol=unit, atol=1e-6)
    assert ROUNDING / 2 < relative(y, plain(x)) < 1.5 * ROUNDING


def test_autocast_does_not_reach_the_emulation() -> None:
    layer, x = Float8Linear(linear(dtype=torch.bfloat16), transposed=True), torch.randn(7, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torchs_own_product_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as on a GPU, forward and backward; torch has a row-wise product for CPUs as well from some version on."""
    layer = Float8Linear(linear(dtype=dtype), transposed=True)
    x, dy = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(2, 5, 48).to(dtype)

    def gradients() -> tuple[Tensor, Tensor]:
        y = layer(x)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    ours = gradients()
    monkeypatch.setattr(fp8, "_has_units", lambda device: True)
    monkeypatch.setattr(fp8, "_on_units", called := Mock(wraps=fp8._on_units))
    try:
        theirs = gradients()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"torch {torch.__version__} has no such product on a CPU: {error}")
    for mine, its in zip(ours, theirs, strict=True):
        assert its.dtype == dtype
        assert relative(its, mine) < 4e-3  # torch's is rounded to bfloat16 whatever the type
    assert called.call_count == 2


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_activations_alone(transposed: bool, dtype: torch.dtype) -> None:
    plain = linear(dtype=dtype)
    layer = Float8Linear(plain, transposed=transposed)
    x, dy = torch.randn(3, 5, 64).to(dtype).requires_grad_(), torch.randn(3, 5, 48).to(dtype)
    layer(x).backward(dy)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    slopes, weight = dy.flatten(0, 1), plain.weight
    if transposed:
        wanted = dequantized(slopes) @ dequantized(weight.T.contiguous()).T
    else:
        wanted = slopes.double() @ dequantized(weight)
    assert relative(x.grad.flatten(0, 1), wanted) < (1e-6 if dtype == torch.float32 else 6e-3)
    assert relative(x.grad.flatten(0, 1), slopes.double() @ weight.double()) < 1.5 * ROUNDING
    assert all(p.grad is None for p in layer.parameters())


def test_moving_and_casting_leave_the_numbers() -> None:
    layer = Float8Linear(linear(), transposed=True)
    before = copy.deepcopy(layer)
    layer.to(torch.bfloat16).to("cpu")
    for name in ("q", "scale", "columns", "column_scale"):
        old, new = getattr(before, name), getattr(layer, name)
        assert new.dtype == old.dtype
        assert torch.equal(new.float(), old.float())
    x = torch.randn(4, 64)
    assert (before(x).dtype, layer(x).dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    other = Float8Linear(nn.Linear(64, 48).requires_grad_(False), transposed=True)
    other.load_state_dict(before.state_dict())
    assert torch.equal(other(x), before(x))


def test_layers_that_cannot_be_kept_so() -> None:
    with pytest.raises(ValueError, match="trainable layer"):
        Float8Linear(nn.Linear(32, 32))
    for inside, outside in ((24, 32), (32, 40)):
        with pytest.raises(ValueError, match="multiples of 16"):
            Float8Linear(linear(inside, outside))


# --- which layers -----------------------------------------------------------------------------------------------------

# Eight projections of each joint attention, but to_add_out where the text stream ends, and so on.
PUBLISHED = {
    "stabilityai/stable-diffusion-3.5-medium": 24 * 8 - 1 + 13 * 4 + 24 * 2 + 23 * 2,
    "stabilityai/stable-diffusion-3.5-large": 38 * 8 - 1 + 38 * 2 + 37 * 2,
    "black-forest-labs/FLUX.1-dev": 19 * (8 + 4) + 38 * (3 + 2),
    "Qwen/Qwen-Image": 60 * (8 + 4),
    "Tongyi-MAI/Z-Image-Turbo": (2 + 2 + 30) * (4 + 3),
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_attention_and_feed_forward_of_every_family(path: str) -> None:
    model = meta_model(path, dtype=torch.bfloat16)
    transformer = copy.deepcopy(model.transformer).requires_grad_(False)
    found = frozen_layers(token_layers(transformer))
    assert len(found) == PUBLISHED[path]
    inside = {id(m) for block in model.blocks(transformer) for m in block.modules()}
    assert all(id(layer) in inside for layer in found.values())
    assert not any(word in name for name in found for word in ("norm", "_mod.", "modulation", "embed"))
    # What is left of the blocks are the modulations: a few products of a sample's one embedding.
    rest = [n for n, m in transformer.named_modules() if type(m) is nn.Linear and id(m) in inside and n not in found]
    assert all("norm" in name or "_mod." in name or "modulation" in name for name in rest)


def test_wrapped_trainable_and_skipped_layers_stay(tmp_path: Path) -> None:
    model = load_model(save_tiny(tmp_path), device="cpu", dtype=torch.float32)
    everything = len(frozen_layers(token_layers(model.transformer)))
    Student.build(model, StudentConfig(rank=4, alpha=8.0))
    transformer: Any = model.transformer
    wrapped = [m for m in transformer.modules() if isinstance(m, LoraLinear)]
    transformer.transformer_blocks[0].ff.net[2].weight.requires_grad_(True)
    skip = ["transformer_blocks.0.ff_context.net.2"]
    assert len(wrapped) == 15
    layers = {name: layer for name, layer in token_layers(transformer).items() if name not in skip}
    assert quantize_frozen(transformer, layers) == everything - 15 - 2
    assert all(type(m.get_base_layer()) is nn.Linear for m in wrapped)
    assert type(transformer.get_submodule(skip[0])) is nn.Linear
    assert type(transformer.transformer_blocks[0].ff.net[2]) is nn.Linear
    # The one that was skipped; float8 is not quantised again.
    assert quantize_frozen(transformer, token_layers(transformer)) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_bytes_of_a_weight(transposed: bool) -> None:
    """Half of bfloat16's, or, with the transposed copy, as many; four more a row and column for the scales."""
    transformer = tiny_transformer(attention_head_dim=64).to(torch.bfloat16).requires_grad_(False)
    layers = frozen_layers(token_layers(transformer))
    weights, sides = sum(m.weight.numel() for m in layers.values()), [m.weight.shape for m in layers.values()]
    scales = 4 * sum(out + (inside if transposed else 0) for out, inside in sides)

    def held() -> int:
        return sum(t.nbytes for t in [*transformer.parameters(), *transformer.buffers()])

    before = held()
    assert quantize_frozen(transformer, token_layers(transformer), transposed=transposed) == len(layers) > 20
    assert before - held() == (0 if transposed else weights) - scales
    assert scales < 0.04 * weights


# --- the student's merged layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [True, False])
def test_merged_product_and_its_gradients(transposed: bool) -> None:
    merged, bias = torch.randn(48, 64), torch.randn(48)
    weight = quantize_weight(merged, transposed=transposed)
    dy = torch.randn(2, 5, 48)
    inputs = [torch.randn(2, 5, 64), torch.randn(4, 64), torch.randn(48, 4)]  # x, a, b

    def gradients(run: Any) -> tuple[Tensor, list[Tensor]]:
        x, a, b = (t.clone().requires_grad_() for t in inputs)
        y = run(x, a, b)
        return y, list(torch.autograd.grad(y, (x, a, b), dy))

    y, (dx, da, db) = gradients(lambda x, a, b: merged_linear(x, weight, bias, a, b, 2.0))
    truth, (dx_true, da_true, db_true) = gradients(lambda x, a, b: merged_linear(x, merged, bias, a, b, 2.0))
    plain = Float8Linear(linear(), transposed=transposed)
    plain.q, plain.scale, plain.columns, plain.column_scale = weight
    plain.bias = nn.Parameter(bias, requires_grad=False)
    assert torch.equal(y, plain(inputs[0]))
    assert 0.01 < relative(y, truth) < 1.5 * ROUNDING
    assert 0.01 < relative(dx, dx_true) < 1.5 * ROUNDING
    assert torch.equal(da, da_true)  # of x and dy as they are
    assert torch.equal(db, db_true)


def test_requantising_stays_in_place() -> None:
    held = quantize_weight(torch.randn(32, 48), transposed=True)
    places = [t.data_ptr() for t in held if t is not None]
    other = torch.randn(32, 48) * 3
    assert requantize(other, held) is held
    assert [t.data_ptr() for t in held if t is not None] == places
    for old, new in zip(held, quantize_weight(other, transposed=True), strict=True):
        assert old is not None
        assert new is not None
        assert torch.equal(old.float(), new.float())
    torch.testing.assert_close(
        held.q.float() * held.scale[:, None], other, rtol=2**-4, atol=float(other.abs().max()) / 448 / 512
    )


def tiny_student(folder: Path) -> Student:
    model = load_model(save_tiny(folder), device="cpu", dtype=torch.float32)
    student = Student.build(model, StudentConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return student


def through(student: Student) -> tuple[Tensor, Tensor]:
    """The student's output and its gradient in one row, merged for the round."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 5, 32, generator=generator)
    for parameter in student.parameters():
        parameter.grad = None
    with student.merged_for_round() as transformer:
        y = transformer(x, text, torch.randn(3, 32, generator=generator), torch.full((3,), 500.0), return_dict=False)[0]
        y.square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def in_float8_for_good(student: Student) -> MergedLayers:
    layers = MergedLayers(student.transformer, ADAPTER, float8=True)
    student._merged = layers
    quantize_frozen(student.transformer, token_layers(student.transformer), transposed=True)
    return layers


def test_a_student_merged_in_float8(tmp_path: Path) -> None:
    student = tiny_student(tmp_path)
    y, gradient = through(student)
    layers = in_float8_for_good(student)
    found, slope = through(student)
    assert 0.005 < relative(found, y) < 0.08
    assert 0.005 < relative(slope, gradient) < 0.15
    # The next round merges the new weights into the same places.
    weights = layers._weights
    assert weights is not None
    places = [t.data_ptr() for w in weights for t in w if t is not None]
    for parameter in student.parameters():
        parameter.data.mul_(1.5)
    assert relative(through(student)[0], found) > 0.1
    assert [t.data_ptr() for w in weights for t in w if t is not None] == places
    assert not any("forward" in vars(module) for module in student.transformer.modules())


# --- compilation ------------------------------------------------------------------------------------------------------


def test_blocks_compile_whole(tmp_path: Path) -> None:
    """Each block is one graph, forward and backward, and computes the same."""
    student = tiny_student(tmp_path)
    in_float8_for_good(student)
    eager = through(student)
    compiled: Any = student.transformer
    for block in compiled.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    found = through(student)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# --- support, outliers, the gate --------------------------------------------------------------------------------------


def test_why_a_device_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supported("cpu") == "a CPU has no fp8 matrix units; give engine.precision auto"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An A100")
    said = supported(torch.device("cuda", 0))
    assert said is not None
    assert said.startswith("An A100 has compute capability 8.0 and fp8 matrix units begin with 8.9")
    assert said.endswith("give engine.precision auto")


class Spread(nn.Module):
    """A plain layer, and one whose inputs have a huge channel that it does not look at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]).requires_grad_(False)
        self.blocks[1].weight[:, 0] = 0.0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[1](self.blocks[0](x) + 1e6 * torch.eye(32)[0])
        return y


def test_layers_with_outliers_are_found() -> None:
    module = Spread()
    errors = layer_errors(token_layers(module), lambda: [module(torch.randn(64, 32)) for _ in range(3)])
    assert ROUNDING / 2 < errors["blocks.0"] < 1.5 * ROUNDING < OUTLIER
    assert errors["blocks.1"] > 0.5
    above, line = outliers(errors)
    assert above == ["blocks.1"]
    assert "1 of 2 stay as they are, being off by more than 10%: blocks.1 " in line
    assert quantize_frozen(module, {n: layer for n, layer in token_layers(module).items() if n not in above}) == 1
    assert not any(m._forward_hooks for m in module.modules())


def test_gate() -> None:
    exact = torch.tensor([[1.0, 3.0], [0.5, 0.5]])
    line = check_losses(exact, exact * torch.tensor([[1.002], [0.991]]))
    assert line == "precision: fp8 (step losses move by -0.90% at most, at step 1; their sum by -0.02%)"
    check_losses(exact.sum(1), exact.sum(1) * 1.0099)
    with pytest.raises(
        UserError, match=r"engine\.precision: fp8 moves the loss of step 1 by \+1\.10% .* 1% is allowed"
    ):
        check_losses(exact, exact * torch.tensor([[1.0], [1.011]]))
    with pytest.raises(UserError, match="not finite"):
        check_losses(exact, exact.clone().fill_(float("nan")))
    with pytest.raises(UserError, match="step 0 a loss where there is none"):
        check_losses(torch.tensor([0.0, 1.0]), torch.tensor([1e-9, 1.0]))
    check_losses(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="alike"):
        check_losses(exact, exact[:1])


# --- the bundled model ------------------------------------------------------------------------------------------------


class Bundled:
    """One round of the bundled recipe with two samples of each task, exact and in float8, on the same states."""

    def __init__(self) -> None:
        self.method = bundled(2)
        self.setup = self.method.setup
        self.batch = self.method.batch(0)
        self.exact = run(self.method, self.batch, self.setup.teachers)
        teacher = self.setup.teachers.teachers[0]
        self.errors = layer_errors(
            token_layers(teacher.transformer), lambda: ask(self.method, self.batch, self.exact.states[:-1])
        )
        self.quantized = in_float8(self.setup.teachers)
        self.found = run(self.method, self.batch, self.quantized, self.exact.states)


@pytest.fixture(scope="module")
def world(one_thread: None) -> Bundled:
    return Bundled()


def test_bundled_layers(world: Bundled) -> None:
    """All 45 layers of attention and feed-forward, none of them worse than rounding explains."""
    assert len(world.errors) == 45
    mean = sum(world.errors.values()) / 45
    assert 0.01 < mean < 0.025
    assert max(world.errors.values()) < 0.045
    assert outliers(world.errors)[0] == []


def test_bundled_velocities_and_losses(world: Bundled) -> None:
    """The teachers' velocities move by 3 % at most; the round's loss by 3 %, being the square of a gap a few times as
    large. The gate stops where a single step moves by more than it is told to allow."""
    found, exact = world.found, world.exact
    errors = [relative(f, e) for f, e in zip(found.velocities, exact.velocities, strict=True)]
    assert min(errors) > 0.005
    assert max(errors) < 0.035
    assert abs(float(found.losses.sum() / exact.losses.sum()) - 1) < 0.03
    moved = (found.losses.double().sum(1) / exact.losses.double().sum(1) - 1).abs()
    moved = moved[moved.isfinite()]  # the last step is not trained
    most = float(moved.max())
    assert 0.0005 < most < 0.05
    with pytest.raises(UserError, match=r"engine\.precision: fp8 moves the loss of step"):
        check_losses(exact.losses, found.losses, limit=0.9 * most)
    assert "step losses move by" in check_losses(exact.losses, found.losses, limit=1.1 * most)


def test_bundled_one_pass_says_the_same(world: Bundled) -> None:
    """The engine's own round, with the quantised teachers in place, has the losses measured here."""
    setup = world.setup
    out = one_pass(setup.model, setup.student, world.quantized, world.batch, setup.table, world.method.weight)
    gradient = torch.cat([p.grad.flatten() for p in setup.student.parameters() if p.grad is not None])
    torch.testing.assert_close(out.losses, world.found.losses, rtol=1e-5, atol=0)
    assert relative(gradient, world.found.gradient) < 1e-5
    assert 0.01 < relative(gradient, world.exact.gradient) < 0.15
    for parameter in setup.student.parameters():
        parameter.grad = None


def test_bundled_student(world: Bundled) -> None:
    """The last of these: the student's base stays in float8."""
    quantize_student(world.setup)
    found = run(world.method, world.batch, world.setup.teachers, world.exact.states)
    assert abs(float(found.losses.sum() / world.exact.losses.sum()) - 1) < 0.03
    assert 0.01 < relative(found.gradient, world.exact.gradient) < 0.15
