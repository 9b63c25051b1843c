"""Blocks that compute their activations again: less is kept, and every gradient stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.models import gradients
from opd_fast.engine.activation_checkpointing import checkpoint_blocks
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.objectives import step_weights
from opd_fast.training.rollout import one_pass
from tests.recorded import RecordedBackend
from tests.training.test_one_pass import GUIDED, World


@pytest.fixture(scope="module")
def world(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("recompute"))


def _round(world: World, kind: str, blocks: int, graphs: Graphs | None = None) -> tuple[dict[str, Tensor], int]:
    """Gradients of a round, and the bytes that autograd kept in it."""
    model, student, bank = copy.deepcopy(world.team(kind, "lora", "merged", GUIDED))
    assert checkpoint_blocks(model.blocks(student.transformer), blocks) == blocks
    table = world.table("flow_sde", "exact")
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        one_pass(model, student, bank, world.batch, table, step_weights(table, "kl"), graphs=graphs)
    return gradients(dict(student.named_parameters())), kept


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_stay_and_memory_shrinks(world: World, kind: str) -> None:
    truth, kept = _round(world, kind, 0)
    for blocks in (1, 2):
        found, less = _round(world, kind, blocks)
        assert less < (0.7 if blocks == 1 else 0.3) * kept
        assert all(torch.equal(found[name], gradient) for name, gradient in truth.items())
        kept = kept if blocks == 1 else less


def test_recomputation_is_captured(world: World) -> None:
    graphs = Graphs(RecordedBackend())
    truth, _ = _round(world, "lora", 0)
    found, _ = _round(world, "lora", 2, graphs)
    assert graphs.captured == 1
    assert all(torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-9) for name, gradient in truth.items())
