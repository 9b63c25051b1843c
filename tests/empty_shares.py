"""Runs where some processes have no sample: python -m tests.empty_shares WORLD_FOLDER OUT.

It starts worlds of 5, 2 and 3 processes itself, by fork, so that everything is imported once, and then runs the same
alone. Every case leaves, from rank 0, OUT/SIZE/CASE-STRATEGY with the gradient of round 0, the checkpoint after its
rounds and the rewards.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_fast.config import Config
from opd_fast.data.text_store import TextStore
from opd_fast.distributed.world import open_world
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.setup import prepare
from tests.parallel_cases import STRATEGIES, case, case_settings, judge

SIZES = (5, 2, 3)
ROUNDS = 3
"""The last leaves half of a rollout in hand."""
ONE: dict[str, Any] = {"train__samples_per_task": 1, "train__tasks_per_round": 1}
JUDGED: dict[str, Any] = {"evaluation__every": 2, "evaluation__prompts": 1, "evaluation__steps": 2}
GROUP = ONE | {"train__samples_per_task": 2, "rl__updates": 2}
CASES: dict[str, dict[str, Any]] = {
    "lora": ONE | JUDGED | {"train__task_schedule": "weighted"},
    # One sample of each of two tasks; teachers on the shards.
    "lora-shared": {"train__samples_per_task": 1, "train__micro_batch": 1, "engine__placement": "shared"},
    "lora-returns": ONE
    | {
        "engine__placement": "shared",
        "objective__kind": "ppo",
        "objective__reward_gradient": "return_to_go",
        "objective__anchor": "words",
        "parallel__reshard": "block",
    },
    "full": ONE
    | JUDGED
    | {"student__kind": "full", "train__lr": 1e-4, "objective__queries": 1, "student__guidance": 2.0},
    # Two images, one of them for each round.
    "grpo": GROUP | JUDGED | {"train__method": "grpo", "rl__clip": 0.05},
    "nft": GROUP | {"train__method": "nft"},
    "sft": ONE
    | {
        "train__method": "sft",
        "train__samples_per_task": 2,
        "sft__updates": 2,
        "sft__images_per_prompt": 2,
        "sft__base_weight": 0.5,
    },
    # A gradient scaler on processes that never scale a loss.
    "grpo-half": GROUP | {"train__method": "grpo", "model__dtype": "float16", "train__micro_batch": 1},
}
RESUMED = ("full-fsdp2", "grpo-ddp", "nft-ddp", "sft-ddp")
"""What three processes go on with from the checkpoint of five."""


def cases(size: int | None) -> list[tuple[str, str]]:
    """(case, strategy) that are run on `size` processes, None being a process alone."""
    if size is None:
        return [(name, "one") for name in CASES]
    few = [("grpo", "ddp"), ("sft", "ddp"), ("full", "fsdp2")]
    if size == 2:
        return [*few, ("lora", "ddp")]
    few += [("nft", "ddp"), ("lora-shared", "fsdp2")]
    if size == 5:
        return few
    more = [(name, "ddp") for name in ("lora", "lora-shared", "full", "grpo-half")]
    return few + more + [("lora", "fsdp2"), ("lora-returns", "fsdp2")]


def made(folder: Path, name: str, strategy: str) -> Config:
    config = case_settings(folder, CASES[name] | STRATEGIES[strategy])
    config.parallel.timeout = 2.0  # minutes, after which a process that waits in vain fails
    return config


def work(folder: Path, out: Path, size: int | None) -> None:
    for name, strategy in cases(size):
        case(made(folder, name, strategy), out / f"{name}-{strategy}", rounds=ROUNDS)
    if size in (None, 3):
        for done in RESUMED:
            name, strategy = done.rsplit("-", 1)
            source = out.parent / "5" / done if size else out / f"{name}-one"
            again = out / f"resumed-{name}"
            if os.environ.get("RANK", "0") == "0":
                shutil.copytree(source, again)
            case(made(folder, name, strategy if size else "one"), again, rounds=ROUNDS + 1, resume=True)
    if size == 3:
        judge(case_settings(folder, STRATEGIES["ddp"] | {"evaluation__prompts": 1}), out / "judged")
        keep_text(made(folder, "lora", "ddp"), out)
    if size == 5:
        keep_one_tensor(made(folder, "lora", "ddp"), out / "small")


def keep_text(config: Config, out: Path) -> None:
    """A store of embeddings that the second process's machine cannot keep; a file for each process that encoded."""
    config.model.text_cache = str(out / "text")
    opened = TextStore.open
    if os.environ["RANK"] == "1":
        TextStore.open = lambda *given: None  # type: ignore[method-assign, assignment]
    with open_world(config) as world:
        setup = prepare(config, lambda text: None, world)
        (out / f"encoded-{world.rank}").write_text(str(setup.text.encoded))
    TextStore.open = opened  # type: ignore[method-assign]


def keep_one_tensor(config: Config, directory: Path) -> None:
    """A checkpoint of fewer tensors than processes, written and read."""
    with open_world(config) as world:
        checkpoints = Checkpoints(directory, 1, world)
        checkpoints.save(1, {"only": torch.arange(7.0)}, {})
        checkpoints.wait()
        found: dict[str, Tensor] = {"only": torch.zeros(7)}
        checkpoints.restore(checkpoints.find()[0], found)
        assert torch.equal(found["only"], torch.arange(7.0))


def start(folder: Path, out: Path, size: int) -> None:
    """`work` on `size` processes; the first to fail ends them all."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    waiting = set()
    for rank in range(size):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                os.environ |= place | {name: str(value) for name, value in ranks.items()}
                work(folder, out / str(size), size)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        waiting.add(pid)
    while waiting:
        pid, status = os.wait()
        waiting.remove(pid)
        if status:
            time.sleep(1)  # for what the others have to say
            for other in waiting:
                os.kill(other, 9)
            sys.exit(f"a process of {size} failed")


def main(folder: Path, out: Path) -> None:
    prepare(case_settings(folder, {}), lambda text: None)  # imports what a run needs
    for size in SIZES:
        start(folder, out, size)
    work(folder, out / "alone", None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
