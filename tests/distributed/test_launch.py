"""docs/launch.md and docs/slurm.sh: every command in them is one that torchrun and the engine take."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from opd_fast.config.command_line import Command, parse
from opd_fast.config.serialize import to_yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", (DOCS / "launch.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
MODULE = "opd_fast.train"


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where the run of the page has begun."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "x"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(parse(["sd35-mopd", "--dry-run"]).config))
    return tmp_path


def read(words: list[str]) -> Command:
    """A launch as torchrun and the engine read it."""
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.training_script == MODULE
        words = ["python", "-m", MODULE, *launch.training_script_args]
    assert words[:3] == ["python", "-m", MODULE]
    return parse([*words[3:], "--dry-run"])


def test_the_page_has_them() -> None:
    assert len([line for line in COMMANDS if MODULE in line]) >= 6


@pytest.mark.parametrize("line", [line for line in COMMANDS if MODULE in line])
def test_commands_of_the_page(line: str, begun: Path) -> None:
    command = read(shlex.split(line))
    assert command.resume == ("--resume" in line)
    if "--max-restarts" in line:
        assert "--run-dir" in line


STUBS = {
    "srun": 'printf "%s\\n" "$@" > "$STUBS/srun.txt"; [[ -z ${WRITES:-} ]] || mkdir -p "$WRITES"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" > "$STUBS/scontrol.txt"; fi\n',
}


def submitted(folder: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """The script run with stand-ins for SLURM's commands, which write down how they were called."""
    for name, body in STUBS.items():
        (folder / name).write_text("#!/bin/bash\n" + body)
        (folder / name).chmod(0o755)
        (folder / f"{name}.txt").unlink(missing_ok=True)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "5"}
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(DOCS / "slurm.sh"), *words],
        env={**os.environ, **slurm, "PATH": path, "STUBS": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def launched(folder: Path) -> Command:
    words = (folder / "srun.txt").read_text().splitlines()
    return read(words[words.index("torchrun") :])


def test_slurm_begins_goes_on_and_ends(begun: Path) -> None:
    line = next(line for line in COMMANDS if line.startswith("sbatch"))
    words = shlex.split(line)
    assert words[1] == "docs/slurm.sh"
    arguments = [words[2], str(begun / "new"), *words[4:]]
    assert submitted(begun, arguments).returncode == 1  # nothing was written
    command = launched(begun)
    assert (command.resume, command.run_dir, command.config.train.rounds) == (False, begun / "new", 3000)
    assert "node7:29500" in (begun / "srun.txt").read_text()
    assert not (begun / "scontrol.txt").exists()

    run_dir = begun / "runs" / "x"
    going = [words[2], str(run_dir), *words[4:]]
    done = submitted(begun, going, WRITES=str(run_dir / "checkpoints" / "round-000007"))
    assert done.returncode == 0, done.stderr
    command = launched(begun)
    assert (command.resume, command.run_dir) == (True, run_dir)
    assert (begun / "scontrol.txt").read_text() == "requeue 5\n"

    (run_dir / "results.json").touch()
    assert submitted(begun, going).returncode == 0
    assert not (begun / "scontrol.txt").exists()
