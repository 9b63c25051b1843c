"""Options of the benchmark suite, and its results file."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.environment import default_device, environment
from benchmarks.report import RESULTS, rows_of, save_rows

STARTED = pytest.StashKey[float]()
ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


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
        help="measure the compiled reference of the bundled rounds on a CPU too, where compiling takes minutes",
    )
    group.addoption(
        "--rehearse",
        action="store_true",
        help="the rounds of Stable Diffusion 3.5 Medium on a model of a test's size and on any device; their rows are "
        "named rehearsal/...",
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    return default_device()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the device can do at most is measured first: at the end there may be no time left."""
    if session.config.getoption("save_results") is not None and session.items and not session.config.option.collectonly:
        command = shlex.join(["pytest", *map(str, session.config.invocation_params.args)])
        session.config.stash[ENVIRONMENT] = environment(default_device(), command)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write the rows as they come: whoever stops the suite keeps what was measured."""
    _save(item.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = _save(session.config)
    if path is not None:
        session.config.get_terminal_writer().line(f"\nresults written to {path}")


def _save(config: pytest.Config) -> Path | None:
    measured = getattr(config, "_benchmarksession", None)
    found = config.stash.get(ENVIRONMENT, None)
    if measured is None or found is None:
        return None
    rows = rows_of(measured.benchmarks)
    return save_rows(found, rows, Path(config.getoption("save_results"))) if rows else None
