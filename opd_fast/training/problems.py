"""The checks before a run that need its settings and the disk alone: weights, prompts, rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from opd_fast.config import Config
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import (
    BASE,
    MERGED,
    SUFFIXES,
    Kind,
    Split,
    bundled_remedy,
    held_out,
    is_bundled,
    resolve_source,
)
from opd_fast.config.validate import no_held_out
from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.errors import UserError, did_you_mean, one_line


def check_paths(config: Config) -> None:
    """Raise `UserError` for weights or prompt files that are not there, or hold nothing."""
    for error in problems(config):
        raise error


def problems(config: Config) -> Iterator[UserError]:
    """Yield what keeps a run from beginning: mistakes in weights and prompt files, in the order of the configuration,
    in the rewards, and what the rewards lack in the prompts.

    A repository of the hub is not looked for here, but when it is loaded.
    """
    checks: list[Callable[[], object]] = [partial(_check_weights, "model.path", config.model.path, "pipeline")]
    for key, weights, own in (
        ("student.start", config.student.start, MERGED),
        ("objective.anchor", config.objective.anchor, BASE),
    ):
        if weights is not None and weights != own:
            checks.append(partial(_check_weights, key, weights, "teachers"))
    for i, teacher in enumerate(config.teachers):
        key, held = f"teachers[{i}]", f"teachers[{i}].eval_prompts"
        if method_spec(config).has_teachers:
            of = f" of teacher {teacher.name!r}"
            checks.append(partial(_check_weights, f"{key}.weights", teacher.weights, "teachers", of))
        checks.append(partial(read_prompts, f"{key}.prompts", teacher.prompts, "train"))
        if teacher.eval_prompts is not None and config.evaluation.every > 0:
            checks.append(partial(read_prompts, held, teacher.eval_prompts, "test"))
        elif config.evaluates(teacher):
            checks.append(partial(_read_held_out, held, teacher.prompts))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield error
    try:
        _check_rewards(config)
    except UserError as error:
        yield error
    else:
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


# --- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(key: str, source: str, split: Split) -> list[Prompt]:
    """The prompts of a setting's file. Raises UserError, which names setting, file and line, for a file that is missing
    or cannot be read."""
    path = resolve_source(source, "prompts").path
    if path is not None and path.is_dir() and not any(p.suffix in SUFFIXES for p in path.glob(f"{split}*")):
        remedy = f"give a file ({', '.join(SUFFIXES)}), a folder with one for each split, or bundled/NAME"
        raise UserError(key, f"{source} has no prompt file {split}*", remedy)
    try:
        return load_prompts(source, split)
    except ValueError as error:
        problem, _, told = str(error).rpartition("; ")
        raise UserError(key, problem or told, told if problem else "fix that line, or take it out") from error


def _read_held_out(key: str, prompts: str) -> None:
    """Raise UserError where the training `prompts`, which are there, have no test split beside them to read."""
    if is_bundled(prompts) or not Path(prompts).expanduser().exists():
        return  # `read_prompts` looks after them
    try:
        file = held_out(prompts)
    except ValueError as error:
        raise UserError(key, f"is missing, and {one_line(error)}", "name held-out prompts") from error
    if file is None:
        raise no_held_out(key, prompts)
    read_prompts(key, str(file), "test")


# --- rewards ---------------------------------------------------------------------------------------------------------


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
                remedy = "name a function of (images, prompts) as package.module:function"
                try:
                    get_reward(name, config.reward_models)
                except ValueError as error:
                    raise UserError(key, str(error), remedy) from error
            elif name not in REWARDS:
                raise UserError(key, f"unknown reward {name!r}", did_you_mean(name, REWARDS))
            reward = get_reward(name, config.reward_models)
            if isinstance(reward, ModelReward) and (learns or config.evaluation.reward_failure == "stop"):
                reward.check()


def metadata_problems(config: Config) -> Iterator[UserError]:
    """Yield what the rewards lack in the prompts that they judge, the first line of each file.

    Files and rewards that cannot be read themselves are skipped, because `problems` reports them.
    """
    from opd_fast.rewards.metadata import check_metadata

    for key, source, split, rewards in _judged_prompts(config):
        try:
            prompts = read_prompts(key, source, split)
        except UserError:
            continue
        for reward in rewards:
            try:
                check_metadata(reward, prompts, key)
            except UserError as error:
                yield error
            except ValueError:
                continue


def _judged_prompts(config: Config) -> Iterator[tuple[str, str, Split, list[str]]]:
    """(setting, source, split, rewards) of every prompt file whose images a run judges: those that it learns from
    rewards on, and those of its evaluations."""
    from opd_fast.rewards import evaluated_rewards, reward_terms

    learns = method_spec(config).learns_from_rewards(config)
    for i, teacher in enumerate(config.teachers):
        rewards = [] if teacher.reward is None else [term.reward for term in reward_terms(teacher.reward)]
        if rewards and learns and i in config.trained:
            yield f"teachers[{i}].prompts", teacher.prompts, "train", rewards
        file = None
        if config.evaluates(teacher):
            with contextlib.suppress(ValueError):  # `problems` reports what is wrong with it
                file = held_out(teacher.prompts, teacher.eval_prompts)
        if file is not None:
            named = "prompts" if teacher.eval_prompts is None else "eval_prompts"
            yield f"teachers[{i}].{named}", str(file), "test", evaluated_rewards(teacher, config.evaluation.rewards)
