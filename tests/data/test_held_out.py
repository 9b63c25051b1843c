"""Held-out prompts: which file they come from, how many images are drawn of them, and what is said about either."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd_fast.config import Config
from opd_fast.config.command_line import parse
from opd_fast.config.paths import held_out
from opd_fast.config.serialize import from_dict
from opd_fast.data.prompt_files import load_prompts
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError
from opd_fast.training.evaluation import EvalTask
from opd_fast.training.problems import problems
from opd_fast.training.setup import evaluation_task

RECORD = '{"prompt": "a cat", "include": []}\n'


def prompts(folder: Path, *names: str) -> Path:
    """A folder with files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(RECORD if name.endswith(".jsonl") else "prompt\na cat\na dog\n")
    return folder


def made(source: Path | str, **evaluation: object) -> Config:
    teacher = {"name": "t", "weights": "base", "prompts": str(source), "reward": "colour"}
    return from_dict({"teachers": [teacher], "evaluation": evaluation})


def asked(config: Config) -> tuple[EvalTask, list[str]]:
    """The task of the only teacher, and what is said of it."""
    said: list[str] = []
    task = evaluation_task(config.teachers[0], config, said.append)
    assert task is not None
    return task, said


@pytest.mark.parametrize(
    ("files", "source", "found"),
    [
        (("train.txt", "test.txt"), "", "test.txt"),
        (("train_metadata.jsonl", "test_metadata.jsonl"), "", "test_metadata.jsonl"),
        (("train.txt", "test.txt"), "train.txt", "test.txt"),
        (("train_metadata.jsonl", "test_metadata.jsonl"), "train_metadata.jsonl", "test_metadata.jsonl"),
        (("train.csv", "test.csv", "test.txt"), "train.csv", "test.csv"),  # of its own name before all others
        (("train_small.txt", "test.csv"), "train_small.txt", "test.csv"),
        (("train.txt",), "", None),
        (("train.txt",), "train.txt", None),
        (("prompts.txt", "test.txt"), "prompts.txt", None),  # whatever lies in the folder: it is no training split
        (("test.txt",), "test.txt", None),
        ((), "train.txt", None),
    ],
)
def test_the_test_split_beside_the_training_prompts(
    tmp_path: Path, files: tuple[str, ...], source: str, found: str | None
) -> None:
    folder = prompts(tmp_path / "p", *files)
    assert held_out(str(folder / source)) == (None if found is None else folder / found)


def test_named_and_bundled_prompts_come_from_where_they_did(tmp_path: Path) -> None:
    folder = prompts(tmp_path, "train.txt", "test.txt", "other.txt")
    assert held_out(str(folder), str(folder / "other.txt")) == folder / "other.txt"
    bundled = held_out("bundled/colour")
    assert bundled is not None
    assert bundled.parts[-2:] == ("colour", "test.txt")
    assert held_out("bundled/colour", str(folder)) == folder / "test.txt"
    prompts(tmp_path, "test.csv")
    with pytest.raises(ValueError, match="holds several of"):
        held_out(str(folder))


def test_a_run_says_which_file_it_takes(tmp_path: Path) -> None:
    folder = prompts(tmp_path, "train.txt", "test.txt")
    config = made(folder, prompts=2)
    assert not [error for error in problems(config) if "eval_prompts" in error.key]
    task, said = asked(config)
    assert task.prompts == load_prompts(folder / "test.txt")[:2]
    assert said == [f"task t: held-out prompts from {folder / 'test.txt'}"]
    config.teachers[0].eval_prompts = str(folder)
    assert asked(config) == (task, [])


def test_without_a_test_split_they_must_be_named(tmp_path: Path) -> None:
    folder = prompts(tmp_path, "train.txt")
    why = f"is missing while a reward is set, and {folder} has no test split beside it; name held-out prompts"
    found = [error for error in problems(made(folder)) if "eval_prompts" in error.key]
    assert [str(error) for error in found] == [f"teachers[0].eval_prompts: {why}"]
    with pytest.raises(UserError, match=r"^teachers\.t\.eval_prompts: is missing while a reward is set"):
        asked(made(folder))
    assert not [error for error in problems(made(folder, every=0)) if "eval_prompts" in error.key]
    (folder / "test.txt").write_text("\n")
    assert [error.problem for error in problems(made(folder)) if "eval_prompts" in error.key] == [
        f"{folder / 'test.txt'} holds no prompt"
    ]


@pytest.mark.parametrize(("several", "images"), [(1, 3), (4, 12), (None, 8)])
def test_a_short_file_is_taken_as_it_is_and_said_to_be(tmp_path: Path, several: int | None, images: int) -> None:
    folder = prompts(tmp_path, "train.txt", "test.txt")
    config = made(folder / "train.txt", prompts=8, images_per_prompt=several)
    task, said = asked(config)
    assert (len(task.prompts), task.count) == (3, images)
    assert said[1:] == [
        f"task t: 3 held-out prompts in {folder / 'test.txt'}, fewer than evaluation.prompts = 8; "
        f"an evaluation draws {images} images of them"
    ]
    config.evaluation.prompts = 2
    task, said = asked(config)
    assert (task.prompts, task.count) == (load_prompts(folder / "test.txt")[:2], 2 * (several or 1))
    assert len(said) == 1


def test_the_bundled_recipe_draws_the_images_it_has_always_drawn() -> None:
    """128 of each task, of which text has 69 prompts and colour 17: its published numbers are means over these."""
    (config,) = parse(["bundled"]).configs
    counts = {}
    for teacher in config.teachers:
        task = evaluation_task(teacher, config, lambda text: None)
        assert task is not None
        every = load_prompts(teacher.prompts, "test")
        counts[task.name] = len(task.prompts)
        assert [task.prompts[i % len(task.prompts)] for i in range(task.count)] == [
            every[i % len(every)] for i in range(128)
        ]
    assert counts == {"composition": 128, "text": 69, "colour": 17}


def test_the_plan_counts_the_images_that_are_drawn(tmp_path: Path) -> None:
    folder = prompts(tmp_path, "train.txt", "test.txt")
    sizes = {"every": 20, "prompts": 8, "steps": 5, "images_per_prompt": 2}
    models = 4 + 2  # the student after 20, 40, 60 and 80 rounds, the base and a teacher
    assert make_plan(made(folder, **sizes), 1, 80.0).evaluation_rows == models * 5 * 3 * 2
    assert make_plan(made(tmp_path / "absent", **sizes), 1, 80.0).evaluation_rows == models * 5 * 8 * 2
    started = made(folder, **sizes)
    started.student.start = "merged"  # judged before its first round, where it is not the base
    assert make_plan(started, 1, 80.0).evaluation_rows == (models + 1) * 5 * 3 * 2


def test_no_images_of_a_prompt_are_refused() -> None:
    with pytest.raises(UserError, match=r"^evaluation\.images_per_prompt: 0 is below 1"):
        parse(["bundled", "--evaluation.images_per_prompt", "0"])
    assert parse(["bundled", "--evaluation.images_per_prompt", "3"]).config.evaluation.images_per_prompt == 3
    assert parse(["bundled", "--evaluation.images_per_prompt", "null"]).config.evaluation.images(17) == 128
