"""OpenMP's threads spin for a bounded time where the user has not decided otherwise."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import waiting as benchmark
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


def test_the_benchmark_tells_each_way_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process gets the variables of its way and none of the user's; medians and ranges are over all of them."""
    begun: list[dict[str, str]] = []
    neighbours: list[int] = []
    asked: list[tuple[int, str]] = []
    calm: list[tuple[int, float]] = []

    class Popen:
        def __init__(self, words: list[str], env: dict[str, str], **options: Any) -> None:
            assert words[-2:] == ["--train.lr", "1e-4"]
            self.way = len(begun)
            begun.append({name: env[name] for name in waiting.VARIABLES if name in env})
            self.stdin = SimpleNamespace(write=lambda text: asked.append((self.way, text)))
            self.stdout = SimpleNamespace(readline=lambda: f"{10 * self.way + len(neighbours)}\n")

        def kill(self) -> None:
            begun[self.way]["ended"] = "yes"

        def communicate(self) -> None:
            pass

    @contextlib.contextmanager
    def neighbour() -> Iterator[None]:
        neighbours.append(len(asked))
        yield

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(benchmark.subprocess, "Popen", Popen)
    monkeypatch.setattr(benchmark, "neighbour", neighbour)
    monkeypatch.setattr(
        benchmark, "await_calm", lambda running, seconds: calm.append((running, seconds)) or running == 1
    )
    monkeypatch.setattr("benchmarks.environment.environment", lambda device, command: {"command": command})
    out = tmp_path / "waiting.json"
    assert benchmark.main(["--rounds", "3", "--calm", "0.5", "--train.lr", "1e-4", "--out", str(out)]) == 0
    ways = len(benchmark.WAYS)
    assert begun == [way | {"ended": "yes"} for way in benchmark.WAYS.values()]
    assert asked == [(way, f"{index}\n") for index in (0, 1, 1, 2, 2, 3, 3) for way in range(ways)]
    assert neighbours == [2 * ways, 4 * ways, 6 * ways]
    found = json.loads(out.read_text())
    assert found["environment"]["command"].endswith("--train.lr 1e-4 --out " + str(out))
    assert calm == ([(1, 0.5)] * ways + [(2, 0.5)] * ways) * 3
    assert found["disturbed"] == 3 * ways
    second = found["ways"]["opd_fast's"]
    assert second["variables"] == waiting.BOUNDED
    assert second["idle"] == {"seconds": 11.0, "least": 10.0, "most": 12.0}
    assert second["busy"] == {"seconds": 12.0, "least": 11.0, "most": 13.0}
    assert "opd_fast's          idle 11.00 s  busy 12.00 s" in capsys.readouterr().out


def test_a_process_that_ended_is_told() -> None:
    with benchmark.Process({}, ["--train.lr", "-1"]) as process, pytest.raises(RuntimeError, match="has ended"):
        process.round(0)


def test_the_neighbour_computes_and_ends() -> None:
    with benchmark.neighbour():
        children = psutil.Process().children()
        (process,) = [child for child in children if "while True" in " ".join(child.cmdline())]
        for _ in range(200):
            if process.cpu_affinity() == [max(os.sched_getaffinity(0))] and process.cpu_times().user > 0:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it does not compute")
    assert not process.is_running()
