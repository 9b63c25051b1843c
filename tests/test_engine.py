"""The engine's techniques are put to work as the settings say, and what cannot be is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from opd_fast.config import EngineConfig, StudentConfig, TeacherConfig
from opd_fast.engine import Engaged, engage
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.student import Student
from opd_fast.teachers import TeacherBank
from tests.runs import write_world


@pytest.fixture
def team(tmp_path: Path) -> tuple[DiffusionModel, Student, TeacherBank]:
    folder = write_world(tmp_path / "world").parent
    model = load_model(str(folder / "pipeline"), device="cpu", dtype=torch.float32)
    teacher = TeacherConfig(name="words", weights=str(folder / "words"), prompts="")
    bank = TeacherBank.load(model, [teacher], "merged")
    return model, Student.build(model, StudentConfig(rank=4, alpha=8.0)), bank


OFF = EngineConfig(compile="off", graphs="off", merge_student=False, fuse_projections=False, cache_modulation=False)


def _engage(team: tuple[DiffusionModel, Student, TeacherBank], settings: EngineConfig, said: list[str]) -> Engaged:
    return engage(settings, *team, compiled=settings.compile == "on", graphed=settings.graphs == "on", say=said.append)


def test_all_off_is_plain(team: tuple[DiffusionModel, Student, TeacherBank]) -> None:
    engaged = _engage(team, OFF, [])
    assert (engaged.merged_teachers, engaged.merged_layers, engaged.compiled, engaged.graphs.on) == (1, 0, 0, False)


def test_each_switch_counts_what_it_did(team: tuple[DiffusionModel, Student, TeacherBank]) -> None:
    _, student, _ = team
    merged = _engage(team, dataclasses.replace(OFF, merge_student=True), [])
    assert merged.merged_layers == len(student.parameters()) // 2


def test_graphs_without_a_gpu_are_off_and_said_to_be(team: tuple[DiffusionModel, Student, TeacherBank]) -> None:
    said: list[str] = []
    engaged = _engage(team, dataclasses.replace(OFF, graphs="on"), said)
    assert not engaged.graphs.on
    assert any("graphs: off, there is no CUDA device" in line for line in said)
