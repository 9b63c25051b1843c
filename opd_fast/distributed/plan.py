"""What a run would do, worked out from configuration files alone: `--dry-run`, and the choices behind `auto`.

The transformer is built on the meta device, so nothing is loaded and a model of any size is planned in a second or two.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_fast.config import Config, TeacherConfig
from opd_fast.config.paths import BASE, held_out, resolve_source
from opd_fast.config.serialize import config_hash, to_yaml
from opd_fast.data.prompt_files import load_prompts
from opd_fast.distributed.communication import collectives, sent
from opd_fast.distributed.memory import GIB, RESERVE, Load, Strategy, choose_strategy, memory, recomputation
from opd_fast.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from opd_fast.distributed.flops import RowCost
    from opd_fast.models.base import DiffusionModel
    from opd_fast.solvers import SolverTable

SAVED_PER_BLOCK = {"lora": 26, "full": 46}
"""For families that cannot be traced (`opd_fast.distributed.flops`): values of the model's dtype that autograd keeps
for each token, unit of width and block. Those of SD3.5-Medium in bfloat16, where the norms run in float32;
FLUX.1-dev keeps 18 and 31, float32 models 14 and 25."""
GPU_MEMORY = 80.0
"""GiB that a plan assumes where there is no GPU to ask."""


# --- what auto means --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resolved:
    """The engine's choices where the configuration says auto."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    graphs: bool
    tf32: bool


def pick_device() -> torch.device:
    """The CUDA device of this process where there is one, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(dtype: str, precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and forwards: `model.dtype`, where auto stands for bfloat16 on a GPU that computes in it,
    and for float32 elsewhere and wherever `engine.precision` asks for float32 or TF32."""
    import torch

    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    if precision in ("auto", "fp8") and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return torch.float32


