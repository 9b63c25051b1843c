"""Draws and judges what a request asks for, image by image, and goes on where an earlier attempt stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.config.paths import resolve_source
from opd_fast.data.prompt_files import Prompt
from opd_fast.distributed.world import World
from opd_fast.errors import UserError
from opd_fast.evaluation.judgements import Judgements, hashed
from opd_fast.evaluation.request import Request
from opd_fast.evaluation.samplers import Draw, Sampler, check_request, is_family, open_sampler
from opd_fast.files import replace_text
from opd_fast.rewards import REWARDS, ModelReward, get_reward
from opd_fast.rewards.geneval_layout import image_file, image_record, save_image
from opd_fast.rewards.runner import Pending, RewardRunner
from opd_fast.training.evaluation import EvalTask, task_keys
from opd_fast.training.identity import code_hashes, digest, pipeline_hashes, weights_hashes

Progress = Callable[[int, int], None]
ROWS = "rows"
"""The folder of the judgements in that of an evaluation."""


@dataclass
class Judged:
    """What an evaluation has judged.

    Attributes:
        rows: row to task to its judgements.
        failures: what rewards did wrong, in words.
        drawn: how many images were drawn for it; the others had been judged or drawn before.
    """

    rows: dict[str, dict[str, Judgements]]
    failures: list[str]
    drawn: int


def judge(request: Request, world: World | None = None, progress: Progress | None = None) -> Judged:
    """Draw and judge every image of a request that has not been yet, and keep what was found in `request.out`.

    Args:
        world: the processes that share the images of each row and task.
        progress: called with (images done, images in all) of this process.

    Raises:
        ValueError: settings that contradict the model, a reward that is unknown, or a model that yields NaN or infinite
            numbers.
    """
    world = world or World()
    check_request(request)
    _check_rewards(request, world)
    tables = _judgements(request, world)
    world.on_first(lambda: _prepare(request, tables))
    for row in tables.values():
        for table in row.values():
            table.read()
    work = _Work(request, tables, world, progress)
    with RewardRunner("record", request.reward_timeout, request.reward_models) as runner:
        work.run(runner)
        failures = dict(runner.messages)
    told: dict[tuple[str, str], str] = {}
    for reason, message in world.all_gather_objects(list(failures.items())):
        if reason not in told and world.is_main:
            print(f"evaluation: {message}", file=sys.stderr, flush=True)
        told.setdefault(reason, message)
    drawn = sum(world.all_gather_objects([work.drawn]))
    world.on_first(lambda: _finish(request, tables))
    for row in tables.values():
        for table in row.values():
            table.read()
    return Judged(tables, list(told.values()), drawn)


class _Work:
    """One process's share of an evaluation."""

    def __init__(
        self, request: Request, tables: dict[str, dict[str, Judgements]], world: World, progress: Progress | None
    ) -> None:
        self.request, self.tables, self.world, self.progress = request, tables, world, progress
        self.sampler: Sampler | None = None
        self.drawn = 0
        self.waiting: deque[tuple[Judgements, list[int], Tensor, Pending]] = deque()
        self.shares = {
            (row.name, task.name): self._share(row.name, task) for row in request.rows for task in request.tasks
        }
        """The images that this process has to judge, by row and task; found once, before any value is added."""
        self.total, self.done = sum(len(share) for share in self.shares.values()), 0

    def run(self, runner: RewardRunner) -> None:
        for row in self.request.rows:
            judged = {task.name: self._judge_kept(row.name, task, runner) for task in self.request.tasks}
            left = {
                task.name: [i for i in self.shares[row.name, task.name] if i not in judged[task.name]]
                for task in self.request.tasks
            }
            if any(left.values()):
                self.sampler = self.sampler or open_sampler(self.request, shown=self.world.is_main)
                with self.sampler.row(row) as draw:
                    for task in self.request.tasks:
                        self._draw(row.name, task, left[task.name], draw, runner)
        while self.waiting:
            self._record()

    def _share(self, row: str, task: EvalTask) -> list[int]:
        """The images of a row and task that this process has to judge."""
        table = self.tables[row][task.name]
        missing = table.missing()
        if self.request.save_images:
            unsaved = (i for i in range(task.count) if not _is_saved(self.request, row, task, i))
            missing = sorted({*missing, *unsaved})
        return missing[self.world.rank :: self.world.size]

    def _judge_kept(self, row: str, task: EvalTask, runner: RewardRunner) -> set[int]:
        """Judge what an earlier attempt drew; returns which images these are."""
        table, share = self.tables[row][task.name], set(self.shares[row, task.name])
        found: set[int] = set()
        for indices, images in table.drawn():
            places = [place for place, index in enumerate(indices) if index in share]
            if places:
                kept = [indices[place] for place in places]
                self._submit(row, task, kept, images[places], runner)
                found.update(kept)
        return found

    def _draw(self, row: str, task: EvalTask, share: list[int], draw: Draw, runner: RewardRunner) -> None:
        table, keys = self.tables[row][task.name], task_keys(self.request.seed, task.name, task.count)
        for start in range(0, len(share), self.request.batch):
            indices = share[start : start + self.request.batch]
            images = draw(_prompts(task, indices), keys[indices])
            if images is None:
                raise ValueError(
                    f"row {row!r}, task {task.name!r}: the model's images hold NaN or infinite numbers; look at its "
                    "weights, or give --dtype float32"
                )
            self.drawn += len(indices)
            table.keep_drawn(indices, images)
            self._submit(row, task, indices, images, runner)

    def _save(self, row: str, task: EvalTask, indices: list[int], images: Tensor) -> None:
        """Write images as GenEval's own evaluation reads them."""
        for index, prompt, image in zip(indices, _prompts(task, indices), images, strict=True):
            sample, number = divmod(index, len(task.prompts))
            save_image(_saved_folder(self.request, row, task), number, sample, image, image_record(prompt))

    def _submit(self, row: str, task: EvalTask, indices: list[int], images: Tensor, runner: RewardRunner) -> None:
        table = self.tables[row][task.name]
        if self.request.save_images:
            self._save(row, task, indices, images)
        lacking = [name for name in task.rewards if any(name in table.lacking(index) for index in indices)]
        pending = runner.submit(images, _prompts(task, indices), lacking)
        self.waiting.append((table, indices, images.cpu(), pending))
        while len(self.waiting) > runner.ahead:
            self._record()

    def _record(self) -> None:
        table, indices, images, pending = self.waiting.popleft()
        table.record(indices, pending.result(), images)
        self.done += len(indices)
        if self.progress is not None:
            self.progress(self.done, self.total)


