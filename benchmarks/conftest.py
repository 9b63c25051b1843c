"""Options of the benchmark suite, and its results file."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest
import torch

from benchmarks.environment import default_device, environment
from benchmarks.report import README, RESULTS, load_results, render, rows_of, write_results

STARTED = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("opd_fast benchmarks")
    group.addoption(
        "--save-results",
        nargs="?",
        const=str(RESULTS),
        metavar="DIR",
        help="write DEVICE-DATE.json into DIR (default benchmarks/results, where the README is rendered again too)",
    )
    group.addoption(
        "--pairs",
        type=int,
        help="rounds of engine and reference in turn (default: 7, on a GPU as many as fit into a row's time, 2 to 20)",
    )
    group.addoption(
        "--within",
        type=float,
        metavar="SECONDS",
        help="skip the rounds whose turn would come later than this after the start",
    )
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
