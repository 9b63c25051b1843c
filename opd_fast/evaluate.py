"""Rewards of models on held-out prompts, one table:

python -m opd_fast.evaluate [RUN ...]                             runs, and evaluations already made
python -m opd_fast.evaluate --model PATH [--lora PATH[,PATH]] --prompts SRC[,SRC] --rewards NAME[+NAME][,NAME]
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from opd_fast.config import Config, RewardModelsConfig
from opd_fast.config.paths import BASE, is_bundled
from opd_fast.errors import UserError, main_guard
from opd_fast.evaluation.command_line import pair, read_settings, reward_names
from opd_fast.files import replace_text
from opd_fast.reporting.telemetry import quiet_libraries
from opd_fast.waiting import bound_spinning

if TYPE_CHECKING:
    from opd_fast.distributed.world import World
    from opd_fast.evaluation.comparison import Table
    from opd_fast.evaluation.request import Request
    from opd_fast.training.evaluation import EvalTask

RECORDED = ("solver", "eta", "steps", "guidance", "guidance_convention", "resolution", "seed")
"""Settings that results.json repeats."""

WAIT = 24 * 60
"""Minutes that a process waits for the others, whose images or rewards may take longer."""


@main_guard
def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    bound_spinning()
    settings = read_settings(argv)
    pairs = pair(settings.prompts, settings.rewards) if settings.prompts is not None and not settings.runs else []
    quiet_libraries()
    began = time.monotonic()
    with _world() as world:
        if settings.runs:
            return _compare(settings, world, began)
        request = _of_model(settings, pairs) if pairs else _of_bundle(settings)
        request = replace(request, out=world.on_first(lambda: request.out))  # its time is that of the first process
        results, table, out = _evaluate(settings, request, world, began)
        if world.is_main:
            _show(settings, request, results, table, out)
        _refuse_unjudged(table, results["failures"])
    return 0


@contextlib.contextmanager
def _world() -> Iterator[World]:
    """The processes that torchrun started; each draws and judges its share with all of the weights."""
    from opd_fast.distributed.world import launched, open_world

    config = Config()
    config.parallel.strategy = "auto" if launched() is None else "ddp"
    config.parallel.timeout = WAIT
    with open_world(config) as world:
        yield world


# --- what is asked for -----------------------------------------------------------------------------------------------


def _of_model(settings: SimpleNamespace, pairs: Sequence[tuple[str, list[str]]]) -> Request:
    """The request of --model, --lora, --prompts and --rewards."""
    from opd_fast.evaluation.request import ModelRow, Request

    tasks = _tasks(settings, pairs)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    loras: list[str | None] = [None]
    if settings.lora is not None:
        loras = [None if (name := part.strip()) == BASE else name for part in settings.lora.split(",") if part.strip()]
    names = _row_names(loras)
    rows = [
        ModelRow(name if len(settings.guidances) == 1 else f"{name}, guidance {_shown(guidance)}", lora, guidance)
        for name, lora in zip(names, loras, strict=True)
        for guidance in settings.guidances
    ]
    return Request(
        model=settings.model,
        rows=rows,
        tasks=tasks,
        out=Path(settings.out or f"runs/evaluate-{stamp}").expanduser(),
        **{name: getattr(settings, name) for name in _PASSED},
    )


_PASSED = (
    "solver",
    "eta",
    "steps",
    "resolution",
    "guidance_convention",
    "seed",
    "batch",
    "dtype",
    "text_cache",
    "reward_timeout",
    "reward_models",
    "judgement_cache",
    "save_images",
    "grid",
)
"""Options that a request has under the same name."""


def _tasks(settings: SimpleNamespace, pairs: Sequence[tuple[str, list[str]]]) -> list[EvalTask]:
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
        tasks.append(EvalTask(_task_name(source, tasks), prompts, rewards, len(prompts) * settings.images_per_prompt))
    return tasks


def _task_name(source: str, tasks: Sequence[EvalTask]) -> str:
    """The source's own name, with a number where a task before it has that: it names a row and a picture."""
    path = Path(source)
    name = path.name if is_bundled(source) else path.stem or path.resolve().name
    taken = {task.name for task in tasks}
    numbered = (f"{name}-{number}" for number in itertools.count(len(tasks)))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _row_names(loras: Sequence[str | None], key: str = "lora") -> list[str]:
    """The last parts of paths that tell them apart, and `base` for None; `key` names them in errors."""
    names: list[str] = []
    for depth in range(1, 1 + max(len(Path(lora or BASE).parts) for lora in loras)):
        names = [BASE if lora is None else "/".join(Path(lora).parts[-depth:]) for lora in loras]
        if len(set(names)) == len(names):
            return names
    twice = next(name for i, name in enumerate(names) if name in names[:i])
    raise UserError(key, f"{twice} stands twice", "name each once")


