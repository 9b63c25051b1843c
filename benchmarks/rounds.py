"""Engine and reference on the same work: what `test_round.py` times.

The floor of a round. Let F be the floating-point operations of one transformer forward on all samples of the round at
one step (guidance above 1 runs two branches, so it doubles a model's samples). A trained step needs one student
forward, one backward to the adapters, which with frozen weights costs as much as the forward, and one teacher forward:

    floor = N_trained * (2 * F_student + F_teachers) / rate

With equal guidance that is 3 F N. F comes from `torch.utils.flop_counter.FlopCounterMode` on one forward, products of
attention included; the rate is that of a large matrix product measured in the same process. The adapters' own products
and all that is not a matrix product count as nothing, so no engine can reach 100 %.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import measured_peaks, round_dtype, synchronize
from benchmarks.models import (
    Shape,
    copy_parameters,
    gradients,
    random_model,
    random_text,
    relative_error,
    write_random_lora,
)
from benchmarks.reference import AdapterPolicy, Reference, adapters_on
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.engine import compile_blocks
from opd_fast.models import load_model
from opd_fast.models.base import ASSETS, DiffusionModel, TextEmbeds
from opd_fast.objectives import step_weights
from opd_fast.prompts import load_prompts
from opd_fast.rollout import RoundBatch, one_pass
from opd_fast.solvers import solver_table
from opd_fast.student import Student
from opd_fast.teachers import TeacherBank

# Standard deviations of B in the student and in a random teacher. At B = 0 the student's A would have no gradient.
STUDENT_START, TEACHER_GAP = 0.02, 0.02
LEARNING_RATE, CLIP = 3e-4, 1.0


@dataclass(frozen=True)
class Recipe:
    """What both sides run."""

    solver: str = "flow_sde"
    steps: int = 10
    eta: float = 0.7
    samples_per_task: int = 8
    guidance: float = 1.0
    teacher_guidance: tuple[float, ...] = (1.0, 1.0, 1.0)
    rank: int = 32
    alpha: float = 64.0
    micro_batch: int | None = None
    resolution: int = 32

    @property
    def trained_steps(self) -> int:
        """The last step is rolled out by the reference and trained by neither, as published."""
        return self.steps - 1


class Side:
    """A contestant: its parameters, an optimizer, and a round of one optimizer step."""

    def __init__(
        self,
        accumulate: Callable[[RoundBatch], object],
        parameters: dict[str, nn.Parameter],
        networks: Sequence[nn.Module],
        device: torch.device,
    ) -> None:
        self.accumulate = accumulate
        self.parameters = parameters
        self.networks = networks
        self.device = device
        self.optimizer = torch.optim.AdamW(list(parameters.values()), lr=LEARNING_RATE, weight_decay=1e-4)

    def round(self, batch: RoundBatch) -> None:
        """Gradients of the round, clipping, optimizer step; returns when the device is done."""
        self.accumulate(batch)
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)

    def seconds(self, batch: RoundBatch) -> float:
        """Wall time of one round."""
        synchronize(self.device)
        start = time.perf_counter()
        self.round(batch)
        return time.perf_counter() - start

    def held_bytes(self) -> int:
        """Bytes of all its networks' weights, shared ones once."""
        storages = {}
        for network in self.networks:
            for tensor in (*network.parameters(), *network.buffers()):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def peak_bytes(self, batch: RoundBatch) -> int:
        """Bytes at the peak of a round: weights, and what the round allocates at most at one time."""
        return self.held_bytes() + peak_bytes(lambda: self.round(batch), self.device)

    def gradients(self, batch: RoundBatch) -> dict[str, Tensor]:
        """Gradients of a round by canonical name; the parameters stay as they are."""
        self.accumulate(batch)
        return gradients(self.parameters)


