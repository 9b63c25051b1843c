"""The plan of a run: rows, memory, traffic and the parallel strategy, worked out from configuration files alone.

The transformer is built on the meta device: nothing is loaded, and a model of any size is planned in a second or two.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from opd_fast.config import Config, TeacherConfig
from opd_fast.config.methods.spec import RoundSize, method_spec
from opd_fast.config.paths import BASE, held_out, resolve_source
from opd_fast.data.prompt_files import load_prompts
from opd_fast.data.schedule import TaskSchedule
from opd_fast.distributed.communication import collectives, sent
from opd_fast.distributed.flops import RowCost, block_input, row_cost_or_estimate
from opd_fast.distributed.memory import (
    GIB,
    RESERVE,
    Strategy,
    Workload,
    blocks_to_checkpoint,
    choose_strategy,
    memory,
    need,
)
from opd_fast.distributed.resolve import Resolved, resolve
from opd_fast.errors import UserError
from opd_fast.models import meta_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, find_lora
from opd_fast.objectives import query_law, step_weights
from opd_fast.solvers import SolverTable, solver_table

GPU_MEMORY = 80.0
"""GiB that a plan assumes where there is no GPU to ask."""


@dataclass(frozen=True)
class Plan:
    """Numbers of one run. Rows count guidance's branches: a guided sample is two rows of a forward."""

    resolved: Resolved
    devices: int
    samples: int
    """Samples of a rollout on all devices; under opd a round has a rollout of its own."""
    updates: int
    """Rounds that a rollout serves."""
    student_rows: int
    """Rows of a step that is learnt from, on all devices."""
    teacher_rows: dict[str, int]
    """Rows of a step by teacher, for one turn of its task."""
    turns: dict[str, float]
    """Turns of each task in a round, on average."""
    asked_steps: float
    """Trained steps that a round has a loss at, on average: fewer where steps are queried."""
    round_rows: dict[str, int]
    """Transformer rows of a round, by what they are for."""
    resolution: int
    """Pixels along the side of an image."""
    latent: tuple[int, int, int]
    image_tokens: int
    text_tokens: int
    table: SolverTable
    weight: list[float]
    lora_modules: int | None
    row: RowCost
    """Cost of one row of a forward."""
    traced: bool
    """Whether `row` comes from a trace; otherwise it is a rough estimate."""
    workload: Workload
    """The sizes and settings that memory and traffic follow from."""
    strategy: Strategy
    reason: str
    shard_size: int
    ranks_per_node: int
    gpu_memory: float
    """GiB of a device."""
    evaluations: int
    evaluation_rows: int

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the fullest device at a round's peak, by purpose (`opd_fast.distributed.memory`)."""
        return memory(self.workload, self.strategy, self.devices, self.shard_size)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that a rank sends in a round, by kind of collective."""
        return sent(collectives(self.workload, self.strategy, self.devices, self.shard_size, self.ranks_per_node))


class Planner:
    """What a run is planned from, and its plan.

    Each of `resolved`, `model` and `plan` is worked out once, when it is first asked for. A door makes one planner for
    a run and hands it down: the choice of a strategy, the checks before a run and the run's setup read it. Each of the
    three raises ValueError for settings that this machine or the model's files cannot honour.
    """

    def __init__(self, config: Config, devices: int | None = None, gpu_memory: float | None = None) -> None:
        """`devices` and `gpu_memory` are those of `make_plan`."""
        self.config = config
        self._devices, self._gpu_memory = devices, gpu_memory

    @cached_property
    def resolved(self) -> Resolved:
        """Device, dtype and switches (`resolve`)."""
        return resolve(self.config)

    @cached_property
    def model(self) -> DiffusionModel:
        """The model on the meta device, without weights."""
        settings = self.config.model
        return meta_model(
            settings.path,
            settings.family,
            dtype=self.resolved.dtype,
            max_sequence_length=settings.max_sequence_length,
            guidance_convention=settings.guidance_convention,
        )

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run."""
        devices = self._devices or int(os.environ.get("WORLD_SIZE", "1"))
        gpu_memory, device = self._gpu_memory, self.resolved.device
        if gpu_memory is None:
            on_gpu = device.type == "cuda"
            gpu_memory = torch.cuda.get_device_properties(device).total_memory / GIB if on_gpu else GPU_MEMORY
        return _plan(self.config, self.model, self.resolved, devices, gpu_memory)


def make_plan(config: Config, devices: int | None = None, gpu_memory: float | None = None) -> Plan:
    """Work out a run from the model's configuration files.

    Args:
        devices: ranks that share the round; None: WORLD_SIZE, or one.
        gpu_memory: GiB of each; None: that of this process's GPU, else `GPU_MEMORY`.

    Raises:
        ValueError: the model's folder is missing or damaged, or does not fit the settings.
    """
    return Planner(config, devices, gpu_memory).plan


def task_schedule(config: Config) -> TaskSchedule:
    """Which tasks each round takes."""
    train, shares = config.train, [teacher.share for teacher in config.teachers]
    return TaskSchedule(shares, train.tasks_per_round, train.task_schedule, train.seed, config.trained)