def _saved_folder(request: Request, row: str, task: EvalTask) -> Path:
    return request.out / "images" / file_name(row) / file_name(task.name)


def _is_saved(request: Request, row: str, task: EvalTask, index: int) -> bool:
    sample, number = divmod(index, len(task.prompts))
    return image_file(_saved_folder(request, row, task), number, sample).is_file()


def _prompts(task: EvalTask, indices: Sequence[int]) -> list[Prompt]:
    return [task.prompts[index % len(task.prompts)] for index in indices]


# --- what is kept ----------------------------------------------------------------------------------------------------


def _judgements(request: Request, world: World) -> dict[str, dict[str, Judgements]]:
    """The judgements of every row and task, not read yet."""
    model = _model_hashes(request)
    rewards = {name: reward_hash(name, request.reward_models) for task in request.tasks for name in task.rewards}
    found: dict[str, dict[str, Judgements]] = {}
    for row in request.rows:
        weights = {} if row.weights is None else weights_hashes(row.weights) or {"name": row.weights}
        for task in request.tasks:
            texts = [[prompt.text, prompt.metadata] for prompt in task.prompts]
            images = hashed(model, request.drawing, weights, row.guidance, task.name, task.count, texts)
            folder = request.out / ROWS / file_name(row.name) / file_name(task.name)
            of_task = {name: rewards[name] for name in task.rewards}
            found.setdefault(row.name, {})[task.name] = Judgements(folder, images, of_task, task.count, world.rank)
    return found


