"""Whole runs and evaluations whose rewards come from servers, and evaluations that draw while they judge."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.rewards import server_client
from opd_fast.rewards.runner import RewardRunner
from opd_fast.train import main
from opd_fast.training.evaluation import EvalTask, Evaluation, evaluate
from tests import judge_server as fake
from tests.judge_server import Handler, Server, serving
from tests.runs import PROMPTS, write_world

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_client, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


# --- evaluations -----------------------------------------------------------------------------------------------------


class Drawing:
    """A sampler whose images follow from the keys; each batch takes `pause` seconds."""

    seed, batch = 0, 2

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.drawn: list[tuple[Tensor, list[Prompt]]] = []

    def draw(self, transformer: nn.Module, prompts: Sequence[Prompt], keys: Tensor) -> Tensor:
        time.sleep(self.pause)
        generators = [torch.Generator().manual_seed(int(key) % 2**31) for key in keys]
        images = torch.stack([torch.rand(3, 8, 8, generator=generator) * 0.9 for generator in generators])
        self.drawn.append((images, list(prompts)))
        return images


TASKS = [
    EvalTask(name, [Prompt(f"{name} {i}") for i in range(count)], ["unified_reward", "colour", "hpsv3"])
    for name, count in (("one", 2), ("two", 6), ("three", 1))
]
BATCHES = 5


def evaluated(sampler: Any, server: Server | None, **options: Any) -> Evaluation:
    addresses = {} if server is None else {"judge_server": f"{server.address}/v1", "hps3_server": server.address}
    models = RewardModelsConfig(**addresses, **options)
    return evaluate(sampler, nn.Identity(), TASKS, keep_images=2, reward_timeout=60.0, reward_models=models)


def either(handler: Handler, asked: Any) -> Any:
    return fake.hpsv3(handler, asked) if handler.path == "/score" else fake.judge(handler, asked)


def test_an_evaluation_draws_while_it_judges() -> None:
    """Five batches of three tasks, each of 0.3 s to draw and as much to judge: 3 s in turns, 1.8 s beside each other.

    The means are to the bit those of the same images judged one batch after another.
    """
    sampler: Any = Drawing(0.3)
    with serving(fake.slowly(either, 0.3)) as server:
        begun = time.monotonic()
        found = evaluated(sampler, server)
        seconds = time.monotonic() - begun
        models = RewardModelsConfig(judge_server=f"{server.address}/v1", hps3_server=server.address)
        server.how = either
        runner = RewardRunner("raise", None, models)
        values = [
            {name: runner(name, images, prompts) for name in TASKS[0].rewards} for images, prompts in sampler.drawn
        ]
    assert len(sampler.drawn) == BATCHES
    assert not found.failed
    parts = {"one": values[:1], "two": values[1:4], "three": values[4:]}
    for task, batches in parts.items():
        for name, mean in found.rewards[task].items():
            assert mean == float(torch.cat([batch[name] for batch in batches]).double().mean())
    assert {name: len(images) for name, images in found.images.items()} == {"one": 2, "two": 2, "three": 1}
    assert seconds < 0.6 * BATCHES - 0.3


def test_an_evaluation_without_its_servers_has_the_others() -> None:
    """One server is not named and the other dies after the first task; both say so once."""

    def mortal(handler: Handler, asked: Any) -> Any:
        prompts = asked["prompts"]
        return handler.cut() if prompts and not prompts[0].startswith("one") else fake.hpsv3(handler, asked)

    sampler: Any = Drawing(0.0)
    with serving(mortal) as server:
        models = RewardModelsConfig(hps3_server=server.address, retries=1)
        found = evaluate(sampler, nn.Identity(), TASKS, reward_timeout=60.0, reward_models=models)
    assert set(found.unjudged()) == {(task.name, "unified_reward") for task in TASKS} | {
        ("two", "hpsv3"),
        ("three", "hpsv3"),
    }
    images = sampler.drawn[0][0]
    assert found.rewards["one"]["hpsv3"] == pytest.approx(15 * float(images.mean()), abs=0.1)
    assert all(found.rewards[task.name]["colour"] >= 0 for task in TASKS)
    assert list(found.failed) == [("unified_reward", "unavailable"), ("hpsv3", "raised ServerError")]
    said = found.failed["unified_reward", "unavailable"]
    assert said.startswith("reward 'unified_reward' cannot judge: reward_models.judge_server: is not set")


# --- runs ------------------------------------------------------------------------------------------------------------


def learning(world: Path, run_dir: Path, server: Server, method: str) -> list[str]:
    """Three rounds that learn two tasks from two servers, with pictures judged at both ends."""
    rewards = {"words": "unified_reward", "plain": "0.5*unified_reward + 0.1*hpsv3"}
    tasks = ", ".join(
        f"{{name: {name}, weights: base, prompts: {world.parent / name}.txt, eval_prompts: {world.parent / name}.txt, "
        f"reward: '{rewards[name]}'}}"
        for name in PROMPTS
    )
    sizes = ("--train.samples_per_task", "2", "--rl.images_per_prompt", "2", "--rl.updates", "1", "--train.rounds", "3")
    every = ("--checkpoint.every", "1", "--evaluation.every", "0", "--evaluation.reward_timeout", "60")
    servers = ("--reward_models.judge_server", f"{server.address}/v1", "--reward_models.hps3_server", server.address)
    return [
        *(str(world), "--run-dir", str(run_dir), "--train.method", method, "--teachers", f"[{tasks}]"),
        *(*sizes, *every, *servers, "--reward_models.retries", "1"),
    ]


def fine(handler: Handler, asked: Any) -> Any:
    """Finer scores than `fake.judge`, so that images of one prompt differ."""
    if handler.path == "/score":
        return fake.hpsv3(handler, asked)
    return fake.chat(f"Final Score: {1 + 4 * fake.brightness(fake.chat_image(asked)):.4f}")


def test_a_run_learns_from_servers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its second rollout finds a server dead: the run ends, names it, and goes on by --resume as if nothing was."""
    with serving(fine) as server:
        assert main(learning(world, tmp_path / "whole", server, "grpo")) == 0
        whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
        rounds = [line for line in whole if "loss" in line]
        assert len(rounds) == 3
        assert all(0.2 <= line["reward/words"] <= 1 for line in rounds)
        assert all(line["images"] > 0 for line in rounds)

        asked = 0

        def mortal(handler: Handler, body: Any) -> Any:
            nonlocal asked
            if handler.path == "/score":
                return fake.hpsv3(handler, body)
            with handler.server.lock:
                asked += 1
            return handler.cut() if asked > 4 else fine(handler, body)

        capsys.readouterr()
        server.how = mortal
        assert main(learning(world, tmp_path / "run", server, "grpo")) == 2
        said = capsys.readouterr().err
        address = re.escape(server.address)
        assert re.search(
            r"teachers\.\w+\.reward: reward 'unified_reward' raised ServerError: "
            rf"{address}/v1/chat/completions does not answer: .*\(2 attempts\); fix the reward, .*--resume",
            said,
        )
        assert "Traceback" not in said
        server.how = fine
        assert main(["--resume", str(tmp_path / "run")]) == 0
    again = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    for name in ("loss", "reward/words", "reward/plain"):
        assert [line[name] for line in again] == [line[name] for line in rounds]


