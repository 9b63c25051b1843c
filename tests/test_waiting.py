"""OpenMP's threads spin for a bounded time where the user has not decided otherwise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_fast import waiting
from opd_fast.waiting import bound_spinning

ROOT = Path(__file__).resolve().parent.parent
DOORS = {"train": "['--resume', '/absent']", "evaluate": "['--steps', '0']"}  # which end before torch is imported
LOAD = """
import ctypes, sys
from importlib.util import find_spec
from pathlib import Path
from opd_fast.{door} import main
assert main({argv}) == 2 and "torch" not in sys.modules
ctypes.CDLL(str(next((Path(find_spec("torch").origin).parent / "lib").glob("libgomp*"))))
"""


def libgomp() -> bool:
    """Whether this torch carries GCC's runtime, as the wheels of pytorch.org do."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return any((Path(spec.origin).parent / "lib").glob("libgomp*"))


def spinning(door: str, **environment: str) -> int:
    """The turns that libgomp says it will spin, loaded by a process after the door was called."""
    kept = {name: value for name, value in os.environ.items() if name not in waiting.VARIABLES}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(door=door, argv=DOORS[door])],
        env={**kept, "PYTHONPATH": paths, "OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found is not None, done.stderr
    return int(found.group(1))


@pytest.mark.skipif(not libgomp(), reason="torch carries no libgomp here")
@pytest.mark.parametrize("door", DOORS)
def test_the_doors_bound_it(door: str) -> None:
    assert spinning(door) == int(waiting.BOUNDED["GOMP_SPINCOUNT"]) < 10_000


@pytest.mark.skipif(not libgomp(), reason="torch carries no libgomp here")
@pytest.mark.parametrize(
    ("name", "value", "turns"),
    [("OMP_WAIT_POLICY", "active", 30_000_000_000), ("GOMP_SPINCOUNT", "77", 77), ("OMP_WAIT_POLICY", "passive", 0)],
)
def test_the_users_choice_stays(name: str, value: str, turns: int) -> None:
    assert spinning("train", **{name: value}) == turns


def test_only_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in waiting.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    bound_spinning()  # torch is there
    assert not set(waiting.VARIABLES) & os.environ.keys()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "environ", found := {"KMP_BLOCKTIME": "5"})
    bound_spinning()
    assert found == {"KMP_BLOCKTIME": "5"}
    found.clear()
    bound_spinning()
    assert found == waiting.BOUNDED
