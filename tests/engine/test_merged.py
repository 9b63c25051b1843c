"""The LoRA merged for a round computes what PEFT's layers compute, forward and backward, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from opd_fast.config import StudentConfig
from opd_fast.models import load_model
from opd_fast.models.lora.adapters import add_frozen, use_adapter
from opd_fast.models.lora.files import LoraWeights
from opd_fast.training.student import Student
from tests.runs import random_lora
from tests.tiny import save_tiny


@pytest.fixture
def student(tmp_path) -> Student:  # type: ignore[no-untyped-def]
    model = load_model(save_tiny(tmp_path), device="cpu", dtype=torch.float32)
    tensors = random_lora(5)
    add_frozen(model.transformer, "other", LoraWeights(tmp_path, "peft", tensors, dict.fromkeys(tensors, 2.0), ""))
    built = Student.build(model, StudentConfig(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return built


def _run(student: Student) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Output, gradients of the parameters, gradient of the input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=generator, requires_grad=True)
    text, pooled = torch.randn(3, 5, 32, generator=generator), torch.randn(3, 32, generator=generator)
    for parameter in student.parameters():
        parameter.grad = None
    v = student.transformer(x, text, pooled, torch.full((3,), 500.0), return_dict=False)[0]
    v.square().mean().backward()
    assert x.grad is not None
    return v.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}, x.grad


def test_merged_equals_unmerged(student: Student) -> None:
    plain, gradients, slope = _run(student)
    with student.merged_for_round():
        merged, theirs, their_slope = _run(student)
    torch.testing.assert_close(merged, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(their_slope, slope, rtol=1e-4, atol=1e-8)
    assert gradients.keys() == theirs.keys()
    assert len(gradients) == len(student.parameters())
    for name, gradient in gradients.items():
        assert (theirs[name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # the last block has some of zero


def test_merging_follows_the_weights_and_ends(student: Student) -> None:
    with student.merged_for_round():
        before, _, _ = _run(student)
    for parameter in student.parameters():
        parameter.data.mul_(1.5)
    with student.merged_for_round():
        after, _, _ = _run(student)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(_run(student)[0], after, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in student.transformer.modules())


def test_other_adapters_and_the_base_are_not_merged(student: Student) -> None:
    def output(name: str | None) -> torch.Tensor:
        with torch.no_grad(), use_adapter(student.transformer, name) as transformer:
            ones = torch.ones(1, 4, 8, 8)
            text, pooled = torch.ones(1, 5, 32), torch.ones(1, 32)
            velocity: torch.Tensor = transformer(ones, text, pooled, torch.tensor([300.0]), return_dict=False)[0]
            return velocity

    expected = {name: output(name) for name in ("other", None)}
    with student.merged_for_round():
        assert all(torch.equal(output(name), value) for name, value in expected.items())
