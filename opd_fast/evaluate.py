"""Rewards of one model on held-out prompts, with or without a LoRA:

python -m opd_fast.evaluate --model PATH [--lora PATH] --prompts SRC[,SRC] --rewards NAME[+NAME][,NAME]
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal

from opd_fast.config import DETERMINISTIC, Solver
from opd_fast.config.options import Option, read_options
from opd_fast.config.paths import is_bundled
from opd_fast.config.validate import check_least, check_text
from opd_fast.errors import UserError, main_guard
from opd_fast.files import replace_text
from opd_fast.reporting.telemetry import quiet_libraries
from opd_fast.waiting import bound_spinning

if TYPE_CHECKING:
    import torch

    from opd_fast.training.evaluation import EvalTask, Evaluation

RECORDED = ("solver", "eta", "steps", "guidance", "guidance_convention", "resolution", "seed")
"""Settings of the command line that its results.json repeats."""


DOOR = "python -m opd_fast.evaluate"
OPTIONS = (
    Option("model", str, "bundled", "diffusers pipeline folder, hub id or bundled"),
    Option("lora", str | None, None, "LoRA, or whatever form a teacher may have; null: the model alone"),
    Option("prompts", str, MISSING, "prompt files or bundled/NAME, joined by commas; held-out parts"),
    Option("rewards", str, MISSING, "for each prompt file one reward, or several joined by +"),
    Option("steps", int, 20, "solver steps"),
    Option("solver", Solver, "ode", "solver"),
    Option("eta", float, 0.7, "noise level of a stochastic solver"),
    Option("guidance", float | None, None, "as the model's pipeline takes it; null: unguided"),
    Option(
        "guidance-convention",
        Literal["pipeline", "linear"],
        "pipeline",
        "what --guidance is a value of, as model.guidance_convention",
    ),
    Option("resolution", int | None, None, "pixels; null: what the pipeline was made for"),
    Option("limit", int | None, None, "prompts taken from the start of each file; null: all"),
    Option("images-per-prompt", int, 1, "images of each prompt, with different noise, averaged"),
    Option("text-cache", str, "auto", "folder for text embeddings, auto or off, as model.text_cache"),
    Option("seed", int, 0, "of the noise"),
    Option("batch", int, 64, "images drawn at once"),
    Option("reward-timeout", float | None, 300.0, "seconds a reward may take for a batch; null: any"),
    Option("dtype", Literal["auto", "float32", "bfloat16", "float16"], "auto", "of the weights"),
    Option("grid", int, 8, "images of each file in the image grid; 0: no grid"),
    Option("out", str | None, None, "folder for results.json and grids; null: runs/evaluate-TIME"),
)


def _settings(argv: list[str]) -> SimpleNamespace:
    """The options' values, checked."""
    found = read_options(argv, DOOR, "Judge a model, with or without a LoRA, on prompt files.", OPTIONS)
    for option in ("model", "lora", "out", "text_cache"):
        if (given := getattr(found, option)) is not None:
            check_text(option.replace("_", "-"), given)
    for source in found.prompts.split(","):
        check_text("prompts", source.strip())
    check_least(
        ("steps", found.steps, 1),
        ("limit", found.limit, 1),
        ("images-per-prompt", found.images_per_prompt, 1),
        ("batch", found.batch, 1),
        ("seed", found.seed, 0),
        ("guidance", found.guidance, 0),
        ("grid", found.grid, 0),
    )
    if found.reward_timeout is not None and not found.reward_timeout > 0:
        raise UserError("reward-timeout", f"{found.reward_timeout:g} is not above 0", "give seconds, or null for any")
    for name in ("guidance", "eta"):
        value = getattr(found, name)
        if value is not None and not math.isfinite(value):
            raise UserError(name, f"{value} is not a finite number", "give a finite one")
    if not found.text_cache:
        raise UserError("text-cache", "is empty", "name a folder, or give auto or off")
    if found.solver not in DETERMINISTIC and not found.eta > 0:
        raise UserError("eta", f"{found.eta} with solver {found.solver}", "give eta > 0 or solver ode")
    return found


def _pair(prompts: str, rewards: str) -> list[tuple[str, list[str]]]:
    """Prompt sources with the rewards that judge each."""
    sources = [s for s in (part.strip() for part in prompts.split(",")) if s]
    names = [[n.strip() for n in part.split("+") if n.strip()] for part in rewards.split(",") if part.strip()]
    if len(sources) == 1 and len(names) > 1:
        names = [[name for group in names for name in group]]
    if not sources or len(sources) != len(names):
        raise UserError(
            "rewards", f"{len(names)} for {len(sources)} prompt files", "give one for each file, several joined by +"
        )
    if not all(names):
        raise UserError("rewards", f"{rewards!r} leaves a prompt file without any", "name one for each file")
    for group in names:
        if twice := [name for i, name in enumerate(group) if name in group[:i]]:
            raise UserError("rewards", f"{twice[0]} stands twice beside one prompt file", "name it once")
    return list(zip(sources, names, strict=True))


