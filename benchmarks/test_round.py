"""A round by the engine against a round by the published loop, in one process, in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import STARTED
from benchmarks.models import SD35M_512, SD35M_1024, Shape
from benchmarks.report import quantiles
from benchmarks.rounds import Contest, Recipe, bundle_is_there, published_recipe, random_work, tiny_work
from opd_fast.config import EngineConfig

CUDA = torch.cuda.is_available()
MOST_PAIRS = 20


@pytest.fixture(autouse=True)
def _in_time_and_memory(pytestconfig: pytest.Config) -> Iterator[None]:
    within = pytestconfig.getoption("within")
    if within is not None and time.monotonic() - pytestconfig.stash[STARTED] > within:
        pytest.skip(f"the suite has used its {within:.0f} seconds (--within)")
    yield
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


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


EXACT = EngineConfig()
FP8 = EngineConfig(precision="fp8")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "shape", "recipe", "settings", "seconds"),
    [
        ("round/sd35m-512/exact", SD35M_512, published_recipe(), EXACT, 40.0),
        ("round/sd35m-512/fp8", SD35M_512, published_recipe(), FP8, 20.0),
        ("round/sd35m-512/exact/1", SD35M_512, published_recipe(1), EXACT, 10.0),
        ("round/sd35m-512/exact/16", SD35M_512, published_recipe(16), EXACT, 30.0),
        ("round/sd35m-1024/exact", SD35M_1024, published_recipe(resolution=1024), EXACT, 30.0),
    ],
    ids=["512", "512-fp8", "512-1", "512-16", "1024"],
)
def test_round_sd35m(
    benchmark: Any,
    device: torch.device,
    pytestconfig: pytest.Config,
    tmp_path: Path,
    name: str,
    shape: Shape,
    recipe: Recipe,
    settings: EngineConfig,
    seconds: float,
) -> None:
    """The compiled reference runs in the first row alone: it compiles for each adapter and each number of samples."""
    first = name == "round/sd35m-512/exact"
    contest = Contest(random_work(device, shape, recipe, tmp_path), settings, compiled=first)
    compare(benchmark, name, contest, pytestconfig, exact=settings.precision != "fp8", seconds=seconds)


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
