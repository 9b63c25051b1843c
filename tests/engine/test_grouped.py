"""Teachers in one forward: each row as its own adapter has it, whatever the groups, and no trace left behind."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from opd_fast.config import StudentConfig
from opd_fast.engine.grouped_lora import GroupedAdapters, Span, grouped_velocities, joined
from opd_fast.errors import UserError
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import use_adapter
from opd_fast.models.lora.load import WeightsSource
from opd_fast.objectives import step_weights
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teachers import BASE, SharedTeachers, Teacher, TeacherBank, TeacherConditioning
from tests.grouping import FAMILIES, SHAPE, add, add_all, small, states, text
from tests.tiny import tiny_transformer

pytestmark = pytest.mark.usefixtures("one_thread")
SIGMA = torch.tensor(0.7)
GROUPS: dict[str, list[Span]] = {
    "equal": [(0, slice(0, 2)), (1, slice(2, 4)), (2, slice(4, 6))],
    "unequal": [(0, slice(0, 1)), (1, slice(1, 4)), (2, slice(4, 9))],
    "large and unequal": [(2, slice(0, 7)), (0, slice(7, 12))],
    "any order, twice": [(1, slice(4, 6)), (0, slice(0, 2)), (1, slice(2, 4)), (2, slice(6, 8)), (0, slice(8, 10))],
    "the base too": [(None, slice(0, 2)), (2, slice(2, 4)), (0, slice(4, 5))],
    "a gap and an empty group": [(1, slice(0, 2)), (0, slice(2, 2)), (2, slice(3, 5))],
    "one": [(2, slice(0, 3))],
    "the base alone": [(None, slice(0, 3))],
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    built = small(tmp_path_factory.mktemp(request.param), request.param)
    add_all(built)
    Student.build(built, StudentConfig(rank=4, alpha=8.0))
    for name, parameter in built.transformer.named_parameters():
        if ".lora_B.student." in name:
            parameter.data.normal_(std=0.3)  # an adapter that would show
    return built


@pytest.fixture(scope="module")
def grouped(model: DiffusionModel) -> GroupedAdapters:
    return GroupedAdapters(model.transformer, ["first", "second", "third"])


@torch.no_grad()
def velocity(model: DiffusionModel, rows: slice, name: str | None) -> Tensor:
    with use_adapter(model.transformer, name) as transformer:
        return model.velocity(transformer, states(12)[rows], SIGMA, text(model, 12).index(rows))


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=0, atol=2e-6 * float(truth.abs().max()))


@pytest.mark.parametrize("spans", GROUPS.values(), ids=GROUPS)
def test_equals_one_forward_each(model: DiffusionModel, grouped: GroupedAdapters, spans: list[Span]) -> None:
    rows = max(span[1].stop for span in spans)
    owner: list[int | None] = [None] * rows
    for index, span in spans:
        owner[span] = [index] * (span.stop - span.start)
    with torch.no_grad(), grouped.active(spans) as transformer:
        found = model.velocity(transformer, states(12)[:rows], SIGMA, text(model, 12).index(slice(0, rows)))
    for row, index in enumerate(owner):
        truth = velocity(model, slice(row, row + 1), None if index is None else grouped.adapters[index])
        close(found[row : row + 1], truth)
        other = velocity(model, slice(row, row + 1), grouped.adapters[((index or 0) + 1) % 3])
        assert (found[row] - other[0]).abs().max() > 1e-3 * truth.abs().max()


def test_leaves_no_trace(model: DiffusionModel, grouped: GroupedAdapters) -> None:
    trained = [parameter.requires_grad for parameter in model.transformer.parameters()]
    before = {name: velocity(model, slice(0, 3), name) for name in (None, "student", "first")}
    with pytest.raises(KeyError), grouped.active(GROUPS["equal"]):
        raise KeyError
    assert all(torch.equal(velocity(model, slice(0, 3), name), v) for name, v in before.items())
    assert [parameter.requires_grad for parameter in model.transformer.parameters()] == trained
    assert not any("forward" in vars(module) for module in model.transformer.modules())


def test_within_the_students_merged_weights(model: DiffusionModel, grouped: GroupedAdapters) -> None:
    """The student's own layers come back as they were: merged, inside `merged_for_round`."""
    student = Student(model, model.transformer, StudentConfig(rank=4, alpha=8.0))
    with student.merged_for_round():
        merged = velocity(model, slice(0, 3), "student")
        with torch.no_grad(), grouped.active(GROUPS["equal"]) as transformer:
            found = model.velocity(transformer, states(12)[:6], SIGMA, text(model, 12).index(slice(0, 6)))
        close(found[:2], velocity(model, slice(0, 2), "first"))
        assert torch.equal(velocity(model, slice(0, 3), "student"), merged)


