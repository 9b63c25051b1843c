"""The plan of a run: rows, memory, traffic and the parallel strategy, worked out from configuration files alone.

The transformer is built on the meta device: nothing is loaded, and a model of any size is planned in a second or two.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import replace
from functools import cached_property

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from opd_fast.config import Config
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


class Plan:
    """Numbers of one run. Rows count guidance's branches: a guided sample is two rows of a forward."""

    def __init__(
        self, config: Config, model: DiffusionModel, resolved: Resolved, devices: int, gpu_memory: float
    ) -> None:
        """`model` lies on the meta device; `gpu_memory` is in GiB of a device."""
        self.resolved, self.devices, self.gpu_memory = resolved, devices, gpu_memory
        self.resolution = model.resolution(config.model.resolution)
        """Pixels along the side of an image."""
        check_guidance(config, model)
        train, method, schedule = config.train, method_spec(config), task_schedule(config)
        self.latent = model.latent_shape(self.resolution)
        self.image_tokens, self.text_tokens = model.image_tokens(self.resolution), model.text_tokens
        self.table = rollout_solver(config, model)
        self.weight: list[float] = step_weights(self.table, config.objective.kind).tolist() if method.distils else []

        lora = config.student.kind == "lora"
        layers = lora_modules(model.transformer, model.targets(config.student.targets)) if lora else None
        self.lora_modules = None if layers is None else len(layers)
        ranks = None if layers is None else dict.fromkeys(layers, config.student.rank)
        self.row, self.traced = row_cost_or_estimate(model, ranks, self.resolution)
        """The cost of one row of a forward, and whether it comes from a trace or is a rough estimate."""

        self.workload = _workload(config, model, layers, self.row, schedule.per_round)
        """The sizes and settings that memory and traffic follow from."""
        self.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
        self.shard_size = config.parallel.shard_size or min(self.ranks_per_node, devices)
        self.strategy, self.reason = self._choose_strategy(config)
        if config.engine.recompute is None and (
            blocks := blocks_to_checkpoint(self.workload, self.strategy, devices, self.shard_size, gpu_memory * GIB)
        ):
            self.workload = replace(self.workload, checkpointed=blocks)
            self.reason = f"{self._choose_strategy(config)[1]}, with activation checkpointing of {blocks} blocks"

        frozen = config.teachers if method.has_teachers else []
        self.teacher_rows = {t.name: train.samples_per_task * branches(model, t.guidance) for t in frozen}
        """Rows of a step by teacher, for one turn of its task."""
        self.turns = {t.name: turns for t, turns in zip(config.teachers, schedule.expected, strict=True)}
        """Turns of each task in a round, on average."""
        self.samples = train.samples_per_task * schedule.per_round
        """Samples of a rollout on all devices; under opd a round has a rollout of its own."""
        self.updates = method.updates(config)
        """Rounds that a rollout serves."""
        self.asked_steps = _asked_steps(config, self.workload.steps)
        """Trained steps that a round has a loss at, on average: fewer where steps are queried."""
        own_branches = branches(model, method.student_guidance(config))
        self.student_rows = self.workload.samples * own_branches
        """Rows of a step that is learnt from, on all devices."""
        taught = sum(rows * self.turns[name] for name, rows in self.teacher_rows.items())
        size = RoundSize(self.samples * own_branches, taught, self.workload.steps, self.asked_steps)
        self.round_rows = method.forward_rows(config, size)
        """Transformer rows of a round, by what they are for."""
        self.evaluations, self.evaluation_rows = _evaluation(config, model)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the fullest device at a round's peak, by purpose (`opd_fast.distributed.memory`)."""
        return memory(self.workload, self.strategy, self.devices, self.shard_size)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that a rank sends in a round, by kind of collective."""
        return sent(collectives(self.workload, self.strategy, self.devices, self.shard_size, self.ranks_per_node))

    def _choose_strategy(self, config: Config) -> tuple[Strategy, str]:
        """Return the strategy of the workload, and the reason."""
        wanted, devices, shard_size = config.parallel.strategy, self.devices, self.shard_size
        if wanted == "hsdp" and devices % shard_size:
            problem = f"{shard_size} does not divide {devices} devices"
            raise UserError("parallel.shard_size", problem, "give a divisor of their number")
        if wanted == "single" and devices > 1:
            raise UserError("parallel.strategy", f"single on {devices} devices", "give auto, ddp, fsdp2 or hsdp")
        chosen, reason = choose_strategy(self.workload, devices, self.gpu_memory * GIB, shard_size)
        if not method_spec(config).shards and chosen not in ("single", "ddp"):
            size = need(self.workload, "ddp", devices, shard_size) / GIB
            return "ddp", f"{config.train.method} shards no weights, but {size:.1f} GiB do not fit"
        if wanted == "auto":
            return chosen, reason
        why = "as parallel.strategy says"
        size, room = need(self.workload, wanted, devices, shard_size) / GIB, self.gpu_memory * (1 - RESERVE)
        if size > room:
            why += f", but {size:.1f} GiB do not fit into the {room:.1f} GiB that may be filled"
        if wanted != chosen:
            why += f"; auto would take {chosen}: {reason}"
        return wanted, why


class Planner:
    """What a run is planned from, and its plan.

    Each of `resolved`, `model` and `plan` is worked out once, when it is first asked for. A door makes one planner for
    a run and hands it down: the choice of a strategy, the checks before a run and the run's setup read it. Each of the
    three raises ValueError for settings that this machine or the model's files cannot honour.
    """

    def __init__(self, config: Config, devices: int | None = None, gpu_memory: float | None = None) -> None:
        """`devices` are the ranks that share the round (None: WORLD_SIZE, or one), and `gpu_memory` is GiB of each
        (None: that of this process's GPU, else `GPU_MEMORY`)."""
        self.config = config
        self._devices, self._gpu_memory = devices, gpu_memory

    @cached_property
    def resolved(self) -> Resolved:
        """Device, dtype and switches (`resolve`)."""
        return resolve(self.config)

    @cached_property
    def model(self) -> DiffusionModel:
        """The model on the meta device, without weights."""
        s = self.config.model
        length, convention = s.max_sequence_length, s.guidance_convention
        return meta_model(
            s.path, s.family, dtype=self.resolved.dtype, max_sequence_length=length, guidance_convention=convention
        )

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run."""
        devices = self._devices or int(os.environ.get("WORLD_SIZE", "1"))
        gpu_memory, device = self._gpu_memory, self.resolved.device
        if gpu_memory is None:
            on_gpu = device.type == "cuda"
            gpu_memory = torch.cuda.get_device_properties(device).total_memory / GIB if on_gpu else GPU_MEMORY
        return Plan(self.config, self.model, self.resolved, devices, gpu_memory)


def make_plan(config: Config, devices: int | None = None, gpu_memory: float | None = None) -> Plan:
    """Work out a run from the model's configuration files: `Planner(...).plan`."""
    return Planner(config, devices, gpu_memory).plan


def task_schedule(config: Config) -> TaskSchedule:
    """Return which tasks each round takes."""
    train, shares = config.train, [teacher.share for teacher in config.teachers]
    return TaskSchedule(shares, train.tasks_per_round, train.task_schedule, train.seed, config.trained)


def rollout_solver(config: Config, model: DiffusionModel) -> SolverTable:
    """Return the solver of the rollout, on the model's own noise levels."""
    s, resolution = config.sampler, model.resolution(config.model.resolution)
    return solver_table(s.solver, model.sigmas(s.steps, resolution), s.eta, variance=config.objective.variance)


def _workload(
    config: Config, model: DiffusionModel, layers: dict[str, tuple[int, int]] | None, row: RowCost, tasks: int
) -> Workload:
    """Return the workload of a round of `tasks` tasks; `layers` are those of a LoRA student."""
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
    # Systematic sampling draws a step at all with this probability.
    law = query_law(trained_steps, o.query_law, o.query_alpha, o.query_beta)
    return float((law * o.queries).clamp(max=1).sum())


def _adapter_values(weights: str) -> int | None:
    """Return the number of values of a LoRA that lies on this machine; None for anything else."""
    if resolve_source(weights, "teachers").where == "hub":
        return None
    if (found := find_lora(weights)) is None:
        return None
    file = next((file for file in (found, found / PEFT_WEIGHTS, found / DIFFUSERS_WEIGHTS) if file.is_file()), None)
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
    except (SafetensorError, OSError, TypeError):  # damaged, or None: the loader reports it
        return None


def check_guidance(config: Config, model: DiffusionModel) -> None:
    """Raise `UserError` for guidance with a model that has none, and for any under a method without guidance."""
    wanted = {"student.guidance": config.student.guidance, "evaluation.guidance": config.evaluation.guidance}
    wanted |= {f"teachers.{t.name}.guidance": t.guidance for t in config.teachers}
    given = {key: value for key, value in wanted.items() if value is not None}
    for key, value in given.items():
        if model.guidance_kind == "none" and value not in (0, 1):
            raise UserError(key, f"{value:g} with a {model.name} model that has no guidance", "give 1")
        strength = model.strength(value)
        if key == "student.guidance" and not method_spec(config).guided and strength != 1:
            problem = f"{value:g} under {config.train.method}, which has none"
            raise UserError(key, problem, f"give {model.unguided:g}, or leave it out")


def branches(model: DiffusionModel, guidance: float | None) -> int:
    """Return the rows that a sample takes in a forward under a guidance setting."""
    return 2 if model.is_guided(guidance) else 1


def lora_modules(transformer: nn.Module, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) by name of the linear layers whose name is, or ends in, one of `targets`.

    Raises UserError for a target that names none.
    """
    linear = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    wanted: set[str] = set()
    for target in targets:
        names = {name for name in linear if name == target or name.endswith("." + target)}
        if not names:
            problem = f"no linear layer is named {target}"
            raise UserError("student.targets", problem, "use attention, all or other names")
        wanted |= names
    return {name: (m.in_features, m.out_features) for name, m in linear.items() if name in wanted}


def _evaluation(config: Config, model: DiffusionModel) -> tuple[int, int]:
    """Return how often the student is evaluated, and the rows of all evaluations with one of the base and teachers."""
    e = config.evaluation
    images = 0
    for teacher in config.teachers:
        if not config.evaluates(teacher):
            continue
        prompts = e.prompts  # as many as the settings ask for, where the task's own cannot be read yet
        with contextlib.suppress(ValueError, OSError):
            file = held_out(teacher.prompts, teacher.eval_prompts)
            prompts = prompts if file is None else len(load_prompts(file))
        images += e.images(prompts)
    if not images:
        return 0, 0
    # Without a start it is the base at first, and without rounds its first evaluation is its last.
    started = config.student.start is not None and config.train.rounds > 0
    student = started + len(range(e.every, config.train.rounds, e.every)) + 1  # and at the end
    guidance = config.student.guidance if e.guidance is None else e.guidance
    models = student + 1 + (len(config.teachers) if method_spec(config).has_teachers else 0)
    return student, models * images * e.steps * branches(model, guidance)