class Contest:
    """One recipe on one model: the engine, the published loop and, where wanted, its compiled form."""

    def __init__(
        self,
        model: DiffusionModel,
        scheduler: Any,
        teachers: list[tuple[str, Path]],
        text: TextEmbeds,
        negative: TextEmbeds,
        recipe: Recipe,
        *,
        compiled: bool = False,
    ) -> None:
        count = recipe.samples_per_task
        if len(text) != count * len(teachers):
            raise ValueError(f"{len(text)} prompts for {len(teachers)} tasks of {count} samples")
        self.model, self.recipe, self.device = model, recipe, model.device
        self.batch = RoundBatch(
            text=text,
            negative=negative if max(recipe.guidance, *recipe.teacher_guidance) > 1 else None,
            tasks=tuple((i, slice(i * count, (i + 1) * count)) for i in range(len(teachers))),
            keys=torch.arange(len(text), device=self.device),
            scale=torch.full((len(text),), 1 / len(text), device=self.device),
            shape=model.latent_shape(recipe.resolution),
        )
        float32 = copy.deepcopy(model.transformer)
        if model.dtype != torch.float32:
            float32 = float32.float()
        loop, self.reference = self._published(float32, scheduler, teachers)
        self._reset_student(self.reference)
        self.per_sample = forward_flops(model, self.batch)
        self.compiled = self._compiled(copy.deepcopy(model.transformer), scheduler, teachers) if compiled else None
        self.engine = self._engine(teachers)
        copy_parameters(self.reference.parameters, self.engine.parameters)
        self.gradient_error = self._gradient_error()
        if self.device.type == "cuda":  # as released: float32 weights under autocast
            loop.autocast = round_dtype(self.device)

    def _published(
        self, transformer: nn.Module, scheduler: Any, teachers: list[tuple[str, Path]]
    ) -> tuple[Reference, Side]:
        from peft import LoraConfig

        recipe = self.recipe
        targets = self.model.targets("attention")
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets)
        adapters = adapters_on(transformer, config, teachers)
        reference = Reference(
            copy.deepcopy(scheduler),
            AdapterPolicy(adapters, "student", recipe.guidance),
            [AdapterPolicy(adapters, name, g) for (name, _), g in zip(teachers, recipe.teacher_guidance, strict=True)],
            solver=recipe.solver,
            steps=recipe.steps,
            eta=recipe.eta,
        )
        return reference, Side(reference.round, reference.parameters(), [adapters], self.device)

    def _compiled(self, base: nn.Module, scheduler: Any, teachers: list[tuple[str, Path]]) -> Side:
        """The three passes at their best: weights in the round's dtype, blocks compiled for each adapter and shape."""
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 256  # kinds of block x adapters x gradient on or off x batch sizes
        loop, side = self._published(base, scheduler, teachers)
        if self.device.type == "cuda":  # the adapters stay float32
            loop.autocast = round_dtype(self.device)
        for block in base.transformer_blocks:  # type: ignore[union-attr]
            block.compile(dynamic=False)
        copy_parameters(self.reference.parameters, side.parameters)
        return side

    def _engine(self, teachers: list[tuple[str, Path]]) -> Side:
        recipe = self.recipe
        configs = [
            TeacherConfig(name=name, weights=str(folder), prompts="bundled/composition", guidance=guidance)
            for (name, folder), guidance in zip(teachers, recipe.teacher_guidance, strict=True)
        ]
        bank = TeacherBank.load(self.model, configs, "merged")
        student = Student.build(
            self.model, StudentConfig(rank=recipe.rank, alpha=recipe.alpha, guidance=recipe.guidance)
        )
        if self.device.type == "cuda":  # the default of engine.compile
            compile_blocks(self.model, student, bank)
        sigmas = self.model.sigmas(recipe.steps, recipe.resolution)
        table = solver_table(recipe.solver, sigmas, recipe.eta)
        weight = step_weights(table, "kl")

        def accumulate(batch: RoundBatch) -> object:
            return one_pass(self.model, student, bank, batch, table, weight, micro_batch=recipe.micro_batch)

        networks = [student.transformer, *(teacher.transformer for teacher in bank.teachers)]
        return Side(accumulate, dict(student.named_parameters()), networks, self.device)

    def _reset_student(self, side: Side) -> None:
        with torch.no_grad():
            for name, parameter in side.parameters.items():
                if ".lora_B." in name:
                    nn.init.normal_(parameter, std=STUDENT_START)

    def _gradient_error(self) -> float:
        """Relative error of the engine's gradient against the reference's in float32, same start, same noise."""
        count, recipe = len(self.batch.scale), self.recipe
        x = torch.randn(count, *self.batch.shape, device=self.device)
        noise = torch.randn(recipe.steps, count, *self.batch.shape, device=self.device)
        batch = replace(self.batch, x=x, noise=noise)
        with full_precision():
            truth = self.reference.gradients(batch)
        return relative_error(self.engine.gradients(batch), truth)

    def floor_seconds(self) -> float:
        """The floor as this file's first lines define it."""
        recipe = self.recipe
        branches = [2 if g > 1 else 1 for g in recipe.teacher_guidance]
        student = len(self.batch.scale) * (2 if recipe.guidance > 1 else 1) * self.per_sample
        teaching = recipe.samples_per_task * sum(branches) * self.per_sample
        rate = float(measured_peaks(self.device)["matmul_tflops"]) * 1e12
        return recipe.trained_steps * (2 * student + teaching) / rate


