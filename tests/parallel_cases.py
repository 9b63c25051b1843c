"""What each process of a distributed test does: python -m tests.parallel_cases WORLD_FOLDER OUT, alone or by torchrun.

Every case leaves, from rank 0, OUT/NAME/gradient.safetensors of round 0 and the checkpoint after its rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opd_fast.config import Config
from opd_fast.data.prompt_files import Prompt
from opd_fast.distributed.world import full_tensor, launched, open_world
from opd_fast.reporting.telemetry import NullTelemetry
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.loop import Run
from opd_fast.training.methods.base import make_method
from opd_fast.training.setup import prepare
from tests.runs import PROMPTS, reinforced, settings

ROUNDS = 20
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"student__kind": "full", "train__lr": 1e-4},
    # Six samples divide among no four ranks; in micro-batches; teachers on the shards.
    "lora-shared": {"engine__placement": "shared", "train__samples_per_task": 3, "train__micro_batch": 2},
    # Rewards of later steps from a first rollout, padding rows of scale 0, and an anchor on the shards.
    "lora-returns": {
        "engine__placement": "shared",
        "objective__kind": "ppo",
        "objective__reward_gradient": "return_to_go",
        "objective__anchor": "words",
        "train__samples_per_task": 3,
        "parallel__reshard": "block",
    },
    # The last backward is not that of the last step.
    "full-queried": {
        "student__kind": "full",
        "sampler__steps": 6,
        "objective__queries": 1,
        "objective__anchor": "base",
        "objective__anchor_weight": 0.5,
        "train__micro_batch": 1,
    },
    "full-guided": {"student__kind": "full", "student__guidance": 2.0, "parallel__reshard": "block"},
    "full-half": {"student__kind": "full", "model__dtype": "bfloat16"},
    # Ten images in groups of two: one process has more of them than another, and groups are torn apart.
    "grpo": {"train__method": "grpo", "train__samples_per_task": 10, "train__micro_batch": 2, "rl__clip": 0.05},
    "nft": {"train__method": "nft", "train__samples_per_task": 10, "train__micro_batch": 3},
    "sft": {
        "train__method": "sft",
        "train__samples_per_task": 5,
        "train__micro_batch": 3,
        "sft__updates": 2,
        "sft__images_per_prompt": 2,
        "sft__base_weight": 0.5,
    },
}
"""Settings by name."""
REINFORCED = ("grpo", "nft")
REPLICATED = (*REINFORCED, "sft")
"""The cases whose rounds share what was drawn, and which shard nothing."""
TRAINED = ("lora", "full", *REPLICATED)
"""The cases that go on for all rounds."""


STRATEGIES: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"parallel__strategy": "ddp"},
    "fsdp2": {"parallel__strategy": "fsdp2"},
    "hsdp": {"parallel__strategy": "hsdp", "parallel__shard_size": 2},
}


def strategies(name: str) -> tuple[str, ...]:
    """Those that a case is held to on every number of processes."""
    return ("ddp",) if name in REPLICATED else ("ddp", "fsdp2")


def cases(size: int | None) -> list[tuple[str, str]]:
    """(case, strategy) that are run on `size` processes, None being a process alone."""
    if size is None:
        return [(name, "one") for name in CASES]
    pairs = [(name, strategy) for name in TRAINED for strategy in strategies(name)]
    if size == 1:
        return pairs
    pairs += [(name, "fsdp2") for name in ("lora-shared", "lora-returns", "full-queried", "full-guided")]
    return pairs + (
        [("lora-shared", "ddp"), ("full-queried", "ddp"), ("full-half", "fsdp2")]
        if size == 2
        else [("lora-returns", "ddp"), ("full", "hsdp"), ("lora-shared", "hsdp")]
    )


def case_settings(folder: Path, changes: dict[str, Any]) -> Config:
    fixed = {
        "train__schedule": "constant",
        "sampler__steps": 3,
        "evaluation__every": 0,
        "checkpoint__every": 0,
        "train__ema": 0.5,
    }
    if (anchor := changes.get("objective__anchor")) in PROMPTS:
        changes = changes | {"objective__anchor": str(folder / anchor)}
    if (method := changes.get("train__method")) in REINFORCED:
        return reinforced(folder / "run.yaml", method, "colour", **(fixed | changes))
    return settings(folder / "run.yaml", **(fixed | changes))


def case(config: Config, directory: Path, *, rounds: int = 0, resume: bool = False) -> None:
    """The gradient of round 0, then a run up to `rounds` rounds, or on from its checkpoint."""
    with open_world(config) as world:
        setup = prepare(config, lambda text: None, world)
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
        if not resume:
            make_method(setup).accumulate(0, torch.amp.GradScaler("cpu", enabled=False))
            named = setup.student.named_parameters()
            found = {name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None}
            if world.is_main:
                save_file(found, directory / "gradient.safetensors")
            for _, parameter in named:
                parameter.grad = None
        world.wait()
        if rounds:
            checkpoints = Checkpoints(directory / "checkpoints", 1, world)
            run = Run(setup, directory, checkpoints, time.monotonic())
            if resume:
                run.load(*checkpoints.find())
            setup.config.train.rounds = rounds
            run.go(NullTelemetry())
            if world.is_main:
                (directory / "rows.json").write_text(json.dumps(run.judging.rows))


def gone_on_rank_1(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A reward: 1 for a task's first image and 0 for others, where its server is not gone."""
    if os.environ.get("RANK") == "1":
        raise OSError("server gone")
    return torch.tensor([float(i == 0) for i in range(len(images))])


