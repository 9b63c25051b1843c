"""Modulation from the tables equals the plain forward, with the same gradients, in every step and when compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.models import SD35M_512, random_model
from opd_fast.config import StudentConfig
from opd_fast.engine.grouped_lora import GroupedAdapters, grouped_velocities, joined
from opd_fast.engine.modulation_cache import ModulationCache
from opd_fast.models import meta_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Velocities, predict_velocities
from opd_fast.models.lora.adapters import use_adapter
from opd_fast.training.student import Student
from tests.grouping import FAMILIES, add_all, small, states, text
from tests.tiny import tiny_transformer

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMAS = torch.tensor([1.0, 0.81, 0.37, 0.06])
ROWS = 3


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> DiffusionModel:
    return small(tmp_path, request.param)


def cache_of(model: DiffusionModel) -> ModulationCache:
    found = ModulationCache.of(model, model.transformer)
    assert found is not None
    return found


def condition(model: DiffusionModel, guidance: float = 4.5, rows: int = ROWS, seed: int = 0) -> Conditioning:
    return Conditioning.build(model, text(model, rows, seed), text(model, 1, seed=9), guidance)


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


def assert_velocities(found: Velocities, truth: Velocities) -> None:
    close(found.cond, truth.cond)
    assert (found.uncond is None) == (truth.uncond is None)
    if found.uncond is not None and truth.uncond is not None:
        close(found.uncond, truth.uncond)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_equals_the_plain_forward_at_every_step(model: DiffusionModel, guidance: float) -> None:
    asked, tables = condition(model, guidance), cache_of(model)
    tables.fill(SIGMAS, asked)
    before = None
    for j, sigma in enumerate(SIGMAS):
        tables.step.copy_(torch.tensor(j))
        with torch.no_grad():
            plain = predict_velocities(model, model.transformer, states(ROWS), sigma, asked)
            with tables.active():
                found = predict_velocities(model, model.transformer, states(ROWS), sigma, asked)
        assert_velocities(found, plain)
        if before is not None:
            assert (plain.cond - before).abs().max() > 1e-2 * plain.cond.abs().max()
        before = plain.cond
    assert not any("forward" in vars(module) for module in model.transformer.modules())


def test_nothing_of_it_is_computed_again(model: DiffusionModel) -> None:
    """Weights changed after the fill change nothing: the layers' products are really gone."""
    asked, tables = condition(model), cache_of(model)
    tables.fill(SIGMAS, asked)
    with torch.no_grad():
        plain = predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked)
        names = ("time_text_embed", "context_embedder", "norm1.linear", "norm1_context.linear", "norm_out.linear")
        names += ("norm.linear",) if model.name == "flux" else ()
        touched = set()
        for name, parameter in model.transformer.named_parameters():
            touched |= {n for n in names if f"{n}." in name}
            if any(f"{n}." in name for n in names):
                parameter.fill_(float("nan"))
        assert touched == set(names)
        with tables.active():
            assert_velocities(predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked), plain)
        assert predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked).cond.isnan().any()


def test_filled_again_in_place(model: DiffusionModel) -> None:
    """Other prompts and levels fill the same memory; rows of another number have their own, and both are kept."""
    tables = cache_of(model)
    tables.fill(SIGMAS, condition(model, seed=1))

    def addresses() -> list[int]:
        assert tables._table is not None
        held = (tables._table.steps, tables._table.rows, tables._table.context)
        return [t.data_ptr() for t in held if t is not None]

    first = addresses()
    tables.fill(SIGMAS, condition(model, rows=2))
    assert not set(first) & set(addresses())
    asked = condition(model, seed=2)
    tables.fill(SIGMAS.flip(0), asked)
    assert addresses() == first
    tables.step.fill_(1)
    with torch.no_grad():
        plain = predict_velocities(model, model.transformer, states(ROWS), SIGMAS[2], asked)
        with tables.active():
            assert_velocities(predict_velocities(model, model.transformer, states(ROWS), SIGMAS[2], asked), plain)