def bytes_of_factors(grouped: GroupedAdapters) -> int:
    pairs = [pair for layer in grouped._layers for pair in (layer.factors, *layer.gathered.values())]
    storages = {t.untyped_storage() for pair in pairs for t in pair or ()}
    return sum(storage.nbytes() for storage in storages)


def test_factors_are_stacked_once(model: DiffusionModel) -> None:
    grouped = GroupedAdapters(model.transformer, ["first", "second"])
    stacked = bytes_of_factors(grouped)
    layers: list[Any] = [m for m in model.transformer.modules() if {"first", "second"} & {*getattr(m, "lora_A", ())}]
    assert stacked == sum(2 * 8 * (layer.in_features + layer.out_features) * 4 for layer in layers)
    with grouped.active([(0, slice(0, 4)), (1, slice(4, 8))]), grouped.active([(0, slice(0, 2)), (1, slice(2, 4))]):
        assert bytes_of_factors(grouped) == stacked
    with grouped.active([(1, slice(0, 4)), (0, slice(4, 6))]):
        pass
    assert bytes_of_factors(grouped) == stacked * 5 // 2  # parts of two rows: 1, 1, 0


def test_half_precision_factors(tmp_path: Path) -> None:
    model = small(tmp_path, "sd3", torch.bfloat16)
    names = add_all(model)
    parts = teacher_condition(model, (1.0, 1.0, 1.0)).parts
    grouped = GroupedAdapters(model.transformer, names)
    found = grouped_velocities(model, grouped, states(9), SIGMA, joined(parts)).cond
    truth = bank(model, (1.0, 1.0, 1.0)).velocities(states(9), SIGMA, teacher_condition(model, (1.0, 1.0, 1.0))).cond
    assert found.dtype == torch.bfloat16
    assert (found - truth).norm() < 0.02 * truth.norm()


# --- velocities under a teacher conditioning --------------------------------------------------------------------------


def bank(model: DiffusionModel, guidance: tuple[float, ...]) -> TeacherBank:
    source = WeightsSource("random", "lora", 0, 0, 0, (), "")
    names = ["first", "second", "third", BASE][: len(guidance)]
    return SharedTeachers(
        model, [Teacher(n, g, model.transformer, n, source) for n, g in zip(names, guidance, strict=True)]
    )


def batch(model: DiffusionModel, sizes: tuple[int, ...]) -> RoundBatch:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    rows = bounds[-1]
    return RoundBatch(
        text(model, rows),
        text(model, 1, seed=7),
        tuple((t, slice(a, b)) for t, (a, b) in enumerate(itertools.pairwise(bounds))),
        torch.arange(rows),
        torch.linspace(0.5, 1.5, rows),
        SHAPE,
    )


def teacher_condition(
    model: DiffusionModel, guidance: tuple[float, ...], sizes: tuple[int, ...] = (2, 3, 4)
) -> TeacherConditioning:
    return bank(model, guidance).condition(batch(model, sizes))


@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (4.5, 1.0, 2.0), (4.5, 4.5, 4.5), (2.0, 1.0, 4.5, 3.0)])
@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (2, 0, 4, 1), (0, 0, 2, 0)])
def test_velocities_of_a_course(model: DiffusionModel, guidance: tuple[float, ...], sizes: tuple[int, ...]) -> None:
    sizes = sizes[: len(guidance)]
    asked, x = teacher_condition(model, guidance, sizes), states(sum(sizes))
    grouped = GroupedAdapters(model.transformer, ["first", "second", "third", None])
    calls = joined(asked.parts)
    values = {guidance[t] for t, size in enumerate(sizes) if size}
    assert len(calls) == (len(values) if model.guidance_kind == "embedded" else 1)
    found = grouped_velocities(model, grouped, x, SIGMA, calls)
    truth = bank(model, guidance).velocities(x, SIGMA, asked)
    close(found.cond, truth.cond)
    assert (found.uncond is None) == (truth.uncond is None)
    for _, rows, condition in asked.parts:
        if condition.guided:
            assert found.uncond is not None
            assert truth.uncond is not None
            close(found.uncond[rows], truth.uncond[rows])


