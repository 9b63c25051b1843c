"""Several devices: who computes which samples, how weights are sharded, and what a round communicates.

A run on W devices computes what one device would. The samples of a round are numbered over all tasks, and sample i
belongs to rank i mod W; its prompt and its noise follow from its number, never from the rank. Every reduction averages
over the ranks, in float32, so a rank counts its own loss W times. The engine asks PyTorch's distributed stack for the
rest: process groups and device meshes, `fully_shard` (FSDP2), functional all-reduce.

    ddp      every rank holds all weights. A round ends in one all-reduce of what is trained: there are N backwards in a
             round and one update, so buckets that hook into each backward (`DistributedDataParallel`) have nothing to
             overlap with until the last.
    fsdp2    each block's weights are sharded over all ranks. LoRA: the frozen base is; the adapters are small, stay
             whole and are reduced as under ddp. Full weights: weights, gradients, optimizer and average are, and
             gradients are reduce-scattered in the round's last backward.
    hsdp     fsdp2 within groups of `parallel.shard_size` ranks, and the same shards in each group.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from opd_fast.config import Config
from opd_fast.distributed.memory import Reshard, Strategy
from opd_fast.distributed.plan import Planner
from opd_fast.errors import UserError, one_line

T = TypeVar("T")
_opened = itertools.count()


def launched() -> int | None:
    """Return how many processes torchrun (or a launcher of its kind) started; None without a launcher."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees them; the default is a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The process's number on its own machine."""
    strategy: Strategy = "single"
    mesh: DeviceMesh | None = None
    """The mesh of sharded weights: (W,) under fsdp2, (replicas, shards) under hsdp."""
    reshard: Reshard = "round"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp2", "hsdp")

    def rows(self, count: int) -> tuple[list[int], int]:
        """Return which of `count` samples this rank computes, ascending, and how many of these are its own.

        Forwards of sharded weights are collective, so every rank gets equally many: where they do not divide, its last
        row repeats the one before (or the very first sample) and must not count.
        """
        own = list(range(self.rank, count, self.size))
        padding = -(-count // self.size) - len(own)
        return own + [own[-1] if own else 0] * padding, len(own)

    def gather_samples(self, values: Tensor, count: int, dim: int = 0) -> Tensor:
        """Gather the values of all `count` samples from the ranks that own them, in the samples' order.

        `values` holds this rank's `rows(count)` along `dim`, or only its own of them; a rank that owns none may give a
        tensor of length 0 there. The result is the same on every rank.
        """
        if self.size == 1:
            return values
        rows, own = self.rows(count)
        gathered = values.new_zeros([count if d == dim else length for d, length in enumerate(values.shape)])
        positions = torch.tensor(rows[:own], dtype=torch.int64, device=values.device)
        gathered.index_copy_(dim, positions, values.narrow(dim, 0, own))
        # A sum would spread one rank's NaN to no other sample, and every sample has one owner.
        dist.all_reduce(gathered)
        return gathered

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the ranks, the same on each."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def all_gather_objects(self, items: Sequence[T], group: dist.ProcessGroup | None = None) -> list[T]:
        """Gather all ranks' items, which pickle can hold, rank after rank; the same on every rank.

        `group`, where given, is another group of all ranks that carries the messages.
        """
        if self.size == 1:
            return list(items)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, list(items), group)
        return [item for part in gathered for item in part]

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def on_first(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """Do `work` on rank 0 alone. Its result, or the UserError it raised, is every rank's; `group` as above."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, group=group)
        result: T | UserError = outcome[0]
        if isinstance(result, UserError):
            raise result
        return result

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the block on the first process of each machine, then on its others, so that they find its files."""
        if self.size > 1 and self.local_rank != 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    # --- weights and gradients ---------------------------------------------------------------------------------------

    def same_weights(self, parameters: Iterable[Tensor]) -> None:
        """Give every rank the weights of rank 0, whatever each drew or loaded."""
        if self.size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.detach(), 0)

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average whole (not sharded) float32 gradients over the ranks: one all-reduce for up to 1 GiB of them.

        A parameter without a gradient counts as one of zeros.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            parts = flat.div_(self.size).split([g.numel() for g in gradients])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def shard(self, transformer: nn.Module, blocks: Sequence[nn.Module], dtype: torch.dtype) -> None:
        """`fully_shard` each block, then what is left of the transformer, in place; LoRA's halves stay whole.

        `dtype` is the one forwards compute in. Inputs keep their types: levels and rotary angles are float32.
        """
        assert self.mesh is not None
        trained = any(p.requires_grad for name, p in transformer.named_parameters() if ".lora_" not in name)
        whole = {p for name, p in transformer.named_parameters() if ".lora_" in name}
        device = torch.device(self.mesh.device_type)
        for adapter in whole:
            adapter.data = adapter.data.to(device)
        param_dtype = dtype if trained else None  # a frozen base already lies in it
        policy = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        settings: Any = {"mesh": self.mesh, "mp_policy": policy, "ignored_params": whole}
        for module in (*blocks, transformer):
            fully_shard(module, reshard_after_forward=self.reshard == "block", **settings)
        root: Any = transformer
        root.set_reshard_after_backward(self.reshard != "round")
        root.set_requires_gradient_sync(False)


