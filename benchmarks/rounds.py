"""Engine and reference on the same work: what `test_round.py` and `ladder.py` time.

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
    canonical,
    copy_parameters,
    gradients,
    random_model,
    random_text,
    relative_error,
    write_random_lora,
)
from benchmarks.reference import AdapterPolicy, Reference, adapters_on
from opd_fast.config import EngineConfig, StudentConfig, TeacherConfig
from opd_fast.data.prompt_files import load_prompts
from opd_fast.models import load_model
from opd_fast.models.base import ASSETS, DiffusionModel
from opd_fast.models.text import TextEmbeds
from opd_fast.objectives import step_weights
from opd_fast.reporting.telemetry import annotate
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.optimize import ActiveTechniques, ForwardSizes, ResolvedSettings, apply_techniques
from opd_fast.training.rollout import one_pass
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE

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


def published_recipe(samples_per_task: int = 3, resolution: int = 512) -> Recipe:
    """The published run of Stable Diffusion 3.5 Medium, with other numbers of samples and pixels where given.

    Both sides hold as many samples' activations at a time: as the published loop does, all of a task, but no more than
    the memory of one GPU takes.
    """
    most = 4 if resolution <= 512 else 1
    return Recipe(
        samples_per_task=samples_per_task,
        guidance=4.5,
        teacher_guidance=(4.5, 4.5, 1.0),
        micro_batch=min(samples_per_task, most),
        resolution=resolution,
    )


@dataclass(frozen=True)
class Outcome:
    """What a round computes."""

    loss: float
    """Of all samples and trained steps, as weighted in the round."""
    gradients: dict[str, Tensor]
    """By canonical name."""

    def errors(self, truth: Outcome) -> dict[str, float]:
        """The relative errors `gradient_error` and `loss_error` against another outcome."""
        return {
            "gradient_error": relative_error(self.gradients, truth.gradients),
            "loss_error": abs(self.loss - truth.loss) / abs(truth.loss),
        }


class Side:
    """A contestant: its parameters, an optimizer, and a round of one optimizer step."""

    def __init__(
        self,
        accumulate: Callable[[RoundBatch], Tensor],
        parameters: dict[str, nn.Parameter],
        networks: Sequence[nn.Module],
        device: torch.device,
        *,
        before: int = 0,
        active: ActiveTechniques | None = None,
    ) -> None:
        self.accumulate = accumulate
        """Adds a round's gradient; returns the losses of its steps and samples."""
        self.parameters = parameters
        self.networks = networks
        self.device = device
        self.before = before
        """Bytes that were allocated on the GPU before this contestant was there."""
        self.active = active
        """The engine's techniques that are at work; None for the reference."""
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=LEARNING_RATE, weight_decay=1e-4, fused=None if active is None else True
        )

    def round(self, batch: RoundBatch) -> None:
        """Gradients of the round, clipping, optimizer step; returns when the device is done."""
        self.update(batch)
        synchronize(self.device)

    def update(self, batch: RoundBatch) -> None:
        """`round` that does not wait for the device."""
        with annotate("round"):
            self.accumulate(batch)
        with annotate("optimizer"):
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()

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
        """Bytes at the peak of a round. On a GPU all that came with this contestant, the pools of its graphs included;
        on a CPU its weights, and what the round allocates at most at one time."""
        if self.device.type != "cuda":
            return self.held_bytes() + peak_bytes(lambda: self.round(batch), self.device)
        synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        grown = peak_bytes(lambda: self.round(batch), self.device)
        return before - self.before + grown + graph_bytes()

    def outcome(self, batch: RoundBatch) -> Outcome:
        """What a round computes; the parameters stay as they are."""
        loss = float(self.accumulate(batch).double().sum())
        return Outcome(loss, gradients(self.parameters))