def _shown(guidance: float | None) -> str:
    return "none" if guidance is None else f"{guidance:g}"


def _changes(settings: SimpleNamespace) -> dict[str, Any]:
    """What the command line says in place of a run's own settings."""
    names = settings.given & {"steps", "resolution", "seed", "batch", "text-cache", "reward-timeout"}
    given = {name: getattr(settings, name) for name in (option.replace("-", "_") for option in names)}
    if "guidance" in settings.given:
        given["guidance"] = settings.guidances[0]
    given |= {name: getattr(settings, name) for name in ("judgement_cache", "save_images", "grid")}
    return given


def _reward_models(settings: SimpleNamespace, config: RewardModelsConfig) -> RewardModelsConfig:
    """A run's settings of its rewards' models, with those of the command line in their place."""
    names = [one.name for one in fields(config) if f"reward-models.{one.name}".replace("_", "-") in settings.given]
    return replace(config, **{name: getattr(settings.reward_models, name) for name in names})


def _of_run(settings: SimpleNamespace, run: Path) -> Request:
    from opd_fast.evaluation.request import of_run

    request = of_run(run, limit=settings.limit, rewards=reward_names(settings.rewards or ""), **_changes(settings))
    return replace(request, reward_models=_reward_models(settings, request.reward_models))


def _of_bundle(settings: SimpleNamespace) -> Request:
    """The bundled base and teachers, and the newest run on them."""
    from opd_fast.config.command_line import parse
    from opd_fast.evaluation.request import RUNS, newest_run, of_configs

    run = newest_run()
    if run is not None:
        print(f"student: {run / 'student'}")
        request = _of_run(settings, run)
    else:
        request = of_configs(
            parse(["bundled"]).configs, RUNS / "evaluate-bundled", limit=settings.limit, **_changes(settings)
        )
    return request if settings.out is None else replace(request, out=Path(settings.out).expanduser())


# --- doing it --------------------------------------------------------------------------------------------------------


def _evaluate(
    settings: SimpleNamespace, request: Request, world: World, began: float
) -> tuple[dict[str, Any], Table, Path]:
    """Judge what is missing, write results.json, and return its content, the table and the folder."""
    from opd_fast.evaluation.comparison import table_of, to_results
    from opd_fast.evaluation.judge import judge
    from opd_fast.reporting.progress import progress_of

    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "out", f"{request.out} cannot be made ({error.strerror})", "give a folder you may write"
        ) from error
    with progress_of("judged", "images", shown=world.is_main) as progress:
        judged = judge(request, world, progress)
    table = table_of(request, judged)
    results = _head(request, table) | to_results(table, judged.failures)
    results |= {
        "prompts": {task.name: len(task.prompts) for task in request.tasks},
        "images": {task.name: task.count for task in request.tasks},
        "drawn": judged.drawn,
        "settings": _recorded(request),
        "seconds": round(time.monotonic() - began, 3),
    }
    if world.is_main:
        _write(request.out, results, table)
    return results, table, request.out


def _head(request: Request, table: Table) -> dict[str, Any]:
    """What results.json of one model begins with."""
    if len(request.rows) > 1:
        return {"model": request.model, "weights": {row.name: row.weights for row in request.rows}}
    (cells,) = table.values()
    rewards: dict[str, dict[str, float]] = {}
    for column, cell in cells.items():
        rewards.setdefault(column.task, {})[column.reward] = cell.mean
    return {"model": request.model, "lora": request.rows[0].weights, "rewards": rewards}


