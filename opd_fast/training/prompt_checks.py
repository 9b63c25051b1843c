"""A run's prompt files, read and held against its rewards before anything heavy begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from opd_fast.config import Config, TeacherConfig
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import SUFFIXES, Split, bundled_remedy, held_out, is_bundled, resolve_source
from opd_fast.config.validate import no_held_out
from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.errors import UserError, one_line


def read_prompts(key: str, source: str, split: Split) -> list[Prompt]:
    """The prompts of a setting's file.

    Raises:
        UserError: the file is missing, or a line of it cannot be read; the message names the setting, file and line.
    """
    remedy = f"give a file ({', '.join(SUFFIXES)}), a folder with one for each split, or bundled/NAME"
    path = resolve_source(source, "prompts").path
    assert path is not None  # prompts are never on the hub
    if is_bundled(source) and not path.is_dir():
        raise UserError(key, f"{source} is not in the package", bundled_remedy(source, "prompts"))
    if path.is_dir() and not any(p.suffix in SUFFIXES for p in path.glob(f"{split}*")):
        raise UserError(key, f"{source} has no prompt file {split}*", remedy)
    if not path.is_dir() and not path.is_file():
        raise UserError(key, f"{source} does not exist", remedy)
    try:
        return load_prompts(source, split)
    except ValueError as error:
        problem, _, told = str(error).rpartition("; ")
        raise UserError(key, problem or told, told if problem else "fix that line, or take it out") from error


def read_held_out(key: str, prompts: str) -> None:
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


def judged_prompts(config: Config) -> Iterator[tuple[str, str, Split, list[str]]]:
    """(setting, source, split, rewards) of every prompt file whose images a run judges: those that it learns from
    rewards on, and those of its evaluations."""
    from opd_fast.rewards import evaluated_rewards, reward_terms

    learns = method_spec(config).learns_from_rewards(config)
    for i, teacher in enumerate(config.teachers):
        rewards = [] if teacher.reward is None else [term.reward for term in reward_terms(teacher.reward)]
        if rewards and learns and i in config.trained:
            yield f"teachers[{i}].prompts", teacher.prompts, "train", rewards
        if config.evaluates(teacher) and (file := _held_out(teacher)) is not None:
            named = "prompts" if teacher.eval_prompts is None else "eval_prompts"
            yield f"teachers[{i}].{named}", str(file), "test", evaluated_rewards(teacher, config.evaluation.rewards)


def _held_out(teacher: TeacherConfig) -> Path | None:
    """The file of a task's evaluations; None where it cannot be read, which `problems` reports."""
    try:
        return held_out(teacher.prompts, teacher.eval_prompts)
    except ValueError:
        return None


def metadata_problems(config: Config) -> Iterator[UserError]:
    """Yield what the rewards lack in the prompts that they judge, the first line of each file.

    Files and rewards that cannot be read themselves are skipped, because `problems` reports them.
    """
    from opd_fast.rewards.metadata import check_metadata

    for key, source, split, rewards in judged_prompts(config):
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