def resolve(config: Config) -> Resolved:
    """Device, dtype and switches of a run.

    Raises:
        UserError: a setting that this machine cannot honour.
    """
    device = pick_device()
    on_gpu = device.type == "cuda"
    if config.engine.precision == "tf32" and not on_gpu:
        raise UserError("engine.precision", "tf32 needs a CUDA device", "use auto or float32")
    return Resolved(
        device=device,
        dtype=pick_dtype(config.model.dtype, config.engine.precision, device),
        compile=config.engine.compile == "on" or (config.engine.compile == "auto" and on_gpu),
        graphs=config.engine.graphs == "on" or (config.engine.graphs == "auto" and on_gpu),
        tf32=config.engine.precision == "tf32",
    )


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Numbers of one run. Rows count guidance's branches: a guided sample is two rows of a forward."""

    resolved: Resolved
    devices: int
    samples: int
    """Of a round, on all devices; of methods that learn from one rollout several times, of the rollout."""
    updates: int
    """Rounds that a rollout serves."""
    student_rows: int
    """Of a step that is learnt from, on all devices."""
    teacher_rows: dict[str, int]
    """When the teacher's task has a turn."""
    turns: dict[str, float]
    """Of each task in a round, on average."""
    forwards_per_step: int
    """Of a device."""
    trained_steps: int
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
    parameters: int
    trainable: int
    blocks: int
    lora_modules: int | None
    row: RowCost
    """Of one row of a forward."""
    traced: bool
    """Whether `row` was found by a trace; else it is a rough estimate."""
    load: Load
    """What memory and traffic follow from."""
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
        """Of the fullest device at a round's peak, by purpose (`opd_fast.distributed.memory`)."""
        return memory(self.load, self.strategy, self.devices, self.shard_size)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that a rank sends in a round, by kind of collective."""
        return sent(collectives(self.load, self.strategy, self.devices, self.shard_size, self.ranks_per_node))


def make_plan(config: Config, devices: int | None = None, gpu_memory: float | None = None) -> Plan:
    """Work out a run from the model's configuration files.

    Args:
        devices: ranks that share the round; None: WORLD_SIZE, or one.
        gpu_memory: GiB of each; None: that of this process's GPU, else `GPU_MEMORY`.

    Raises:
        ValueError: the model's folder is missing or damaged, or does not fit the settings.
    """
    from opd_fast.data.prompt_files import TaskSchedule
    from opd_fast.models import outline_model
    from opd_fast.objectives import step_weights
    from opd_fast.solvers import solver_table

    resolved = resolve(config)
    devices = devices or int(os.environ.get("WORLD_SIZE", "1"))
    gpu_memory = gpu_memory or _own_memory(resolved.device)
    settings = config.model
    model = outline_model(
        settings.path,
        settings.family,
        dtype=resolved.dtype,
        max_sequence_length=settings.max_sequence_length,
        guidance_convention=settings.guidance_convention,
    )
    resolution = model.resolution(settings.resolution)
    check_guidance(config, model)
    s = config.sampler
    table = solver_table(s.solver, model.sigmas(s.steps, resolution), s.eta, variance=config.objective.variance)
    per_task = config.train.samples_per_task
    shares = [teacher.share for teacher in config.teachers]
    schedule = TaskSchedule(shares, config.train.tasks_per_round, config.train.task_schedule, among=config.trained)
    samples = per_task * schedule.per_round
    parameters = sum(p.numel() for p in model.transformer.parameters())
    lora = config.student.kind == "lora"
    layers = lora_modules(model.transformer, model.targets(config.student.targets)) if lora else {}
    adapter = sum(config.student.rank * (i + o) for i, o in layers.values())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks(model.transformer)]
    # A teacher that is not on this machine counts as large as the student's LoRA, or as 1 % of full weights.
    o = config.objective
    anchors = [] if o.anchor is None or o.anchor == BASE else [o.anchor]
    frozen = [teacher.weights for teacher in config.teachers if not config.reinforces] + anchors
    adapters = sum(_adapter_values(weights) or adapter or parameters // 100 for weights in frozen)
    row, traced = _row_cost(model, config, layers if lora else None)
    trained_steps = _trained_steps(config)
    updates = {"opd": 1, "sft": config.sft.updates}.get(config.train.method, config.rl.updates)
    own_branches = branches(model, config.student.guidance if config.train.method != "sft" else None)
    latent = model.latent_shape(resolution)
    # States, next states and means of the trained steps, or the last latent alone; float32.
    kept = 4 * math.prod(latent) * (3 * trained_steps if config.train.method == "grpo" else 1)
    load = Load(
        kind=config.student.kind,
        parameters=parameters,
        trainable=adapter if lora else parameters,
        merged=sum(i * o for i, o in layers.values()) if lora else 0,
        block=max(blocks),
        outside=parameters - sum(blocks),
        itemsize=resolved.dtype.itemsize,
        teachers=len(frozen),
        adapters=adapters,
        placement=config.engine.placement,
        offload=config.parallel.offload_teachers,
        reshard=config.parallel.reshard,
        samples=-(-samples // updates),
        micro_batch=config.train.micro_batch,
        activation=row.saved * own_branches,
        steps=trained_steps,
        tasks=schedule.per_round,
        blocks=len(blocks),
        boundary=_boundary(model, resolution) * own_branches,
        drawn=0 if config.train.method == "opd" else samples,
        kept=kept,
        old_policy=config.train.method == "nft",
        recomputed=min(config.engine.recompute or 0, len(blocks)),
    )
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    strategy, shard_size, reason = _strategy(config, load, devices, ranks_per_node, gpu_memory)
    if config.engine.recompute is None and (
        again := recomputation(load, strategy, devices, shard_size, gpu_memory * GIB)
    ):
        load = replace(load, recomputed=again)
        reason = f"{_strategy(config, load, devices, ranks_per_node, gpu_memory)[2]}, as {again} blocks recompute"
    evaluations, evaluation_rows = _evaluation(config, model)
    teacher_rows = {t.name: per_task * branches(model, t.guidance) for t in config.teachers if not config.reinforces}
    turns = {t.name: turns for t, turns in zip(config.teachers, schedule.expected, strict=True)}
    asked = _asked_steps(config, trained_steps)
    rows = (
        _rows_of_distillation(config, samples * own_branches, trained_steps, asked, teacher_rows, turns)
        if config.train.method == "opd"
        else _rows_of_learning(config, samples * own_branches, trained_steps, updates, teacher_rows, turns)
    )
    return Plan(
        resolved=resolved,
        devices=devices,
        samples=samples,
        updates=updates,
        student_rows=load.samples * own_branches,
        teacher_rows=teacher_rows,
        turns=turns,
        forwards_per_step=load.forwards_per_step(devices),
        trained_steps=trained_steps,
        asked_steps=asked,
        round_rows=rows,
        resolution=resolution,
        latent=latent,
        image_tokens=model.image_tokens(resolution),
        text_tokens=model.text_tokens,
        table=table,
        weight=step_weights(table, config.objective.kind).tolist() if config.train.method == "opd" else [],
        parameters=parameters,
        trainable=load.trainable,
        blocks=len(blocks),
        lora_modules=len(layers) if lora else None,
        row=row,
        traced=traced,
        load=load,
        strategy=strategy,
        reason=reason,
        shard_size=shard_size,
        ranks_per_node=ranks_per_node,
        gpu_memory=gpu_memory,
        evaluations=evaluations,
        evaluation_rows=evaluation_rows,
    )


def _trained_steps(config: Config) -> int:
    """Solver steps, or noise levels, at which a sample is learnt from."""
    s, rl = config.sampler, config.rl
    return {
        "opd": s.steps if s.train_last else s.steps - 1,
        "grpo": s.steps - 1 if rl.window is None else rl.window,
        "nft": int(s.steps * rl.timestep_fraction),
        "sft": 1,
    }[config.train.method]


def _asked_steps(config: Config, trained_steps: int) -> float:
    from opd_fast.objectives import query_law

    o = config.objective
    if o.queries is None:
        return float(trained_steps)
    # A step is drawn at all with this probability, systematic sampling's.
    law = query_law(trained_steps, o.query_law, o.query_alpha, o.query_beta)
    return float((law * o.queries).clamp(max=1).sum())


def _rows_of_distillation(
    config: Config, rows: int, steps: int, asked: float, teacher_rows: dict[str, int], turns: dict[str, float]
) -> dict[str, int]:
    """Of a round, from the student's `rows` of a step. Queries end a rollout at the last queried step, which is not
    taken off the student's forwards."""
    o = config.objective
    rollouts = 2 if o.kind == "ppo" and o.reward_gradient == "return_to_go" else 1  # one without gradient before
    teachers = sum(rows * turns[name] for name, rows in teacher_rows.items())
    found = {
        "student forward": rows * steps * rollouts,
        "student backward": round(rows * asked),
        "teacher forward": round(teachers * asked * rollouts),
    }
    return found | ({"anchor forward": round(rows * asked)} if o.anchor is not None else {})


