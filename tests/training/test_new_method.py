"""A new method of training is one file and one line: REINFORCE, added to a copy of the package, through its door."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import opd_fast
from opd_fast.config.methods import METHODS
from opd_fast.config.methods.spec import METHOD_SETTINGS, method_spec
from opd_fast.config.serialize import flatten
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.training.methods.base import method_class
from tests import runs

FILE = '''
"""REINFORCE: the log-probability of every drawn step, times the image's advantage, without a ratio and its clip."""

import torch

from opd_fast.config.methods.reinforcement import ReinforcementSpec
from opd_fast.training.methods.reward_learning import Reinforcement
from opd_kernels import fused_step, log_prob, philox_normal
from opd_kernels.philox import INITIAL_NOISE


class ReinforceSpec(ReinforcementSpec):
    name = "reinforce"
    implementation = "opd_fast.training.methods.reinforce:Reinforce"

    def kept_latents(self, config):
        return config.sampler.steps + 1


SPEC = ReinforceSpec()


class Reinforce(Reinforcement):
    def __init__(self, setup):
        super().__init__(setup)
        self.drawing = setup.table.rows(device=setup.model.device)

    def trained_steps(self, epoch):
        return range(self.setup.table.steps)

    def chosen(self, drawn):
        return drawn["advantage"] != 0

    def step(self, epoch, rows, x, j):
        condition = self.condition(epoch, rows)
        v = self.setup.student.velocities(self.setup.model, x, self.drawing[j, -1], condition)
        return v.cond, v.uncond, torch.full((len(rows),), condition.branch_guidance, device=x.device)

    def roll_out(self, epoch):
        rows = torch.arange(self.images)
        x = philox_normal(self.keys(epoch), self.setup.shape, INITIAL_NOISE)
        states = [x]
        for j in self.trained_steps(epoch):
            cond, uncond, guidance = self.step(epoch, rows, x, j)
            ones = torch.ones_like(guidance)
            out = fused_step(
                x, cond, uncond, cond, uncond, guidance, guidance, self.drawing, j, ones, keys=self.keys(epoch)
            )
            states.append(x := out.x_next)
        return x, {"states": torch.stack(states, 1)}

    def learn(self, epoch, rows, shares, scaler):
        steps, drawn = self.trained_steps(epoch), self._drawn
        losses = torch.zeros(len(steps), self.images)
        for j in steps:
            x, following = drawn["states"][rows, j], drawn["states"][rows, j + 1]
            cond, uncond, guidance = self.step(epoch, rows, x, j)
            logp = log_prob(x, following, cond, uncond, guidance, self.drawing, j).logp
            weighed = -shares * drawn["advantage"][rows] * logp / len(steps)
            scaler.scale(weighed.sum()).backward()
            losses[j, rows] = weighed.detach()
        return losses, {}