def _model_hashes(request: Request) -> dict[str, str]:
    if is_family(request):
        return pipeline_hashes(request.model) or {"name": request.model}
    folder = resolve_source(request.model, "pipeline").path
    if folder is None:
        return {"name": request.model}
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def _check_rewards(request: Request, world: World) -> None:
    """Say before the first image which rewards lack something. Raises UserError where all do."""
    missing: dict[str, UserError] = {}
    names = list(dict.fromkeys(name for task in request.tasks for name in task.rewards))
    for name in names:
        reward = get_reward(name, request.reward_models)
        if isinstance(reward, ModelReward):
            try:
                reward.check()
            except UserError as lacking:
                missing[name] = lacking
    if len(missing) == len(names):
        raise next(iter(missing.values()))
    for name, error in missing.items() if world.is_main else ():
        print(f"evaluation: reward {name!r} cannot judge: {error}; the others go on", file=sys.stderr, flush=True)


def reward_hash(name: str, models: RewardModelsConfig) -> str:
    """Return a hash of what a reward's values follow from: its code, and the models that it reads."""
    reward = get_reward(name, models)
    named = REWARDS.get(name, name)
    kind = type(reward) if isinstance(reward, ModelReward) else reward
    identity = reward.identity() if isinstance(reward, ModelReward) else {}
    return hashed(named, code_hashes(kind, sys.modules.get(named.partition(":")[0])), identity)


def file_name(name: str) -> str:
    """Return a row's or task's name as a file may have it; `teacher:NAME` is teacher-NAME, others stay distinct."""
    name = name.replace("teacher:", "teacher-", 1) if name.startswith("teacher:") else name
    plain = "".join(c if c.isalnum() or c in "-_., " else "_" for c in name).strip(". ") or "_"
    return plain if plain == name else f"{plain}-{hashed(name)[:6]}"


def cache_folder(setting: str) -> Path | None:
    """Return where judgements are kept for other evaluations; None for off."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    own, users = os.environ.get("OPD_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(users).expanduser() / "opd_fast") / "judgements"


def _prepare(request: Request, tables: dict[str, dict[str, Judgements]]) -> None:
    """Make the folders, take over what is known, and write what the evaluation is."""
    cache = cache_folder(request.judgement_cache)
    stale = []
    try:
        for row in request.rows:
            for task in request.tasks:
                table = tables[row.name][task.name]
                if table.clear_others():
                    stale.append(row.name)
                if not table.folder.exists():  # whatever images lie there were drawn otherwise
                    shutil.rmtree(_saved_folder(request, row.name, task), ignore_errors=True)
                if cache is not None and row.frozen:
                    table.fetch(cache)
                table.prepare()
        replace_text(request.out / "evaluation.json", description(request))
    except OSError as error:
        problem = f"{request.out} cannot be written ({error.strerror or error})"
        raise UserError("out", problem, "give a folder you may write") from error
    for name in dict.fromkeys(stale):
        print(
            f"{request.out}: the images of {name} were others' (settings, weights or prompts differ)", file=sys.stderr
        )


def description(request: Request) -> str:
    """Return evaluation.json: rows, tasks with their prompts, and settings."""
    tasks = [
        {
            "name": task.name,
            "images": task.count,
            "rewards": task.rewards,
            "prompts": [{"text": prompt.text, "metadata": prompt.metadata} for prompt in task.prompts],
        }
        for task in request.tasks
    ]
    rows = [asdict(row) | {"folder": file_name(row.name)} for row in request.rows]
    settings = request.drawing | {"model": request.model, "reward_models": asdict(request.reward_models)}
    return json.dumps({"rows": rows, "tasks": tasks, "settings": settings}, indent=1, default=str) + "\n"


def _finish(request: Request, tables: dict[str, dict[str, Judgements]]) -> None:
    """Join what the processes wrote, and keep for other evaluations what they can use."""
    cache = cache_folder(request.judgement_cache)
    for row in request.rows:
        for table in tables[row.name].values():
            table.finish()
            if cache is not None and row.frozen:
                try:
                    table.offer(cache)
                except OSError as error:
                    print(f"{cache}: judgements are not kept ({error.strerror or error})", file=sys.stderr)
