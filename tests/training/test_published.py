"""The recipe of the published runs, and the loss of the released code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_fast.config import Config
from opd_fast.config.command_line import read_config
from opd_fast.distributed.plan import make_plan
from opd_fast.solvers import solver_table
from opd_fast.training.methods.opd import OPD
from tests.runs import settings

RECIPES = Path(__file__).resolve().parents[2] / "opd_fast" / "recipes"


@pytest.mark.parametrize(
    ("recipe", "parameters", "modules", "trained"),
    [
        ("sd35-mopd", 2_243_171_520, 191, 18_776_064),
        ("sd35-single-teacher", 2_243_171_520, 191, 18_776_064),
        ("flux-mopd", 11_901_408_320, None, None),
    ],
)
def test_full_size_plans_need_no_weights(
    recipe: str, parameters: int, modules: int | None, trained: int | None
) -> None:
    begun = time.process_time()
    plan = make_plan(read_config(RECIPES / f"{recipe}.yaml"))
    assert time.process_time() - begun < 20
    assert plan.workload.parameters == parameters
    assert plan.lora_modules is not None
    if modules is not None:
        assert (plan.lora_modules, plan.workload.trainable) == (modules, trained)
    config = read_config(RECIPES / f"{recipe}.yaml")
    assert plan.bytes["base"] == 2 * parameters
    assert plan.traced
    if config.engine.placement == "merged":
        assert plan.bytes["teachers"] == len(config.teachers) * 2 * parameters
    else:  # three LoRAs that are not here count as large as the student's
        assert plan.bytes["teachers"] == len(config.teachers) * 4 * plan.workload.trainable


def test_the_recipe_states_the_published_values() -> None:
    """DiffusionOPD's released `mopd` configuration, value by value."""
    config = read_config(RECIPES / "sd35-mopd.yaml")
    assert (config.student.rank, config.student.alpha, config.student.guidance) == (32, 64, 4.5)
    assert {t.name: t.guidance for t in config.teachers} == {"geneval": 1.0, "ocr": 4.5, "aesthetic": 4.5}
    assert (config.sampler.solver, config.sampler.steps, config.sampler.train_last) == ("ode", 10, False)
    assert (config.train.lr, config.train.betas, config.train.eps, config.train.weight_decay) == (
        3e-4,
        (0.9, 0.999),
        1e-8,
        1e-4,
    )
    assert (config.train.clip, config.train.schedule, config.train.ema, config.train.seed) == (1.0, "constant", 0.9, 42)
    assert len(config.teachers) * config.train.samples_per_task == 72
    assert (config.evaluation.every, config.evaluation.steps, config.evaluation.guidance) == (30, 40, 4.5)
    assert (config.model.resolution, config.model.max_sequence_length) == (512, 128)


@pytest.mark.parametrize(("solver", "eta"), [("ode", 0.7), ("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_loss_of_the_released_code(tmp_path: Path, solver: str, eta: float) -> None:
    """As released: each of tasks x steps micro-batches has the loss mean(delta^2) / 2 under an ODE, else over
    max(std_dev^2, 1e-8), means in float32 over samples and elements; accumulation divides by their number."""
    from opd_fast.training.setup import prepare

    config: Config = settings(
        RECIPES / "bundled.yaml",
        sampler__solver=solver,
        sampler__eta=eta,
        objective__kind="kl",
        objective__variance="published",
        objective__steps="mean",
        train__samples_per_task=2,
        evaluation__every=0,
    )
    for teacher in config.teachers:
        teacher.guidance = teacher.weight = 1.0
    setup = prepare(config, log=lambda text: None)
    method = OPD(setup)
    found = method.accumulate(0, torch.amp.GradScaler("cpu", enabled=False)).sum()

    batch = method.batch(0)
    table = solver_table(solver, setup.table.sigmas, eta)
    losses: list[Any] = []
    from opd_kernels import philox_normal
    from opd_kernels.philox import INITIAL_NOISE

    with torch.no_grad(), setup.student.base() as student:  # a new student is the base
        x = philox_normal(batch.keys, batch.shape, INITIAL_NOISE)
        for j in range(table.steps - 1):
            sigma, following = table.sigmas[j].float(), table.sigmas[j + 1].float()
            v_student = setup.model.velocity(student, x, sigma, batch.text)
            gaps = []
            for index, rows in batch.tasks:
                with setup.teachers.active(index) as teacher_network:
                    v_teacher = setup.model.velocity(teacher_network, x[rows], sigma, batch.text.index(rows))
                gaps.append((float(table.b[j]) * (v_student[rows] - v_teacher)).float())
            if solver == "ode":
                variance = 1.0
            elif solver == "flow_sde":  # g^2 = eta^2 * sigma / (1 - sigma), sigma = 1 replaced by sigma[1]; no dt
                top = table.sigmas[1].float() if j == 0 else sigma
                variance = max(float(eta**2 * sigma / (1 - top)), 1e-8)
            else:  # the true variance
                variance = max(float(eta**2 * (sigma - following)), 1e-8)
            losses += [gap.square().mean() / 2 / variance for gap in gaps]
            noise = philox_normal(batch.keys, batch.shape, j) if table.stochastic else torch.zeros_like(x)
            x = float(table.a[j]) * x + float(table.b[j]) * v_student + float(table.std[j]) * noise
    assert len(losses) == 27
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=2e-4, atol=0.0)