'''

DRIVER = """
import sys
from opd_fast.train import main

yaml, out = sys.argv[1:]
base = [yaml, "--train.method", "reinforce"]
for number, options in enumerate((
    [*base, "--rl.guard", "true", "--run-dir", out + "/guard"],
    [yaml, "--train.method", "reinforces", "--run-dir", out + "/misspelt"],
    [*base, "--run-dir", out + "/planned", "--dry-run"],
    [*base, "--run-dir", out + "/straight"],
    [*base, "--run-dir", out + "/halted", "--train.rounds", "1"],
    ["--resume", out + "/halted", "--train.rounds", "2"],
)):
    print("exit", number, main(options), flush=True)
"""


def with_method(folder: Path) -> Path:
    """A copy of the package in `folder` with one more file and one more line."""
    package = Path(opd_fast.__path__[0])
    shutil.copytree(package, folder / "opd_fast", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (folder / "opd_fast" / "assets").symlink_to(package / "assets")
    (folder / "opd_fast" / "training" / "methods" / "reinforce.py").write_text(FILE)
    registry = folder / "opd_fast" / "config" / "methods" / "__init__.py"
    line = '    "sft": "opd_fast.config.methods.sft:SPEC",\n'
    text = registry.read_text()
    assert text.count(line) == 1
    registry.write_text(text.replace(line, line + '    "reinforce": "opd_fast.training.methods.reinforce:SPEC",\n'))
    return folder


def test_a_method_of_ones_own_trains_is_planned_refused_and_resumed(small_world: Path, tmp_path: Path) -> None:
    with_method(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def left(images, prompts):\n    return images[..., :16].mean((1, 2, 3))\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    lines = small_world.read_text().splitlines()
    text = "\n".join(
        line for line in lines if not line.startswith(("  - {", "teachers:", "train:", "checkpoint:", "evaluation:"))
    )
    prompts = small_world.parent / "plain.txt"
    yaml = tmp_path / "mine.yaml"
    # Evaluations take all prompts, so that either run encodes the same text at once and gets the same bits.
    yaml.write_text(
        f"{text}\nteachers:\n"
        f"  - {{name: a, weights: base, prompts: {prompts}, eval_prompts: {prompts}, reward: 'my_rewards:left'}}\n"
        "train: {rounds: 2, samples_per_task: 4}\nrl: {images_per_prompt: 2, updates: 2}\ncheckpoint: {every: 1}\n"
        "evaluation: {every: 3, prompts: 3, steps: 1}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(opd_fast.__path__[0]).parent / "kernels")])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(yaml), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    exits = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    assert exits == ["exit 0 2", "exit 1 2", "exit 2 0", "exit 3 0", "exit 4 0", "exit 5 0"], done.stdout + done.stderr
    assert "rl.guard: is not read under train.method reinforce" in done.stderr
    assert "train.method: 'reinforces' is not one of opd, grpo, nft, sft, reinforce" in done.stderr
    # 4 images in groups of two serve 2 rounds: 4 steps of 4 images to draw, and 4 steps of 2 images to learn from.
    assert "2 of reinforce; a rollout has 4 images" in done.stdout
    assert "rollout 8, student forward 8, student backward 8" in done.stdout
    rounds = [line for line in read_metrics(tmp_path / "straight" / "metrics.jsonl") if "loss" in line]
    assert [line["images"] for line in rounds] == [2, 2]
    assert all(line["gradient_norm"] > 0 and "reward/a" in line for line in rounds)
    straight, halted = (
        load_file(tmp_path / run / "student" / "adapter_model.safetensors") for run in ("straight", "halted")
    )
    assert any(bool(tensor.any()) for name, tensor in straight.items() if "lora_B" in name)
    assert all(torch.equal(straight[name], halted[name]) for name in straight)


@pytest.mark.parametrize("name", METHODS)
def test_a_spec_has_the_name_of_its_line_and_reads_settings_there_are(name: str, small_world: Path) -> None:
    config = runs.read_config(small_world)
    config.train.method = name
    spec = method_spec(config)
    assert spec.name == name
    assert callable(method_class(spec).accumulate)
    prefixes = {pattern.removesuffix("*") for pattern in spec.reads}
    assert all(any(key.startswith(prefix) for key in METHOD_SETTINGS) for prefix in prefixes)
    assert {key for key in METHOD_SETTINGS if not key.startswith("teachers.")} <= flatten(config).keys()


def test_no_question_is_asked_of_a_methods_name() -> None:
    found = []
    for file in Path(opd_fast.__path__[0]).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if any(f"{quote}{name}{quote}" in text for name in METHODS for quote in ("'", '"')):
            found.append(file.relative_to(opd_fast.__path__[0]).as_posix())
    assert sorted(found) == [
        "config/methods/__init__.py",
        "config/methods/grpo.py",
        "config/methods/nft.py",
        "config/methods/opd.py",
        "config/methods/sft.py",
        "config/schema.py",  # the default
    ]
