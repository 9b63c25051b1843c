"""What a family has to pass whatever its transformer looks like: one pass, samples, export, meta model, compilation."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.models import copy_parameters, gradients, relative_error, write_random_lora
from benchmarks.reference import AdapterPolicy, Batch, Predict, Reference, adapters_on
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.models import DiffusionModel
from opd_fast.objectives import step_weights
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.optimize import compile_blocks
from opd_fast.training.rollout import one_pass
from opd_fast.training.sampling import sample
from opd_fast.training.student import Student
from opd_fast.training.student_export import student_writer
from opd_fast.training.teacher_loading import load_teachers
from opd_fast.training.teachers import TeacherBank
from tests.recorded import RecordedBackend

RESOLUTION = 64
STEPS, ETA = 4, 0.7
RANK, ALPHA = 4, 8.0
TOLERANCE = 1e-5
# aot_eager captures, splits and differentiates as the default does, and leaves out what takes minutes on a CPU: C++.
COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(
                "OPD_FAST_COMPILE" not in os.environ, reason="OPD_FAST_COMPILE is not set: takes minutes"
            ),
        ],
    ),
]
PROMPTS = ["a red square", "two blue circles on a wide green field", ""]


def on_its_own(model: DiffusionModel) -> DiffusionModel:
    """The model with a transformer that a test may change."""
    mine = copy.copy(model)
    mine.transformer = copy.deepcopy(model.transformer)
    return mine


def noise(model: DiffusionModel, count: int) -> Tensor:
    """(count, C, H, W) the same at every call."""
    return torch.randn(count, *model.latent_shape(RESOLUTION), generator=torch.Generator().manual_seed(1))


def draw(
    model: DiffusionModel, transformer: nn.Module, x: Tensor, prompts: list[str], guidance: float | None = None
) -> Tensor:
    """The engine's images (B, 3, H, W) by the ODE solver, from x; without guidance where none is given."""
    table = solver_table("ode", model.sigmas(STEPS, RESOLUTION), 0.0)
    text, negative = model.encode(prompts), model.encode([""])
    return model.decode(sample(model, transformer, text, negative, guidance, table, x=x))