def test_a_run_is_refused_without_its_server(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any work, with the command that starts it."""
    argv = learning(world, tmp_path / "run", SimpleNamespace(address="http://127.0.0.1:9"), "grpo")  # type: ignore[arg-type]
    place = argv.index("--reward_models.judge_server")
    assert main([*argv[:place], *argv[place + 2 :]]) == 2
    said = capsys.readouterr().err
    assert (
        "error: reward_models.judge_server: is not set, and the reward asks a server; start a server, python -m" in said
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    argv[argv.index("--reward_models.hps3_server") + 1] = "localhost:1"
    assert main(argv) == 2
    assert "error: reward_models.hps3_server: 'localhost:1' is not the address of a server" in capsys.readouterr().err
    argv[argv.index("--reward_models.hps3_server") + 1] = "http://localhost:1"
    assert main([*argv, "--reward_models.request_timeout", "0"]) == 2
    assert "error: reward_models.request_timeout: 0.0 is not above 0" in capsys.readouterr().err


SCRIPT = """
import sys, torch
from torch import nn
from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import main_guard
from opd_fast.training.evaluation import EvalTask, evaluate

class Drawing:
    seed, batch = 0, 2
    def draw(self, transformer, prompts, keys):
        print("drawn", flush=True)
        return torch.rand(len(keys), 3, 8, 8)

@main_guard
def main(argv):
    models = RewardModelsConfig(judge_server=argv[0] + "/v1")
    tasks = [EvalTask("one", [Prompt(f"prompt {i}") for i in range(12)], ["unified_reward"])]
    evaluate(Drawing(), nn.Identity(), tasks, reward_timeout=300.0, reward_models=models)
    return 0

sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupted_evaluation_ends_though_the_server_hangs() -> None:
    with serving(fake.slowly(fake.judge, 60)) as server:
        argv = [sys.executable, "-c", SCRIPT, server.address]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)
        try:
            deadline = time.monotonic() + 60
            while len(server.asked) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err.strip()) == (130, "interrupted")
    assert out.count("drawn") == 3  # two batches wait for the server, and the third for them
    assert time.monotonic() - begun < 20


def test_results_name_a_server_that_fails(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A distillation goes on without the values, and its results say why."""

    def garbage(handler: Handler, asked: Any) -> Any:
        return handler.answer(b"<html>Bad gateway</html>", 502)

    tasks = ", ".join(
        f"{{name: {name}, weights: {world.parent / name}, prompts: {world.parent / name}.txt, "
        f"eval_prompts: {world.parent / name}.txt, reward: {reward}}}"
        for name, reward in (("words", "unified_reward"), ("plain", "colour"))
    )
    with serving(garbage) as server:
        argv = [str(world), "--run-dir", str(tmp_path / "run"), "--teachers", f"[{tasks}]", "--train.rounds", "1"]
        argv += ["--reward_models.judge_server", f"{server.address}/v1", "--reward_models.retries", "1"]
        assert main([*argv, "--evaluation.reward_failure", "continue"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    [said] = results["failures"]
    assert said.startswith(
        f"reward 'unified_reward' raised ServerError: {server.address}/v1/chat/completions answered "
    )
    assert said.endswith("status 502: <html>Bad gateway</html> (2 attempts)")
    assert capsys.readouterr().err.count(said) == 1
    assert all(row["unified_reward"] is None and row["colour"] >= 0 for row in results["rows"].values())
