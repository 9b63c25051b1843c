"""What `--dry-run` prints: the settings, the plan, the solver's steps, and what a run would be refused for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_fast.config import Config
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.serialize import config_hash, to_yaml
from opd_fast.distributed.memory import GIB
from opd_fast.distributed.plan import Plan


def print_plan(
    plan: Plan, config: Config, run_dir: Path, refused: Iterable[ValueError] = (), unchecked: Iterable[str] = ()
) -> None:
    """Print the settings, the plan, what a run would be refused for, and weights of the hub that were not checked."""
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
        trained = (f"{plan.weight[j]:.3e}", "yes" if j < plan.workload.steps else "no") if plan.weight else ()
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
    checkpointed = plan.workload.checkpointed
    again = f"; {checkpointed} of {plan.workload.blocks} blocks under activation checkpointing" if checkpointed else ""
    lora = "" if plan.lora_modules is None else f" in {plan.lora_modules} LoRA modules of rank {config.student.rank}"
    teachers = ", ".join(f"{name} ({rows},{c},{h},{w})" for name, rows in plan.teacher_rows.items())
    sizes = plan.bytes
    traffic = ", ".join(f"{kind} {_size(size)}" for kind, size in plan.sent.items())
    group = f" in groups of {plan.shard_size}" if plan.strategy == "hsdp" else ""
    source = "traced" if plan.traced else "a rough estimate, as the family cannot be traced"
    student = f"({plan.student_rows},{c},{h},{w})" + (f" on {plan.devices} devices, each" if plan.devices > 1 else "")
    student += f" in {plan.workload.forwards_per_step(plan.devices)} forward(s) a step"
    if plan.devices > plan.samples:
        student += f"; {plan.devices - plan.samples} of the devices have no sample of their own"
    evaluation = "off"
    if plan.evaluations:
        evaluation = f"{plan.evaluations} times; {plan.evaluation_rows:,} forward rows with base and teachers"
    rounds = f"{config.train.rounds} of {plan.samples} samples: {tasks}"
    steps = f"{plan.table.steps}, of which {plan.workload.steps} are run and trained"
    if not method_spec(config).distils:
        each = "" if plan.updates == 1 else f", which serves {plan.updates} rounds"
        rounds = f"{config.train.rounds} of {config.train.method}; a rollout has {plan.samples} images: {tasks}{each}"
        steps = f"{plan.table.steps}; an image is learnt from at {plan.workload.steps}"
    return [
        ("run directory", str(run_dir)),
        ("device", f"{r.device}, {str(r.dtype).removeprefix('torch.')}{', TF32' if r.tf32 else ''}, {switches}"),
        ("resolution", f"{plan.resolution} pixels{own}, latents ({c},{h},{w})"),
        ("rounds", rounds),
        ("solver steps", steps),
        ("student batch", student),
        *((("teacher batch", f"{teachers} a step"),) if teachers else ()),
        ("rows of a round", f"{work}  (a guided sample is two rows)"),
        ("rows of the run", f"{sum(plan.round_rows.values()) * config.train.rounds:,}"),
        ("tokens of a row", f"{plan.image_tokens} image + {plan.text_tokens} text"),
        ("parameters", f"{plan.workload.parameters:,} in the transformer, {plan.workload.trainable:,} trained{lora}"),
        ("cost of a row", f"{plan.row.flops / 1e9:,.1f} GFLOP forward, {_size(plan.row.saved)} kept ({source})"),
        ("strategy", f"{plan.strategy}{group} on {plan.devices} device(s) of {plan.gpu_memory:g} GiB: {plan.reason}"),
        ("memory of a device", f"{_size(sum(sizes.values()))} at a round's peak, of which"),
        *(("", f"{name} {_size(size)}{again if name == 'activations' else ''}") for name, size in sizes.items()),
        ("sent by a rank", f"{traffic or 'nothing'} a round"),
        ("evaluations", evaluation),
    ]


def _size(size: float) -> str:
    if size < 1024:
        return f"{size:.0f} B"
    power = 1 if size < 2**20 else 2 if size < GIB else 3
    return f"{size / 1024**power:.1f} {'KMG'[power - 1]}iB"