def test_embedded_guidance_is_the_filled_one(tmp_path: Path) -> None:
    model = small(tmp_path, "flux")
    tables = cache_of(model)
    found = []
    for guidance in (1.0, 3.5):
        asked = condition(model, guidance)
        tables.fill(SIGMAS, asked)
        with torch.no_grad(), tables.active():
            found.append(predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked).cond)
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


# --- the student -----------------------------------------------------------------------------------------------------


def gradients(model: DiffusionModel, student: Student, asked: Conditioning, j: int) -> tuple[Tensor, dict[str, Tensor]]:
    v = student.velocities(model, states(ROWS), SIGMAS[j], asked)
    branches = [branch for branch in (v.cond, v.uncond) if branch is not None]
    sum(branch.square().sum() for branch in branches).backward()  # type: ignore[union-attr]
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    for parameter in student.parameters():
        parameter.grad = None
    return torch.cat(branches).detach(), found


TARGETS = {"attention": "attention", "with modulation": ["attn.to_q", "norm1.linear", "norm_out.linear"]}
TARGETS |= {"with the embedding": ["attn.to_q", "timestep_embedder.linear_2"], "with the text": ["context_embedder"]}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("merged", [True, False])
def test_gradients_of_the_student(model: DiffusionModel, targets: Any, merged: bool) -> None:
    student = Student.build(model, StudentConfig(rank=4, alpha=8.0, targets=targets))
    for parameter in student.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    asked, tables = condition(model), cache_of(model)
    tables.fill(SIGMAS, asked)
    tables.step.fill_(2)
    plain, wanted = gradients(model, student, asked, 2)
    if merged:
        with student.merged_for_round(), tables.active():
            found, theirs = gradients(model, student, asked, 2)
    else:
        with tables.active():
            found, theirs = gradients(model, student, asked, 2)
    torch.testing.assert_close(found, plain, rtol=0, atol=(1e-5 if merged else 1e-6) * float(plain.abs().max()))
    assert theirs.keys() == wanted.keys()
    total = sum(float(gradient.square().sum()) for gradient in wanted.values()) ** 0.5
    gap = sum(float((theirs[name] - gradient).square().sum()) for name, gradient in wanted.items()) ** 0.5
    assert total > 0
    assert gap < 5e-6 * total


def test_what_is_left_out(model: DiffusionModel) -> None:
    everything = cache_of(model).layers
    Student.build(model, StudentConfig(rank=4, targets=["norm1.linear"]))
    fewer = cache_of(model)
    assert 0 < fewer.layers < everything
    assert not any("lora" in name for linear in fewer._linears for name, _ in linear.named_parameters())


def test_nothing_to_cache(model: DiffusionModel, tmp_path: Path) -> None:
    model.transformer.requires_grad_(True)
    assert ModulationCache.of(model, model.transformer) is None
    meta = meta_model("bundled", dtype=torch.float32)
    meta.device = torch.device("cpu")  # the weights wait elsewhere
    assert ModulationCache.of(meta, meta.transformer) is None


# --- teachers --------------------------------------------------------------------------------------------------------


def test_the_adapter_that_was_switched_on(model: DiffusionModel) -> None:
    add_all(model)
    asked, tables = condition(model), cache_of(model)
    for name in ("third", None):
        with torch.no_grad(), use_adapter(model.transformer, name):
            tables.fill(SIGMAS, asked)
            plain = predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked)
            with tables.active():
                assert_velocities(predict_velocities(model, model.transformer, states(ROWS), SIGMAS[0], asked), plain)