def forward_flops(model: DiffusionModel, batch: RoundBatch) -> int:
    """Floating-point operations of the matrix products in one sample's forward, one branch."""
    x = torch.randn(1, *batch.shape, device=model.device)
    sigma = torch.full((1,), 0.5, device=model.device)
    text = batch.text.index(slice(0, 1))
    # Fused attention on a CPU is not counted; the plain one has the same products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.velocity(model.transformer, x, sigma, text)
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that `work` has allocated at most at one time, beyond what was there before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    kineto: Any = recorded.profiler
    events = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for _, change in sorted(events):
        held += change
        highest = max(highest, held)
    return highest


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, without TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


TASKS = ("composition", "text", "colour")


def bundle_is_there() -> bool:
    """Whether the bundled pipeline and its three teachers have been built."""
    return (ASSETS / "pipeline").is_dir() and all((ASSETS / "teachers" / task).is_dir() for task in TASKS)


def tiny_contest(device: torch.device, recipe: Recipe, *, compiled: bool = False) -> Contest:
    """The bundled model, its three teachers and their own prompts."""
    torch.manual_seed(0)
    model = load_model("bundled", device=device, dtype=round_dtype(device))
    texts = [p.text for task in TASKS for p in load_prompts(f"bundled/{task}")[: recipe.samples_per_task]]
    text, negative = model.encode(texts), model.encode([""])
    teachers = [(task, ASSETS / "teachers" / task) for task in TASKS]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "pipeline" / "scheduler")
    return Contest(model, scheduler, teachers, text, negative, recipe, compiled=compiled)


def random_contest(
    device: torch.device, shape: Shape, recipe: Recipe, folder: Path, *, compiled: bool = False
) -> Contest:
    """A model of the given shape with random weights, and three random teachers written to `folder`."""
    torch.manual_seed(0)
    model = random_model(shape, device=device, dtype=round_dtype(device))
    targets = model.targets("attention")
    teachers = [(f"teacher{i}", folder / f"teacher{i}") for i in range(len(recipe.teacher_guidance))]
    for _, path in teachers:
        write_random_lora(
            model.transformer, path, rank=recipe.rank, alpha=recipe.alpha, targets=targets, std=TEACHER_GAP
        )
    count = recipe.samples_per_task * len(teachers)
    text = random_text(count, shape, device=device).to(dtype=model.dtype)
    negative = random_text(1, shape, device=device).to(dtype=model.dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Contest(model, scheduler, teachers, text, negative, recipe, compiled=compiled)
