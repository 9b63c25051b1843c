"""Bytes by purpose and the strategy chosen from them, on loads whose numbers can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from opd_fast.distributed.memory import (
    GIB,
    RESERVE,
    Workload,
    activations,
    blocks_to_checkpoint,
    choose_strategy,
    memory,
)

# 2 G parameters in bfloat16 (4e9 bytes a copy), 20 M trained, three teachers, 50 MB a sample.
LORA = Workload(
    kind="lora",
    parameters=2_000_000_000,
    trainable=20_000_000,
    merged=500_000_000,
    block=80_000_000,
    outside=40_000_000,
    itemsize=2,
    teachers=3,
    adapters=60_000_000,
    placement="merged",
    offload=False,
    reshard="round",
    samples=72,
    micro_batch=8,
    activation=50_000_000,
    steps=9,
    tasks=3,
)
FULL = replace(LORA, kind="full", trainable=2_000_000_000, merged=0)


def test_replicated() -> None:
    found = memory(LORA, "single")
    assert found == {
        "base": 4_000_000_000,
        "teachers": 12_000_000_000,
        "merged layers": 1_000_000_000,
        "trained weights": 80_000_000,
        "working copy": 0,
        "gradients": 80_000_000,
        "optimizer": 160_000_000,
        "average": 80_000_000,
        "activations": 400_000_000,
    }
    assert memory(LORA, "ddp", 8) == found
    assert memory(LORA, "ddp", 24)["activations"] == 150_000_000  # three samples a device


def test_sharded() -> None:
    lora = memory(LORA, "fsdp2", 8)
    assert (lora["base"], lora["merged layers"]) == (500_000_000, 0)
    assert (lora["teachers"], lora["optimizer"]) == (12_000_000_000, 160_000_000)  # replicated
    assert lora["working copy"] == 4_000_000_000
    assert memory(replace(LORA, reshard="block"), "fsdp2", 8)["working copy"] == 400_000_000
    full = memory(FULL, "fsdp2", 8)
    assert full["trained weights"] == full["average"] == 1_000_000_000
    assert (full["optimizer"], full["gradients"]) == (2_000_000_000, 9_000_000_000)
    assert memory(FULL, "hsdp", 32, shard_size=8) == memory(FULL, "fsdp2", 8) | {
        "activations": memory(FULL, "fsdp2", 32)["activations"]
    }


def test_teachers_elsewhere() -> None:
    assert memory(replace(LORA, offload=True), "single")["teachers"] == 400_000_000
    assert memory(replace(LORA, placement="shared"), "single")["teachers"] == 240_000_000


def test_half_precision_full_weights_are_cast() -> None:
    assert memory(FULL, "single")["working copy"] == 4_000_000_000
    assert memory(replace(FULL, itemsize=4), "single")["working copy"] == 0


BLOCKS = replace(LORA, blocks=20, boundary=500_000)


def test_checkpointed_blocks_keep_their_inputs() -> None:
    assert activations(BLOCKS) == 50_000_000
    assert activations(replace(BLOCKS, checkpointed=1)) == 50_000_000 + 500_000  # its own comes back in its backward
    assert activations(replace(BLOCKS, checkpointed=20)) == 20 * 500_000 + 2_500_000


def test_as_few_blocks_are_checkpointed_as_make_the_round_fit() -> None:
    def need(count: int) -> float:
        return sum(memory(replace(BLOCKS, checkpointed=count), "single").values()) / (1 - RESERVE)

    assert blocks_to_checkpoint(BLOCKS, "single", 1, 8, need(0)) == 0
    assert blocks_to_checkpoint(BLOCKS, "single", 1, 8, need(0) - 1) == 2
    assert blocks_to_checkpoint(BLOCKS, "single", 1, 8, need(13)) == 13
    assert blocks_to_checkpoint(BLOCKS, "single", 1, 8, need(20)) == 20
    assert blocks_to_checkpoint(BLOCKS, "single", 1, 8, need(20) - 10) == 0  # in vain


@pytest.mark.parametrize(
    ("workload", "world", "gib", "strategy", "words"),
    [
        (LORA, 1, 80, "single", "fit into"),
        (LORA, 8, 80, "ddp", "fits into"),
        (FULL, 8, 80, "fsdp2", "masters and moments are sharded"),
        (replace(LORA, offload=True), 8, 5.5, "fsdp2", "5.0 GiB; parallel.reshard block would do"),
        (replace(LORA, reshard="block", offload=True), 8, 5, "fsdp2", "sharded over 8 it takes 2.0 GiB"),
        (LORA, 1, 17, "single", "parallel.offload_teachers true or engine.placement shared would do"),
        (replace(LORA, teachers=0, activation=3 * GIB), 1, 16, "single", "train.micro_batch 1 would do"),
        (LORA, 2, 2.4, "fsdp2", "on 4 devices would do"),
        (LORA, 8, 0.5, "fsdp2", "no setting helps"),
    ],
)
def test_choice(workload: Workload, world: int, gib: float, strategy: str, words: str) -> None:
    chosen, reason = choose_strategy(workload, world, gib * GIB)
    assert chosen == strategy, reason
    assert words in reason
    assert "\n" not in reason


def test_what_is_advised_does_fit() -> None:
    """Each remedy of the sentence, applied, makes a choice that no longer complains."""
    applied: dict[str, dict[str, Any]] = {
        "parallel.offload_teachers true": {"offload": True},
        "engine.placement shared": {"placement": "shared"},
        "train.micro_batch 1": {"micro_batch": 1},
        "parallel.reshard block": {"reshard": "block"},
    }
    told = 0
    for workload in (LORA, FULL, replace(LORA, activation=GIB), replace(FULL, activation=GIB)):
        for world in (1, 2, 8):
            for gib in range(2, 80):
                _, reason = choose_strategy(workload, world, gib * GIB)
                if not reason.endswith("would do"):
                    continue
                advice = reason.split("; ")[-1]
                words = [w for w in applied if w in advice]
                changes = [applied[w] for w in words]
                ranks = int(advice.split(" devices")[0].split()[-1]) if " devices" in advice else world
                if ", " in advice or " devices" in advice or len(changes) == 1:
                    changes = [{key: value for change in changes for key, value in change.items()}]
                for change in changes:
                    _, then = choose_strategy(replace(workload, **change), ranks, gib * GIB)
                    assert "do not fit" not in then, (reason, then)
                    told += 1
    assert told > 50


def test_more_devices_never_need_more() -> None:
    for workload in (LORA, FULL):
        sizes = [sum(memory(workload, "fsdp2", world).values()) for world in (2, 4, 8, 16, 64)]
        assert all(b <= a for a, b in pairwise(sizes))
    assert 0 < RESERVE < 0.5
