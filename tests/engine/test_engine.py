"""The engine's techniques are put to work as the settings say, and what cannot be is said."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.models import gradients, relative_error
from opd_fast.config import EngineConfig, StudentConfig, TeacherConfig
from opd_fast.engine.attention import BACKENDS
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.objectives import step_weights
from opd_fast.training.optimize import (
    ActiveTechniques,
    ForwardSizes,
    ResolvedSettings,
    apply_techniques,
    compile_blocks,
)
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers
from opd_fast.training.teachers import TeacherBank
from tests.recorded import RecordedBackend
from tests.runs import write_world
from tests.training.test_one_pass import GUIDED, UNGUIDED, Guidance, World


@pytest.fixture
def team(tmp_path: Path) -> Team:
    return _team(tmp_path, "merged")


def _team(folder: Path, placement: Literal["merged", "shared"]) -> Team:
    world = write_world(folder / "world").parent
    model = load_model(str(world / "pipeline"), device="cpu", dtype=torch.float32)
    teacher = TeacherConfig(name="words", weights=str(world / "words"), prompts="")
    bank = load_teachers(model, [teacher], placement)
    return model, Student.build(model, StudentConfig(rank=4, alpha=8.0)), bank


OFF = EngineConfig(
    attention="native",
    compile="off",
    graphs="off",
    group_teachers=False,
    merge_student=False,
    fuse_projections=False,
    cache_modulation=False,
)
FORWARDS = ForwardSizes(student_rows=2, teacher_rows=1, resolution=64)
Team = tuple[DiffusionModel, Student, TeacherBank]


def _apply(team: Team, said: list[str] | None = None, **changes: Any) -> ActiveTechniques:
    settings = dataclasses.replace(OFF, **changes)
    say = (said if said is not None else []).append
    resolved = ResolvedSettings(settings.compile == "on", settings.graphs == "on")
    return apply_techniques(settings, *team, FORWARDS, resolved=resolved, say=say)


def _at_work(active: ActiveTechniques) -> dict[str, Any]:
    """What is not zero or empty."""
    found = {key: value for key, value in vars(active).items() if key != "graphs" and value}
    return found | ({"graphs": True} if active.graphs.on else {})


def test_all_off_is_plain(team: Team) -> None:
    assert _at_work(_apply(team)) == {"merged_teachers": 1}


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"merge_student": True}, {"merged_layers": 15}),
        ({"fuse_projections": True}, {"fused": 3}),
        ({"cache_modulation": True}, {"modulation": 14}),
        ({"attention": "math"}, {"backends": ("math", "math")}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_each_switch_counts_what_it_did(team: Team, changes: dict[str, Any], counted: dict[str, Any]) -> None:
    assert _at_work(_apply(team, **changes)) == {"merged_teachers": 1} | counted


def test_measured_attention_is_told_and_kept(team: Team) -> None:
    said: list[str] = []
    active = _apply(team, said, attention="auto")
    assert set(active.backends) <= set(BACKENDS)
    assert len(active.backends) == 2
    assert [line.split(":")[0] for line in said] == ["attention of the student", "attention of the teachers"]
    settings, resolved = dataclasses.replace(OFF, attention="auto"), ResolvedSettings(backends=("math", "native"))
    again = apply_techniques(settings, *team, FORWARDS, resolved=resolved, say=said.append)
    assert again.backends == ("math", "native")
    assert len(said) == 2, "measured again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"graphs": "on"}, "graphs: off, there is no CUDA device"),
        ({"precision": "fp8"}, "precision: fp8 a CPU has no fp8 matrix units"),
        ({"attention": "flash_3"}, "attention of the student: flash_3 needs a CUDA device"),
        ({"attention": "xformers"}, "instead"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_the_machine_lacks_is_said_and_left_out(team: Team, changes: dict[str, Any], words: str) -> None:
    said: list[str] = []
    active = _apply(team, said, **changes)
    assert not active.graphs.on
    assert active.fp8 == 0
    assert any(words in line for line in said), said


def test_every_number_of_rows_is_compiled_for_itself(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher without guidance has half the rows of one with it; no kernel of either has symbolic sizes."""
    sizes: set[Any] = set()
    compile_module = torch.nn.Module.compile

    def recording(module: torch.nn.Module, **options: Any) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            sizes.update(size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape)
            sizes.update(value for value in inputs if isinstance(value, torch.SymInt))
            return graph

        compile_module(module, backend=backend, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", recording)
    model, student, bank = team
    assert compile_blocks(model, student, bank) > 0
    text = model.encode(["a red circle"])
    for rows in (4, 2, 3):
        x = torch.randn(rows, *model.latent_shape(64))
        with torch.no_grad():
            model.velocity(bank.teachers[0].transformer, x, torch.full((rows,), 0.5), text.expand(rows))
    assert {2, 3, 4} <= sizes
    assert not [size for size in sizes if isinstance(size, torch.SymInt)]


def test_teachers_on_one_base_are_asked_together(tmp_path: Path) -> None:
    model, student, bank = _team(tmp_path, "shared")
    active = _apply((model, student, bank), group_teachers=True, cache_modulation=True)
    assert active.grouped_teachers == 1
    assert active.merged_teachers == 0
    assert active.modulation == 14  # seven, by the student and by the teachers


# --- all of them together ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("guidance", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("placement", ["merged", "shared"])
def test_the_round_is_the_same_with_all_techniques_on(
    world: World, placement: str, guidance: Guidance, micro_batch: int | None
) -> None:
    """Three rounds with weights that move, each step a replay, against the plain rounds."""
    table = world.table("flow_sde", "exact")
    found = []
    for on in (False, True):
        model, student, bank = copy.deepcopy(world.team("lora", "lora", placement, guidance))
        settings = EngineConfig(compile="off", graphs="off") if on else OFF
        active = apply_techniques(
            settings, model, student, bank, FORWARDS, resolved=ResolvedSettings(checkpointed=int(on))
        )
        graphs = Graphs(RecordedBackend()) if on else None
        if on:
            counts = _at_work(active)
            teaching = {"merged": {"merged_teachers", "fused"}, "shared": {"grouped_teachers"}}[placement]
            assert counts.keys() == teaching | {"merged_layers", "modulation", "backends", "checkpointed"}
        rounds = []
        for index in range(3):
            batch = dataclasses.replace(world.batch, keys=world.batch.keys + 10 * index, noise=None)
            batch = dataclasses.replace(batch, text=batch.text.index([(i + index) % 3 for i in range(3)]))
            out = one_pass(
                model,
                student,
                bank,
                batch,
                table,
                step_weights(table, "kl"),
                micro_batch=micro_batch,
                graphs=graphs,
            )
            rounds.append((out.losses.clone(), gradients(dict(student.named_parameters()))))
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(1.1)
        found.append(rounds)
        if graphs is not None:
            assert graphs.captured == (1 if micro_batch is None else 2)
            assert not graphs.refused
    for (true_losses, truth), (losses, gradient) in zip(*found, strict=True):
        assert float(true_losses.min()) > 0
        torch.testing.assert_close(losses, true_losses, rtol=1e-4, atol=0.0)
        assert relative_error(gradient, truth) <= 1e-5
