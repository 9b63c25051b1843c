"""Bytes on each device by purpose, and the parallel strategy that fits: arithmetic without torch and without files.

With P parameters of a transformer, T trained values, w bytes of the model's dtype, M teachers, and the base or the
masters cut into s shards:

    base               P w / s      frozen; under full weights it stays as the reference that is evaluated
    teachers           M P w        merged copies, on every rank; with parallel.offload_teachers two blocks and what is
                                    outside the blocks
                       4 A          placement shared: their float32 adapters of A values
    merged layers      L w          LoRA: the target layers' L weights with the student's adapter added for the round;
                                    0 where the base is sharded, as it is not merged there
    trained weights    4 T          LoRA: on every rank; full: 4 T / s
    working copy       see `working_copy`: weights gathered, or cast, for a forward and its backward
    gradients          4 T          full, sharded: 4 T + 4 T / s, as the whole gradient waits for the round's end
    optimizer          8 T          AdamW's two moments; full: / s
    average            4 T          full: / s
    activations        of one student forward of at most micro_batch samples: see `activations`
    rollout            what reinforcement learning keeps of the images in hand
    old policy         4 T          DiffusionNFT: the weights that draw

ZeRO (arXiv 1910.02054, section 3) counts the same things. The base, the masters and what follows them are cut into
s = world shards under fsdp2 and s = the ranks of a group under hsdp; s = 1 otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

Strategy = Literal["single", "ddp", "fsdp2", "hsdp"]
Reshard = Literal["round", "block"]
GIB = 2**30
RESERVE = 0.1
"""Share of a device's memory that a plan leaves free: CUDA context, VAE, text embeddings, fragmentation."""
PREFETCHED = 2
"""Blocks that lie on the device at once where they come and go: the one that computes and the next."""


@dataclass(frozen=True)
class Workload:
    """The sizes and settings that memory and traffic depend on. Sizes count values unless they are said to be bytes."""

    kind: Literal["lora", "full"]
    parameters: int
    """Values of one transformer."""
    trainable: int
    merged: int
    """Weights of the layers that the student's LoRA adapts; 0 for full weights."""
    block: int
    """Parameters of the largest repeated block."""
    outside: int
    """Parameters outside the repeated blocks."""
    itemsize: int
    """Bytes of the model's dtype."""
    teachers: int
    adapters: int
    """Values of all teachers' LoRAs, for teachers that share the base."""
    placement: Literal["merged", "shared"]
    offload: bool
    reshard: Reshard
    samples: int
    """Samples of a round on all devices."""
    micro_batch: int | None
    activation: int
    """Bytes of one sample in a student forward, both branches of guidance."""
    steps: int
    """Trained solver steps."""
    tasks: int
    """Tasks of a round."""
    blocks: int = 1
    boundary: int = 0
    """Bytes of one sample at the entrance of a block, both branches."""
    drawn: int = 0
    """Samples of a rollout that is kept to learn from, on all devices."""
    kept: int = 0
    """Bytes of each of them."""
    old_policy: bool = False
    checkpointed: int = 0
    """Blocks of the student under activation checkpointing."""

    def samples_per_device(self, world: int) -> int:
        """Return the samples of the rank that has most of them: sample i goes to rank i % world."""
        return math.ceil(self.samples / world)

    def forward_samples(self, world: int) -> int:
        """Return the samples of one student forward on the rank that has most."""
        return min(self.samples_per_device(world), self.micro_batch or self.samples)

    def forwards_per_step(self, world: int) -> int:
        return math.ceil(self.samples_per_device(world) / self.forward_samples(world))


def shards(strategy: Strategy, world: int, shard_size: int) -> int:
    """Return the number of parts into which a sharded tensor is cut."""
    return {"single": 1, "ddp": 1, "fsdp2": world, "hsdp": min(shard_size, world)}[strategy]


def memory(workload: Workload, strategy: Strategy, world: int = 1, shard_size: int = 8) -> dict[str, int]:
    """Return the bytes of the fullest device at the peak of a round, by purpose; see the module's table.

    `world` counts the ranks, `shard_size` those of a group under hsdp.
    """
    s = shards(strategy, world, shard_size)
    of_masters = s if workload.kind == "full" else 1
    whole = workload.parameters * workload.itemsize
    trained = 4 * workload.trainable
    if workload.placement == "shared":
        teachers = 4 * workload.adapters
    elif workload.offload:
        teachers = in_passing(workload) if workload.teachers else 0
    else:
        teachers = workload.teachers * whole
    return {
        "base": _cut(whole, s),
        "teachers": teachers,
        "merged layers": workload.merged * workload.itemsize if s == 1 else 0,
        "trained weights": _cut(trained, of_masters),
        "working copy": working_copy(workload, s),
        "gradients": trained + (_cut(trained, s) if of_masters > 1 else 0),
        "optimizer": 2 * _cut(trained, of_masters),
        "average": _cut(trained, of_masters),
        "activations": activations(workload) * workload.forward_samples(world),
        **({"rollout": workload.kept * math.ceil(workload.drawn / world)} if workload.drawn else {}),
        **({"old policy": trained} if workload.old_policy else {}),
    }


def need(workload: Workload, strategy: Strategy, world: int = 1, shard_size: int = 8) -> int:
    """Return the bytes of the fullest device at the peak of a round, in all."""
    return sum(memory(workload, strategy, world, shard_size).values())


