"""What graphs promise, on a stand-in that records operators: same numbers, declared inputs, refusals, fall-backs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import gradients, relative_error
from opd_fast.engine.cuda_graphs import Graphs, Static
from opd_fast.models.text import TextEmbeds
from opd_fast.objectives import Surrogate, step_weights
from opd_fast.training.batch import RoundBatch
from opd_fast.training.rollout import one_pass
from tests.recorded import RecordedBackend
from tests.training.test_one_pass import GUIDED, UNGUIDED, Case, World


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Tensor
    right: tuple[Tensor, ...]
    factor: float = 1.0


def _product(pair: Pair, shift: Tensor) -> Tensor:
    return pair.left @ pair.right[0] * pair.factor + shift


def _pair(seed: int, rows: int = 3, **changes: Any) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    pair = Pair(torch.randn(rows, 4, generator=generator), (torch.randn(4, 2, generator=generator),))
    return dataclasses.replace(pair, **changes)


def test_replays_compute_with_what_they_are_given() -> None:
    graphs = Graphs(RecordedBackend())
    for seed in range(3):
        pair, shift = _pair(seed), torch.tensor(float(seed))
        torch.testing.assert_close(graphs.call("p", "the product", _product, pair, shift), _product(pair, shift))
    assert (graphs.captured, graphs.replays) == (1, 3)


def test_a_result_lasts_until_the_next_replay() -> None:
    graphs = Graphs(RecordedBackend())
    first = graphs.call("p", "the product", _product, _pair(0), torch.zeros(()))
    kept = first.clone()
    other = graphs.call("q", "another", _product, _pair(1), torch.zeros(()))
    torch.testing.assert_close(first, kept)  # another graph leaves it alone
    again = graphs.call("p", "the product", _product, _pair(2), torch.zeros(()))
    assert again is first
    assert not torch.equal(first, kept)
    torch.testing.assert_close(other, _product(_pair(1), torch.zeros(())))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (_pair(1, rows=5), ("left", "(5, 4)", "(3, 4)")),
        (_pair(1, left=torch.zeros(3, 4, dtype=torch.float64)), ("left", "float64", "float32")),
        (_pair(1, left=torch.zeros(3, 4, device="meta")), ("left", "on meta", "on cpu")),
        (_pair(1, factor=2.0), ("factor", "2.0", "1.0")),
        (_pair(1, right=()), ("right", "0", "1")),
        (TextEmbeds(torch.zeros(3, 4, 1)), ("sequence", "left")),
    ],
    ids=["shape", "dtype", "device", "number", "length", "another kind"],
)
def test_another_form_of_input_is_refused_by_name(given: Any, named: tuple[str, ...]) -> None:
    graphs = Graphs(RecordedBackend())
    before = graphs.call("p", "the product", _product, _pair(0), torch.zeros(())).clone()
    with pytest.raises(ValueError, match="the product was captured with") as caught:
        graphs.call("p", "the product", _product, given, torch.zeros(()))
    assert all(word in str(caught.value) for word in named), caught.value
    assert "engine.graphs off" in str(caught.value)
    assert graphs.captured == 1
    again = graphs.call("p", "the product", _product, _pair(0), torch.zeros(()))
    assert torch.equal(again, before), "a refusal changed the declared inputs"


def test_what_is_loaded_again_unchanged_is_not_copied() -> None:
    source = torch.ones(3)
    held = Static("it", (source,))
    held.load((source,))
    held.value[0].fill_(7.0)
    held.load((source,))
    assert float(held.value[0][0]) == 7.0
    source.mul_(2.0)
    held.load((source,))
    assert float(held.value[0][0]) == 2.0


def test_a_capture_leaves_what_it_changes_as_it_was() -> None:
    total = torch.ones(2)
    run = Graphs(RecordedBackend()).capture("the sum", lambda: total.add_(1.0), [total])
    assert total.tolist() == [1.0, 1.0]
    run()
    run()
    assert total.tolist() == [3.0, 3.0]


def test_what_cannot_be_captured_runs_all_the_same_and_says_so() -> None:
    said: list[str] = []
    graphs = Graphs(RecordedBackend(), said.append)
    total = torch.zeros(())

    def reads(x: Tensor) -> Tensor:
        return total.add_(1.0) * float(x.sum())

    for n in range(1, 4):
        x = torch.full((2,), float(n))
        assert float(graphs.call("r", "the reader", reads, x)) == pytest.approx(n * 2 * float(total))
    assert graphs.captured == graphs.replays == 0
    assert graphs.refused == ["the reader"]
    (line,) = said
    assert "the reader cannot be captured and runs without" in line


def test_without_a_backend_nothing_is_kept() -> None:
    graphs = Graphs(None)
    for rows in (3, 5):
        assert graphs.call("p", "the product", _product, _pair(0, rows), torch.zeros(())).shape == (rows, 2)
    assert graphs.captured == 0


# --- a round ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("graphs"))


def _other(batch: RoundBatch) -> RoundBatch:
    """A batch of the same form and none of the same numbers."""
    return dataclasses.replace(
        batch,
        text=batch.text.index([*range(1, len(batch)), 0]),
        keys=batch.keys + 100,
        scale=batch.scale.flip(0),
        x=None if batch.x is None else batch.x.flip(0),
        noise=None if batch.noise is None else batch.noise.flip(1),
    )


def _rounds(
    world: World, case: Case, batches: list[RoundBatch], placement: str = "merged", **options: Any
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Losses, last states and gradients of rounds one after the other, the weights moving between them."""
    model, student, bank = world.team(case.kind, case.teachers, placement, case.guidance)
    table = world.table(case.solver, case.variance)
    start = [p.detach().clone() for p in student.parameters()]
    found = []
    for batch in batches:
        out = one_pass(model, student, bank, batch, table, step_weights(table, "kl"), **options)
        found.append((out.losses.clone(), out.x.clone(), gradients(dict(student.named_parameters()))))
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(1.1)
    with torch.no_grad():
        for p, value in zip(student.parameters(), start, strict=True):
            p.copy_(value)
    return found