def _recorded(request: Request) -> dict[str, Any]:
    from opd_fast.evaluation.samplers import unguided

    found = {name: getattr(request, name) for name in RECORDED if name != "guidance"}
    of_rows = {row.name: unguided(request) if row.guidance is None else row.guidance for row in request.rows}
    found["guidance"] = of_rows if len(set(of_rows.values())) > 1 else next(iter(of_rows.values()))
    return {name: found[name] for name in RECORDED}


def _write(out: Path, results: dict[str, Any], table: Table) -> None:
    """Write results.json, and scores.jsonl with a line for every image."""
    from opd_fast.evaluation.comparison import image_lines
    from opd_fast.reporting.results import finite

    replace_text(out / "results.json", json.dumps(finite(results), indent=2, allow_nan=False) + "\n")
    replace_text(out / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in image_lines(table)))


def _refuse_unjudged(table: Table, failures: Sequence[str]) -> None:
    """Raise UserError where no image has a value."""
    if not any(math.isfinite(cell.mean) for cells in table.values() for cell in cells.values()):
        raise UserError(
            "rewards", f"no image has a value: {'; '.join(failures)}", "fix the reward, then evaluate again"
        )


def _compare(settings: SimpleNamespace, world: World, began: float) -> int:
    """Judge each run, read each evaluation, and show one table of all."""
    from opd_fast.evaluation.comparison import merged, read_evaluation, to_results

    tables: dict[str, Table] = {}
    failures: list[str] = []
    request: Request | None = None
    for folder, name in zip(settings.runs, _row_names([str(run) for run in settings.runs], "RUN"), strict=True):
        if (folder / "evaluation.json").is_file() and not (folder / "config.yaml").is_file():
            tables[name] = read_evaluation(folder)
            continue
        request = _of_run(settings, folder)
        if settings.out is not None and len(settings.runs) == 1:
            request = replace(request, out=Path(settings.out).expanduser())
        results, tables[name], _ = _evaluate(settings, request, world, began)
        failures += results["failures"]
    if len(settings.runs) == 1 and request is not None:
        if world.is_main:
            _show(settings, request, results, tables[name], request.out)
        _refuse_unjudged(tables[name], failures)
        return 0
    table = merged(tables)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(settings.out or f"runs/compare-{stamp}").expanduser()
    results = to_results(table, failures) | {"seconds": round(time.monotonic() - began, 3)}
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        _write(out, results, table)
        _show(settings, None, results, table, out)
    return 0


# --- showing it ------------------------------------------------------------------------------------------------------


def _show(settings: SimpleNamespace, request: Request | None, results: dict[str, Any], table: Table, out: Path) -> None:
    """Print the table, write the report and the image grids."""
    from rich.console import Console

    from opd_fast.evaluation.comparison import best_keys
    from opd_fast.evaluation.pictures import examples, write_grids
    from opd_fast.reporting.comparison import print_comparison, write_comparison
    from opd_fast.reporting.table import print_failures

    console = Console()
    best = best_keys(table)
    title = out.resolve().name if request is None else _title(request)
    console.print(title, markup=False, highlight=False)
    if request is not None and len(request.rows) == 1:
        _print_one(results, table, console)
        print_failures(results["failures"], console)
    else:
        print_comparison(results, best, console)
    facts = [] if request is None else [(name, str(value)) for name, value in results["settings"].items()]
    write_comparison(out / "report.html", title, results, best, examples(table), facts)
    if request is not None and settings.grid:
        write_grids(request, out, settings.grid)
    print(f"results: {out / 'results.json'}   report: {out / 'report.html'}")


def _title(request: Request) -> str:
    only = request.rows[0].weights if len(request.rows) == 1 else None
    return request.model if only is None else f"{request.model} + {only}"


def _print_one(results: dict[str, Any], table: Table, console: Any) -> None:
    """Print the table of one model: a line for each task and reward."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    from opd_fast.reporting.comparison import half_width, print_tags
    from opd_fast.reporting.table import number

    shown = RichTable()
    for heading in ("prompts", "images", "reward", "mean"):
        shown.add_column(heading, justify="left" if heading in ("prompts", "reward") else "right")
    (cells,) = table.values()
    for column, cell in cells.items():
        mean = f"{number(cell.mean)} {half_width(cell.interval)}".rstrip()
        shown.add_row(escape(column.task), str(len(cell.values)), column.reward.replace("_", " "), mean)
    console.print(shown)
    print_tags(results, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
