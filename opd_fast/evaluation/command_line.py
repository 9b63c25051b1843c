"""The options of `python -m opd_fast.evaluate`, read and checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from opd_fast.config import DETERMINISTIC, RewardModelsConfig, Solver
from opd_fast.config.options import Option, print_help, read, settle
from opd_fast.config.serialize import leaves
from opd_fast.config.validate import check_least, check_text
from opd_fast.errors import UserError

DOOR = "python -m opd_fast.evaluate"
WHAT = (
    "Judge models on prompt files: runs (base, teachers and student), or a pipeline with or without LoRAs. Without any "
    "argument: the bundled base and teachers, and the newest run on them in runs/."
)
WORDS = ("RUN", "*", "folders of runs or of evaluations, shown in one table; each run is judged as its settings say")
OF_A_MODEL = ("model", "lora", "prompts", "solver", "eta", "images-per-prompt", "dtype", "guidance-convention")
"""Options that a run's own settings stand for."""
OPTIONS = (
    Option("model", str, "bundled", "diffusers text-to-image pipeline: folder, hub id or bundled"),
    Option(
        "lora", str | None, None, "LoRAs, or whatever form a teacher may have, joined by commas; base: the model alone"
    ),
    Option("prompts", str | None, None, "prompt files or bundled/NAME, joined by commas; held-out parts"),
    Option(
        "rewards", str | None, None, "for each prompt file one reward, or several joined by +; of a run: for all tasks"
    ),
    Option("steps", int, 20, "solver steps"),
    Option("solver", Solver, "ode", "solver"),
    Option("eta", float, 0.7, "noise level of a stochastic solver"),
    Option(
        "guidance",
        str | None,
        None,
        "as the model's pipeline takes it; null: unguided; joined by commas: a row for each",
    ),
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
    Option("save-images", None, False, "write every image in GenEval's layout below OUT/images"),
    Option("judgement-cache", str, "auto", "folder that keeps judgements of base and teachers, auto or off"),
    Option("out", str | None, None, "folder for the results; null: runs/evaluate-TIME, of a run: RUN/evaluation"),
    *(
        Option(key.replace("_", "-"), hint, default, help)
        for key, (hint, default, help) in leaves().items()
        if key.startswith("reward_models.")
    ),
)


def read_settings(argv: list[str]) -> SimpleNamespace:
    """The options' values, checked; `runs` are the words, `given` the names of the options that stand there."""
    print_help(argv, DOOR, WHAT, WORDS, OPTIONS)
    words, given = read(argv, OPTIONS, DOOR)
    found = settle(OPTIONS, given)
    found.runs, found.given = [Path(word) for word in words], {one.option.name for one in given}
    found.reward_models = RewardModelsConfig(
        **{one.name: getattr(found, f"reward_models.{one.name}") for one in fields(RewardModelsConfig)}
    )
    _check(found)
    return found


def _check(found: SimpleNamespace) -> None:
    """Raise UserError for a value out of range and for options that do not go together."""
    for option in ("model", "lora", "out", "text_cache", "judgement_cache"):
        if (given := getattr(found, option)) is not None:
            check_text(option.replace("_", "-"), given)
    for source in (found.prompts or "").split(","):
        check_text("prompts", source.strip())
    found.guidances = _guidances(found.guidance)
    check_least(
        ("steps", found.steps, 1),
        ("limit", found.limit, 1),
        ("images-per-prompt", found.images_per_prompt, 1),
        ("batch", found.batch, 1),
        ("seed", found.seed, 0),
        *(("guidance", guidance, 0) for guidance in found.guidances),
        ("grid", found.grid, 0),
        ("reward-models.batch", found.reward_models.batch, 1),
        ("reward-models.requests", found.reward_models.requests, 1),
        ("reward-models.retries", found.reward_models.retries, 0),
    )
    if found.reward_timeout is not None and not found.reward_timeout > 0:
        raise UserError("reward-timeout", f"{found.reward_timeout:g} is not above 0", "give seconds, or null for any")
    if not math.isfinite(found.eta):
        raise UserError("eta", f"{found.eta} is not a finite number", "give a finite one")
    for option in ("text_cache", "judgement_cache"):
        if not getattr(found, option):
            raise UserError(option.replace("_", "-"), "is empty", "name a folder, or give auto or off")
    if found.solver not in DETERMINISTIC and not found.eta > 0:
        raise UserError("eta", f"{found.eta} with solver {found.solver}", "give eta > 0 or solver ode")
    if found.runs and (named := [name for name in OF_A_MODEL if name in found.given]):
        raise UserError(named[0], "is not read beside a run, whose settings say it", "leave it out, or leave out RUN")
    if found.runs and len(found.guidances) > 1:
        raise UserError("guidance", f"{found.guidance} beside a run", "give one number, or leave it out")
    alone = not found.runs and not found.given & {"model", "lora", "prompts", "rewards"}
    missing = [name for name in ("prompts", "rewards") if getattr(found, name) is None]
    if missing and not alone and not found.runs:
        raise UserError(", ".join(missing), "not given", "give " + " ".join(f"--{name} VALUE" for name in missing))


def _guidances(text: str | None) -> list[float | None]:
    """The numbers of --guidance; None is unguided."""
    found: list[float | None] = []
    for part in (text or "null").split(","):
        try:
            found.append(None if part.strip() == "null" else float(part))
        except ValueError:
            raise UserError("guidance", f"{part.strip()!r} is not a number", "the default is null") from None
        if found[-1] is not None and not math.isfinite(found[-1]):
            raise UserError("guidance", f"{found[-1]} is not a finite number", "give a finite one")
    return found


def pair(prompts: str, rewards: str) -> list[tuple[str, list[str]]]:
    """Prompt sources with the rewards that judge each."""
    sources = [s for s in (part.strip() for part in prompts.split(",")) if s]
    names = [reward_names(part) for part in rewards.split(",") if part.strip()]
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


def reward_names(rewards: str) -> list[str]:
    return [name.strip() for name in rewards.split("+") if name.strip()]