class Work:
    """One recipe on one model: what all contestants do, and the contestants, each on weights of its own.

    `model.transformer` stays as it is, and moves to CPU memory; each contestant copies it to the device.
    """

    def __init__(
        self,
        model: DiffusionModel,
        scheduler: Any,
        teachers: list[tuple[str, Path]],
        text: TextEmbeds,
        negative: TextEmbeds,
        recipe: Recipe,
    ) -> None:
        count = recipe.samples_per_task
        if len(text) != count * len(teachers):
            raise ValueError(f"{len(text)} prompts for {len(teachers)} tasks of {count} samples")
        self.model, self.scheduler, self.teachers, self.recipe = model, scheduler, teachers, recipe
        self.device = model.device
        self.batch = RoundBatch(
            text=text,
            negative=negative if max(recipe.guidance, *recipe.teacher_guidance) > 1 else None,
            tasks=tuple((i, slice(i * count, (i + 1) * count)) for i in range(len(teachers))),
            keys=torch.arange(len(text), device=self.device),
            scale=torch.full((len(text),), 1 / len(text), device=self.device),
            shape=model.latent_shape(recipe.resolution),
        )
        self.per_sample = forward_flops(model, self.batch)
        model.transformer.cpu()
        self.start: dict[str, Tensor] = {}
        """The student that every contestant starts from, by canonical name; the first one draws it."""

    # --- contestants -------------------------------------------------------------------------------------------------

    def published(self) -> tuple[Reference, Side]:
        """The loop as released: float32 weights, on a GPU under autocast."""
        before = allocated(self.device)
        return self._published(self._base().float(), before)

    def compiled(self) -> Side:
        """The three passes at their best: weights in the round's dtype, blocks compiled for each adapter and shape."""
        import torch._dynamo

        before = allocated(self.device)
        torch._dynamo.config.recompile_limit = 256  # kinds of block x adapters x gradient on or off x batch sizes
        base = self._base()
        _, side = self._published(base, before)
        for block in self.model.blocks(base):
            block.compile(dynamic=False)
        return side

    def _base(self) -> nn.Module:
        return copy.deepcopy(self.model.transformer).to(self.device)

    def _published(self, transformer: nn.Module, before: int) -> tuple[Reference, Side]:
        from peft import LoraConfig

        recipe = self.recipe
        targets = self.model.targets("attention")
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets)
        adapters = adapters_on(transformer, config, self.teachers)
        teachers = [
            AdapterPolicy(adapters, name, g)
            for (name, _), g in zip(self.teachers, recipe.teacher_guidance, strict=True)
        ]
        reference = Reference(
            copy.deepcopy(self.scheduler),
            AdapterPolicy(adapters, "student", recipe.guidance),
            teachers,
            solver=recipe.solver,
            steps=recipe.steps,
            eta=recipe.eta,
            autocast=round_dtype(self.device) if self.device.type == "cuda" else None,  # the adapters stay float32
        )

        def accumulate(batch: RoundBatch) -> Tensor:
            return reference.round(self._in_turns(batch))

        side = Side(accumulate, reference.parameters(), [adapters], self.device, before=before)
        self._to_start(side)
        return reference, side

    def _in_turns(self, batch: RoundBatch) -> RoundBatch:
        """The batch with tasks of no more samples than the recipe's micro-batch: the published loop takes them so."""
        size = self.recipe.micro_batch or len(batch)
        parts = [
            (task, slice(start, min(start + size, rows.stop)))
            for task, rows in batch.tasks
            for start in range(rows.start, rows.stop, size)
        ]
        return replace(batch, tasks=tuple(parts))

    def engine(self, settings: EngineConfig, say: Callable[[str], None] = lambda text: None) -> Side:
        """The engine with the techniques of `settings`."""
        recipe, before = self.recipe, allocated(self.device)
        model = copy.copy(self.model)
        model.transformer = self._base()
        configs = [
            TeacherConfig(name=name, weights=str(folder), prompts="bundled/composition", guidance=guidance)
            for (name, folder), guidance in zip(self.teachers, recipe.teacher_guidance, strict=True)
        ]
        bank = load_teachers(model, configs, settings.placement)
        student = Student.build(model, StudentConfig(rank=recipe.rank, alpha=recipe.alpha, guidance=recipe.guidance))
        on = ("on", "auto") if self.device.type == "cuda" else ("on",)
        compiled, graphed = settings.compile in on, settings.graphs in on
        at_once = min(recipe.micro_batch or len(self.batch), len(self.batch))
        forwards = ForwardSizes(
            student_rows=at_once * (2 if recipe.guidance > 1 else 1),
            teacher_rows=min(at_once, recipe.samples_per_task) * (2 if max(recipe.teacher_guidance) > 1 else 1),
            resolution=recipe.resolution,
        )
        active = apply_techniques(
            settings, model, student, bank, forwards, resolved=ResolvedSettings(compiled, graphed), say=say
        )
        sigmas = model.sigmas(recipe.steps, recipe.resolution)
        table = solver_table(recipe.solver, sigmas, recipe.eta)
        weight = step_weights(table, "kl")

        def accumulate(batch: RoundBatch) -> Tensor:
            return one_pass(
                model, student, bank, batch, table, weight, micro_batch=recipe.micro_batch, graphs=active.graphs
            ).losses

        networks = [student.transformer, *(teacher.transformer for teacher in bank.teachers)]
        parameters = dict(student.named_parameters())
        side = Side(accumulate, parameters, networks, self.device, before=before, active=active)
        self._to_start(side)
        return side

    def _to_start(self, side: Side) -> None:
        if self.start:
            copy_parameters(self.start, side.parameters)
            return
        with torch.no_grad():
            for name, parameter in side.parameters.items():
                if ".lora_B." in name:
                    nn.init.normal_(parameter, std=STUDENT_START)
        self.start = {canonical(name): p.detach().clone() for name, p in side.parameters.items()}

    # --- the yardsticks ----------------------------------------------------------------------------------------------

    def part(self) -> RoundBatch:
        """What the outcome is compared on: the round, or its first micro-batch where it has several."""
        return next(part for _, part in self.batch.split(self.recipe.micro_batch))

    def truth(self, reference: Reference, side: Side) -> Outcome:
        """The published loop in float32, from the common start and on the engine's noise."""
        autocast, reference.autocast = reference.autocast, None
        try:
            with full_precision():
                return side.outcome(self._drawn())
        finally:
            reference.autocast = autocast

    def errors(self, side: Side, truth: Outcome) -> dict[str, float]:
        """The relative errors `gradient_error` and `loss_error` of a side, its student put back to the start."""
        self._to_start(side)
        return side.outcome(self._drawn() if side.active is None else self.part()).errors(truth)

    def _drawn(self) -> RoundBatch:
        """`part` with the noise that the engine draws from its keys."""
        part = self.part()
        x = philox_normal(part.keys, part.shape, INITIAL_NOISE)
        noise = torch.stack([philox_normal(part.keys, part.shape, j) for j in range(self.recipe.steps)])
        return replace(part, x=x, noise=noise)

    def floor_seconds(self) -> float:
        """The floor as this file's first lines define it."""
        recipe = self.recipe
        branches = [2 if g > 1 else 1 for g in recipe.teacher_guidance]
        student = len(self.batch.scale) * (2 if recipe.guidance > 1 else 1) * self.per_sample
        teaching = recipe.samples_per_task * sum(branches) * self.per_sample
        rate = float(measured_peaks(self.device)["matmul_tflops"]) * 1e12
        return recipe.trained_steps * (2 * student + teaching) / rate


