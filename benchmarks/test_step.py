"""The fused step against the published eager step, and against `torch.compile` of the same maths.

On a CPU the engine is the twin in plain torch. On CUDA all three are timed as CUDA-graph replays, several steps a
graph, with CUDA events: the figure is the device's time for one step. The steps of a graph take their operands in turn
from as many sets as outgrow the L2 cache, outputs included, so that memory serves them (but for `step/tiny`, which is
bound by its launch). `step/NAME` gives the same noise to all three, so that all do the same work; in `step/NAME/drawn`
each draws its own as it does in use (published and compiled: `torch.randn`; engine: Philox from the samples' keys). The
engine's launch parameters are measured first, as a run does; the row says which they are.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.eager_step import Guidance, Prepared, Schedule, published_step
from benchmarks.environment import default_device, measured_peaks, round_dtype
from opd_kernels import fused_step

STEPS, ROW, ETA = 10, 5, 0.7
DEVICE = default_device()
CUDA = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Case:
    """A row of the results: batch, latent shape, guidance of the student and of each task's teacher (equal tasks)."""

    name: str
    batch: int
    latent: tuple[int, int, int]
    student: float
    teachers: tuple[float, ...]
    drawn: bool = False

    def guidance(self, scales: tuple[float, ...]) -> Guidance:
        size = self.batch // len(scales)
        return [(slice(i * size, (i + 1) * size), scale) for i, scale in enumerate(scales)]


_NAMED = [
    Case("step/tiny", 24, (4, 16, 16), 1.0, (1.0,)),
    Case("step/sd35m-512", 9, (16, 64, 64), 4.5, (4.5, 4.5, 1.0)),
    Case("step/sd35m-512/unguided", 9, (16, 64, 64), 1.0, (1.0,)),
]
if CUDA:  # about 1.3 GB through the kernel, several times any L2 cache
    _NAMED.append(Case("step/1GB", 768, (16, 64, 64), 4.5, (4.5, 4.5, 1.0)))
CASES = [*_NAMED, *(replace(case, name=case.name + "/drawn", drawn=True) for case in _NAMED)]


@dataclass
class Operands:
    """Everything the three variants read."""

    x: Tensor
    cond_s: Tensor
    uncond_s: Tensor | None
    cond_t: Tensor
    uncond_t: Tensor | None
    guidance_s: Tensor
    guidance_t: Tensor
    table: Tensor
    step: Tensor
    scale: Tensor
    noise: Tensor | None
    keys: Tensor
    timesteps: Tensor
    schedule: Schedule | Prepared

    def bytes_moved(self) -> int:
        """What one pass must read and write: each tensor once, an unread unconditional row not at all."""
        moved = 2 * self.x.nbytes + self.cond_s.nbytes + self.cond_t.nbytes + self.cond_s.nbytes
        if self.noise is not None:
            moved += self.noise.nbytes
        for uncond, guidance in ((self.uncond_s, self.guidance_s), (self.uncond_t, self.guidance_t)):
            if uncond is not None:
                moved += int((guidance != 1).sum()) * uncond[0].nbytes
        return moved + (0 if self.uncond_s is None else self.uncond_s.nbytes)


def table_rows() -> Tensor:
    """(STEPS, 6) float32 rows of Flow-SDE in float64 from the formulas, weighted as the released code does."""
    sigmas = Schedule(STEPS, torch.device("cpu")).sigmas.double()
    s, n = sigmas[:-1], sigmas[1:]
    g2 = ETA**2 * s / (1 - torch.where(s == 1, sigmas[1], s))
    b = -(s - n) * (1 + g2 * (1 - s) / (2 * s))
    columns = (1 - g2 * (s - n) / (2 * s), b, torch.zeros_like(b), (g2 * (s - n)).sqrt(), b**2 / (2 * g2), s)
    return torch.stack(columns, dim=1).float()


