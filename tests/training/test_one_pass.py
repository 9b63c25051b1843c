"""One pass equals rollout, then teacher pass, then training pass: loss for loss and gradient for gradient.

The engine is held against `benchmarks/reference.py`, which shares no code with it, on a random model of SD3's anatomy.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor

from benchmarks.models import (
    NANO,
    copy_parameters,
    gradients,
    random_model,
    random_text,
    relative_error,
    write_random_lora,
)
from benchmarks.reference import AdapterPolicy, Policy, Reference, WeightsPolicy, adapters_on
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.models.sd3 import SD3
from opd_fast.models.text import TextEmbeds
from opd_fast.objectives import step_weights
from opd_fast.solvers import SOLVERS, solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers
from opd_fast.training.teachers import TeacherBank
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE

STEPS, ETA = 4, 0.7
RANK, ALPHA = 4, 8.0
TOLERANCE = 1e-5
Guidance = tuple[float, tuple[float, float]]  # the student's, the teachers'
GUIDED: Guidance = (4.5, (4.5, 1.0))
UNGUIDED: Guidance = (1.0, (1.0, 1.0))
# The last block's text stream is discarded, and so are its queries.
IDLE = tuple(f"transformer_blocks.{NANO.layers - 1}.attn.{name}" for name in ("add_q_proj", "norm_added_q"))

Team = tuple[SD3, Student, TeacherBank]
Result = tuple[Tensor, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """What engine and reference are both told."""

    solver: str = "flow_sde"
    guidance: Guidance = UNGUIDED
    kind: str = "lora"
    teachers: str = "lora"
    objective: str = "kl"
    variance: str = "exact"
    reduction: str = "mean"
    train_last: bool = False


class World:
    """One base, two LoRA teachers of different rank, two full-weight teachers, two tasks of 2 and 1 samples."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = random_model(NANO)
        targets = self.model.targets("attention")
        base: Any = self.model.transformer
        self.folders: dict[str, list[Path]] = {"lora": [], "full": []}
        for i, (rank, alpha) in enumerate(((4, 8.0), (2, 2.0))):
            lora = write_random_lora(base, folder / f"lora{i}", rank=rank, alpha=alpha, targets=targets, std=0.5)
            self.folders["lora"].append(lora)
            full = _perturbed(base)
            full.save_pretrained(folder / f"full{i}")
            self.folders["full"].append(folder / f"full{i}")
        self.lora_config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)

        # The student's values are the reference's; the engine's student gets a copy.
        self.adapters = adapters_on(
            copy.deepcopy(base), self.lora_config, [(f"t{i}", f) for i, f in enumerate(self.folders["lora"])]
        )
        for name, parameter in self.adapters.named_parameters():
            if ".lora_B.student." in name:
                torch.nn.init.normal_(parameter, std=0.5)
        self.full_student = _perturbed(base).requires_grad_(True)
        # Teachers that are the student itself, under the names "lora student" and "full student".
        self.adapters.save_pretrained(str(folder), selected_adapters=["student"])
        self.full_student.save_pretrained(folder / "full_student")
        self.folders["lora student"] = [folder / "student"] * 2
        self.folders["full student"] = [folder / "full_student"] * 2
        self.full_teachers = [type(base).from_pretrained(f).eval().requires_grad_(False) for f in self.folders["full"]]

        count, shape = 3, self.model.latent_shape(NANO.resolution)
        self.batch = RoundBatch(
            text=random_text(count, NANO),
            negative=random_text(1, NANO),
            tasks=((0, slice(0, 2)), (1, slice(2, 3))),
            keys=torch.arange(count),
            scale=torch.tensor([0.5, 0.25, 1.5]),
            shape=shape,
            x=torch.randn(count, *shape),
            noise=torch.randn(STEPS, count, *shape),
        )
        self.table = functools.cache(self._table)
        self.team = functools.cache(self._team)
        self.reference = functools.cache(self._reference)

    def _table(self, solver: str, variance: str) -> Any:
        return solver_table(solver, self.model.sigmas(STEPS, NANO.resolution), ETA, variance=variance)

    def _team(self, kind: str, teachers: str, placement: str, guidance: Guidance) -> Team:
        """The engine's student and teachers on a base of their own, the student with the reference's values."""
        model = copy.copy(self.model)
        model.transformer = copy.deepcopy(self.model.transformer)
        configs = [
            TeacherConfig(name=f"t{i}", weights=str(folder), prompts="bundled/composition", guidance=guidance[1][i])
            for i, folder in enumerate(self.folders[teachers])
        ]
        bank = load_teachers(model, configs, placement)  # type: ignore[arg-type]
        config = StudentConfig(kind=kind, rank=RANK, alpha=ALPHA, guidance=guidance[0])  # type: ignore[arg-type]
        student = Student.build(model, config)
        policy = self._student_policy(kind, guidance[0])
        copy_parameters(dict(policy.parameters()), dict(student.named_parameters()))
        return model, student, bank

    def _student_policy(self, kind: str, guidance: float) -> AdapterPolicy | WeightsPolicy:
        if kind == "lora":
            return AdapterPolicy(self.adapters, "student", guidance)
        return WeightsPolicy(self.full_student, guidance)

    def engine(self, case: Case, placement: str = "merged", batch: RoundBatch | None = None, **options: Any) -> Result:
        model, student, bank = self.team(case.kind, case.teachers, placement, case.guidance)
        table = self.table(case.solver, case.variance)
        out = one_pass(
            model,
            student,
            bank,
            self.batch if batch is None else batch,
            table,
            step_weights(table, case.objective),  # type: ignore[arg-type]
            train_last=case.train_last,
            reduction=case.reduction,  # type: ignore[arg-type]
            **options,
        )
        return out.losses, gradients(dict(student.named_parameters()))

    def _reference(self, case: Case) -> Result:
        if case.teachers == "lora":
            teachers: list[Policy] = [
                AdapterPolicy(self.adapters, f"t{i}", guidance) for i, guidance in enumerate(case.guidance[1])
            ]
        else:
            teachers = [
                WeightsPolicy(model, guidance)
                for model, guidance in zip(self.full_teachers, case.guidance[1], strict=True)
            ]
        reference = Reference(
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            self._student_policy(case.kind, case.guidance[0]),
            teachers,
            solver=case.solver,
            steps=STEPS,
            eta=ETA,
            objective=case.objective,  # type: ignore[arg-type]
            variance=case.variance,  # type: ignore[arg-type]
            reduction=case.reduction,  # type: ignore[arg-type]
            train_last=case.train_last,
        )
        losses = reference.round(self.batch)
        return losses, gradients(reference.parameters())


