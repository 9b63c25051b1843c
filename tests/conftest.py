"""Fixtures of several files, and the cores that each of several workers takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a run on a random small pipeline (tests/runs.py)."""
    from tests.runs import write_world

    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: the matrices of the small models are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs measure of this machine goes to a folder of the tests, not to the user's cache."""
    before = os.environ.get("OPD_FAST_CACHE")
    os.environ["OPD_FAST_CACHE"] = str(tmp_path_factory.mktemp("measured"))
    yield
    if before is None:
        del os.environ["OPD_FAST_CACHE"]
    else:
        os.environ["OPD_FAST_CACHE"] = before