def _buckets(parameters: Sequence[nn.Parameter], most: int = 2**28) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in order, in lists of at most `most` elements (or of one parameter)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > most:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def reshard(transformer: nn.Module) -> None:
    """Free the gathered copies of sharded weights."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor onto every rank, collectively; any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, in the same memory; any other tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_alone(config: Config) -> None:
    """Raise UserError for a strategy of several processes, where no launcher started this one."""
    strategy = config.parallel.strategy
    if strategy not in ("auto", "single"):
        remedy = "start it with torchrun --nproc-per-node N -m opd_fast.train, or give auto"
        raise UserError("parallel.strategy", f"{strategy} in a process started alone", remedy)


@contextlib.contextmanager
def open_world(config: Config, planner: Planner | None = None) -> Iterator[World]:
    """Join the processes of this run, and leave them at the end of the block.

    Without a launcher it is a process alone. `planner` is that of `config`, where the caller has one; the strategy
    behind auto is read from its plan. Raises UserError for a strategy that the launch does not allow.
    """
    size = launched()
    if size is None:
        check_alone(config)
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_rank >= (gpus := torch.cuda.device_count()):
            problem = f"process {local_rank} has no GPU, there are {gpus}"
            raise UserError("--nproc-per-node", problem, "start no more processes than GPUs")
        torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(minutes=config.parallel.timeout)
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # The launcher's store outlives a failed start, with the addresses of processes that are gone.
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_opened)}"
    # Gloo beside NCCL: checkpoints are written from the CPU while the GPUs go on.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        chosen = _strategy(config, size, planner or Planner(config, size))
        mesh = _mesh(config, chosen, size, "cuda" if on_gpu else "cpu")
        yield World(rank, size, local_rank, chosen, mesh, config.parallel.reshard)
    except RuntimeError as error:
        if size == 1 or not (isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise
        problem = f"lost another process ({one_line(error)[:120]})"
        remedy = "its own message or the launcher's summary says why; go on with --resume RUN_DIR"
        raise UserError(f"rank {rank}", problem, remedy) from error
    finally:
        dist.destroy_process_group()


def _strategy(config: Config, size: int, planner: Planner) -> Strategy:
    wanted = config.parallel.strategy
    if wanted == "single" and size > 1:
        raise UserError("parallel.strategy", f"single, with {size} processes", "give auto, or start one process")
    if wanted != "auto":
        return wanted
    return "single" if size == 1 else planner.plan.strategy


def _mesh(config: Config, strategy: Strategy, size: int, device: str) -> DeviceMesh | None:
    if strategy == "fsdp2":
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    if strategy == "hsdp":
        group = config.parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if size % group:
            problem = f"{group} does not divide {size} processes"
            raise UserError("parallel.shard_size", problem, "give a divisor of their number")
        return init_device_mesh(device, (size // group, group), mesh_dim_names=("replicate", "shard"))
    return None