class World:
    """A base, two LoRA teachers of different rank, a LoRA student; two tasks of 2 and 1 samples with text of their own.

    `predict` calls the network as diffusers has it, at the levels sigma (B,) in place of timesteps; `schedule` is what
    the pipeline hands to `set_timesteps`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        folder: Path,
        predict: Predict,
        scheduler: FlowMatchEulerDiscreteScheduler,
        schedule: Mapping[str, Any],
    ) -> None:
        torch.manual_seed(0)
        self.model, self.network_at, self.scheduler, self.schedule = model, predict, scheduler, schedule
        self.levels = model.sigmas(STEPS, RESOLUTION).float()
        targets = model.targets("attention")
        self.loras = [
            write_random_lora(model.transformer, folder / f"lora{i}", rank=rank, alpha=alpha, targets=targets, std=0.2)
            for i, (rank, alpha) in enumerate(((4, 8.0), (2, 2.0)))
        ]
        self.adapters = adapters_on(
            copy.deepcopy(model.transformer),
            LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets),
            [(f"t{i}", lora) for i, lora in enumerate(self.loras)],
        )
        for name, parameter in self.adapters.named_parameters():
            if ".lora_B.student." in name:
                torch.nn.init.normal_(parameter, std=0.2)
        count, shape = len(PROMPTS), model.latent_shape(RESOLUTION)
        self.batch = RoundBatch(
            text=model.encode(PROMPTS),
            negative=model.encode(["a blur"]),
            tasks=((0, slice(0, 2)), (1, slice(2, 3))),
            keys=torch.arange(count),
            scale=torch.tensor([0.5, 0.25, 1.5]),
            shape=shape,
            x=torch.randn(count, *shape),
            noise=torch.randn(STEPS, count, *shape),
        )
        self._team = functools.cache(self._build)

    def _build(self, guidance: tuple[float, float, float]) -> tuple[DiffusionModel, Student, TeacherBank]:
        model = on_its_own(self.model)
        configs = [
            TeacherConfig(name=f"t{i}", weights=str(lora), prompts="bundled/composition", guidance=guidance[1 + i])
            for i, lora in enumerate(self.loras)
        ]
        bank = load_teachers(model, configs, "merged")
        student = Student.build(model, StudentConfig(kind="lora", rank=RANK, alpha=ALPHA, guidance=guidance[0]))
        policy = AdapterPolicy(self.adapters, "student", guidance[0])
        copy_parameters(dict(policy.parameters()), dict(student.named_parameters()))
        return model, student, bank

    def predict(
        self, network: nn.Module, x: Tensor, timestep: Tensor, batch: Batch, rows: slice, guidance: float
    ) -> Tensor:
        # The scheduler's levels are the engine's but for float32 rounding (tested apart); the embedding of the level
        # multiplies it by 1000, which would be all that is left of the difference between the two gradients.
        level = self.levels[(self.levels - timestep[:, None] / 1000).abs().argmin(1)]
        return self.network_at(network, x, level, batch, rows, guidance)

    def check(self, solver: str, guidance: tuple[float, float, float]) -> None:
        """Engine and reference agree; `guidance` is the student's and the two teachers'."""
        model, student, bank = self._team(guidance)
        table = solver_table(solver, model.sigmas(STEPS, RESOLUTION), ETA)
        out = one_pass(model, student, bank, self.batch, table, step_weights(table, "kl"))
        found = gradients(dict(student.named_parameters()))

        reference = Reference(
            self.scheduler,
            AdapterPolicy(self.adapters, "student", guidance[0]),
            [AdapterPolicy(self.adapters, f"t{i}", guidance[1 + i]) for i in range(2)],
            solver=solver,
            steps=STEPS,
            eta=ETA,
            schedule=self.schedule,
            predict=self.predict,
        )
        losses = reference.round(self.batch)
        truth = gradients(reference.parameters())
        assert float(losses.min()) > 0
        assert sum(bool(gradient.any()) for gradient in truth.values()) >= 0.8 * len(truth)
        torch.testing.assert_close(out.losses, losses, rtol=1e-4, atol=0.0)
        assert relative_error(found, truth) <= TOLERANCE


def check_guidance(
    model: DiffusionModel, theirs: Callable[[Tensor, list[str], float], Tensor], groups: list[list[float]]
) -> None:
    """The engine draws what the pipeline draws of the same guidance; `theirs(x, prompts, guidance)` are its images.

    The guidances of a group draw the same images, those of different groups different ones.
    """
    x, prompts = noise(model, 2), PROMPTS[:2]
    found = []
    for group in groups:
        for guidance in group:
            images = draw(model, model.transformer, x, prompts, guidance)
            torch.testing.assert_close(images, theirs(x, prompts, guidance), rtol=0, atol=1e-4)
            found.append((group, images))
    for (group, images), (other, different) in itertools.combinations(found, 2):
        away = float((images - different).abs().max())
        assert away == 0 if group is other else away > 1e-3


def check_export(model: DiffusionModel, pipe: Any, folder: Path, theirs: Any) -> None:
    """`pipe` with the student's LoRA draws the engine's images; `theirs(pipe, x, prompts)` draws its."""
    mine = on_its_own(model)
    student = Student.build(mine, StudentConfig(kind="lora", rank=RANK, alpha=ALPHA))
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    student.ema.update(0, 0.0)
    student_writer(student)(folder)
    x, prompts = noise(model, 2), PROMPTS[:2]
    with student.ema_weights() as transformer:
        images = draw(mine, transformer, x, prompts)
    pipe.load_lora_weights(folder)
    assert float((theirs(pipe, x, prompts) - images).abs().max()) <= 2 / 255
    assert float((draw(model, model.transformer, x, prompts) - images).abs().max()) > 0.05  # the LoRA does something


def check_meta_model(model: DiffusionModel, meta: DiffusionModel) -> None:
    """The meta model of a folder answers as the model loaded from it."""
    assert meta.device.type == "meta"
    shapes = [{name: p.shape for name, p in m.transformer.named_parameters()} for m in (model, meta)]
    assert shapes[0] == shapes[1]
    assert all(p.device.type == "meta" for p in meta.transformer.parameters())
    assert meta.latent_shape(RESOLUTION) == model.latent_shape(RESOLUTION)
    assert meta.image_tokens(RESOLUTION) == model.image_tokens(RESOLUTION)
    assert meta.text_tokens == model.text_tokens
    assert torch.equal(meta.sigmas(7, RESOLUTION), model.sigmas(7, RESOLUTION))
    assert len(meta.blocks(meta.transformer)) == len(model.blocks(model.transformer))


def check_compiled(model: DiffusionModel, folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass with compiled blocks, LoRA merged into the student's, equals the eager one; two steps, so that the
    second runs what the first compiled.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    targets, prompts = model.targets("attention"), PROMPTS[:2]
    lora = write_random_lora(model.transformer, folder, rank=2, alpha=2.0, targets=targets, std=0.2)
    batch = RoundBatch(
        text=model.encode(prompts),
        negative=None,
        tasks=((0, slice(0, 2)),),
        keys=torch.arange(2),
        scale=torch.tensor([0.5, 1.5]),
        shape=model.latent_shape(RESOLUTION),
    )
    table = solver_table("ode", model.sigmas(3, RESOLUTION), 0.0)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    torch._dynamo.reset()
    counters.clear()
    try:
        for compiled in (False, True):
            mine = on_its_own(model)
            teacher = TeacherConfig(name="t", weights=str(lora), prompts="bundled/composition")
            bank = load_teachers(mine, [teacher], "merged")
            student = Student.build(mine, StudentConfig(kind="lora", rank=RANK, alpha=ALPHA))
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    if ".lora_B." in name:
                        parameter.normal_(std=0.2, generator=generator)
            if compiled:
                compile_blocks(mine, student, bank)
            losses = one_pass(mine, student, bank, batch, table, step_weights(table, "kl")).losses
            found.append((losses, gradients(dict(student.named_parameters()))))
            assert bool(counters["stats"]["unique_graphs"]) == compiled
    finally:
        torch._dynamo.reset()
    (losses, truth), (mine_losses, gradient) = found
    assert float(losses.min()) > 0
    torch.testing.assert_close(mine_losses, losses, rtol=TOLERANCE, atol=0.0)
    assert relative_error(gradient, truth) <= TOLERANCE


def check_captured(model: DiffusionModel, folder: Path) -> None:
    """Rounds replayed from graphs equal the plain ones, each with its own text, noise and weights."""
    targets, prompts = model.targets("attention"), PROMPTS[:2]
    lora = write_random_lora(model.transformer, folder, rank=2, alpha=2.0, targets=targets, std=0.2)
    table = solver_table("flow_sde", model.sigmas(3, RESOLUTION), ETA)
    guidance = 3.0 if model.guidance_kind == "cfg" else 1.0
    graphs = Graphs(RecordedBackend())
    found: list[list[tuple[Tensor, dict[str, Tensor]]]] = []
    for kept in (None, graphs):
        mine = on_its_own(model)
        teacher = TeacherConfig(name="t", weights=str(lora), prompts="bundled/composition", guidance=guidance)
        bank = load_teachers(mine, [teacher], "merged")
        student = Student.build(mine, StudentConfig(kind="lora", rank=RANK, alpha=ALPHA, guidance=guidance))
        generator = torch.Generator().manual_seed(2)
        found.append([])
        for index in range(2):
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.normal_(std=0.2, generator=generator)
            batch = RoundBatch(
                text=model.encode(prompts[::-1] if index else prompts),
                negative=model.encode([""]),
                tasks=((0, slice(0, 2)),),
                keys=torch.arange(2) + 10 * index,
                scale=torch.tensor([0.5, 1.5]),
                shape=model.latent_shape(RESOLUTION),
            )
            losses = one_pass(mine, student, bank, batch, table, step_weights(table, "kl"), graphs=kept).losses
            found[-1].append((losses.clone(), gradients(dict(student.named_parameters()))))
    assert (graphs.captured, graphs.replays, graphs.refused) == (1, 4, [])
    for (true_losses, truth), (losses, gradient) in zip(*found, strict=True):
        assert float(true_losses.min()) > 0
        torch.testing.assert_close(losses, true_losses, rtol=TOLERANCE, atol=0.0)
        assert relative_error(gradient, truth) <= TOLERANCE


def check_reads_nothing_back(model: DiffusionModel) -> None:
    """Tensors without values give a velocity without one: no step of it asks the device for a number."""
    text, x = model.encode(PROMPTS).to("meta"), noise(model, len(PROMPTS)).to("meta")
    transformer = copy.deepcopy(model.transformer).to("meta")
    v = model.velocity(transformer, x, torch.tensor(0.7, device="meta"), text)
    assert v.shape == x.shape
    assert v.device.type == "meta"


def check_padding(short: DiffusionModel, long: DiffusionModel) -> None:
    """The number of text tokens changes nothing, nor does what stands in the padding."""
    assert short.text_tokens < long.text_tokens
    x, sigma = noise(short, len(PROMPTS)), torch.tensor([0.9, 0.5, 0.1])
    text, padded = short.encode(PROMPTS), long.encode(PROMPTS)
    assert text.mask is not None
    assert text.mask.dtype == torch.bool
    v = short.velocity(short.transformer, x, sigma, text)
    torch.testing.assert_close(long.velocity(short.transformer, x, sigma, padded), v, rtol=1e-4, atol=1e-5)
    text.sequence[~text.mask] = torch.randn(int((~text.mask).sum()), text.sequence.shape[2])
    torch.testing.assert_close(short.velocity(short.transformer, x, sigma, text), v, rtol=1e-4, atol=1e-5)
    first = text.index([1, 0]), x[[1, 0]], sigma[[1, 0]]
    again = short.velocity(short.transformer, first[1], first[2], first[0])
    torch.testing.assert_close(again, v[[1, 0]], rtol=1e-4, atol=1e-5)


def check_low_precision(low: DiffusionModel, full: DiffusionModel) -> None:
    """bfloat16 transformer and text, float32 VAE; a float32 student on it is fed float32."""
    assert {p.dtype for p in low.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in low.vae.parameters()} == {torch.float32}
    text, x, sigma = low.encode(PROMPTS), noise(low, len(PROMPTS)), torch.tensor(0.75)
    assert text.sequence.dtype == torch.bfloat16
    v = low.velocity(low.transformer, x, sigma, text)
    assert v.dtype == torch.bfloat16
    truth = full.velocity(full.transformer, x, sigma, full.encode(PROMPTS))
    assert float((v.float() - truth).norm() / truth.norm()) < 0.05
    assert low.velocity(full.transformer, x, sigma, text).dtype == torch.float32
    assert low.decode(x.to(torch.bfloat16)).dtype == torch.float32


def check_foreign_lora(model: DiffusionModel, wider: nn.Module, folder: Path) -> None:
    """A LoRA of another width is refused in one line that names the teacher and the file."""
    lora = write_random_lora(wider, folder, rank=2, alpha=2.0, targets=model.targets("attention"), std=0.1)
    config = TeacherConfig(name="odd", weights=str(lora), prompts="bundled/composition")
    with pytest.raises(ValueError, match=r"teacher 'odd'.*take the LoRA of this model") as caught:
        load_teachers(on_its_own(model), [config])
    assert "\n" not in str(caught.value)


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