def test_a_forward_for_each_guidance_that_is_embedded(tmp_path: Path) -> None:
    model = small(tmp_path, "flux")
    add_all(model)
    (call,) = joined(teacher_condition(model, (3.5, 3.5, 3.5)).parts)
    assert len(call.parts) == 3
    calls = joined(teacher_condition(model, (3.5, 4.0, 3.5)).parts)
    assert [(len(call.parts), call.condition.embedded) for call in calls] == [(2, 3.5), (1, 4.0)]


@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (4.5, 1.0, 2.0)])
def test_gradient_of_a_round(model: DiffusionModel, guidance: tuple[float, ...]) -> None:
    table = solver_table("flow_sde", model.sigmas(4, 64), 0.7, variance="exact")
    student = Student(model, model.transformer, StudentConfig(rank=4, alpha=8.0, guidance=guidance[0]))
    results = []
    for together in (False, True):
        teachers = bank(model, guidance)
        assert not together or teachers.group() == len(guidance)
        with use_adapter(model.transformer, "student"):
            round_ = dataclasses.replace(batch(model, (2, 2, 1)), x=states(5), noise=torch.stack([states(5)] * 4))
            out = one_pass(model, student, teachers, round_, table, step_weights(table, "kl"), micro_batch=3)
        results.append((out, [p.grad for p in student.parameters()]))
        for parameter in student.parameters():
            parameter.grad = None
    (switched, theirs), (grouped, mine) = results
    torch.testing.assert_close(grouped.losses, switched.losses, rtol=1e-5, atol=1e-8)
    total = torch.cat([g.flatten() for g in theirs if g is not None])
    gap = torch.cat([(a - b).flatten() for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None])
    assert total.norm() > 0
    assert gap.norm() < 1e-5 * total.norm()


def test_one_compilation_serves_all_blocks_of_a_kind(tmp_path: Path) -> None:
    """Three kinds of block in six; other teachers in the same parts of the batch need no compilation."""
    model = small(tmp_path, "sd3")
    model.transformer = tiny_transformer(layers=6).requires_grad_(False)
    for name, rank in (("first", 3), ("second", 5)):
        add(model, name, ("attn.to_q", "attn.add_k_proj"), rank)
    torch._dynamo.reset()  # what earlier tests compiled may be found again, and is then not counted
    grouped, counter = GroupedAdapters(model.transformer, ["first", "second"]), CompileCounterWithBackend("aot_eager")
    truth = [velocity(model, slice(row, row + 1), name) for row, name in enumerate(["first", "second"] * 2)]
    for block in model.blocks(model.transformer):
        block.compile(backend=counter)
    orders: list[list[Span]] = [[(t, slice(row, row + 1)) for row, t in enumerate(order)] for order in ([0, 1], [1, 0])]
    for turn, spans in enumerate(orders * 2):
        rows = slice(turn % 2, turn % 2 + 2)
        with torch.no_grad(), grouped.active(spans) as transformer:
            found = model.velocity(transformer, states(12)[rows], SIGMA, text(model, 12).index(rows))
        close(found, torch.cat(truth[rows]))
        assert counter.frame_count == 3


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes(model: DiffusionModel, grouped: GroupedAdapters) -> None:
    with pytest.raises(UserError, match="no adapter fourth"):
        GroupedAdapters(model.transformer, ["first", "fourth"])
    with pytest.raises(UserError, match="adapter student is trained"):
        GroupedAdapters(model.transformer, ["student"])
    wrong: dict[str, list[Span]] = {
        "overlaps": [(0, slice(0, 2)), (1, slice(1, 3))],
        "a span of adapter 3": [(3, slice(0, 2))],
        "no span has a row": [(0, slice(0, 0))],
    }
    for message, spans in wrong.items():
        with pytest.raises(UserError, match=message), grouped.active(spans):
            pass
    with (
        torch.no_grad(),
        grouped.active(GROUPS["equal"]) as transformer,
        pytest.raises(ValueError, match="6 rows and the batch has 5"),
    ):
        model.velocity(transformer, states(5), SIGMA, text(model, 5))


def test_an_adapter_that_came_later(tmp_path: Path) -> None:
    model = small(tmp_path, "sd3")
    add(model, "first", ("attn.to_q",), 2)
    grouped = GroupedAdapters(model.transformer, ["first"])
    add(model, "later", ("attn.to_v",), 2)
    with pytest.raises(RuntimeError, match="make it afterwards"), grouped.active([(0, slice(0, 1))]):
        pass
