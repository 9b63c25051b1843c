"""Families from elsewhere: the page on adding one, run as it stands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from opd_fast.models import find_family, load_model, meta_model
from opd_fast.train import main

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


def test_a_family_of_ones_own_trains(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(str(toy / "model"), "toy_family:Toy", device="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.transformer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter) * parameter.std())
    model.transformer.save_pretrained(toy / "teacher")  # type: ignore[operator]

    run = toy / "run"
    assert main(arguments(toy, "--run-dir", str(run))) == 0
    import json

    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["loss"] for line in losses if "loss" in line]
    assert sum(values[-5:]) < 0.8 * sum(values[:5])
    assert (run / "student" / "adapter_model.safetensors").is_file()

    assert main(arguments(toy, "--run-dir", str(toy / "other"), "--dry-run")) == 0
    assert "2 LoRA modules of rank 4" in " ".join(capsys.readouterr().out.split())
    assert not (toy / "other").exists()


def test_outline_agrees(toy: Path) -> None:
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