def _rows_of_learning(
    config: Config, rows: int, steps: int, updates: int, teacher_rows: dict[str, int], turns: dict[str, float]
) -> dict[str, int]:
    """Of a round, from the `rows` of a step of a whole rollout, which serves `updates` rounds; GRPO from no more:
    images of groups without variance are left out."""
    method, drawn = config.train.method, config.sampler.steps / updates
    if method == "sft":
        teachers = sum(rows * turns[name] for name, rows in teacher_rows.items()) * config.sft.images_per_prompt
        found = {"teacher rollout": round(teachers * drawn)}
    else:
        found = {"rollout": round(rows * drawn)}
    learnt = round(rows * steps / updates)
    found |= {"student forward": learnt, "student backward": learnt}
    if method == "nft":
        found["old policy forward"] = learnt
    return found | ({"base forward": learnt} if config.base_weight > 0 else {})


def _strategy(
    config: Config, load: Load, devices: int, ranks_per_node: int, gpu_memory: float
) -> tuple[Strategy, int, str]:
    """(strategy, ranks of a shard group, why)."""
    wanted = config.parallel.strategy
    shard_size = config.parallel.shard_size or min(ranks_per_node, devices)
    if wanted == "hsdp" and devices % shard_size:
        raise UserError(
            "parallel.shard_size", f"{shard_size} does not divide {devices} devices", "give a divisor of their number"
        )
    if wanted == "single" and devices > 1:
        raise UserError("parallel.strategy", f"single on {devices} devices", "give auto, ddp, fsdp2 or hsdp")
    chosen, reason = choose_strategy(load, devices, gpu_memory * GIB, shard_size)
    if config.train.method != "opd" and chosen not in ("single", "ddp"):
        need = sum(memory(load, "ddp", devices, shard_size).values()) / GIB
        return "ddp", shard_size, f"{config.train.method} shards no weights, but {need:.1f} GiB do not fit"
    if wanted == "auto":
        return chosen, shard_size, reason
    why = "as parallel.strategy says"
    need = sum(memory(load, wanted, devices, shard_size).values()) / GIB
    if need > gpu_memory * (1 - RESERVE):
        why += f", but {need:.1f} GiB do not fit into the {gpu_memory * (1 - RESERVE):.1f} GiB that may be filled"
    if wanted != chosen:
        why += f"; auto would take {chosen}: {reason}"
    return wanted, shard_size, why


