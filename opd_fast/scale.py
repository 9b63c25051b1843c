"""What a recipe costs on many devices, by the model of `opd_fast.distributed.communication`:

python -m opd_fast.scale [RECIPE_OR_YAML ...] [--world 8,64,512] [--rate 800] [--share 0.5] ...
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_fast.config.options import Option, read_options
from opd_fast.config.validate import check_positive
from opd_fast.distributed.communication import Network, Work, collectives, round_time, sent
from opd_fast.distributed.memory import GIB, RESERVE, Reshard, Strategy, memory
from opd_fast.errors import UserError, main_guard

RECIPES = ("sd35-mopd", "flux-mopd")
NETWORK = Network()
DOOR = "python -m opd_fast.scale"
OPTIONS = (
    Option("world", str, "8,64,512", "numbers of devices, with commas"),
    Option("samples", int, 9, "of a device in a round, whatever the number of devices"),
    Option("reshard", Reshard, "round", "as parallel.reshard, of fsdp2"),
    Option("rate", float, 800.0, "TFLOP/s of large bfloat16 products on a device"),
    Option("share", float, 0.5, "of that rate that a round reaches"),
    Option("gpu-memory", float, 80.0, "GiB of a device"),
    Option("ranks-per-node", int, NETWORK.ranks_per_node, "devices of a node"),
    Option("intra-bandwidth", float, NETWORK.intra_bandwidth / 1e9, "GB/s within a node"),
    Option("inter-bandwidth", float, NETWORK.inter_bandwidth / 1e9, "GB/s between nodes"),
    Option("intra-latency", float, NETWORK.intra_latency * 1e6, "microseconds of a hop"),
    Option("inter-latency", float, NETWORK.inter_latency * 1e6, "the same between nodes"),
    Option("link-share", float, NETWORK.share, "of the bandwidths that is reached"),
)


@main_guard
def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    from opd_fast.reporting.telemetry import quiet_libraries

    what = "Expected efficiency of rounds on many devices, and the numbers that it follows from."
    recipes = ("recipes", "*", f"recipes or YAML files; without any {', '.join(RECIPES)}")
    given = read_options(argv, DOOR, what, OPTIONS, recipes)
    worlds = _worlds(given.world)
    latencies = ("intra-latency", "inter-latency")
    values = {option.name: getattr(given, option.name.replace("-", "_")) for option in OPTIONS}
    check_positive(*((n, v) for n, v in values.items() if n not in ("world", "reshard", *latencies)))
    for name in latencies:
        if not 0 <= values[name] < math.inf:
            raise UserError(name, f"{values[name]} is below 0", "give microseconds")
    quiet_libraries()
    network = Network(
        ranks_per_node=given.ranks_per_node,
        intra_bandwidth=given.intra_bandwidth * 1e9,
        inter_bandwidth=given.inter_bandwidth * 1e9,
        intra_latency=given.intra_latency * 1e-6,
        inter_latency=given.inter_latency * 1e-6,
        share=given.link_share,
    )
    _show([row for recipe in given.recipes or RECIPES for row in _rows(recipe, worlds, network, given)], given)
    return 0


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        remedy = "give whole numbers with commas, as 8,64,512"
        raise UserError("world", f"{text!r} is not a list of device counts", remedy)
    return worlds


def _rows(recipe: str, worlds: Iterable[int], network: Network, given: SimpleNamespace) -> Iterator[tuple[str, ...]]:
    """The table's lines about a recipe: LoRA by ddp and full weights by fsdp2, with as many samples on each device."""
    from opd_fast.config.command_line import parse
    from opd_fast.distributed.plan import make_plan

    cases: tuple[tuple[Literal["lora", "full"], Strategy], ...] = (("lora", "ddp"), ("full", "fsdp2"))
    for kind, strategy in cases:
        plan = make_plan(parse([recipe, "--student.kind", kind, "--engine.recompute", "0"]).config)
        per_device = {name: count * given.samples / plan.samples for name, count in plan.round_rows.items()}
        work = Work(
            student=per_device["student forward"] * plan.row.flops,
            teacher=per_device["teacher forward"] * plan.row.flops,
            backward=1.0 if kind == "lora" else 2.0,
            blocks=plan.workload.blocks,
        )
        for world in worlds:
            workload = replace(plan.workload, samples=given.samples * world, reshard=given.reshard)
            gib = sum(memory(workload, strategy, world).values()) / GIB
            traffic = sent(collectives(workload, strategy, world, ranks_per_node=network.ranks_per_node))
            time = round_time(workload, work, strategy, world, network, given.rate * given.share * 1e12)
            yield (
                *(escape(Path(recipe).stem), kind, strategy, str(world), f"{gib:.1f}"),
                "yes" if gib <= given.gpu_memory * (1 - RESERVE) else "no",
                f"{sum(traffic.values()) / 1e9:.2f}",
                *(f"{time.compute:.2f}", f"{time.wire:.3f}", f"{time.exposed:.3f}", f"{time.efficiency:.2%}"),
            )


def _show(rows: Iterable[tuple[str, ...]], given: SimpleNamespace) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    table = Table(box=None, header_style="dim")
    for name in ("recipe", "student", "strategy"):
        table.add_column(name, no_wrap=True)
    for name in ("devices", "GiB", "fits", "sent GB", "compute s", "wire s", "exposed s", "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{given.samples} samples a device and round, reshard {given.reshard}; {given.rate:g} TFLOP/s x "
        f"{given.share:g}; fits: into {given.gpu_memory:g} GiB less {RESERVE:.0%}; GB and s of a rank and round"
    )
    console.print(
        f"nodes of {given.ranks_per_node}; {given.intra_bandwidth:g} GB/s and {given.intra_latency:g} us within, "
        f"{given.inter_bandwidth:g} GB/s and {given.inter_latency:g} us between, x {given.link_share:g}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