def judge(config: Config, directory: Path) -> None:
    """What each rank gets to know of an evaluation whose reward fails on one."""
    config.teachers = config.teachers[:1]
    config.teachers[0].reward = "tests.parallel_cases:gone_on_rank_1"
    config.evaluation.every = 1
    with open_world(config) as world:
        setup = prepare(config, lambda text: None, world)
        with setup.student.base() as transformer:
            run = Run(setup, directory, Checkpoints(directory / "checkpoints", 1, world), time.monotonic())
            found = run.judging.judge(transformer, 1.0)
        directory.mkdir(parents=True, exist_ok=True)
        said = {"rewards": found.rewards, "failures": found.failures}
        (directory / f"{world.rank}.json").write_text(json.dumps(said))


def main(folder: Path, out: Path) -> None:
    size = launched()
    work(folder, out, size)
    if size is None:  # and as a launcher starts one process
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        work(folder, out.parent / "1", 1)


def work(folder: Path, out: Path, size: int | None) -> None:
    for name, strategy in cases(size):
        config = case_settings(folder, CASES[name] | STRATEGIES[strategy])
        case(config, out / f"{name}-{strategy}", rounds=ROUNDS if name in TRAINED and strategy != "hsdp" else 0)
    if size == 2:
        judge(case_settings(folder, STRATEGIES["fsdp2"]), out / "judged")
    saved = out.parent / "saved"
    if size == 4:
        case(case_settings(folder, CASES["full"] | {"parallel__strategy": "fsdp2"}), saved, rounds=ROUNDS // 2)
        # One update of a rollout is made: the other is to come.
        for name in REPLICATED:
            case(
                case_settings(folder, CASES[name] | STRATEGIES["ddp"]),
                saved.parent / f"saved-{name}",
                rounds=ROUNDS - 3,
            )
    elif size in (None, 2):
        again = out / "resumed"
        if os.environ.get("RANK", "0") == "0":
            shutil.copytree(saved, again)
        parallel = {} if size is None else {"parallel__strategy": "ddp"}
        case(case_settings(folder, CASES["full"] | parallel), again, rounds=ROUNDS, resume=True)
        for name in REPLICATED:
            again = out / f"resumed-{name}"
            if os.environ.get("RANK", "0") == "0":
                shutil.copytree(out.parent / f"saved-{name}", again)
            case(case_settings(folder, CASES[name] | parallel), again, rounds=ROUNDS, resume=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