def activations(workload: Workload) -> int:
    """Return the bytes that a student forward keeps of one sample.

    Blocks under activation checkpointing keep their inputs, and one of them at a time keeps all else as well. What is
    outside the blocks counts as theirs.
    """
    if not workload.checkpointed:
        return workload.activation
    of_block = workload.activation // workload.blocks
    return workload.activation - workload.checkpointed * (of_block - workload.boundary) + of_block


def blocks_to_checkpoint(workload: Workload, strategy: Strategy, world: int, shard_size: int, gpu_memory: float) -> int:
    """Return the fewest blocks under activation checkpointing with which a round fits; 0 where it fits without, or
    never. `gpu_memory` is in bytes of a device, of which `RESERVE` stays free."""
    room = gpu_memory * (1 - RESERVE)
    for count in range(workload.blocks + 1):
        if need(replace(workload, checkpointed=count), strategy, world, shard_size) <= room:
            return count
    return 0


def working_copy(workload: Workload, s: int) -> int:
    """Return the bytes of weights that live beside the stored ones from a forward to its backward.

    Sharded weights are gathered in the model's dtype: all of them, or few blocks at a time under reshard block. Float32
    masters that are not sharded are cast by autocast, which keeps the copies for the backward.
    """
    if s > 1 and workload.reshard == "block":
        return in_passing(workload)
    cast = workload.kind == "full" and workload.itemsize < 4
    return workload.parameters * workload.itemsize if s > 1 or cast else 0


def in_passing(workload: Workload) -> int:
    """Return the bytes of a transformer whose blocks come and go: `PREFETCHED` of them, and what is outside them."""
    return min(PREFETCHED * workload.block + workload.outside, workload.parameters) * workload.itemsize


def choose_strategy(workload: Workload, world: int, gpu_memory: float, shard_size: int = 8) -> tuple[Strategy, str]:
    """Choose the strategy behind parallel.strategy auto, and say why in one sentence.

    One device takes single. LoRA takes ddp where everything fits on every device, else fsdp2. Full weights take fsdp2.
    `gpu_memory` is in bytes of a device, of which `RESERVE` stays free.
    """
    room = gpu_memory * (1 - RESERVE)
    room_words = f"the {room / GIB:.1f} GiB that may be filled of each device"
    if world == 1:
        if (alone := need(workload, "single")) <= room:
            return "single", f"one device, and {alone / GIB:.1f} GiB fit into {room_words}"
        return "single", f"one device, but {_too_large(workload, 'single', 1, room, shard_size)}"
    why = "full weights: masters and moments are sharded"
    if workload.kind == "lora":
        if (replicated := need(workload, "ddp", world, shard_size)) <= room:
            return "ddp", f"the base with everything beside it, {replicated / GIB:.1f} GiB, fits into {room_words}"
        why = f"replicated it would take {replicated / GIB:.1f} GiB, more than {room_words}"
    if (sharded := need(workload, "fsdp2", world, shard_size)) <= room:
        return "fsdp2", f"{why}; sharded over {world} it takes {sharded / GIB:.1f} GiB"
    return "fsdp2", f"{why}; but {_too_large(workload, 'fsdp2', world, room, shard_size)}"


def _too_large(workload: Workload, strategy: Strategy, world: int, room: float, shard_size: int) -> str:
    """Say that it does not fit, what is largest, and which change, changes, or number of devices would help."""

    def fits(changed: Workload, ranks: int = world) -> bool:
        return need(changed, "fsdp2" if ranks > 1 else strategy, ranks, shard_size) <= room

    sizes = memory(workload, strategy, world, shard_size)
    largest = max(sizes, key=lambda purpose: sizes[purpose])
    problem = f"{sum(sizes.values()) / GIB:.1f} GiB ({largest} {sizes[largest] / GIB:.1f}) do not fit into "
    problem += f"{room / GIB:.1f} GiB"
    changes: dict[str, dict[str, Any]] = {}
    if workload.checkpointed < workload.blocks and workload.boundary:
        changes[f"engine.recompute {workload.blocks}"] = {"checkpointed": workload.blocks}
    if workload.forward_samples(world) > 1:
        changes["train.micro_batch 1"] = {"micro_batch": 1}
    if workload.placement == "merged" and workload.teachers > 1 and not workload.offload:
        changes["parallel.offload_teachers true"] = {"offload": True}
    if workload.placement == "merged" and workload.teachers:
        changes["engine.placement shared"] = {"placement": "shared"}
    if world > 1 and workload.reshard != "block":
        changes["parallel.reshard block"] = {"reshard": "block"}
    if enough := [words for words, change in changes.items() if fits(replace(workload, **change))]:
        return f"{problem}; {' or '.join(enough)} would do"
    changes.pop("parallel.offload_teachers true", None)  # shared goes further
    together = replace(workload, **{key: value for change in changes.values() for key, value in change.items()})
    if changes and fits(together):
        return f"{problem}; {', '.join(changes)} together would do"
    together = replace(together, reshard="block")
    for ranks in (2**i for i in range(1, 13)):
        if ranks > world and fits(together, ranks):
            settings = ", ".join(dict.fromkeys([*changes, "parallel.reshard block"]))
            return f"{problem}; {settings} on {ranks} devices would do"
    smaller = "student.kind lora or a smaller model" if workload.kind == "full" else "or a smaller model"
    return f"{problem}; no setting helps: take devices of more memory, {smaller}"


def _cut(size: int, parts: int) -> int:
    return -(-size // parts)