def _assert_same(found: list[Any], truth: list[Any]) -> None:
    for (losses, x, grads), (true_losses, true_x, true_grads) in zip(found, truth, strict=True):
        assert float(true_losses.max()) > 0
        torch.testing.assert_close(losses, true_losses, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(x, true_x, rtol=1e-6, atol=1e-6)
        assert relative_error(grads, true_grads) <= 1e-6


@pytest.mark.parametrize("drawn", [False, True], ids=["noise given", "noise drawn"])
@pytest.mark.parametrize(
    "case",
    [
        Case(solver="flow_sde", guidance=GUIDED),
        Case(solver="dpm2", guidance=UNGUIDED),
        Case(solver="ode", guidance=(1.0, (4.5, 1.0))),
        Case(solver="flow_sde", kind="full", teachers="full", guidance=GUIDED),
    ],
    ids=["flow_sde", "dpm2", "ode", "full"],
)
def test_a_round_of_replays_is_the_round(world: World, case: Case, drawn: bool) -> None:
    """Three rounds, each with its own text, noise and weights; no Python of a step runs in the last two."""
    batch = dataclasses.replace(world.batch, x=None, noise=None) if drawn else world.batch
    batches = [batch, _other(batch), _other(_other(batch))]
    graphs = Graphs(RecordedBackend())
    found = _rounds(world, case, batches, graphs=graphs)
    _assert_same(found, _rounds(world, case, batches))
    assert graphs.captured == 1
    assert graphs.replays == 3 * (world.table(case.solver, case.variance).steps - 1)
    assert not graphs.refused


def test_teachers_on_a_shared_base_are_captured_too(world: World) -> None:
    case = Case(guidance=GUIDED)
    graphs = Graphs(RecordedBackend())
    batches = [world.batch, _other(world.batch)]
    _assert_same(_rounds(world, case, batches, "shared", graphs=graphs), _rounds(world, case, batches, "shared"))
    assert graphs.captured == 1


def test_each_form_of_micro_batch_has_its_graph(world: World) -> None:
    case, graphs = Case(guidance=GUIDED), Graphs(RecordedBackend())
    batches = [world.batch, _other(world.batch)]
    options = {"micro_batch": 2}
    _assert_same(_rounds(world, case, batches, graphs=graphs, **options), _rounds(world, case, batches, **options))
    assert graphs.captured == -(-len(world.batch) // 2)


def test_gradients_are_added_to_those_there(world: World) -> None:
    """Two rounds without an optimizer step between them: the sum, in the buffers of the graph."""
    case, graphs = Case(guidance=GUIDED), Graphs(RecordedBackend())
    model, student, bank = world.team(case.kind, case.teachers, "merged", case.guidance)
    table = world.table(case.solver, case.variance)
    sums = []
    for kept in (None, graphs):
        for batch in (world.batch, _other(world.batch)):
            one_pass(model, student, bank, batch, table, step_weights(table, "kl"), graphs=kept)
        sums.append(gradients(dict(student.named_parameters())))
    assert relative_error(sums[1], sums[0]) <= 1e-6


def test_steps_without_loss_have_a_graph_of_their_own(world: World) -> None:
    case = Case(guidance=GUIDED)
    model, student, bank = world.team(case.kind, case.teachers, "merged", case.guidance)
    table = world.table(case.solver, case.variance)
    graphs = Graphs(RecordedBackend())
    queried = [torch.tensor([0.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 3.0, 0.0])]
    for factors in queried:
        weight = step_weights(table, "kl") * factors
        found = []
        for kept in (None, graphs):
            out = one_pass(model, student, bank, world.batch, table, weight, graphs=kept)
            found.append((out.losses, out.x, gradients(dict(student.named_parameters()))))
        _assert_same(found[1:], found[:1])
    assert graphs.captured == 2


def test_a_policy_gradient_replays_the_teachers_alone(world: World) -> None:
    case, graphs = Case(solver="flow_sde", guidance=GUIDED), Graphs(RecordedBackend())
    batches, options = [world.batch, _other(world.batch)], {"surrogate": Surrogate("return_to_go")}
    _assert_same(_rounds(world, case, batches, graphs=graphs, **options), _rounds(world, case, batches, **options))
    assert graphs.captured == len(world.batch.tasks)
    assert graphs.replays == 2 * len(world.batch.tasks) * 3


def test_text_of_another_length_is_refused(world: World) -> None:
    case, graphs = Case(guidance=GUIDED), Graphs(RecordedBackend())
    _rounds(world, case, [world.batch], graphs=graphs)
    longer = dataclasses.replace(
        world.batch,
        text=dataclasses.replace(world.batch.text, sequence=world.batch.text.sequence.repeat(1, 2, 1)),
        negative=dataclasses.replace(world.batch.negative, sequence=world.batch.negative.sequence.repeat(1, 2, 1)),
    )
    with pytest.raises(ValueError, match=r"text\.sequence .*is given"):
        _rounds(world, case, [longer], graphs=graphs)


def test_a_model_that_reads_numbers_back_trains_without_graphs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    case, graphs = Case(guidance=GUIDED), Graphs(RecordedBackend(), said.append)
    truth = _rounds(world, case, [world.batch])
    model, _, _ = world.team(case.kind, case.teachers, "merged", case.guidance)
    plain = type(model).velocity

    def reading(self: Any, transformer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert float(x.abs().max()) > 0  # asks the device for a number
        return plain(self, transformer, x, *args, **kwargs)

    monkeypatch.setattr(type(model), "velocity", reading)
    _assert_same(_rounds(world, case, [world.batch], graphs=graphs), truth)
    assert graphs.captured == 0
    assert any("cannot be captured and runs without" in line for line in said)