def test_with_grouped_adapters(model: DiffusionModel) -> None:
    """Each row's modulation has its teacher's adapter in it."""
    names = add_all(model)
    grouped, tables = GroupedAdapters(model.transformer, names), cache_of(model)
    (call,) = joined([(t, slice(2 * t, 2 * t + 2), condition(model, 2.0, rows=2, seed=t)) for t in range(3)])
    plain = grouped_velocities(model, grouped, states(6), SIGMAS[1], [call])
    with grouped.active(call.spans):
        tables.fill(SIGMAS, call.condition)
    tables.step.fill_(1)
    assert_velocities(grouped_velocities(model, grouped, states(6), SIGMAS[1], [call], [tables]), plain)
    with tables.active(), pytest.raises(RuntimeError, match=r"enter active\(\) inside of it"):
        grouped_velocities(model, grouped, states(6), SIGMAS[1], [call])


# --- compiled --------------------------------------------------------------------------------------------------------


def test_one_compilation_serves_all_steps_and_contents(tmp_path: Path) -> None:
    """Three kinds of block in eight: as many compilations as without tables, none for a step, a refill or a round."""
    model = small(tmp_path, "sd3")
    model.transformer = tiny_transformer(layers=8).requires_grad_(False)
    student = Student.build(model, StudentConfig(rank=4))
    tables, counter = cache_of(model), CompileCounterWithBackend("aot_eager")
    for block in model.blocks(model.transformer):
        block.compile(backend=counter)
    plain = []
    asked = [condition(model, seed=seed) for seed in range(2)]
    for seed in range(2):
        tables.fill(SIGMAS, asked[seed])
        for j in range(len(SIGMAS)):
            tables.step.fill_(j)
            with tables.active():
                gradients(model, student, asked[seed], j)
            if not plain:
                plain.append(counter.frame_count)
    assert plain == [3]
    assert counter.frame_count == 3
    with tables.active():
        found, _ = gradients(model, student, asked[1], 3)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=True):
        truth, _ = gradients(model, student, asked[1], 3)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6 * float(truth.abs().max()))


# --- sizes and mistakes ----------------------------------------------------------------------------------------------


def test_rows_of_the_tables(model: DiffusionModel) -> None:
    """A guided batch has one row for its negative prompt."""
    for guidance in (1.0, 4.5):
        tables, asked = cache_of(model), condition(model, guidance)
        tables.fill(SIGMAS, asked)
        held, rows = tables._table, len(asked.text)
        assert held is not None
        assert held.steps is not None
        assert held.context is not None
        assert held.steps.shape == (len(SIGMAS), rows // 2 + 1 if asked.guided else rows, sum(tables._sizes))
        assert held.context.shape[:2] == asked.text.sequence.shape[:2]


def test_size_of_sd35_medium() -> None:
    """A third of the transformer's weights serve modulation; its tables of a usual round are far smaller."""
    model = random_model(SD35M_512, device="meta", dtype=torch.bfloat16)
    tables = cache_of(model)
    weights = sum(p.nbytes for linear in tables._linears for p in linear.parameters())
    assert weights / sum(p.nbytes for p in model.transformer.parameters()) == pytest.approx(0.31, abs=0.05)
    context: Any = tables._modulation.text
    steps, rows = 9, 24
    values = steps * rows * sum(tables._sizes) + rows * SD35M_512.text_tokens * context.out_features
    assert 0 < values * model.dtype.itemsize < weights / 5


def test_mistakes(model: DiffusionModel) -> None:
    tables, asked = cache_of(model), condition(model, 1.0)
    with pytest.raises(RuntimeError, match="fill first"), tables.active():
        pass
    tables.fill(SIGMAS, asked)
    with tables.active(), pytest.raises(RuntimeError, match="outside of active"):
        tables.fill(SIGMAS, asked)
    with tables.active(), torch.no_grad(), pytest.raises(ValueError, match="filled for 3 rows and asked for 2"):
        predict_velocities(model, model.transformer, states(2), SIGMAS[0], condition(model, 1.0, rows=2))
    add_all(model)
    with pytest.raises(RuntimeError, match="make it afterwards"), tables.active():
        pass