def rollout_solver(config: Config, model: DiffusionModel) -> SolverTable:
    """The solver of the rollout, on the model's own noise levels."""
    s, resolution = config.sampler, model.resolution(config.model.resolution)
    return solver_table(s.solver, model.sigmas(s.steps, resolution), s.eta, variance=config.objective.variance)


def _plan(config: Config, model: DiffusionModel, resolved: Resolved, devices: int, gpu_memory: float) -> Plan:
    check_guidance(config, model)
    train, method, schedule = config.train, method_spec(config), task_schedule(config)
    resolution, table = model.resolution(config.model.resolution), rollout_solver(config, model)
    lora = config.student.kind == "lora"
    layers = lora_modules(model.transformer, model.targets(config.student.targets)) if lora else None
    ranks = None if layers is None else dict.fromkeys(layers, config.student.rank)
    row, traced = row_cost_or_estimate(model, ranks, resolution)
    workload = _workload(config, model, layers, row, schedule.per_round)
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    workload, strategy, shard_size, reason = _fit(config, workload, devices, ranks_per_node, gpu_memory)
    evaluations, evaluation_rows = _evaluation(config, model)
    frozen = config.teachers if method.has_teachers else []
    teacher_rows = {t.name: train.samples_per_task * branches(model, t.guidance) for t in frozen}
    turns = {t.name: turns for t, turns in zip(config.teachers, schedule.expected, strict=True)}
    taught = sum(rows * turns[name] for name, rows in teacher_rows.items())
    samples, asked = train.samples_per_task * schedule.per_round, _asked_steps(config, workload.steps)
    own_branches = branches(model, method.student_guidance(config))
    round_size = RoundSize(samples * own_branches, taught, workload.steps, asked)
    return Plan(
        resolved=resolved,
        devices=devices,
        samples=samples,
        updates=method.updates(config),
        student_rows=workload.samples * own_branches,
        teacher_rows=teacher_rows,
        turns=turns,
        asked_steps=asked,
        round_rows=method.forward_rows(config, round_size),
        resolution=resolution,
        latent=model.latent_shape(resolution),
        image_tokens=model.image_tokens(resolution),
        text_tokens=model.text_tokens,
        table=table,
        weight=step_weights(table, config.objective.kind).tolist() if method.distils else [],
        lora_modules=None if layers is None else len(layers),
        row=row,
        traced=traced,
        workload=workload,
        strategy=strategy,
        reason=reason,
        shard_size=shard_size,
        ranks_per_node=ranks_per_node,
        gpu_memory=gpu_memory,
        evaluations=evaluations,
        evaluation_rows=evaluation_rows,
    )


def _workload(
    config: Config, model: DiffusionModel, layers: dict[str, tuple[int, int]] | None, row: RowCost, tasks: int
) -> Workload:
    """The workload of a round of `tasks` tasks; `layers` are those of a LoRA student."""
    parameters = sum(p.numel() for p in model.transformer.parameters())
    adapter = sum(config.student.rank * (i + o) for i, o in (layers or {}).values())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks(model.transformer)]
    # A teacher that is not on this machine counts as large as the student's LoRA, or as 1 % of full weights.
    anchor, method = config.objective.anchor, method_spec(config)
    frozen = [teacher.weights for teacher in config.teachers if method.has_teachers]
    frozen += [] if anchor is None or anchor == BASE else [anchor]
    samples, steps = config.train.samples_per_task * tasks, method.trained_steps(config)
    resolution, rows = model.resolution(config.model.resolution), branches(model, method.student_guidance(config))
    return Workload(
        kind=config.student.kind,
        parameters=parameters,
        trainable=parameters if layers is None else adapter,
        merged=sum(i * o for i, o in (layers or {}).values()),
        block=max(blocks),
        outside=parameters - sum(blocks),
        itemsize=model.dtype.itemsize,
        teachers=len(frozen),
        adapters=sum(_adapter_values(weights) or adapter or parameters // 100 for weights in frozen),
        placement=config.engine.placement,
        offload=config.parallel.offload_teachers,
        reshard=config.parallel.reshard,
        samples=-(-samples // method.updates(config)),
        micro_batch=config.train.micro_batch,
        activation=row.saved * rows,
        steps=steps,
        tasks=tasks,
        blocks=len(blocks),
        boundary=block_input(model, resolution) * rows,
        drawn=0 if method.distils else samples,
        kept=4 * math.prod(model.latent_shape(resolution)) * method.kept_latents(config),  # float32
        old_policy=method.old_policy,
        checkpointed=min(config.engine.recompute or 0, len(blocks)),
    )


def _asked_steps(config: Config, trained_steps: int) -> float:
    o = config.objective
    if o.queries is None:
        return float(trained_steps)
    # A step is drawn at all with this probability, systematic sampling's.
    law = query_law(trained_steps, o.query_law, o.query_alpha, o.query_beta)
    return float((law * o.queries).clamp(max=1).sum())


def _fit(
    config: Config, workload: Workload, devices: int, ranks_per_node: int, gpu_memory: float
) -> tuple[Workload, Strategy, int, str]:
    """Returns the workload with its checkpointed blocks, the strategy, the ranks of a shard group, and the reason."""
    strategy, shard_size, reason = _strategy(config, workload, devices, ranks_per_node, gpu_memory)
    if config.engine.recompute is None and (
        again := blocks_to_checkpoint(workload, strategy, devices, shard_size, gpu_memory * GIB)
    ):
        workload = replace(workload, checkpointed=again)
        reason = _strategy(config, workload, devices, ranks_per_node, gpu_memory)[2]
        reason += f", with activation checkpointing of {again} blocks"
    return workload, strategy, shard_size, reason


def _strategy(
    config: Config, workload: Workload, devices: int, ranks_per_node: int, gpu_memory: float
) -> tuple[Strategy, int, str]:
    """Returns the strategy, the ranks of a shard group, and the reason."""
    wanted = config.parallel.strategy
    shard_size = config.parallel.shard_size or min(ranks_per_node, devices)
    if wanted == "hsdp" and devices % shard_size:
        raise UserError(
            "parallel.shard_size", f"{shard_size} does not divide {devices} devices", "give a divisor of their number"
        )
    if wanted == "single" and devices > 1:
        raise UserError("parallel.strategy", f"single on {devices} devices", "give auto, ddp, fsdp2 or hsdp")
    chosen, reason = choose_strategy(workload, devices, gpu_memory * GIB, shard_size)
    if not method_spec(config).shards and chosen not in ("single", "ddp"):
        size = need(workload, "ddp", devices, shard_size) / GIB
        return "ddp", shard_size, f"{config.train.method} shards no weights, but {size:.1f} GiB do not fit"
    if wanted == "auto":
        return chosen, shard_size, reason
    why = "as parallel.strategy says"
    size, room = need(workload, wanted, devices, shard_size) / GIB, gpu_memory * (1 - RESERVE)
    if size > room:
        why += f", but {size:.1f} GiB do not fit into the {room:.1f} GiB that may be filled"
    if wanted != chosen:
        why += f"; auto would take {chosen}: {reason}"
    return wanted, shard_size, why


def _adapter_values(weights: str) -> int | None:
    """Values of a LoRA that lies on this machine; None for anything else."""
    if resolve_source(weights, "teachers").where == "hub":
        return None
    found = find_lora(weights)
    if found is None:
        return None
    files = [found] if found.is_file() else [found / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)]
    file = next((file for file in files if file.is_file()), None)
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError, TypeError):  # damaged, or None: the loader reports it
        return None


