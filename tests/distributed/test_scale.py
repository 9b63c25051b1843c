"""Bytes and seconds between devices, on loads and links whose numbers can be worked out by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_fast import scale
from opd_fast.distributed.communication import Network, Work, collectives, round_time, seconds, sent
from tests.distributed.test_memory import FULL, LORA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
# Links without latency, so that a time is bytes over bandwidth; 100 B/s within a node of 4, 10 B/s between.
PLAIN = Network(ranks_per_node=4, intra_bandwidth=100, inter_bandwidth=10, intra_latency=0, inter_latency=0, share=1)


def test_lora_is_reduced_once_a_round() -> None:
    (only,) = collectives(LORA, "ddp", 8)
    assert (only.kind, only.size, only.count, only.ranks) == ("all-reduce", 80_000_000, 1, 8)
    assert sent([only]) == {"all-reduce": 2 * 80_000_000 * 7 // 8}
    assert collectives(LORA, "single", 1) == collectives(FULL, "fsdp2", 1) == []


@pytest.mark.parametrize(("reshard", "gathers"), [("block", 36), ("round", 1)])
def test_full_weights_are_gathered_and_scattered(reshard: Any, gathers: int) -> None:
    workload = replace(
        FULL, reshard=reshard
    )  # nine samples a device, eight a forward: two forwards in each of nine steps
    gather, scatter = collectives(workload, "fsdp2", 8)
    assert (gather.kind, gather.count, gather.size) == ("all-gather", gathers, 4_000_000_000)
    assert (scatter.kind, scatter.count, scatter.size) == ("reduce-scatter", 1, 8_000_000_000)
    assert sent([gather, scatter])["all-gather"] == gathers * 3_500_000_000


def test_groups_are_reduced_between() -> None:
    gather, scatter, reduce = collectives(FULL, "hsdp", 32, shard_size=8, ranks_per_node=8)
    assert (gather.ranks, scatter.ranks) == (8, 8)
    assert (reduce.kind, reduce.ranks, reduce.per_node, reduce.size) == ("all-reduce", 4, 1, 1_000_000_000)


def test_shared_teachers_gather_the_base() -> None:
    shared = replace(LORA, placement="shared", reshard="block")
    purposes = {c.purpose: c.count for c in collectives(shared, "fsdp2", 8)}
    assert purposes == {"student": 36, "teacher": 54, "gradients": 1}  # three tasks in each of 18 forwards
    assert "teacher" not in {c.purpose for c in collectives(replace(shared, reshard="round"), "fsdp2", 8)}


def test_times() -> None:
    assert seconds("all-gather", 400, 4, PLAIN) == pytest.approx(300 / 100)
    assert seconds("reduce-scatter", 400, 4, PLAIN) == pytest.approx(300 / 100)
    assert seconds("all-reduce", 400, 4, PLAIN) == pytest.approx(600 / 100)
    # Eight ranks: two nodes of four; a quarter goes between them by each rank.
    assert seconds("all-gather", 800, 8, PLAIN) == pytest.approx(100 / 10 + 600 / 100)
    assert seconds("all-reduce", 800, 8, PLAIN) == pytest.approx(2 * 600 / 100 + 2 * 100 / 10)
    assert seconds("all-reduce", 800, 8, PLAIN, per_node=1) == pytest.approx(2 * 700 / 10)
    assert seconds("all-gather", 800, 1, PLAIN) == 0


def test_small_messages_take_a_tree() -> None:
    slow = replace(PLAIN, ranks_per_node=64, intra_latency=1.0)
    assert seconds("all-reduce", 1e-6, 64, slow) == pytest.approx(2 * 6, rel=1e-3)  # a ring has 126 hops
    assert seconds("all-reduce", 1e9, 64, slow) == pytest.approx(2 * 63 / 64 * 1e7, rel=1e-4)


def test_what_is_hidden() -> None:
    """A gather behind a long computation shows its first block alone; behind none, all of it."""
    workload = replace(FULL, micro_batch=None, steps=1, reshard="round")
    network = Network()
    gather = seconds("all-gather", 4e9, 8, network)
    scatter = seconds("reduce-scatter", 8e9, 8, network)
    long = round_time(workload, Work(1e15, 1e15, 2.0, 10), "fsdp2", 8, network, 1e12)
    assert long.compute == pytest.approx(4000)
    assert long.exposed == pytest.approx(gather / 10 + scatter, rel=0.01)
    assert long.wire == pytest.approx(gather + scatter, rel=0.01)
    none = round_time(workload, Work(0, 0, 2.0, 10), "fsdp2", 8, network, 1e12)
    assert none.exposed == pytest.approx(none.wire)
    alone = round_time(workload, Work(1e15, 1e15, 2.0, 10), "single", 1, network, 1e12)
    assert alone.efficiency == 1 > long.efficiency


def test_lora_scales_and_more_devices_never_help_a_round() -> None:
    work = Work(5e14, 4e14, 1.0, 24)
    found = [round_time(replace(LORA, samples=9 * n), work, "ddp", n, Network(), 4e14).efficiency for n in (8, 64, 512)]
    assert found == sorted(found, reverse=True)
    assert min(found) > 0.99


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["--world", "8;64"], "world: '8;64' is not a list of device counts"),
        (["--world", "0"], "world: '0' is not a list"),
        (["--rate", "-1"], "rate: -1.0 is not above 0"),
        (["--rate", "fast"], "rate: 'fast' is not a number; the default is 800.0"),
        (["--inter-latency", "-1"], "inter-latency: -1.0 is below 0"),
        (["--reshard", "never"], "reshard: 'never' is not one of round, block"),
        (["--bandwidth", "3"], "bandwidth: unknown option"),
        (["absent"], "RECIPE: no recipe or YAML file 'absent'"),
    ):
        assert scale.main(argv) == 2, argv
        assert words in capsys.readouterr().err, argv


@pytest.mark.slow
def test_the_page_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"```\n\$ python -m opd_fast\.scale ?(.*)\n((?:.*\n)*?)```", PAGE.read_text())
    assert len(found) >= 2
    for options, table in found:
        assert scale.main(options.split()) == 0
        printed = capsys.readouterr().out
        assert [line.rstrip() for line in printed.splitlines()] == table.splitlines()
