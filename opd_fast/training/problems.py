"""The checks before a run that need its settings and the disk alone: weights, prompts, resolution, rewards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from opd_fast.config import Config
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import BASE, MERGED, Kind, bundled_remedy, resolve_source
from opd_fast.errors import UserError, did_you_mean


def check_paths(config: Config) -> None:
    """Raise `UserError` for weights or prompt files that are not there, or hold nothing."""
    for error in problems(config):
        raise error


def problems(config: Config) -> Iterator[UserError]:
    """Yield what keeps a run from beginning: mistakes in weights and prompt files, in the order of the configuration,
    in the resolution, in the rewards, and what the rewards lack in the prompts.

    A repository of the hub is not looked for here, but when it is loaded.
    """
    from opd_fast.training.prompt_checks import metadata_problems, read_held_out, read_prompts

    checks: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    checks.append((_check_weights, ("model.path", config.model.path, "pipeline")))
    if config.student.start not in (None, MERGED):
        checks.append((_check_weights, ("student.start", config.student.start, "teachers")))
    if config.objective.anchor not in (None, BASE):
        checks.append((_check_weights, ("objective.anchor", config.objective.anchor, "teachers")))
    for i, teacher in enumerate(config.teachers):
        of = f" of teacher {teacher.name!r}"
        if method_spec(config).has_teachers:
            checks.append((_check_weights, (f"teachers[{i}].weights", teacher.weights, "teachers", of)))
        checks.append((read_prompts, (f"teachers[{i}].prompts", teacher.prompts, "train")))
        if teacher.eval_prompts is not None and config.evaluation.every > 0:
            checks.append((read_prompts, (f"teachers[{i}].eval_prompts", teacher.eval_prompts, "test")))
        elif config.evaluates(teacher):
            checks.append((read_held_out, (f"teachers[{i}].eval_prompts", teacher.prompts)))
    checks += [(_check_resolution, (config,)), (_check_rewards, (config,))]
    for check, arguments in checks:
        try:
            check(*arguments)
        except UserError as error:
            yield error
            if check is _check_rewards:
                return
    yield from metadata_problems(config)


def _check_weights(key: str, name: str, kind: Kind, of: str = "") -> None:
    source = resolve_source(name, kind)
    if source.path is None:
        return
    if not source.path.exists():
        if source.where == "package":
            raise UserError(key, f"{name}{of} is not in the package", bundled_remedy(name, kind))
        raise UserError(key, f"{name}{of} does not exist", "give a path that does, a hub id org/name or bundled/NAME")
    if source.where == "local" and source.path.is_dir() and not any(source.path.iterdir()):
        raise UserError(key, f"{name}{of} is an empty folder", "name the folder that holds the weights")


def _check_resolution(config: Config) -> None:
    """Latents must be whole patches: pixels divide by (VAE factor * patch size). The pipeline's own is asked later."""
    root = resolve_source(config.model.path, "pipeline").path
    if config.model.resolution is None or root is None:
        return
    with contextlib.suppress(OSError, KeyError, TypeError, json.JSONDecodeError):  # a broken folder: the loader says so
        vae = json.loads((root / "vae" / "config.json").read_text())
        transformer = json.loads((root / "transformer" / "config.json").read_text())
        unit = 2 ** (len(vae["block_out_channels"]) - 1) * int(transformer["patch_size"])
        most = int(transformer.get("pos_embed_max_size") or 0) * unit
        size = config.model.resolution
        if size % unit:
            raise UserError(
                "model.resolution", f"{size} is not a multiple of {unit}", f"give {max(size // unit, 1) * unit}"
            )
        if most and size > most:
            raise UserError("model.resolution", f"{size} is above the model's {most}", f"give {most} or less")


def _check_rewards(config: Config) -> None:
    named = [(f"teachers[{i}].reward", t.reward) for i, t in enumerate(config.teachers) if t.reward is not None]
    named += [(f"evaluation.rewards[{i}]", name) for i, name in enumerate(config.evaluation.rewards)]
    if not named:
        return
    from opd_fast.rewards import REWARDS, ModelReward, get_reward, reward_terms  # imports torch, so it comes last

    learns = method_spec(config).learns_from_rewards(config)
    for key, text in named:
        try:
            terms = reward_terms(text)
        except ValueError as error:
            raise UserError(key, str(error), "such as 0.8*text + 0.2*colour") from error
        if key.startswith("evaluation") and text != terms[0].reward:
            raise UserError(key, f"{text} is a sum", "list its rewards one by one")
        if any(term.factor != 1 for term in terms) and not method_spec(config).sums_rewards:
            raise UserError(key, f"{text} is a sum, and no loss uses its weights", "leave them out: text + colour")
        for name in (term.reward for term in terms):
            if ":" in name:
                try:
                    get_reward(name, config.reward_models)
                except ValueError as error:
                    raise UserError(
                        key, str(error), "name a function of (images, prompts) as package.module:function"
                    ) from error
            elif name not in REWARDS:
                raise UserError(key, f"unknown reward {name!r}", did_you_mean(name, REWARDS))
            reward = get_reward(name, config.reward_models)
            if isinstance(reward, ModelReward) and (learns or config.evaluation.reward_failure == "stop"):
                reward.check()
