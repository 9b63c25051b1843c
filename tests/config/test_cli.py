"""The command lines: a user's mistake is one line that names the key and the remedy, at once, without a traceback."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opd_fast import evaluate, train
from opd_fast.config import command_line as command
from opd_fast.config.run_dir import prepare_run_dir
from opd_fast.errors import UserError, is_ours, main_guard, one_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe whose every path exists; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipeline", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "file").write_text("")
    (tmp_path / "vacant").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "broken.yaml").write_text("train: {lr: [}")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "typo.yaml").write_text("trian: {lr: 1}\n")
    (tmp_path / "type.yaml").write_text("train: {lr: quick}\n")
    recipe = {"model": {"path": "pipeline"}, "teachers": [teacher()]}
    (tmp_path / "good.yaml").write_text(yaml.dump(recipe))
    return tmp_path


def teacher(**values: Any) -> dict[str, Any]:
    return {"name": "t", "weights": "adapter", "prompts": "prompts.txt", **values}


def teachers(**values: Any) -> list[str]:
    return ["--teachers", yaml.safe_dump([teacher(**values)], default_flow_style=True, width=1000).strip()]


# argv after the recipe, the key that the message opens with, a word of the remedy
MISTAKES: list[tuple[list[str], str, str]] = [
    (["--train.learning_rate", "1"], "train.learning_rate", "train."),
    (["--sampler.solvr", "ode"], "sampler.solvr", "did you mean --sampler.solver?"),
    (["--frobnicate"], "frobnicate", "--help"),
    (["--train", "3"], "--train", "one by one"),
    (["--train.rounds", "many"], "train.rounds", "default is 80"),
    (["--train.rounds", "1.5"], "train.rounds", "default is 80"),
    (["--train.lr", "quick"], "train.lr", "0.001"),
    (["--logging.tensorboard", "maybe"], "logging.tensorboard", "true"),
    (["--train.betas", "[1, 2, 3]"], "train.betas", "[0.9, 0.999]"),
    (["--train.lr"], "train.lr", "VALUE"),
    (["--sampler.solver", "flow_sed"], "sampler.solver", "did you mean flow_sde?"),
    (["--sampler.eta", "-0.5"], "sampler.eta", "0 or more"),
    (["--sampler.eta", "0"], "sampler.eta", "solver ode"),
    (["--sampler.steps", "1"], "sampler.steps", "2 or more"),
    (["--teachers", "[]"], "teachers", "at least one"),
    (["--teachers", "7"], "teachers", "name: N"),
    (teachers(wieght=2.0), "teachers[0].wieght", "did you mean weight?"),
    (teachers(guidance="strong"), "teachers[0].guidance", "default is null"),
    (["--teachers", "[{name: t, weights: adapter}]"], "teachers[0].prompts", "bundled/NAME"),
    (teachers(weights="absent/adapter.safetensors"), "teachers[0].weights", "hub id"),
    (teachers(weights="./absent"), "teachers[0].weights", "hub id"),
    (teachers(weights="bundled/nothing"), "teachers[0].weights", "bundle"),
    (teachers(weights="vacant"), "teachers[0].weights", "folder"),
    (teachers(prompts="absent.txt"), "teachers[0].prompts", ".jsonl"),
    (teachers(prompts="empty.txt"), "teachers[0].prompts", "one prompt on each line"),
    (teachers(prompts="binary.txt"), "teachers[0].prompts", "UTF-8"),
    (teachers(prompts="vacant"), "teachers[0].prompts", ".jsonl"),
    (teachers(prompts="bundled/nothing"), "teachers[0].prompts", "bundle"),
    (teachers(eval_prompts="empty.txt"), "teachers[0].eval_prompts", "one prompt on each line"),
    (teachers(reward="text"), "teachers[0].eval_prompts", "held-out"),
    (teachers(reward="nowhere:score", eval_prompts="prompts.txt"), "teachers[0].reward", "package.module:function"),
    (teachers(reward="txet", eval_prompts="prompts.txt"), "teachers[0].reward", "did you mean text?"),
    (["--model.path", "/absent"], "model.path", "hub id"),
    (["--student.start", "/absent"], "student.start", "hub id"),
    (["--run-dir", "file/run"], "--run-dir", "may write"),
    (["--run-dir", "used"], "--run-dir", "--resume used"),
    (["--resume", "vacant"], "--resume", "earlier run"),
]


def said(argv: list[str], capsys: pytest.CaptureFixture[str], main: Any = train.main) -> str:
    """The one line on stderr of a command that must fail."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("argv", "key", "remedy"), MISTAKES, ids=[f"{i}-{k}" for i, (_, k, _) in enumerate(MISTAKES)])
def test_mistakes(world: Path, capsys: pytest.CaptureFixture[str], argv: list[str], key: str, remedy: str) -> None:
    recipe = [] if "--resume" in argv else ["good.yaml"]
    line = said([*recipe, *argv], capsys)
    assert line.startswith(f"error: {key}: "), line
    problem, _, rest = line.rpartition("; ")
    assert remedy in rest, line
    assert len(problem) > len(f"error: {key}: "), line
    assert not (world / "runs").exists()  # nothing is left behind


@pytest.mark.parametrize(
    ("recipe", "key", "words"),
    [
        ("bundeld", "RECIPE", "did you mean bundled?"),
        ("absent.yaml", "RECIPE", "no such file"),
        ("broken.yaml", "broken.yaml", "not valid YAML"),
        ("list.yaml", "list.yaml", "section"),
        ("typo.yaml", "trian", "unknown key in typo.yaml; did you mean train?"),
        ("type.yaml", "train.lr", "'quick' is not a number in type.yaml"),
    ],
)
def test_recipe_mistakes(world: Path, capsys: pytest.CaptureFixture[str], recipe: str, key: str, words: str) -> None:
    line = said([recipe], capsys)
    assert line.startswith(f"error: {key}: "), line
    assert words in line, line