def _perturbed(base: torch.nn.Module) -> Any:
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std(correction=0) * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to share
    yield World(tmp_path_factory.mktemp("one_pass"))
    torch.set_num_threads(threads)


def assert_equal(found: Result, truth: Result) -> None:
    losses, grads = found
    true_losses, true_grads = truth
    assert losses.shape == true_losses.shape
    torch.testing.assert_close(losses.cpu(), true_losses, rtol=1e-4, atol=0.0)
    assert float(true_losses.min()) > 0
    idle = {name for name, gradient in true_grads.items() if not gradient.any()}
    assert all(name.startswith(IDLE) for name in idle), f"no gradient, so nothing is proven: {idle}"
    assert relative_error(grads, true_grads) <= TOLERANCE


@pytest.mark.parametrize("placement", ["merged", "shared"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("guidance", [UNGUIDED, GUIDED], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_pass_equals_reference(world: World, solver: str, guidance: Guidance, kind: str, placement: str) -> None:
    case = Case(solver=solver, guidance=guidance, kind=kind)
    assert_equal(world.engine(case, placement), world.reference(case))


@pytest.mark.parametrize(
    "case",
    [
        Case(solver="flow_sde", variance="published"),
        Case(solver="ddim", variance="published"),
        Case(solver="flow_sde", objective="l2", guidance=GUIDED),
        Case(solver="flow_sde", objective="velocity", guidance=GUIDED),
        Case(solver="ode", reduction="sum"),
        Case(solver="flow_sde", train_last=True),
        Case(solver="cps", train_last=True),
        Case(solver="dpm2", train_last=True),
        Case(kind="full", teachers="full", guidance=GUIDED),
        Case(solver="flow_sde", guidance=(1.0, (4.5, 1.0))),
        Case(solver="ode", guidance=(4.5, (1.0, 1.0))),
    ],
    ids=lambda case: "-".join(str(value) for value in dataclasses.astuple(case)),
)
def test_every_convention_equals_reference(world: World, case: Case) -> None:
    assert_equal(world.engine(case), world.reference(case))


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_micro_batches_change_nothing(world: World, kind: str, micro_batch: int) -> None:
    case = Case(solver="dpm2", guidance=GUIDED, kind=kind)
    assert_equal(world.engine(case, micro_batch=micro_batch), world.reference(case))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_noise_drawn_from_keys_is_the_noise_given(world: World, micro_batch: int | None) -> None:
    """Without x and noise the round draws both from its keys, sample by sample, whatever the batch."""
    keys, shape = world.batch.keys, world.batch.shape
    given = dataclasses.replace(
        world.batch,
        x=philox_normal(keys, shape, INITIAL_NOISE),
        noise=torch.stack([philox_normal(keys, shape, j) for j in range(STEPS)]),
    )
    drawn = dataclasses.replace(world.batch, x=None, noise=None)
    case = Case(solver="flow_sde", guidance=GUIDED)
    assert_equal(world.engine(case, batch=drawn, micro_batch=micro_batch), world.engine(case, batch=given))


@pytest.mark.parametrize("placement", ["merged", "shared"])
def test_tasks_apart_sum_to_tasks_together(world: World, placement: str) -> None:
    case = Case(guidance=GUIDED)
    losses, whole = world.engine(case, placement)
    total = whole
    for teacher, rows in world.batch.tasks:
        alone, part = world.engine(case, placement, _only(world.batch, teacher, rows))
        torch.testing.assert_close(alone, losses[:, rows], rtol=1e-4, atol=0.0)
        total = {name: gradient - part[name] for name, gradient in total.items()}
    assert _norm(total) <= TOLERANCE * _norm(whole)


@pytest.mark.parametrize(
    ("kind", "placement"), [("lora", "merged"), ("lora", "shared"), ("full", "merged")], ids=lambda value: value
)
def test_a_teacher_that_is_the_student_teaches_nothing(world: World, kind: str, placement: str) -> None:
    """Loss and gradient vanish but for rounding: 1e-7 of the velocity, where other teachers differ by a third of it."""
    same: list[Guidance] = [(4.5, (4.5, 4.5)), (1.0, (1.0, 1.0))]
    for guidance in same:
        losses, grads = world.engine(Case(kind=kind, guidance=guidance, teachers=f"{kind} student"), placement)
        other_losses, other_grads = world.engine(Case(kind=kind, guidance=guidance), "merged")
        assert bool((losses <= 1e-10 * other_losses).all())
        assert _norm(grads) <= TOLERANCE * _norm(other_grads)


def _norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def _only(batch: RoundBatch, teacher: int, rows: slice) -> RoundBatch:
    assert batch.x is not None
    assert batch.noise is not None
    count = rows.stop - rows.start
    return dataclasses.replace(
        batch,
        text=TextEmbeds(batch.text.sequence[rows], batch.text.pooled[rows]),
        tasks=((teacher, slice(0, count)),),
        keys=batch.keys[rows],
        scale=batch.scale[rows],
        x=batch.x[rows],
        noise=batch.noise[:, rows],
    )
