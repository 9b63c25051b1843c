"""benchmarks/gpu.sh with an interpreter that only pretends: parts that fail or hang stop no other, and all are told."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRETENDER = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
*"-m pip"*) exit 0 ;;
- | "-c "*) exit 0 ;;
*benchmarks.report*) echo "row figures" ;;
*benchmarks.ladder*) {ladder} ;;
*"--benchmark-only"*) {suite} ;;
*pytest*) {tests} ;;
esac
"""


def run(folder: Path, *, tests: str, ladder: str, suite: str, **environment: str) -> tuple[int, str, list[str]]:
    """Status, output and the calls of the interpreter."""
    python = folder / "python"
    python.write_text(PRETENDER.format(tests=tests, ladder=ladder, suite=suite))
    python.chmod(0o755)
    (folder / "calls").touch()
    settings = {"PYTHON": str(python), "OUT": str(folder / "out"), "CALLS": str(folder / "calls"), **environment}
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--cpu"],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr, (folder / "calls").read_text().splitlines()


def test_all_parts_pass(tmp_path: Path) -> None:
    status, out, calls = run(tmp_path, tests="echo 135 skipped in 4.47s", ladder=":", suite="echo 1 passed in 2s")
    assert status == 0
    assert "tests    pass" in out
    assert "135 skipped in 4.47s" in out
    assert "suite    pass" in out
    assert "row figures" in out
    assert (tmp_path / "out" / "logs" / "summary.txt").read_text().strip() in out
    assert [call for call in calls if "--save-results" in call]
    assert len(out.splitlines()) <= 60


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    status, out, _ = run(
        tmp_path,
        tests="echo 2 failed in 3s; exit 1",
        ladder="exec sleep 60",
        suite="echo 1 passed in 2s",
        SECONDS_IN_ALL="16",
    )
    assert status == 1
    assert "tests    FAIL: status 1" in out
    assert "2 failed in 3s" in out
    assert "ladder   FAIL: out of time" in out
    assert "suite    FAIL: no time left" in out


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n[ $1 != -c ]\n")  # `python -c` asks for a device: no
    python.chmod(0o755)
    settings = {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    for command, message in (
        (["benchmarks/gpu.sh"], "sees no CUDA device; try the script without one by benchmarks/gpu.sh --cpu"),
        (["benchmarks/profile.sh"], "sees no CUDA device"),
    ):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert message in done.stderr


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