class Contest:
    """The engine, the published loop and, where wanted, its compiled form, side by side."""

    def __init__(self, work: Work, settings: EngineConfig | None = None, *, compiled: bool = False) -> None:
        self.work, self.batch, self.device = work, work.batch, work.device
        loop, self.reference = work.published()
        truth = work.truth(loop, self.reference)
        self.compiled = work.compiled() if compiled else None
        self.engine = work.engine(EngineConfig() if settings is None else settings)
        self.errors = work.errors(self.engine, truth)


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


def allocated(device: torch.device) -> int:
    """Bytes in tensors on the GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def graph_bytes() -> int:
    """Bytes that the pools of CUDA graphs keep for the inside of their graphs: no tensor shows them."""
    segments = torch.cuda.memory_snapshot()
    private = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)


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


def tiny_work(device: torch.device, recipe: Recipe) -> Work:
    """The bundled model, its three teachers and their own prompts."""
    torch.manual_seed(0)
    model = load_model("bundled", device=device, dtype=round_dtype(device))
    texts = [p.text for task in TASKS for p in load_prompts(f"bundled/{task}")[: recipe.samples_per_task]]
    text, negative = model.encode(texts), model.encode([""])
    teachers = [(task, ASSETS / "teachers" / task) for task in TASKS]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "pipeline" / "scheduler")
    return Work(model, scheduler, teachers, text, negative, recipe)


def random_work(device: torch.device, shape: Shape, recipe: Recipe, folder: Path) -> Work:
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
    return Work(model, FlowMatchEulerDiscreteScheduler(shift=3.0), teachers, text, negative, recipe)