def _own_memory(device: torch.device) -> float:
    """GiB of the GPU, or what stands for it."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else GPU_MEMORY


def _row_cost(model: DiffusionModel, config: Config, layers: dict[str, tuple[int, int]] | None) -> tuple[RowCost, bool]:
    """The cost of a row by a trace, or, of a family that cannot be traced, by its size; and which of the two."""
    from opd_fast.distributed.flops import RowCost, row_cost

    lora = None if layers is None else dict.fromkeys(layers, config.student.rank)
    resolution = model.resolution(config.model.resolution)
    try:
        return row_cost(model, lora, resolution), True
    except ValueError:
        transformer: Any = model.transformer
        tokens = model.image_tokens(resolution) + model.text_tokens
        parameters = sum(p.numel() for p in transformer.parameters())
        saved = SAVED_PER_BLOCK[config.student.kind] * len(model.blocks(transformer))
        return RowCost(2 * parameters * tokens, saved * _boundary(model, resolution)), False


def _boundary(model: DiffusionModel, resolution: int) -> int:
    """Bytes of the residual stream of a row."""
    from torch import nn

    # It feeds most of the linear layers.
    width = statistics.mode([m.in_features for m in model.transformer.modules() if isinstance(m, nn.Linear)])
    return (model.image_tokens(resolution) + model.text_tokens) * width * model.dtype.itemsize


def _adapter_values(weights: str) -> int | None:
    """Values of a LoRA that lies on this machine; None for anything else."""
    from safetensors import SafetensorError, safe_open

    from opd_fast.models.lora.files import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS, find_lora

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
    except (SafetensorError, OSError, TypeError):  # damaged, or None: the loader says so when it comes to it
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
        if key == "student.guidance" and config.train.method == "nft" and strength != 1:
            raise UserError(key, f"{value:g} under nft, which has none", f"give {model.unguided:g}, or leave it out")


def branches(model: DiffusionModel, guidance: float | None) -> int:
    """Rows that a sample takes in a forward under a guidance setting."""
    return 2 if model.is_guided(guidance) else 1


def lora_modules(transformer: nn.Module, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Linear layers whose name is, or ends in, one of `targets`: name to (inputs, outputs).

    Raises:
        UserError: a target that names none.
    """
    from torch import nn

    linear = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise UserError(
                "student.targets", f"no linear layer is named {target}", "use attention, all or other names"
            )
    return {
        name: (m.in_features, m.out_features)
        for name, m in linear.items()
        if any(name == target or name.endswith("." + target) for target in targets)
    }


def _evaluation(config: Config, model: DiffusionModel) -> tuple[int, int]:
    """(evaluations of the student, rows forwarded in all of them and in judging base and teachers once)."""
    e = config.evaluation
    images = sum(_evaluation_images(teacher, config) for teacher in config.teachers if teacher.reward is not None)
    if e.every == 0 or not images:
        return 0, 0
    started = config.student.start is not None  # else it is the base at first
    student = started + len(range(e.every, config.train.rounds, e.every)) + 1  # and at the end
    guidance = config.student.guidance if e.guidance is None else e.guidance
    models = student + 1 + (0 if config.reinforces else len(config.teachers))
    return student, models * images * e.steps * branches(model, guidance)


def _evaluation_images(teacher: TeacherConfig, config: Config) -> int:
    """Images of a task in an evaluation; where its prompts cannot be read yet, of as many as are asked for."""
    asked = config.evaluation.prompts
    with contextlib.suppress(ValueError, OSError):
        file = held_out(teacher.prompts, teacher.eval_prompts)
        asked = asked if file is None else len(load_prompts(file))
    return config.evaluation.images(asked)


# --- printing ---------------------------------------------------------------------------------------------------------


