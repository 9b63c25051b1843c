"""Options of the benchmark suite, and its results file."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.environment import default_device, environment
from benchmarks.report import README, RESULTS, load_results, render, rows_of, write_results


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("opd_fast benchmarks")
    group.addoption(
        "--save-results",
        nargs="?",
        const=str(RESULTS),
        metavar="DIR",
        help="write DEVICE-DATE.json into DIR (default benchmarks/results, where the README is rendered again too)",
    )
    group.addoption("--pairs", type=int, help="rounds of engine and reference in turn (default: 7, on a GPU 20)")
    group.addoption(
        "--compiled-rounds",
        action="store_true",
        help="measure the compiled reference of a round on a CPU too, where compiling takes minutes",
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return default_device()


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("save_results")
    measured = getattr(session.config, "_benchmarksession", None)
    if folder is None or measured is None:
        return
    rows = rows_of(measured.benchmarks)
    if not rows:
        return
    command = shlex.join(["pytest", *map(str, session.config.invocation_params.args)])
    path = write_results(environment(default_device(), command), rows, Path(folder))
    if Path(folder).resolve() == RESULTS:
        README.write_text(render(load_results()), encoding="utf-8")
    session.config.get_terminal_writer().line(f"\nresults written to {path}")