def check_guidance(config: Config, model: DiffusionModel) -> None:
    """Raise `UserError` for guidance with a model that has none, and for any under a method without guidance."""
    wanted = {"student.guidance": config.student.guidance, "evaluation.guidance": config.evaluation.guidance}
    wanted |= {f"teachers.{t.name}.guidance": t.guidance for t in config.teachers}
    for key, value in wanted.items():
        if value is None:
            continue
        if model.guidance_kind == "none" and value not in (0, 1):
            raise UserError(key, f"{value:g} with a {model.name} model that has no guidance", "give 1")
        strength = model.strength(value)
        if key == "student.guidance" and not method_spec(config).guided and strength != 1:
            raise UserError(
                key,
                f"{value:g} under {config.train.method}, which has none",
                f"give {model.unguided:g}, or leave it out",
            )


def branches(model: DiffusionModel, guidance: float | None) -> int:
    """Rows that a sample takes in a forward under a guidance setting."""
    return 2 if model.is_guided(guidance) else 1


def lora_modules(transformer: nn.Module, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Linear layers whose name is, or ends in, one of `targets`: name to (inputs, outputs).

    Raises:
        UserError: a target that names none.
    """
    linear = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    named = {t: {name for name in linear if name == t or name.endswith("." + t)} for t in targets}
    for target, names in named.items():
        if not names:
            raise UserError(
                "student.targets", f"no linear layer is named {target}", "use attention, all or other names"
            )
    wanted = set().union(*named.values())
    return {name: (m.in_features, m.out_features) for name, m in linear.items() if name in wanted}


def _evaluation(config: Config, model: DiffusionModel) -> tuple[int, int]:
    """Returns how often the student is evaluated, and the rows of all evaluations with one of the base and teachers."""
    e = config.evaluation
    images = sum(_evaluation_images(teacher, config) for teacher in config.teachers if teacher.reward is not None)
    if e.every == 0 or not images:
        return 0, 0
    started = config.student.start is not None  # else it is the base at first
    student = started + len(range(e.every, config.train.rounds, e.every)) + 1  # and at the end
    guidance = config.student.guidance if e.guidance is None else e.guidance
    models = student + 1 + (len(config.teachers) if method_spec(config).has_teachers else 0)
    return student, models * images * e.steps * branches(model, guidance)


def _evaluation_images(teacher: TeacherConfig, config: Config) -> int:
    """Images of a task in an evaluation; as many as the settings ask for where its prompts cannot be read yet."""
    asked = config.evaluation.prompts
    with contextlib.suppress(ValueError, OSError):
        file = held_out(teacher.prompts, teacher.eval_prompts)
        asked = asked if file is None else len(load_prompts(file))
    return config.evaluation.images(asked)
