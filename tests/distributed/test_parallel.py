"""Several processes (gloo): one process's gradient, one process's student, and what a launch says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_fast.config import Config
from opd_fast.config.command_line import parse
from opd_fast.config.serialize import from_dict, to_yaml
from opd_fast.config.validate import validate
from opd_fast.distributed.world import World, open_world
from opd_fast.errors import UserError, main_guard
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.loop import train
from tests.parallel_cases import REPLICATED, TRAINED, cases, strategies
from tests.runs import settings, write_world

pytestmark = pytest.mark.slow
SIZES = (1, 2, 4)


VARIABLES = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(size: int, *command: str) -> subprocess.Popen[str]:
    """`command` (options of the launcher before it) on `size` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launcher, *command], env=VARIABLES, text=True, **pipes)  # type: ignore[call-overload]


def finished(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        pytest.fail(f"not finished after {seconds} s:\n{out}\n{err}")
    return process.returncode, out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world")).parent


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases on four processes, on two, and on one."""
    out = tmp_path_factory.mktemp("out")
    for size in (4, 2):
        arguments = ("-m", "tests.parallel_cases", str(folder), str(out / str(size)))
        code, said = finished(torchrun(size, *arguments))
        assert code == 0, said
    alone = [sys.executable, "-m", "tests.parallel_cases", str(folder), str(out / "alone")]
    subprocess.run(alone, check=True, env=VARIABLES, capture_output=True)
    return out


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum(float((found[k] - expected[k]).double().square().sum()) for k in expected)
    return float((error / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5)


def student(directory: Path) -> dict[str, Tensor]:
    tensors, meta = Checkpoints(directory / "checkpoints", 1).load()
    assert meta["round"] == 20
    return {k: v for k, v in tensors.items() if k.startswith(("student.", "ema."))}


@pytest.mark.parametrize(("size", "name", "strategy"), [(size, *pair) for size in SIZES for pair in cases(size)])
def test_gradient_of_one_process(out: Path, size: int, strategy: str, name: str) -> None:
    expected = load_file(out / "alone" / f"{name}-one" / "gradient.safetensors")
    found = load_file(out / str(size) / f"{name}-{strategy}" / "gradient.safetensors")
    if name != "full-half":
        assert relative(found, expected) <= 1e-5
        return
    # In bfloat16 every other batch rounds otherwise: what counts is the distance to float32.
    truth = load_file(out / "alone" / "full-one" / "gradient.safetensors")
    assert relative(found, truth) <= 1.1 * relative(expected, truth) < 0.5
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize(("name", "strategy"), [(name, each) for name in TRAINED for each in strategies(name)])
@pytest.mark.parametrize("size", SIZES)
def test_student_of_one_process(out: Path, size: int, strategy: str, name: str) -> None:
    expected = student(out / "alone" / f"{name}-one")
    found = student(out / str(size) / f"{name}-{strategy}")
    assert relative(found, expected) <= 1e-4
    assert max(float((found[k] - expected[k]).abs().max()) for k in expected) <= 1e-4


@pytest.mark.parametrize("where", ["2", "alone"])
def test_a_sharded_save_goes_on_elsewhere(out: Path, where: str) -> None:
    """Ten rounds under fsdp2 on four processes, ten more under ddp on two or on one alone."""
    expected = student(out / "alone" / "full-one")
    assert relative(student(out / where / "resumed"), expected) <= 1e-4


@pytest.mark.parametrize("name", REPLICATED)
@pytest.mark.parametrize("where", ["2", "alone"])
def test_a_rollout_in_hand_goes_on_elsewhere(out: Path, where: str, name: str) -> None:
    """Seventeen rounds on four processes, one of two updates of the last rollout made; the rest on two or on one."""
    assert relative(student(out / where / f"resumed-{name}"), student(out / "alone" / f"{name}-one")) <= 1e-4


def test_a_reward_that_fails_on_one_rank_costs_its_values_alone(out: Path) -> None:
    for rank in range(2):
        found = json.loads((out / "2" / "judged" / f"{rank}.json").read_text())
        assert (
            found["rewards"]["words"]["tests.parallel_cases:gone_on_rank_1"] == 0.5
        )  # of four images two are rank 0's
        assert found["failures"] == ["reward 'tests.parallel_cases:gone_on_rank_1' raised OSError: server gone"]


def test_every_sample_has_one_owner() -> None:
    for count in (1, 2, 5, 6, 9):
        for size in (1, 2, 4, 8):
            shares = [World(rank, size).rows(count) for rank in range(size)]
            assert len({len(rows) for rows, _ in shares}) == 1
            assert sorted(i for rows, own in shares for i in rows[:own]) == list(range(count))
            assert all(rows == sorted(rows) for rows, _ in shares)


# --- launches ---------------------------------------------------------------------------------------------------------


def made(**parallel: Any) -> Config:
    config = from_dict({"parallel": parallel})
    config.teachers = parse([]).config.teachers
    validate(config)
    return config


@pytest.mark.parametrize(
    ("parallel", "environment", "message"),
    [
        ({"strategy": "fsdp2"}, {}, r"parallel\.strategy: fsdp2 in a process started alone; start it with torchrun"),
        ({"strategy": "single"}, {"WORLD_SIZE": "2"}, r"parallel\.strategy: single, with 2 processes; give auto"),
        (
            {"strategy": "hsdp", "shard_size": 3},
            {"WORLD_SIZE": "2"},
            r"parallel\.shard_size: 3 does not divide 2 processes; give a divisor",
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, parallel: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    if environment:
        monkeypatch.setattr(
            "torch.distributed.rendezvous", lambda *args, **kwargs: [(torch.distributed.HashStore(), 0, 2)]
        )
        monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **kwargs: None)
        monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
        for name, value in {**environment, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), open_world(made(**parallel)):
        pass


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"strategy": "ddp", "shard_size": 2}, r"parallel\.shard_size: 2 is read by hsdp alone"),
        ({"strategy": "hsdp", "shard_size": 0}, r"parallel\.shard_size: 0 is below 1"),
        ({"timeout": 0.0}, r"parallel\.timeout: 0\.0 is not above 0"),
    ],
)
def test_settings_that_contradict_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**parallel)


def test_a_restart_needs_a_named_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=r"--run-dir: not given while torchrun may restart"):
        parse([])
    named = ["--run-dir", str(tmp_path)]
    assert not parse(named).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not parse(named).resume  # it had not begun
    (tmp_path / "config.yaml").touch()
    assert parse(named).resume


def until(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "".join(process.communicate())
        assert time.monotonic() < end
        time.sleep(0.05)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher started, in the order of their ranks."""
    import psutil

    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "opd_fast.train" in child.cmdline():
                found.append(child.pid)
    return found


def test_killed_restarted_signalled_resumed(folder: Path, tmp_path: Path) -> None:
    """One of two processes is killed, the launcher starts both again; one gets SIGTERM, both save and leave; a process
    alone goes on to the end: its student is the one of a run that was never disturbed."""
    run_dir, rounds = tmp_path / "run", 60
    config = settings(folder / "run.yaml", evaluation__every=0, checkpoint__every=5, train__rounds=rounds)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = ("-m", "opd_fast.train", str(tmp_path / "run.yaml"), "--run-dir", str(run_dir))
    process = torchrun(2, "--max-restarts", "1", *command)
    until(lambda: (run_dir / "checkpoints" / "round-000005").exists(), process)
    first = workers(process)
    os.kill(first[1], signal.SIGKILL)
    before = Checkpoints(run_dir / "checkpoints", 3).find()[1]["round"]
    until(lambda: len(workers(process)) == 2 and not set(workers(process)) & set(first), process)
    until(lambda: Checkpoints(run_dir / "checkpoints", 3).find()[1]["round"] >= before + 5, process)
    os.kill(workers(process)[1], signal.SIGTERM)
    code, said = finished(process)
    assert code == 0, said
    assert re.search(r"exitcode: -9\).*local_rank: 1", said)
    assert "rank 0: lost another process" in said
    assert said.count("go on with --resume") >= 1
    assert before + 5 <= Checkpoints(run_dir / "checkpoints", 3).find()[1]["round"] < rounds

    train(config, run_dir, resume=True)
    (tmp_path / "undisturbed").mkdir()
    train(config, tmp_path / "undisturbed")
    found, expected = (
        load_file(d / "student" / "adapter_model.safetensors") for d in (run_dir, tmp_path / "undisturbed")
    )
    assert relative(found, expected) <= 1e-5


def test_processes_other_than_the_first_wait_before_they_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise UserError("key", "is wrong", "mend it")

    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert main_guard(fail)([]) == 2
    assert (capsys.readouterr().err, waited) == ("error: key: is wrong; mend it\n", [])
    monkeypatch.setenv("RANK", "1")
    assert main_guard(fail)([]) == 2
    assert (capsys.readouterr().err, waited) == ("rank 1: error: key: is wrong; mend it\n", [3])


def test_averaging_counts_a_missing_gradient_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)]
    parameters[0].grad, parameters[2].grad = torch.ones(3), torch.full((2,), 4.0)
    reduced = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: reduced.append(flat.clone()))
    World(0, 2, strategy="ddp").average_gradients(parameters)
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[0.5] * 3, [0.0] * 5, [2.0] * 2]
    assert [len(flat) for flat in reduced] == [10]