@main_guard
def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    bound_spinning()
    settings = _settings(argv)
    pairs = _pair(settings.prompts, settings.rewards)
    quiet_libraries()
    from opd_fast.data.prompt_files import load_prompts
    from opd_fast.rewards.metadata import check_metadata
    from opd_fast.training.evaluation import EvalTask

    tasks: list[EvalTask] = []
    for source, rewards in pairs:
        every, limit = load_prompts(source, "test"), settings.limit
        for name in rewards:
            check_metadata(name, every[:limit], "prompts")
        if limit is not None and len(every) < limit:
            print(f"{source}: {len(every)} prompts, fewer than limit = {limit}; all are taken", file=sys.stderr)
        prompts = every[:limit]
        images = len(prompts) * settings.images_per_prompt
        tasks.append(EvalTask(_task_name(source, tasks), prompts, rewards, images))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(settings.out or f"runs/evaluate-{stamp}").expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("out", f"{out} cannot be made ({error.strerror})", "give a folder you may write") from error
    began = time.monotonic()
    found = _judge(settings, tasks)
    results = {
        "model": settings.model,
        "lora": settings.lora,
        "rewards": {
            task: {name: value if math.isfinite(value) else None for name, value in means.items()}
            for task, means in found.rewards.items()
        },
        "failures": list(found.failures),
        "prompts": {task.name: len(task.prompts) for task in tasks},
        "images": {task.name: task.count for task in tasks},
        "settings": {name: getattr(settings, name) for name in RECORDED},
        "seconds": round(time.monotonic() - began, 3),
    }
    replace_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    _show(settings, tasks, found, out)
    if len(found.unjudged()) == sum(len(task.rewards) for task in tasks):
        reasons = "; ".join(found.failures)
        raise UserError("rewards", f"no image has a value: {reasons}", "fix the reward, then evaluate again")
    return 0


def _task_name(source: str, tasks: Sequence[EvalTask]) -> str:
    """The source's own name, with a number where a task before it has that: it names a row and a picture."""
    path = Path(source)
    name = path.name if is_bundled(source) else path.stem or path.resolve().name
    taken = {task.name for task in tasks}
    numbered = (f"{name}-{number}" for number in itertools.count(len(tasks)))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _judge(settings: SimpleNamespace, tasks: list[EvalTask]) -> Evaluation:
    from opd_fast.data.text_embeddings import EmbeddingCache, encoding_progress
    from opd_fast.data.text_store import TextStore
    from opd_fast.distributed.resolve import pick_device, pick_dtype
    from opd_fast.models import load_model
    from opd_fast.models.lora.load import load_transformer
    from opd_fast.solvers import solver_table
    from opd_fast.training.evaluation import ImageSampler, evaluate

    device = pick_device()
    dtype = pick_dtype(settings.dtype, "auto", device)
    _check_fit(settings, dtype)
    convention = settings.guidance_convention
    model = load_model(settings.model, device=device, dtype=dtype, guidance_convention=convention)
    resolution = model.resolution(settings.resolution)
    transformer = model.transformer
    if settings.lora is not None:
        transformer = load_transformer(model, settings.lora, what="lora")
    store = TextStore.open(settings.text_cache, model, "text-cache")
    prompts = [prompt.text for task in tasks for prompt in task.prompts]
    with encoding_progress() as encoded:
        text = EmbeddingCache.build(model, prompts, progress=encoded, store=store)
    model.release_text_encoders()
    table = solver_table(settings.solver, model.sigmas(settings.steps, resolution), settings.eta)
    shape = model.latent_shape(resolution)
    sampler = ImageSampler(model, table, shape, settings.guidance, settings.seed, text, settings.batch)
    with _progress() as advance:
        return evaluate(
            sampler,
            transformer,
            tasks,
            keep_images=settings.grid,
            progress=advance,
            reward_timeout=settings.reward_timeout,
        )


def _check_fit(settings: SimpleNamespace, dtype: torch.dtype) -> None:
    """Raise ValueError for settings that the model's configuration files contradict, before any weight is read."""
    from opd_fast.models import meta_model
    from opd_fast.models.lora.load import check_weights

    outline = meta_model(settings.model, dtype=dtype, guidance_convention=settings.guidance_convention)
    outline.latent_shape(outline.resolution(settings.resolution))
    if settings.guidance is None:
        # What is recorded is a number, as it always was.
        settings.guidance = 1.0 if settings.guidance_convention == "linear" else outline.unguided
    if outline.guidance_kind == "none" and settings.guidance not in (0, 1):
        raise UserError("guidance", f"{settings.guidance:g} with a {outline.name} model that has none", "give 1")
    if settings.lora is not None:
        check_weights(outline, settings.lora, what="lora")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar of images on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(settings: SimpleNamespace, tasks: list[EvalTask], found: Evaluation, out: Path) -> None:
    """Print the table and write an image grid for each task."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from opd_fast.reporting.image_grid import image_grid
    from opd_fast.reporting.table import print_failures

    title = settings.model if settings.lora is None else f"{settings.model} + {settings.lora}"
    console = Console()
    console.print(title, markup=False, highlight=False)
    table = Table()
    for heading in ("prompts", "images", "reward", "mean"):
        table.add_column(heading, justify="left" if heading in ("prompts", "reward") else "right")
    for task in tasks:
        for name, value in found.rewards[task.name].items():
            shown = f"{value:.3f}" if math.isfinite(value) else "-"
            table.add_row(escape(task.name), str(task.count), name.replace("_", " "), shown)
    console.print(table)
    print_failures(found.failures, console)
    for task in tasks:
        if task.name in found.images:
            images = found.images[task.name]
            captions = [prompt.text for prompt in task.prompts[: len(images)]]
            # Small images are enlarged to be seen, large ones are kept.
            scale = max(1, 128 // images.shape[-1])
            image_grid({"with LoRA" if settings.lora else "model": images}, captions, out / f"{task.name}.png", scale)
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
