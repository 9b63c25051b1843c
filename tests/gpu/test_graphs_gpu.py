"""Graphs on a GPU: a round of replays is the eager round, whatever the weights do in between."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models import NANO, gradients, random_model, random_text, relative_error, write_random_lora
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.engine.cuda_graphs import CudaBackend, Graphs
from opd_fast.objectives import Surrogate, step_weights
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.optimize import compile_blocks
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
GUIDANCE = (4.5, (4.5, 1.0))


class Team:
    """Student and two teachers of a small model on the GPU."""

    def __init__(self, folder: Path, dtype: torch.dtype, placement: str = "merged", kind: str = "lora") -> None:
        torch.manual_seed(0)
        self.model = random_model(NANO, device=DEVICE, dtype=dtype)
        targets = self.model.targets("attention")
        configs = []
        for i, guidance in enumerate(GUIDANCE[1]):
            lora = write_random_lora(
                copy.deepcopy(self.model.transformer).float().cpu(),
                folder / f"t{i}",
                rank=4,
                alpha=8.0,
                targets=targets,
                std=0.5,
            )
            configs.append(TeacherConfig(name=f"t{i}", weights=str(lora), prompts="", guidance=guidance))
        self.bank = load_teachers(self.model, configs, placement)  # type: ignore[arg-type]
        settings = StudentConfig(kind=kind, rank=4, alpha=8.0, guidance=GUIDANCE[0])  # type: ignore[arg-type]
        self.student = Student.build(self.model, settings)
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.2)
        self.start = [p.detach().clone() for p in self.student.parameters()]
        self.table = solver_table("flow_sde", self.model.sigmas(4, NANO.resolution), 0.7)

    def batch(self, seed: int, count: int = 3) -> RoundBatch:
        torch.manual_seed(seed)
        return RoundBatch(
            text=random_text(count, NANO, device=DEVICE).to(dtype=self.model.dtype),
            negative=random_text(1, NANO, device=DEVICE).to(dtype=self.model.dtype),
            tasks=((0, slice(0, 2)), (1, slice(2, count))),
            keys=torch.arange(count, device=DEVICE) + 10 * seed,
            scale=torch.rand(count, device=DEVICE) + 0.5,
            shape=self.model.latent_shape(NANO.resolution),
        )

    def rounds(self, graphs: Graphs | None, **options: object) -> list[tuple[Tensor, dict[str, Tensor]]]:
        found = []
        for seed in range(3):
            out = one_pass(
                self.model,
                self.student,
                self.bank,
                self.batch(seed),
                self.table,
                step_weights(self.table, "kl"),
                graphs=graphs,
                **options,  # type: ignore[arg-type]
            )
            found.append((out.losses.clone(), gradients(dict(self.student.named_parameters()))))
            with torch.no_grad():
                for p in self.student.parameters():
                    p.mul_(1.1)
        with torch.no_grad():
            for p, value in zip(self.student.parameters(), self.start, strict=True):
                p.copy_(value)
        return found


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _assert_same(
    found: list[tuple[Tensor, dict[str, Tensor]]], truth: list[tuple[Tensor, dict[str, Tensor]]], most: float
) -> None:
    for (losses, grads), (true_losses, true_grads) in zip(found, truth, strict=True):
        assert float(true_losses.max()) > 0
        torch.testing.assert_close(losses, true_losses, rtol=most, atol=0.0)
        assert relative_error(grads, true_grads) <= most


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("placement", ["merged", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_round_of_replays_is_the_round(
    tmp_path: Path, dtype: torch.dtype, placement: str, kind: str, compiled: bool
) -> None:
    team = Team(tmp_path, dtype, placement, kind)
    truth = team.rounds(None)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(team.model, team.student, team.bank)
    said: list[str] = []
    graphs = Graphs(CudaBackend(DEVICE), said.append)
    found = team.rounds(graphs)
    assert (graphs.captured, graphs.replays) == (1, 9), said
    _assert_same(found, truth, 1e-5 if dtype == torch.float32 else 2e-2)


def test_a_policy_gradient_replays_the_teachers(tmp_path: Path) -> None:
    team = Team(tmp_path, torch.float32)
    options = {"surrogate": Surrogate("return_to_go")}
    truth, graphs = team.rounds(None, **options), Graphs(CudaBackend(DEVICE))
    _assert_same(team.rounds(graphs, **options), truth, 1e-5)
    assert (graphs.captured, graphs.replays) == (2, 18)


def test_text_of_another_length_is_refused(tmp_path: Path) -> None:
    team, graphs = Team(tmp_path, torch.float32), Graphs(CudaBackend(DEVICE))
    team.rounds(graphs)
    batch = team.batch(5)
    assert batch.negative is not None
    longer = dataclasses.replace(
        batch,
        text=dataclasses.replace(batch.text, sequence=batch.text.sequence.repeat(1, 2, 1)),
        negative=dataclasses.replace(batch.negative, sequence=batch.negative.sequence.repeat(1, 2, 1)),
    )
    weight = step_weights(team.table, "kl")
    with pytest.raises(ValueError, match=r"engine\.graphs off"):
        one_pass(team.model, team.student, team.bank, longer, team.table, weight, graphs=graphs)