def print_plan(
    plan: Plan, config: Config, run_dir: Path, refused: Iterable[ValueError] = (), unchecked: Iterable[str] = ()
) -> None:
    """Print the settings and the plan, what a run would be refused for, and weights of the hub that were not looked
    at."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(highlight=False, width=140)
    console.rule(f"settings {config_hash(config)}", align="left")
    console.print(to_yaml(config).rstrip(), markup=False)
    console.rule("plan", align="left")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(plan, config, run_dir):
        facts.add_row(f"[dim]{name}", escape(value))
    console.print(facts)
    t = plan.table
    variance = f", {config.objective.variance}" if plan.weight else ""
    console.rule(f"solver {t.solver}, eta {t.eta:g}{variance}", align="left")
    rows = Table(box=None, header_style="dim")
    for name in ("step", "sigma", "a", "b", "h", "std", *(("weight", "trained") if plan.weight else ())):
        rows.add_column(name, justify="right", no_wrap=True)
    for j in range(t.steps):
        numbers = [float(column[j]) + 0.0 for column in (t.sigmas, t.a, t.b, t.h, t.std)]
        trained = (f"{plan.weight[j]:.3e}", "yes" if j < plan.trained_steps else "no") if plan.weight else ()
        rows.add_row(str(j), *(f"{number:.5f}" for number in numbers), *trained)
    console.print(rows)
    if lines := [str(error) for error in refused]:
        console.rule("a run would be refused", align="left")
        console.print("\n".join(lines), markup=False)
    if names := list(unchecked):
        console.rule("on the hub, checked when a run begins", align="left")
        console.print("\n".join(names), markup=False)


def _facts(plan: Plan, config: Config, run_dir: Path) -> list[tuple[str, str]]:
    r = plan.resolved
    switches = f"compile {'on' if r.compile else 'off'}, graphs {'on' if r.graphs else 'off'}"
    tasks = f"{len(config.trained)} tasks of {config.train.samples_per_task}"
    if plan.samples < len(config.trained) * config.train.samples_per_task:
        tasks = f"{config.train.tasks_per_round} of {tasks}"
    if config.train.task_schedule == "weighted":
        tasks += " (" + ", ".join(f"{name} {turns:.2f}" for name, turns in plan.turns.items()) + " turns on average)"
    work = ", ".join(f"{name} {rows}" for name, rows in plan.round_rows.items())
    c, h, w = plan.latent
    own = " (the pipeline's own)" if config.model.resolution is None else ""
    again = f"; {plan.load.recomputed} of {plan.blocks} blocks recompute theirs" if plan.load.recomputed else ""
    lora = "" if plan.lora_modules is None else f" in {plan.lora_modules} LoRA modules of rank {config.student.rank}"
    teachers = ", ".join(f"{name} ({rows},{c},{h},{w})" for name, rows in plan.teacher_rows.items())
    total = sum(plan.round_rows.values()) * config.train.rounds
    sizes = plan.bytes
    traffic = ", ".join(f"{kind} {_size(size)}" for kind, size in plan.sent.items())
    group = f" in groups of {plan.shard_size}" if plan.strategy == "hsdp" else ""
    found = "traced" if plan.traced else "a rough estimate, as the family cannot be traced"
    many = plan.devices > 1
    idle = max(0, plan.devices - plan.samples)
    evaluation = "off"
    if plan.evaluations:
        evaluation = f"{plan.evaluations} times; {plan.evaluation_rows:,} forward rows with base and teachers"
    distils = config.train.method == "opd"
    rounds = f"{config.train.rounds} of {plan.samples} samples: {tasks}"
    if not distils:
        each = "" if plan.updates == 1 else f", which serves {plan.updates} rounds"
        rounds = f"{config.train.rounds} of {config.train.method}; a rollout has {plan.samples} images: {tasks}{each}"
    steps = f"{plan.table.steps}, of which {plan.trained_steps} are run and trained"
    if not distils:
        steps = f"{plan.table.steps}; an image is learnt from at {plan.trained_steps}"
    return [
        ("run directory", str(run_dir)),
        ("device", f"{r.device}, {str(r.dtype).removeprefix('torch.')}{', TF32' if r.tf32 else ''}, {switches}"),
        ("resolution", f"{plan.resolution} pixels{own}, latents ({c},{h},{w})"),
        ("rounds", rounds),
        ("solver steps", steps),
        (
            "student batch",
            f"({plan.student_rows},{c},{h},{w})"
            + (f" on {plan.devices} devices, each" if many else "")
            + f" in {plan.forwards_per_step} forward(s) a step"
            + (f"; {idle} of the devices have no sample of their own" if idle else ""),
        ),
        *((("teacher batch", f"{teachers} a step"),) if teachers else ()),
        ("rows of a round", f"{work}  (a guided sample is two rows)"),
        ("rows of the run", f"{total:,}"),
        ("tokens of a row", f"{plan.image_tokens} image + {plan.text_tokens} text"),
        ("parameters", f"{plan.parameters:,} in the transformer, {plan.trainable:,} trained{lora}"),
        ("cost of a row", f"{plan.row.flops / 1e9:,.1f} GFLOP forward, {_size(plan.row.saved)} kept ({found})"),
        ("strategy", f"{plan.strategy}{group} on {plan.devices} device(s) of {plan.gpu_memory:g} GiB: {plan.reason}"),
        ("memory of a device", f"{_size(sum(sizes.values()))} at a round's peak, of which"),
        *(("", f"{name} {_size(size)}{again if name == 'activations' else ''}") for name, size in sizes.items()),
        ("sent by a rank", f"{traffic or 'nothing'} a round"),
        ("evaluations", evaluation),
    ]


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    raise AssertionError