def test_two_recipes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "one recipe" in said(["good.yaml", "other.yaml"], capsys)


@pytest.mark.parametrize("argv", [["--sampler.solver", "flow_sed"], teachers(prompts="empty.txt")])
def test_a_process_fails_fast(world: Path, argv: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "opd_fast.train", "good.yaml", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    # Processor time, so that a busy machine does not fail the test; torch alone takes more than this to import.
    assert after.ru_utime - before.ru_utime < 2


def test_good_settings_reach_the_loop(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    called: list[Any] = []
    loop = types.ModuleType("opd_fast.training.loop")
    loop.train = lambda config, run_dir, resume, profile, world, planner: called.append((config, run_dir, resume))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "opd_fast.training.loop", loop)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    assert train.main(["good.yaml", "--run-dir", "run", "--seed", "4", "--train.rounds", "5"]) == 0
    (config, run_dir, resume) = called[0]
    assert (config.train.seed, run_dir, resume) == (4, Path("run"), False)
    assert command.read_config(Path("run/config.yaml")) == config
    assert train.main(["--resume", "run", "--train.rounds", "6"]) == 0
    assert called[1][0].train.rounds == 6
    assert called[1][1:] == (Path("run"), True)
    assert command.read_config(Path("run/config.yaml")).train.rounds == 6


def test_a_run_that_never_began_may_be_started_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake found while loading leaves config.yaml behind; mending it must not need another directory."""
    first, second = (command.parse(["good.yaml", "--run-dir", "run", "--seed", seed]) for seed in "12")
    prepare_run_dir(first)
    prepare_run_dir(second)
    assert command.read_config(Path("run/config.yaml")).train.seed == 2
    (world / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="not empty"):
        prepare_run_dir(second)


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from opd_fast.config.serialize import leaves

    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in leaves():
        assert f"--{key}" in text
    for option in ("--run-dir", "--resume", "--dry-run", "--seed", "--teachers", "bundled"):
        assert option in text
    may_change = "train.rounds, model.text_cache, logging, evaluation, checkpoint, parallel may change"
    assert may_change in " ".join(text.split())


# --- the guard --------------------------------------------------------------------------------------------------------


def test_guard_hides_only_our_own_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def library(argv: list[str]) -> int:
        return int(argv[0])  # a ValueError of this file, which is no part of the project

    with pytest.raises(ValueError, match="invalid literal"):
        main_guard(library)(["x"])

    def ours(argv: list[str]) -> int:
        from opd_fast.reporting.results import write_results

        write_results(Path("."), {})
        return 0

    assert main_guard(ours)([]) == 2
    assert capsys.readouterr().err.startswith("error: results lack rows")
    assert not is_ours(None)


def test_guard_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(argv: list[str]) -> int:
        raise KeyboardInterrupt

    assert main_guard(stopped)([]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_device_without_memory_left_is_told_with_what_needs_less(capsys: pytest.CaptureFixture[str]) -> None:
    def full(argv: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken(argv: list[str]) -> int:
        raise RuntimeError("a kernel failed")

    assert main_guard(full)([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB; give fewer samples at a time")
    assert "--train.micro_batch" in told
    with pytest.raises(RuntimeError, match="a kernel failed"):
        main_guard(broken)([])


def test_errors_are_one_line_and_survive_pickling() -> None:
    import pickle

    error = UserError("train.lr", "is\nbad", "mend it")
    assert one_line(error) == "train.lr: is bad; mend it"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.key, again.remedy) == (str(error), "train.lr", "mend it")


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "key", "words"),
    [
        (["--model", "bundled"], "prompts, rewards", "give --prompts VALUE"),
        (["--prompts", "prompts.txt", "--rewards", "txet"], "", "did you mean 'text'?"),
        (["--prompts", "prompts.txt", "--rewards", "text", "--steps", "0"], "steps", "1 or more"),
        (["--prompts", "prompts.txt", "--rewards", "text", "--step", "0"], "step", "did you mean --steps?"),
        (["--prompts", "prompts.txt", "--rewards", "text", "--solver", "od"], "solver", "did you mean ode?"),
        (["--prompts", "prompts.txt", "--rewards", "text", "--solver", "cps", "--eta", "0"], "eta", "solver ode"),
        (["--prompts", "prompts.txt", "--rewards", "text", "--batch", "x"], "batch", "default is 64"),
        (["--prompts", "prompts.txt,empty.txt", "--rewards", "text"], "rewards", "one for each file"),
        (["--prompts", "empty.txt", "--rewards", "text"], "", "no prompt"),
        (["--prompts", "prompts.txt", "--rewards", "colour", "--out", "file/x"], "out", "may write"),
    ],
)
def test_evaluate_mistakes(
    world: Path, capsys: pytest.CaptureFixture[str], argv: list[str], key: str, words: str
) -> None:
    line = said(argv, capsys, evaluate.main)
    assert line.startswith(f"error: {key}"), line
    assert words in line, line


def test_a_run_directory_serves_one_run_at_a_time(world: Path) -> None:
    from contextlib import ExitStack

    named = command.parse(["good.yaml", "--run-dir", "run"])
    with ExitStack() as hold:
        prepare_run_dir(named, hold)
        before = (world / "run" / "config.yaml").read_text()
        again = command.parse(["--resume", "run", "--train.rounds", "9"])
        with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on .*end that run first"):
            prepare_run_dir(again, ExitStack())
        assert (world / "run" / "config.yaml").read_text() == before
    with ExitStack() as hold:
        prepare_run_dir(again, hold)
    assert command.read_config(Path("run/config.yaml")).train.rounds == 9
