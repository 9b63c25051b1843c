"""What several devices cost: bytes between them, time on the wire, and how much of it a round cannot hide.

    python -m opd_fast.scale [RECIPE_OR_YAML ...] [--world 8,64,512] [--rate 800] [--share 0.5] ...

A round of n samples a device takes, on each of them,

    t_compute = (student forward + backward + teacher forward) / (rate x share)

with a forward's operations counted layer by layer (`opd_fast.cost`), the backward of LoRA one forward (the gradient of
the data) and of full weights two. Collectives of S bytes over n ranks of one node, bandwidth B a direction, latency l:

    all-gather, reduce-scatter   ring (n - 1) (l + S / (n B))     tree  ceil(log2 n) l + (n - 1) S / (n B)
    all-reduce                   twice a ring                     tree  2 ceil(log2 n) l + 2 S / B

whichever is shorter (Thakur, Rabenseifner and Gropp 2005; double binary trees: Sanders, Speck and Traeff 2009). Over k
nodes of g ranks it is done in levels, every rank over its own network port: an all-gather takes S / g between nodes,
then S within; an all-reduce is a reduce-scatter within, an all-reduce of S / g between, an all-gather within. The
levels are added up, which a pipelined implementation beats.

What is exposed: gradients are reduced once a round, after the last backward, with nothing left to hide it. Gathers run
one block ahead of the forward or backward that they serve: the first block's stays exposed, and so does what exceeds
the computation.

    efficiency = t_compute / (t_compute + t_exposed)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from opd_fast.errors import UserError, main_guard
from opd_fast.memory import GIB, RESERVE, Load, Reshard, Strategy, memory, shards

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]


@dataclass(frozen=True)
class Network:
    """Links of a cluster. The defaults are a node of eight GPUs on NVLink 4 (900 GB/s, both directions together) and a
    400 Gbit/s InfiniBand port (NDR) for each of them."""

    ranks_per_node: int = 8
    intra_bandwidth: float = 450e9
    """Bytes a second and direction of a GPU, within a node."""
    inter_bandwidth: float = 50e9
    """The same, between nodes."""
    intra_latency: float = 3e-6
    """Seconds of a hop."""
    inter_latency: float = 10e-6
    share: float = 0.8
    """Of the bandwidths that collectives reach."""


@dataclass(frozen=True)
class Collective:
    """One kind of traffic in a round."""

    kind: Kind
    size: int
    """Bytes of the whole tensor: what is gathered, reduced or summed."""
    count: int
    """In a round."""
    ranks: int
    per_node: int
    """Ranks of it that share a node."""
    purpose: Literal["student", "teacher", "gradients"]

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a round, by a ring."""
        factor = 2 if self.kind == "all-reduce" else 1
        return self.count * factor * self.size * (self.ranks - 1) // self.ranks


