"""Families from elsewhere: the page on adding one, run as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_fast.config import EngineConfig, StudentConfig, TeacherConfig
from opd_fast.engine.float8 import quantize_frozen
from opd_fast.models import DiffusionModel, find_family, load_model, meta_model
from opd_fast.objectives import step_weights
from opd_fast.solvers import solver_table
from opd_fast.train import main
from opd_fast.training.batch import RoundBatch
from opd_fast.training.optimize import ActiveTechniques, ForwardSizes, ResolvedSettings, apply_techniques
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy model's folder, and the module of its family on the path."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "toy_family.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_family", raising=False)
    kind = find_family("toy_family:Toy", lambda: tmp_path)
    torch.manual_seed(0)
    sys.modules[kind.__module__].ToyNet().save_pretrained(tmp_path / "model" / "transformer")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    teacher = f"[{{name: a, weights: {folder / 'teacher'}, prompts: {folder / 'prompts.txt'}, guidance: 2}}]"
    model = ["--model.path", str(folder / "model"), "--model.family", "toy_family:Toy", "--model.resolution", "8"]
    rest = ["--student.rank", "4", "--train.rounds", "30", "--train.samples_per_task", "8", "--train.lr", "0.02"]
    return [*model, "--teachers", teacher, *rest, "--evaluation.every", "0", "--logging.tensorboard", "false", *more]


def load_toy(folder: Path) -> DiffusionModel:
    return load_model(str(folder / "model"), "toy_family:Toy", device="cpu", dtype=torch.float32)


def write_teacher(folder: Path) -> None:
    """Another model of the family's kind, beside the first."""
    transformer = load_toy(folder).transformer
    torch.manual_seed(1)
    for parameter in transformer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    transformer.save_pretrained(folder / "teacher")  # type: ignore[operator]


def test_a_family_of_ones_own_trains(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(toy)
    run = toy / "run"
    assert main(arguments(toy, "--run-dir", str(run))) == 0
    import json

    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in losses if "loss" in line]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert (run / "student" / "adapter_model.safetensors").is_file()

    assert main(arguments(toy, "--run-dir", str(toy / "other"), "--dry-run")) == 0
    assert "8 LoRA modules of rank 4" in " ".join(capsys.readouterr().out.split())
    assert not (toy / "other").exists()


PLAIN = EngineConfig(
    attention="native",
    compile="off",
    graphs="off",
    group_teachers=False,
    merge_student=False,
    fuse_projections=False,
    cache_modulation=False,
)


def toy_round(folder: Path, settings: EngineConfig, checkpointed: int) -> tuple[ActiveTechniques, Tensor, list[Tensor]]:
    """What was at work in a round, its losses and its gradients."""
    model = load_toy(folder)
    teacher = TeacherConfig(name="a", weights=str(folder / "teacher"), prompts="", guidance=2.0)
    bank = load_teachers(model, [teacher])
    student = Student.build(model, StudentConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(2)
    for parameter in student.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    sizes = ForwardSizes(student_rows=3, teacher_rows=6, resolution=8)
    active = apply_techniques(
        settings, model, student, bank, sizes, resolved=ResolvedSettings(checkpointed=checkpointed)
    )
    table = solver_table("flow_sde", model.sigmas(4, 8), 0.7, variance="exact")
    batch = RoundBatch(
        text=model.encode(["a red circle", "a blue square", "two dots"]),
        negative=model.encode([""]),
        tasks=((0, slice(0, 3)),),
        keys=torch.arange(3),
        scale=torch.full((3,), 1 / 3),
        shape=model.latent_shape(8),
    )
    out = one_pass(model, student, bank, batch, table, step_weights(table, "kl"))
    return active, out.losses, [p.grad for p in student.parameters() if p.grad is not None]


def test_a_family_of_ones_own_has_every_technique(toy: Path) -> None:
    """By one class outside the package: fused projections, cached modulation, a merged student, a backend of choice."""
    write_teacher(toy)
    plain, losses, gradients = toy_round(toy, PLAIN, 0)
    active, found, theirs = toy_round(toy, EngineConfig(attention="products", compile="off", graphs="off"), 1)
    assert (plain.fused, plain.modulation, plain.merged_layers, plain.checkpointed) == (0, 0, 0, 0)
    # Of two blocks: an attention each in the teacher; an embedding and two layers in student and teacher.
    assert (active.fused, active.modulation, active.merged_layers, active.checkpointed) == (2, 6, 8, 1)
    assert active.backends == ("products", "products")
    assert float(losses.min()) > 0
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=0.0)
    assert len(gradients) == len(theirs) == 16
    total = torch.cat([g.flatten() for g in gradients])
    assert (torch.cat([g.flatten() for g in theirs]) - total).norm() <= 1e-5 * total.norm()


def test_the_layers_in_float8(toy: Path) -> None:
    """Those on tokens: the modulation's see a sample's one embedding."""
    model = load_toy(toy)
    layers = model.token_layers(model.transformer)
    assert sorted(layers) == sorted(f"mix.{i}.to_{name}" for i in range(2) for name in ("q", "k", "v", "out"))
    assert quantize_frozen(model.transformer, layers) == 8


def test_meta_model_agrees(toy: Path) -> None:
    whole = load_model(toy / "model", "toy_family:Toy", device="cpu", dtype=torch.float32)
    meta = meta_model(toy / "model", "toy_family:Toy", dtype=torch.float32)
    shapes = [{n: p.shape for n, p in m.transformer.named_parameters()} for m in (whole, meta)]
    assert shapes[0] == shapes[1]
    assert meta.latent_shape(8) == whole.latent_shape(8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd4", "did you mean 'sd3'"),
        ("nowhere_to_be_found:Family", "cannot be imported"),
        ("pathlib:Path", "no complete subclass"),
        ("opd_fast.models.base:DiffusionModel", "no complete subclass"),
    ],
)
def test_a_name_that_is_no_family(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_family(name, Path)