@cache
def operands(case: Case, index: int = 0) -> Operands:
    """Set `index` of random operands on the device; the velocities in the dtype that a round has there."""
    generator = torch.Generator(DEVICE).manual_seed(7 + index)
    shape = (case.batch, *case.latent)

    def draw(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)

    def per_sample(scales: tuple[float, ...]) -> Tensor:
        return torch.tensor(scales, device=DEVICE).repeat_interleave(case.batch // len(scales))

    dtype = round_dtype(DEVICE)
    schedule: Schedule | Prepared = Schedule(STEPS, DEVICE)
    timesteps = schedule.timesteps[ROW].repeat(case.batch)  # type: ignore[union-attr]
    if CUDA:
        sigma, sigma_next, sigma_max = schedule.levels(timesteps)
        schedule = Prepared(sigma, sigma_next, float(sigma_max))
    return Operands(
        x=draw(),
        cond_s=draw(dtype),
        uncond_s=draw(dtype) if case.student != 1 else None,
        cond_t=draw(dtype),
        uncond_t=draw(dtype) if any(g != 1 for g in case.teachers) else None,
        guidance_s=per_sample((case.student,)),
        guidance_t=per_sample(case.teachers),
        table=table_rows().to(DEVICE),
        step=torch.tensor(ROW, device=DEVICE),
        scale=torch.ones(case.batch, device=DEVICE),
        noise=None if case.drawn else draw(),
        keys=torch.arange(case.batch, device=DEVICE),
        timesteps=timesteps,
        schedule=schedule,
    )


def steps_a_graph(case: Case) -> int:
    """Enough that starting the graph does not show, and few enough that their outputs fit."""
    return 5 if operands(case).bytes_moved() > 2**28 else 100


def sets(case: Case) -> list[Operands]:
    """What the steps of a graph take in turn: three times the L2 cache, or a set for each step; on a CPU one."""
    if not CUDA:
        return [operands(case)]
    cached = 3 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    count = -(-cached // operands(case).bytes_moved())
    return [operands(case, index) for index in range(min(max(count, 2), steps_a_graph(case)))]


Result = tuple[Tensor, Tensor, tuple[Tensor, ...]]
Runs = list[Callable[[], Result]]
"""The step on each set of operands."""


def engine(case: Case) -> Runs:
    return [engine_on(case, o) for o in sets(case)]


def engine_on(case: Case, o: Operands) -> Callable[[], Result]:
    step = o.step if CUDA else ROW

    def run() -> Result:
        out = fused_step(
            o.x,
            o.cond_s,
            o.uncond_s,
            o.cond_t,
            o.uncond_t,
            o.guidance_s,
            o.guidance_t,
            o.table,
            step,
            o.scale,
            noise=o.noise,
            keys=o.keys if case.drawn else None,
        )
        return out.x_next, out.loss, (out.grad_cond,) if out.grad_uncond is None else (out.grad_cond, out.grad_uncond)

    return run


def eager(case: Case) -> Runs:
    return [eager_on(case, o) for o in sets(case)]


def eager_on(case: Case, o: Operands) -> Callable[[], Result]:
    guidance_s, guidance_t = case.guidance((case.student,)), case.guidance(case.teachers)
    schedule, timesteps = o.schedule, o.timesteps

    def run() -> Result:
        return published_step(
            schedule,
            o.x,
            o.cond_s,
            o.uncond_s,
            o.cond_t,
            o.uncond_t,
            guidance_s,
            guidance_t,
            timesteps,
            ETA,
            o.noise,
        )

    return run


def _same_maths(
    x: Tensor,
    cond_s: Tensor,
    uncond_s: Tensor | None,
    cond_t: Tensor,
    uncond_t: Tensor | None,
    guidance_s: Tensor,
    guidance_t: Tensor,
    table: Tensor,
    step: Tensor,
    scale: Tensor,
    noise: Tensor | None,
) -> Result:
    """The fused step's formulas in the form a compiler likes best: no branch, no read-back, one expression each."""
    a, b, _, std, weight, _ = table.index_select(0, step.reshape(1))[0].unbind()
    g_s, g_t = guidance_s.view(-1, 1, 1, 1), guidance_t.view(-1, 1, 1, 1)
    v_s, v_t = cond_s.float(), cond_t.float()
    if uncond_s is not None:
        v_s = uncond_s.float() + g_s * (v_s - uncond_s.float())
    if uncond_t is not None:
        v_t = uncond_t.float() + g_t * (v_t - uncond_t.float())
    x_next = a * x + b * v_s + std * (torch.randn_like(x) if noise is None else noise)
    gap = v_s - v_t
    loss = scale * weight * (gap * gap).mean(dim=(1, 2, 3))
    slope = gap * (2 * weight / gap[0].numel() * scale).view(-1, 1, 1, 1)
    if uncond_s is None:
        return x_next, loss, (slope.to(cond_s.dtype),)
    return x_next, loss, ((slope * g_s).to(cond_s.dtype), (slope * (1 - g_s)).to(uncond_s.dtype))


def compiled(case: Case) -> Runs:
    torch._dynamo.reset()
    step = torch.compile(_same_maths, fullgraph=True, dynamic=False)

    def on(o: Operands) -> Callable[[], Result]:
        return lambda: step(
            o.x,
            o.cond_s,
            o.uncond_s,
            o.cond_t,
            o.uncond_t,
            o.guidance_s,
            o.guidance_t,
            o.table,
            o.step,
            o.scale,
            o.noise,
        )

    return [on(o) for o in sets(case)]


VARIANTS: dict[str, Callable[[Case], Runs]] = {"engine": engine, "eager": eager, "compiled": compiled}


@cache
def reference_gradients(case: Case) -> tuple[Tensor, ...]:
    """Gradients of the released formulas in float64, by autograd, from the same operands."""
    o = operands(case)
    row = o.table[ROW].double()
    leaves = [t.double().requires_grad_() for t in (o.cond_s, o.uncond_s) if t is not None]

    def velocity(cond: Tensor, uncond: Tensor | None, guidance: Tensor) -> Tensor:
        return cond if uncond is None else uncond + guidance.double().view(-1, 1, 1, 1) * (cond - uncond)

    v_s = velocity(leaves[0], leaves[1] if len(leaves) > 1 else None, o.guidance_s)
    v_t = velocity(o.cond_t.double(), None if o.uncond_t is None else o.uncond_t.double(), o.guidance_t)
    return torch.autograd.grad((row[4] * (v_s - v_t).square().mean(dim=(1, 2, 3))).sum(), leaves)


def gradient_error(case: Case, run: Callable[[], Result]) -> float:
    """Relative error of all gradients together against float64."""
    wanted = reference_gradients(case)
    wrong = sum(float((g.double() - w).square().sum()) for g, w in zip(run()[2], wanted, strict=True))
    return (wrong / sum(float(w.square().sum()) for w in wanted)) ** 0.5


class Clock:
    """pytest-benchmark's timer: wall time on a CPU, the device's own seconds a step on CUDA.

    A nanosecond a reading keeps it moving, which pytest-benchmark expects of a timer."""

    __name__ = "clock"

    def __init__(self) -> None:
        self.device_seconds = 0.0

    def __call__(self) -> float:
        if not CUDA:
            return time.perf_counter()
        self.device_seconds += 1e-9
        return self.device_seconds


clock = Clock()


def replayed(runs: Runs, steps: int) -> Callable[[], None]:
    """One CUDA graph of `steps` steps, `runs` in turn; a call replays it and advances the clock by one step's time.

    As many results as there are runs stay alive while capturing: outputs take turns in memory as operands do."""
    from opd_kernels.recording import Recorder

    def work() -> None:
        alive: deque[Result] = deque(maxlen=len(runs))
        for i in range(steps):
            alive.append(runs[i % len(runs)]())

    recorder = Recorder(DEVICE)
    for run in (*runs[:1] * 3, *runs):
        recorder.warm_up(run)
    graph, _ = recorder.record(work)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> None:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        clock.device_seconds += begin.elapsed_time(end) / 1e3 / steps

    return replay


def measured_launches() -> AbstractContextManager[list[Any]]:
    """Launch parameters are measured inside; Triton is there where CUDA is."""
    from opd_kernels.tuning import measuring

    return measuring()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.benchmark(timer=clock, warmup=False)
def test_step(benchmark: Any, case: Case, variant: str) -> None:
    if variant == "compiled" and not CUDA and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    runs = VARIANTS[variant](case)
    tuned = CUDA and variant == "engine"
    with measured_launches() if tuned else nullcontext([]) as chosen:
        error = gradient_error(case, runs[0])
    assert error < (1e-2 if round_dtype(DEVICE) != torch.float32 else 1e-5)
    benchmark.extra_info.update(name=case.name, variant=variant, exact=True, gradient_error=error)
    if CUDA:
        benchmark.pedantic(replayed(runs, steps_a_graph(case)), rounds=50, warmup_rounds=5)
        rate = operands(case).bytes_moved() / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["share_of_bandwidth"] = rate / float(measured_peaks(DEVICE)["copy_gbps"])
        benchmark.extra_info["launch"] = "; ".join(map(str, chosen)) or None
        operands.cache_clear()
    else:
        benchmark.pedantic(runs[0], rounds=200, warmup_rounds=20)