def collectives(
    load: Load, strategy: Strategy, world: int, shard_size: int = 8, ranks_per_node: int = 8
) -> list[Collective]:
    """The traffic of a round; empty for one rank.

    Weights are gathered in the model's dtype: once a round, or, under reshard block, for each forward and again for its
    backward. Teachers that share a sharded base gather it for their own forwards, unless the student
    holds it gathered. Gradients are float32.
    """
    if world == 1 or strategy == "single":
        return []
    parts = shards(strategy, world, shard_size)
    groups = world // parts
    within, across = min(parts, ranks_per_node), min(groups, max(1, ranks_per_node // parts))
    weights, gradients = load.parameters * load.itemsize, 4 * load.trainable
    found: list[Collective] = []
    if parts > 1:
        forwards = load.steps * load.forwards_per_step(world)
        often = 1 if load.reshard == "round" else 2 * forwards
        found.append(Collective("all-gather", weights, often, parts, within, "student"))
        if load.placement == "shared" and not (load.kind == "lora" and load.reshard != "block"):
            calls = forwards * min(load.tasks, load.forward_samples(world)) if load.reshard != "round" else 1
            found.append(Collective("all-gather", weights, calls, parts, within, "teacher"))
    if load.kind == "lora" or parts == 1:
        found.append(Collective("all-reduce", gradients, 1, world, min(world, ranks_per_node), "gradients"))
        return found
    found.append(Collective("reduce-scatter", gradients, 1, parts, within, "gradients"))
    if groups > 1:
        found.append(Collective("all-reduce", gradients // parts, 1, groups, across, "gradients"))
    return found


def sent(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes that a rank sends in a round, by kind."""
    totals: dict[str, int] = {}
    for collective in found:
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.sent
    return totals


# --- time on the wire -------------------------------------------------------------------------------------------------


def seconds(kind: Kind, size: float, ranks: int, network: Network, per_node: int | None = None) -> float:
    """Of one collective of `size` bytes over `ranks`, `per_node` of them to a node (None: as many as it has)."""
    g = min(ranks, network.ranks_per_node if per_node is None else per_node)
    within = (network.intra_bandwidth * network.share, network.intra_latency)
    between = (network.inter_bandwidth * network.share, network.inter_latency)
    k = math.ceil(ranks / g)
    if k == 1:
        return _flat(kind, size, g, *within)
    if kind == "all-reduce":
        inside = 2 * _flat("all-gather", size, g, *within)
        return inside + _flat("all-reduce", size / g, k, *between)
    return _flat(kind, size / g, k, *between) + _flat(kind, size, g, *within)


def _flat(kind: Kind, size: float, n: int, bandwidth: float, latency: float) -> float:
    """Seconds over one kind of link: a ring or a tree, whichever is shorter."""
    if n == 1:
        return 0.0
    hops = math.ceil(math.log2(n))
    ring = (n - 1) * (latency + size / n / bandwidth)
    if kind == "all-reduce":
        return min(2 * ring, 2 * hops * latency + 2 * size / bandwidth)
    return min(ring, hops * latency + (n - 1) * size / n / bandwidth)


# --- a round ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Of one device in a round, in floating-point operations."""

    student: float
    """All student forwards."""
    teacher: float
    backward: float
    """As a multiple of the student's forwards: 1 for LoRA, 2 for full weights."""
    blocks: int
    """Repeated blocks of the transformer."""


@dataclass(frozen=True)
class RoundTime:
    """Seconds of a round."""

    compute: float
    wire: float
    """All collectives, hidden or not."""
    exposed: float

    @property
    def efficiency(self) -> float:
        return self.compute / (self.compute + self.exposed)


def round_time(
    load: Load, work: Work, strategy: Strategy, world: int, network: Network, rate: float, shard_size: int = 8
) -> RoundTime:
    """The time of a round whose collectives are those of `collectives`; `rate` is in operations a second."""
    forward, teacher = work.student / rate, work.teacher / rate
    backward = forward * work.backward
    wire = exposed = 0.0
    for c in collectives(load, strategy, world, shard_size, network.ranks_per_node):
        if c.purpose == "gradients":
            once = seconds(c.kind, c.size, c.ranks, network, c.per_node)
            wire, exposed = wire + once, exposed + once
            continue
        block = seconds(c.kind, c.size / work.blocks, c.ranks, network, c.per_node)
        calls = load.steps * load.forwards_per_step(world)
        spans = [(c.count, teacher / max(c.count, 1))]
        if c.purpose == "student":
            spans = [(min(c.count, calls), forward / calls)]
            if load.reshard == "block":
                spans.append((calls, backward / calls))
        for count, span in spans:
            hidden = span * (work.blocks - 1) / work.blocks
            wire += count * block * work.blocks
            exposed += count * (block + max(0.0, block * (work.blocks - 1) - hidden))
    return RoundTime(forward + backward + teacher, wire, exposed)


# --- the command ------------------------------------------------------------------------------------------------------

RECIPES = ("sd35-mopd", "flux-mopd")


def build_parser() -> Any:
    """The options: what is not a fact of the recipe."""
    from jsonargparse import ArgumentParser

    n = Network()
    parser = ArgumentParser(
        prog="python -m opd_fast.scale",
        description="Expected efficiency of rounds on many devices, and the numbers that it follows from.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="*", type=str, help=f"recipes or YAML files; without any {', '.join(RECIPES)}")
    parser.add_argument("--world", type=str, default="8,64,512", help="numbers of devices, with commas")
    parser.add_argument("--samples", type=int, default=9, help="of a device in a round, whatever the number of devices")
    parser.add_argument("--reshard", type=Reshard, default="round", help="as parallel.reshard, of fsdp2")
    parser.add_argument("--rate", type=float, default=800.0, help="TFLOP/s of large bfloat16 products on a device")
    parser.add_argument("--share", type=float, default=0.5, help="of that rate that a round reaches")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of a device")
    parser.add_argument("--ranks-per-node", type=int, default=n.ranks_per_node, help="devices of a node")
    parser.add_argument("--intra-bandwidth", type=float, default=n.intra_bandwidth / 1e9, help="GB/s within a node")
    parser.add_argument("--inter-bandwidth", type=float, default=n.inter_bandwidth / 1e9, help="GB/s between nodes")
    parser.add_argument("--intra-latency", type=float, default=n.intra_latency * 1e6, help="microseconds of a hop")
    parser.add_argument("--inter-latency", type=float, default=n.inter_latency * 1e6, help="the same between nodes")
    parser.add_argument("--link-share", type=float, default=n.share, help="of the bandwidths that is reached")
    return parser


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    recipe: str
    kind: str
    strategy: Strategy
    world: int
    gib: float
    sent: dict[str, int]
    time: RoundTime


def rows(
    recipe: str,
    worlds: Iterable[int],
    samples: int,
    network: Network,
    rate: float,
    reshard: Reshard = "round",
) -> list[Row]:
    """LoRA by ddp and full weights by fsdp2, each device with `samples` samples at every number of devices."""
    from opd_fast.command import parse
    from opd_fast.plan import make_plan

    found = []
    cases: tuple[tuple[Literal["lora", "full"], Strategy], ...] = (("lora", "ddp"), ("full", "fsdp2"))
    for kind, strategy in cases:
        config = parse([recipe, "--student.kind", kind, "--engine.recompute", "0"]).config
        plan = make_plan(config)
        per_device = {name: count * samples / plan.samples for name, count in plan.round_rows.items()}
        work = Work(
            student=per_device["student forward"] * plan.row.flops,
            teacher=per_device["teacher forward"] * plan.row.flops,
            backward=1.0 if kind == "lora" else 2.0,
            blocks=plan.blocks,
        )
        for world in worlds:
            load = replace(plan.load, samples=samples * world, reshard=reshard)
            size = sum(memory(load, strategy, world).values()) / GIB
            traffic = sent(collectives(load, strategy, world, ranks_per_node=network.ranks_per_node))
            time = round_time(load, work, strategy, world, network, rate)
            found.append(Row(recipe, kind, strategy, world, size, traffic, time))
    return found


@main_guard
def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    from opd_fast.command import check_options, strict
    from opd_fast.telemetry import quiet_libraries

    parser = build_parser()
    options = [action.option_strings[0] for action in parser._actions if action.option_strings]
    check_options(argv, options, "python -m opd_fast.scale --help lists all")
    hints: dict[str, tuple[Any, Any]] = {name: (type(v), v) for name, v in parser.get_defaults().items()}
    hints["reshard"] = (Reshard, "round")
    given = strict(lambda: parser.parse_args(argv), hints=hints)
    worlds = _worlds(given.world)
    for name in ("samples", "rate", "share", "gpu_memory", "ranks_per_node", "intra_bandwidth", "inter_bandwidth"):
        _positive(name, given[name])
    _positive("link_share", given.link_share)
    for name in ("intra_latency", "inter_latency"):
        if not 0 <= given[name] < math.inf:
            raise UserError(name.replace("_", "-"), f"{given[name]} is below 0", "give microseconds")
    quiet_libraries()
    network = Network(
        ranks_per_node=given.ranks_per_node,
        intra_bandwidth=given.intra_bandwidth * 1e9,
        inter_bandwidth=given.inter_bandwidth * 1e9,
        intra_latency=given.intra_latency * 1e-6,
        inter_latency=given.inter_latency * 1e-6,
        share=given.link_share,
    )
    rate = given.rate * given.share * 1e12
    found = [
        row
        for recipe in given.recipes or RECIPES
        for row in rows(recipe, worlds, given.samples, network, rate, given.reshard)
    ]
    _show(found, given, network)
    return 0


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(part) for part in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise UserError("world", f"{text!r} is no list of device counts", "give whole numbers with commas, as 8,64,512")
    return worlds


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(name.replace("_", "-"), f"{value} is not above 0", "give a positive number")


def _show(found: list[Row], given: Any, network: Network) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    table = Table(box=None, header_style="dim")
    for name in ("recipe", "student", "strategy"):
        table.add_column(name, no_wrap=True)
    for name in ("devices", "GiB", "fits", "sent GB", "compute s", "wire s", "exposed s", "efficiency"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        t = row.time
        table.add_row(
            Path(row.recipe).stem,
            row.kind,
            row.strategy,
            str(row.world),
            f"{row.gib:.1f}",
            "yes" if row.gib <= given.gpu_memory * (1 - RESERVE) else "no",
            f"{sum(row.sent.values()) / 1e9:.2f}",
            f"{t.compute:.2f}",
            f"{t.wire:.3f}",
            f"{t.exposed:.3f}",
            f"{t.efficiency:.2%}",
        )
    console.print(table)
    console.print(
        f"{given.samples} samples a device and round, reshard {given.reshard}; {given.rate:g} TFLOP/s x "
        f"{given.share:g}; fits: into {given.gpu_memory:g} GiB less {RESERVE:.0%}; GB and s of a rank and round",
    )
    console.print(
        f"nodes of {network.ranks_per_node}; {given.intra_bandwidth:g} GB/s and {given.intra_latency:g} us within, "
        f"{given.inter_bandwidth:g} GB/s and {given.inter_latency:g} us between, x {network.share:g}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
