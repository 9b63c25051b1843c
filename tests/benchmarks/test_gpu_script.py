"""benchmarks/gpu.sh: parts that fail, hang or are cut stop no other and lose no row. With an interpreter that only
pretends, and (slow) rehearsed for real on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.report import take

RUNGS_OF_2 = ("one-pass", "student-merged", "blocks", "graphs", "fp8", "reference")
ROOT = Path(__file__).resolve().parents[2]
PRETENDER = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
*"-m pip"*) exit 0 ;;
- | "-c "*) exit 0 ;;
*benchmarks.report*) echo "row figures" ;;
*benchmarks.smoke*) {smoke} ;;
*test_step.py*) {step} ;;
*test_round.py*) {round} ;;
*pytest*) {tests} ;;
esac
"""


def environment(folder: Path, **changes: str) -> dict[str, str]:
    return outside() | {"OUT": str(folder / "out"), "OPD_GPU_CACHE": str(folder / "cache"), **changes}


def outside() -> dict[str, str]:
    """The environment without the marks of a pytest-xdist worker, in which pytest-benchmark measures nothing."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}


def pretend(folder: Path, parts: dict[str, str], **changes: str) -> tuple[int, str, list[str]]:
    """Status, output and the calls of the interpreter."""
    python = folder / "python"
    known = {"smoke": "echo all passed", "step": ":", "round": ":", "tests": "echo 135 skipped in 4.47s"}
    python.write_text(PRETENDER.format(**known | parts))
    python.chmod(0o755)
    (folder / "calls").touch()
    settings = environment(folder, PYTHON=str(python), CALLS=str(folder / "calls"), **changes)
    command = ["benchmarks/gpu.sh", "--rehearse", "1"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr, (folder / "calls").read_text().splitlines()


def test_all_parts_pass(tmp_path: Path) -> None:
    status, out, calls = pretend(tmp_path, {"step": "echo 1 passed in 2s"})
    assert status == 0, out
    order = ["smoke", "tests", "step", "round", "attention", "refusal"]
    lines = {line.split()[0]: line for line in out.splitlines() if " pass " in line}
    assert list(lines) == order
    assert "135 skipped in 4.47s" in lines["tests"]
    assert "1 passed in 2s" in lines["step"]
    assert "row figures" in out
    assert (tmp_path / "out" / "summary.txt").read_text().strip() in out
    assert len([call for call in calls if "--save-results" in call]) == 2
    assert len(out.splitlines()) <= 60
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"summary.txt", "logs.tar.gz"}


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    parts = {"smoke": "echo 1 failed; exit 1", "tests": "exec sleep 60", "step": "echo 1 passed in 2s"}
    status, out, _ = pretend(tmp_path, parts, SECONDS_IN_ALL="12")
    assert status == 1
    assert "smoke      FAIL: status 1" in out
    assert "tests      FAIL: out of time" in out
    assert "step       FAIL: no time left" in out


def test_a_command_that_is_killed_leaves_its_summary(tmp_path: Path) -> None:
    python = tmp_path / "python"
    known = {"smoke": "echo all passed", "step": ":", "round": ":", "tests": "exec sleep 60"}
    python.write_text(PRETENDER.format(**known))
    python.chmod(0o755)
    settings = environment(tmp_path, PYTHON=str(python), CALLS=str(tmp_path / "calls"))
    command = ["benchmarks/gpu.sh", "--rehearse", "1"]
    running = subprocess.Popen(command, cwd=ROOT, env=settings, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for(lambda: "tests/gpu" in (tmp_path / "calls").read_text(), running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert "smoke      pass" in (tmp_path / "out" / "summary.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n[ $1 != -c ]\n")  # `python -c` asks for a device: no
    python.chmod(0o755)
    for command, message in (
        (["benchmarks/gpu.sh", "2"], "sees no CUDA device; rehearse without one by benchmarks/gpu.sh --rehearse 2"),
        (["benchmarks/profile.sh"], "sees no CUDA device"),
    ):
        settings = environment(tmp_path, PYTHON=str(python))
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.parametrize("arguments", [[], ["4"], ["--rehearse"], ["--rehearse", "0"]])
def test_a_command_that_is_not_there_prints_the_usage(arguments: list[str]) -> None:
    done = subprocess.run(["benchmarks/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "benchmarks/gpu.sh 1 " in done.stdout
    assert "python -m benchmarks.report --take OUT" in done.stdout


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_profile_names_a_tool_that_is_missing(tool: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    for needed in ("bash", "dirname", "mkdir", "sh"):
        source = next(Path(d) / needed for d in ("/bin", "/usr/bin") if (Path(d) / needed).exists())
        (tmp_path / needed).symlink_to(source)
    done = subprocess.run(
        ["/bin/bash", "benchmarks/profile.sh", tool],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "PYTHON": str(python), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"profile.sh: {tool} is not on the PATH" in done.stderr


def test_counters_leave_the_clocks_alone(tmp_path: Path) -> None:
    """Locking the clocks, ncu's default, is not ours to do on a shared machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ncu", "python"):
        (tools / name).write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/{name}.calls\n')
        (tools / name).chmod(0o755)
    settings = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    settings["OUT"] = str(tmp_path / "out")
    subprocess.run(["benchmarks/profile.sh", "ncu"], cwd=ROOT, env=settings, check=True, timeout=60)
    first = (tmp_path / "ncu.calls").read_text().splitlines()[0]
    assert "--clock-control none" in first
    assert first.endswith("-m benchmarks.step_launches")


# --- rehearsed ------------------------------------------------------------------------------------------------------


def wait_for(there: object, running: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if there():  # type: ignore[operator]
                return
        except (OSError, ValueError):
            pass
        assert running.poll() is None, "it ended before"
        time.sleep(0.05)
    raise AssertionError("not within the time")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("1", {"step/tiny", "step/tiny/drawn", "rehearsal/round/sd35m-512/exact"}),
        ("2", {f"ladder/nano/{rung}" for rung in RUNGS_OF_2}),
        ("3", {f"rehearsal/round/sd35m-{name}" for name in ("512/exact/at-once", "512/exact/compiled", "1024/exact")}),
    ],
)
def test_the_rehearsal(command: str, rows: set[str], tmp_path: Path) -> None:
    """The real order on small shapes: every part passes, at most eight files, and the rows go where they belong."""
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--rehearse", command],
        cwd=ROOT,
        env=environment(tmp_path, PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"summary.txt", "logs.tar.gz"} < {path.name for path in files}
    assert len(files) <= 8
    (tmp_path / "out" / "logs.tar.gz").unlink()
    taken = take([tmp_path / "out"], tmp_path / "results")
    found = {row["name"] for path in taken for row in json.loads(path.read_text())["rows"]}
    assert found == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "folder"),
    [
        (["pytest", "-q", "benchmarks/test_step.py", "--benchmark-only", "-k", "step/tiny and not compiled"], "step"),
        (["benchmarks.ladder", "--shape", "nano", "--pairs", "1"], "ladder"),
    ],
    ids=["suite", "ladder"],
)
def test_a_part_that_is_killed_leaves_the_rows_it_had(command: list[str], folder: str, tmp_path: Path) -> None:
    out = tmp_path / folder
    running = subprocess.Popen(
        [sys.executable, "-m", *command, "--save-results", str(out)],
        cwd=ROOT,
        env=outside() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def rows() -> list[str]:
        (file,) = out.glob("*.json")
        return [row["name"] for row in json.loads(file.read_text())["rows"] if "seconds" in row]

    wait_for(rows, running)
    had = rows()
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert set(had) <= set(rows())
