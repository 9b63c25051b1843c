"""The recipes: all of them are read, those of the bundled world run, and the published ones say what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_fast.config import Config
from opd_fast.config.command_line import parse, recipes
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.serialize import flatten
from opd_fast.reporting.reward_keys import reward_key
from opd_fast.train import main

REINFORCED = ("joint-grpo-guard", "joint-nft", "joint-raw-sum", "teacher-colour", "teacher-composition", "teacher-text")
OURS = ("bundled", "cascade-nft", "cold-start", *REINFORCED)


def configs(name: str) -> list[Config]:
    return parse([name]).configs


@pytest.mark.parametrize("name", sorted(recipes()))
def test_it_is_read_and_says_what_it_is(name: str) -> None:
    assert all(config.teachers for config in configs(name))
    lines = recipes()[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 120
    bundled = {config.model.path for config in configs(name)} == {"bundled"}
    assert bundled == (name in OURS) == (not name.startswith(("sd35-", "flux-")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REINFORCED, "cascade-nft", "cold-start"])
def test_those_of_the_bundled_world_run(name: str, tmp_path: Path) -> None:
    """Two rounds each, with fewer images; what is left has the form of a distillation's."""
    less = {"train.rounds": "2", "train.warmup": "0", "train.samples_per_task": "12"}
    less |= {"evaluation.prompts": "2", "evaluation.every": "2"}
    options = [word for key, value in less.items() for word in (f"--{key}", value)]
    assert main([name, *options, "--run-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = [row for row in results["rows"] if not row.startswith(("stage:", "teacher:"))]
    assert rows == ["base", "student"]
    row = results["rows"]["student"]
    assert all(reward_key(row, task.name, task.name) in row for config in configs(name) for task in config.teachers)
    assert results["seconds"]["total"] > results["seconds"]["train"] > 0
    assert (tmp_path / "run" / "student" / "adapter_model.safetensors").is_file()


GRPO = {
    "sampler.solver": "flow_sde",
    "sampler.steps": 10,
    "sampler.eta": 0.7,
    "student.guidance": 4.5,
    "train.micro_batch": 9,
    "rl.updates": 2,
    "evaluation.steps": 40,
    "evaluation.guidance": 4.5,
}
GUARD = GRPO | {"train.method": "grpo", "rl.guard": True, "rl.clip": 2e-6, "train.lr": 1e-4}
NFT = {
    "train.method": "nft",
    "sampler.solver": "dpm2",
    "student.guidance": 1.0,
    "train.lr": 3e-4,
    "rl.kl": 1e-4,
    "rl.timestep_fraction": 0.99,
    "evaluation.steps": 40,
    "evaluation.guidance": 1.0,
}
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "sd35-flow-grpo": [GRPO | {"rl.guard": False, "rl.clip": 1e-4, "rl.kl": 0.04, "train.lr": 3e-4}],
    "sd35-flow-grpo-fast": [
        {
            "sampler.solver": "cps",
            "sampler.eta": 0.8,
            "rl.window": 3,
            "rl.window_range": 5,
            "rl.clip": 1e-5,
            "rl.log_prob": "published",
            "rl.kl": 0,
        }
    ],
    "sd35-teacher-ocr": [GUARD | {"rl.kl": 0.04}],
    "sd35-teacher-aesthetic": [GUARD | {"rl.kl": 0.01}],
    "sd35-joint-grpo-guard": [GUARD | {"rl.statistics": "task"}],
    "sd35-teacher-geneval": [NFT | {"sampler.steps": 10, "rl.beta": 1.0, "rl.decay": "early", "rl.updates": 1}],
    "sd35-joint-nft": [NFT | {"sampler.steps": 25, "rl.beta": 0.1}],
    "sd35-cascade-nft": [
        NFT | {"train.tasks[0]": "geneval", "rl.beta": 1.0, "rl.decay": "early", "rl.updates": 1},
        NFT | {"train.tasks[0]": "ocr", "rl.beta": 0.1, "rl.decay": "late", "rl.updates": 2},
        NFT | {"train.tasks[0]": "aesthetic", "rl.beta": 1.0, "rl.decay": "early", "rl.updates": 1},
    ],
    "sd35-flow-opd": [
        {
            "objective.kind": "ppo",
            "objective.variance": "published",
            "objective.clamp": 5.0,
            "objective.anchor_weight": 0.04,
            "sampler.solver": "flow_sde",
            "student.guidance": 4.5,
            "train.lr": 1e-4,
        }
    ],
    "sd35-dance-opd": [
        {
            "objective.kind": "velocity",
            "objective.queries": 1,
            "objective.query_law": "beta",
            "objective.query_weights": "law",
            "sampler.steps": 16,
            "train.lr": 2e-4,
            "train.weight_decay": 0.0,
            "student.rank": 128,
            "student.guidance": 1.0,
        }
    ],
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_it_states_the_published_values(name: str) -> None:
    found = configs(name)
    assert len(found) == len(PUBLISHED[name])
    for config, published in zip(found, PUBLISHED[name], strict=True):
        flat = flatten(config)
        assert {key: flat[key] for key in published} == published
        assert (config.student.rank, config.student.alpha) == (32, 64) or name == "sd35-dance-opd"
        if not method_spec(config).has_teachers:
            trained = len(config.trained)
            assert trained * config.train.samples_per_task == 24 * 48
            assert (config.rl.images_per_prompt, config.rl.std, config.rl.advantage_clip) == (24, "global", 5.0)
