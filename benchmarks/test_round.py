"""A round by the engine against a round by the published loop, in one process, in turn."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import SD35M_512
from benchmarks.report import quantiles
from benchmarks.rounds import Contest, Recipe, bundle_is_there, random_contest, tiny_contest

PUBLISHED_RECIPE = Recipe(
    samples_per_task=3,
    guidance=4.5,
    teacher_guidance=(4.5, 4.5, 1.0),
    micro_batch=3,  # as many samples' activations at a time as the reference holds
    resolution=512,
)


@pytest.fixture(autouse=True)
def _release_memory() -> Iterator[None]:
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(benchmark: Any, name: str, contest: Contest, config: pytest.Config, *, exact: bool = True) -> None:
    """Time engine, published loop and compiled loop in turn (A B C A B C ...) and record the row `name`."""
    pairs = config.getoption("pairs") or (20 if contest.device.type == "cuda" else 7)
    warmups = 3 if contest.device.type == "cuda" else 1
    reference: list[float] = []
    compiled: list[float] = []

    def others() -> None:
        reference.append(contest.reference.seconds(contest.batch))
        if contest.compiled is not None:
            compiled.append(contest.compiled.seconds(contest.batch))

    benchmark.pedantic(
        lambda: contest.engine.round(contest.batch), setup=others, rounds=pairs, warmup_rounds=warmups, iterations=1
    )
    benchmark.extra_info.update(name=name, exact=exact, gradient_error=contest.gradient_error)
    if benchmark.stats is None:  # --benchmark-disable
        return
    engine = benchmark.stats.stats.data
    reference, compiled = reference[warmups:][: len(engine)], compiled[warmups:][: len(engine)]
    benchmark.extra_info.update(
        ratio_vs_reference=_median_ratio(reference, engine),
        reference_seconds=quantiles(reference),
        share_of_floor=contest.floor_seconds() / quantiles(engine)["p50"],
        peak_bytes=contest.engine.peak_bytes(contest.batch),
        reference_peak_bytes=contest.reference.peak_bytes(contest.batch),
        pairs=len(engine),
        samples=len(contest.batch.scale),
    )
    if compiled:
        benchmark.extra_info.update(
            ratio_vs_compiled=_median_ratio(compiled, engine), compiled_seconds=quantiles(compiled)
        )


def _median_ratio(others: list[float], engine: list[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, engine, strict=True))


@pytest.mark.skipif(not bundle_is_there(), reason="the bundled pipeline is not built")
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("round/tiny", Recipe(solver="flow_sde")),
        ("round/tiny/ode", Recipe(solver="ode")),
        (
            "round/tiny/guided",
            Recipe(solver="flow_sde", guidance=4.5, teacher_guidance=(4.5, 4.5, 1.0), samples_per_task=3),
        ),
    ],
    ids=["flow_sde", "ode", "guided"],
)
def test_round_tiny(
    benchmark: Any, device: torch.device, pytestconfig: pytest.Config, name: str, recipe: Recipe
) -> None:
    compiled = device.type == "cuda" or pytestconfig.getoption("compiled_rounds")
    compare(benchmark, name, tiny_contest(device, recipe, compiled=compiled), pytestconfig)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", ["flow_sde", "ode"])
def test_round_sd35m_512(
    benchmark: Any, device: torch.device, pytestconfig: pytest.Config, tmp_path: Path, solver: str
) -> None:
    recipe = Recipe(**{**vars(PUBLISHED_RECIPE), "solver": solver})
    name = "round/sd35m-512/exact" + ("" if solver == "flow_sde" else f"/{solver}")
    contest = random_contest(device, SD35M_512, recipe, tmp_path, compiled=True)
    compare(benchmark, name, contest, pytestconfig)
