"""The plan's numbers against what runs: operations and kept bytes of a forward, and the memory of a whole round."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opd_fast.config import StudentConfig
from opd_fast.config.command_line import parse
from opd_fast.distributed.flops import SAVED_PER_BLOCK, row_cost
from opd_fast.distributed.plan import lora_modules, make_plan
from opd_fast.models import load_model, meta_model
from opd_fast.training.methods.opd import OPD
from opd_fast.training.optimizer import make_optimizer
from opd_fast.training.setup import prepare
from opd_fast.training.student import Student
from tests import tiny, tiny_flux, tiny_qwen, tiny_z_image
from tests.live import LiveBytes, storage_bytes

FAMILIES: dict[str, Callable[..., Path]] = {
    "sd3": tiny.save_tiny,
    "flux": tiny_flux.save_tiny_flux,
    "qwen_image": tiny_qwen.save_tiny,
    "z_image": tiny_z_image.save_tiny,
}


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row(family: str, kind: str, tmp_path: Path) -> None:
    """A forward without numbers against one with them."""
    folder = FAMILIES[family](tmp_path / family)
    model = load_model(str(folder), device="cpu", dtype=torch.float32)
    student = Student.build(model, StudentConfig(kind=kind, rank=4))  # type: ignore[arg-type]
    meta = meta_model(str(folder), dtype=torch.float32)
    layers = lora_modules(meta.transformer, meta.targets("attention"))
    cost = row_cost(meta, dict.fromkeys(layers, 4) if kind == "lora" else None, 64)

    weights = [*student.transformer.parameters(), *(student._merged._merge() if student._merged else ())]
    known = {w.untyped_storage()._cdata for w in weights}
    kept: list[Tensor] = []
    counter = FlopCounterMode(display=False)
    x = torch.randn(1, *model.latent_shape(64))

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept.append(tensor)
        return tensor

    text = model.encode(["a red circle"])
    with student.merged_for_round() as transformer:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.velocity(transformer, x, torch.tensor(0.5), text)
        # The counter does not know the CPU's fused attention.
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
            model.velocity(transformer, x, torch.tensor(0.5), text)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.saved == pytest.approx(storage_bytes(kept), rel=0.05)


def test_what_cannot_be_traced_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse(["bundled"]).config
    traced = make_plan(config)
    monkeypatch.setattr("opd_fast.models.sd3.SD3.velocity", lambda self, transformer, x, *_: float(x.sum()))
    with pytest.raises(ValueError, match="sd3 cannot be traced"):
        row_cost(meta_model("bundled", dtype=torch.float32), None, 32)
    rough = make_plan(config)
    assert (traced.traced, rough.traced) == (True, False)
    tokens = rough.image_tokens + rough.text_tokens
    assert rough.row.flops == 2 * rough.workload.parameters * tokens
    # In float32 the norms keep no second copy, so the estimate lies above.
    assert traced.row.saved < rough.row.saved < 3 * traced.row.saved
    assert rough.row.saved % SAVED_PER_BLOCK["lora"] == 0


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ([], 0.95, 1.2),
        (["--student.kind", "full"], 0.95, 1.2),
        (["--engine.placement", "shared", "--student.guidance", "2", "--train.micro_batch", "4"], 0.95, 1.2),
    ],
)
def test_a_round(options: list[str], least: float, most: float) -> None:
    """One round of the bundled model: what lies there to the byte, activations within a factor of the plan's."""
    argv = ["bundled", "--train.samples_per_task", "2", "--train.rounds", "2", "--evaluation.every", "0", *options]
    config = parse(argv).config
    plan = make_plan(config)
    setup = prepare(config, log=lambda text: None)
    optimizer, method = make_optimizer(setup.student, config), OPD(setup)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    method.accumulate(0, scaler)
    optimizer.step()
    student, base = setup.student, _without_adapters(setup.model.transformer)

    teachers: list[Any] = [t.transformer for t in setup.teachers.teachers if t.adapter is None]
    frozen = [p for teacher in teachers for p in teacher.parameters()]
    if not teachers:
        frozen = [p for name, p in setup.model.transformer.named_parameters() if ".teacher_" in name]
    held = {
        "base": base,
        "teachers": frozen,
        "merged layers": student._merged._merge() if student._merged else [],
        "trained weights": student.parameters(),
        "gradients": [p.grad for p in student.parameters() if p.grad is not None],
        "optimizer": [t for state in optimizer.state.values() for t in state.values() if t.dim()],
        "average": student.ema.values,
        "working copy": [],
    }
    for purpose, tensors in held.items():
        assert storage_bytes(tensors) == plan.bytes[purpose], purpose

    gc.collect()
    with LiveBytes() as live:
        method.accumulate(1, scaler)
    assert least < live.peak / plan.bytes["activations"] < most
    assert live.now < 2**16  # nothing of a round is left


def _without_adapters(transformer: nn.Module) -> list[Tensor]:
    return [p for name, p in transformer.named_parameters() if ".lora_" not in name]


def test_live_bytes() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        before.add_(1)
        kept = before + 1
        dropped = torch.cat([kept, kept])
        del dropped
        view = kept[:10]
        del view
    assert (live.now, live.peak) == (4000, 12000)
    del kept
    assert live.now == 0
