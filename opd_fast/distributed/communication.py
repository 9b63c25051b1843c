"""What several devices cost: bytes between them, time on the wire, and how much of it a round cannot hide.

A round of n samples a device takes, on each of them,

    t_compute = (student forward + backward + teacher forward) / (rate x share)

with a forward's operations counted layer by layer (`opd_fast.distributed.flops`), the backward of LoRA one forward
(the gradient of the data) and of full weights two. Collectives of S bytes over n ranks of one node, bandwidth B a
direction, latency l:

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
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from opd_fast.distributed.memory import Strategy, Workload, shards

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
    """Share of the bandwidths that collectives reach."""


@dataclass(frozen=True)
class Collective:
    """One kind of traffic in a round."""

    kind: Kind
    size: int
    """Bytes of the whole tensor: what is gathered, reduced or summed."""
    count: int
    """How often it happens in a round."""
    ranks: int
    per_node: int
    """How many of these ranks share a node."""
    purpose: Literal["student", "teacher", "gradients"]

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a round, by a ring."""
        factor = 2 if self.kind == "all-reduce" else 1
        return self.count * factor * self.size * (self.ranks - 1) // self.ranks


def collectives(
    workload: Workload, strategy: Strategy, world: int, shard_size: int = 8, ranks_per_node: int = 8
) -> list[Collective]:
    """Return the traffic of a round; there is none for one rank.

    Weights are gathered in the model's dtype: once a round, or, under reshard block, for each forward and again for its
    backward. Teachers that share a sharded base gather it for their own forwards, unless the student holds it gathered.
    Gradients are float32.
    """
    if world == 1 or strategy == "single":
        return []
    parts = shards(strategy, world, shard_size)
    groups = world // parts
    within, across = min(parts, ranks_per_node), min(groups, max(1, ranks_per_node // parts))
    weights, gradients = workload.parameters * workload.itemsize, 4 * workload.trainable
    found: list[Collective] = []
    if parts > 1:
        forwards = workload.steps * workload.forwards_per_step(world)
        once = workload.reshard == "round"
        found.append(Collective("all-gather", weights, 1 if once else 2 * forwards, parts, within, "student"))
        if workload.placement == "shared" and not (workload.kind == "lora" and workload.reshard != "block"):
            calls = 1 if once else forwards * min(workload.tasks, workload.forward_samples(world))
            found.append(Collective("all-gather", weights, calls, parts, within, "teacher"))
    if workload.kind == "lora" or parts == 1:
        return [*found, Collective("all-reduce", gradients, 1, world, min(world, ranks_per_node), "gradients")]
    found.append(Collective("reduce-scatter", gradients, 1, parts, within, "gradients"))
    if groups > 1:
        found.append(Collective("all-reduce", gradients // parts, 1, groups, across, "gradients"))
    return found


def sent(found: Iterable[Collective]) -> dict[str, int]:
    """Return the bytes that a rank sends in a round, by kind."""
    totals: Counter[str] = Counter()
    for collective in found:
        totals[collective.kind] += collective.sent
    return dict(totals)


# --- time on the wire -------------------------------------------------------------------------------------------------


def seconds(kind: Kind, size: float, ranks: int, network: Network, per_node: int | None = None) -> float:
    """Return the seconds of a collective of `size` bytes over `ranks`, `per_node` of them on a node (None: its all)."""
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
    """Return the seconds over one kind of link, of a ring or a tree, whichever is shorter."""
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
    """Floating-point operations of one device in a round."""

    student: float
    """All student forwards."""
    teacher: float
    backward: float
    """A multiple of the student's forwards: 1 for LoRA, 2 for full weights."""
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
    workload: Workload, work: Work, strategy: Strategy, world: int, network: Network, rate: float, shard_size: int = 8
) -> RoundTime:
    """Return the time of a round with the traffic of `collectives`; `rate` is in operations a second."""
    forward, teacher = work.student / rate, work.teacher / rate
    backward = forward * work.backward
    calls = workload.steps * workload.forwards_per_step(world)
    wire = exposed = 0.0
    for c in collectives(workload, strategy, world, shard_size, network.ranks_per_node):
        if c.purpose == "gradients":
            once = seconds(c.kind, c.size, c.ranks, network, c.per_node)
            wire, exposed = wire + once, exposed + once
            continue
        spans = [(c.count, teacher / max(c.count, 1))]
        if c.purpose == "student":
            spans = [(min(c.count, calls), forward / calls)]
            if workload.reshard == "block":
                spans.append((calls, backward / calls))
        block = seconds(c.kind, c.size / work.blocks, c.ranks, network, c.per_node)
        for count, span in spans:
            hidden = span * (work.blocks - 1) / work.blocks
            wire += count * block * work.blocks
            exposed += count * (block + max(0.0, block * (work.blocks - 1) - hidden))
    return RoundTime(forward + backward + teacher, wire, exposed)
