"""A round by the engine against a round by the published loop, in one process, in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from benchmarks.conftest import STARTED
from benchmarks.models import NANO, SD35M_512, SD35M_1024, Shape
from benchmarks.report import quantiles
from benchmarks.rounds import (
    Contest,
    Outcome,
    Recipe,
    Work,
    bundle_is_there,
    published_recipe,
    random_work,
    tiny_work,
)
from opd_fast.config import EngineConfig

CUDA = torch.cuda.is_available()
MOST_PAIRS = 20


@pytest.fixture(autouse=True)
def _in_time_and_memory(pytestconfig: pytest.Config) -> Iterator[None]:
    within = pytestconfig.getoption("within")
    if within is not None and time.monotonic() - pytestconfig.stash[STARTED] > within:
        pytest.skip(f"the suite has used its {within:.0f} seconds (--within)")
    yield
    _free(CUDA)


def compare(
    benchmark: Any,
    name: str,
    contest: Contest,
    config: pytest.Config,
    *,
    exact: bool = True,
    seconds: float = 60.0,
) -> None:
    """Time engine, published loop and compiled loop in turn (A B C A B C ...) and record the row `name`.

    On a GPU as many pairs as fit into `seconds`, at least two, by what a first, uncounted one takes; a CPU takes seven.
    `--pairs` overrules both.
    """
    cuda = contest.device.type == "cuda"
    begun = time.perf_counter()
    for side in (contest.reference, contest.compiled, contest.engine):
        if side is not None:
            side.round(contest.batch)  # kernels are compiled, graphs captured
    if cuda:
        begun = time.perf_counter()
        for side in (contest.reference, contest.compiled, contest.engine):
            if side is not None:
                side.round(contest.batch)
    fitting = max(2, min(MOST_PAIRS, round(seconds / (time.perf_counter() - begun))))
    pairs = config.getoption("pairs") or (fitting if cuda else 7)
    reference: list[float] = []
    compiled: list[float] = []

    def others() -> None:
        reference.append(contest.reference.seconds(contest.batch))
        if contest.compiled is not None:
            compiled.append(contest.compiled.seconds(contest.batch))

    benchmark.pedantic(
        lambda: contest.engine.round(contest.batch), setup=others, rounds=pairs, warmup_rounds=0, iterations=1
    )
    benchmark.extra_info.update(name=name, exact=exact, **contest.errors)
    if benchmark.stats is None:  # --benchmark-disable
        return
    engine = benchmark.stats.stats.data
    benchmark.extra_info.update(
        ratio_vs_reference=_median_ratio(reference, engine),
        reference_seconds=quantiles(reference),
        share_of_floor=contest.work.floor_seconds() / quantiles(engine)["p50"],
        peak_bytes=contest.engine.peak_bytes(contest.batch),
        reference_peak_bytes=contest.reference.peak_bytes(contest.batch),
        pairs=len(engine),
        samples=len(contest.batch),
    )
    if compiled:
        benchmark.extra_info.update(
            ratio_vs_compiled=_median_ratio(compiled, engine), compiled_seconds=quantiles(compiled)
        )


def _median_ratio(others: list[float], engine: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, engine, strict=True))


def compare_apart(benchmark: Any, name: str, work: Work, config: pytest.Config, *, seconds: float = 30.0) -> None:
    """Time the published loop, free it, then time the engine: for rounds where both do not fit beside each other.

    The row's ratio is of the medians, and a drift of the machine in between is in it.
    """
    cuda = work.device.type == "cuda"

    def published() -> tuple[Outcome, list[float]]:
        loop, side = work.published()
        truth = work.truth(loop, side)
        side.round(work.batch)
        first = side.seconds(work.batch)
        count = config.getoption("pairs") or max(2, min(MOST_PAIRS, round(seconds / 2 / first)))
        return truth, [first, *(side.seconds(work.batch) for _ in range(count - 1))]

    truth, reference = published()
    _free(cuda)
    engine = work.engine(EngineConfig())
    errors = work.errors(engine, truth)
    for _ in range(2 if cuda else 1):
        engine.round(work.batch)
    benchmark.pedantic(lambda: engine.round(work.batch), rounds=len(reference), warmup_rounds=0, iterations=1)
    benchmark.extra_info.update(name=name, exact=True, **errors)
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = quantiles(benchmark.stats.stats.data)["p50"]
    benchmark.extra_info.update(
        ratio_vs_reference=quantiles(reference)["p50"] / median,
        reference_seconds=quantiles(reference),
        in_turn=False,
        share_of_floor=work.floor_seconds() / median,
        peak_bytes=engine.peak_bytes(work.batch),
        samples=len(work.batch),
    )


def _free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Row:
    """A round of Stable Diffusion 3.5 Medium."""

    name: str
    shape: Shape
    recipe: Recipe
    precision: Literal["auto", "fp8"] = "auto"
    seconds: float = 30.0
    """For the pairs."""
    compiled: bool = False
    """Against the compiled reference too, which compiles for minutes: for each adapter and each number of samples."""
    apart: bool = False
    """The published loop first, then the engine alone."""


SD35M = (
    Row("round/sd35m-512/exact", SD35M_512, published_recipe(), seconds=40.0),
    Row("round/sd35m-512/exact/compiled", SD35M_512, published_recipe(), compiled=True),
    Row("round/sd35m-512/fp8", SD35M_512, published_recipe(), "fp8", 20.0),
    Row("round/sd35m-512/exact/at-once", SD35M_512, replace(published_recipe(), micro_batch=None), apart=True),
    Row("round/sd35m-1024/exact", SD35M_1024, published_recipe(resolution=1024)),
    Row("round/sd35m-512/exact/1", SD35M_512, published_recipe(1), seconds=10.0),
    Row("round/sd35m-512/exact/16", SD35M_512, published_recipe(16)),
)


@pytest.mark.gpu
@pytest.mark.parametrize("row", SD35M, ids=lambda row: row.name.removeprefix("round/sd35m-").replace("/", "-"))
def test_round_sd35m(
    benchmark: Any, device: torch.device, pytestconfig: pytest.Config, tmp_path: Path, row: Row
) -> None:
    if pytestconfig.getoption("rehearse"):
        small = replace(row.recipe, steps=3, samples_per_task=2, rank=4, resolution=NANO.resolution)
        compiled = row.compiled and CUDA  # on a CPU it takes minutes
        row = replace(row, name=f"rehearsal/{row.name}", shape=NANO, recipe=small, compiled=compiled)
    elif not CUDA:
        pytest.skip("needs a CUDA device")
    work = random_work(device, row.shape, row.recipe, tmp_path)
    if row.apart:
        compare_apart(benchmark, row.name, work, pytestconfig, seconds=row.seconds)
        return
    contest = Contest(work, EngineConfig(precision=row.precision), compiled=row.compiled)
    lossy = row.precision == "fp8"
    if lossy and not (contest.engine.active and contest.engine.active.fp8):
        pytest.skip("no layer is in float8 on this device")
    compare(benchmark, row.name, contest, pytestconfig, exact=not lossy, seconds=row.seconds)


@pytest.mark.skipif(not bundle_is_there(), reason="the bundled pipeline is not built")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("round/bundled", Recipe(solver="flow_sde", samples_per_task=4)),  # as `python -m opd_fast.train` has it
        ("round/bundled/ode", Recipe(solver="ode", samples_per_task=4)),
        ("round/tiny", Recipe(solver="flow_sde")),
        ("round/tiny/ode", Recipe(solver="ode")),
        (
            "round/tiny/guided",
            Recipe(solver="flow_sde", guidance=4.5, teacher_guidance=(4.5, 4.5, 1.0), samples_per_task=3),
        ),
    ],
    ids=["bundled-flow_sde", "bundled-ode", "flow_sde", "ode", "guided"],
)
def test_round_tiny(
    benchmark: Any, device: torch.device, pytestconfig: pytest.Config, name: str, recipe: Recipe
) -> None:
    compiled = pytestconfig.getoption("compiled_rounds") or (device.type == "cuda" and name == "round/tiny")
    compare(benchmark, name, Contest(tiny_work(device, recipe), compiled=compiled), pytestconfig, seconds=10.0)
