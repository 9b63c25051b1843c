"""The configuration: defaults, layers, strictness, round trips, resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from opd_fast.config import Config, Solver, TeacherConfig
from opd_fast.config.command_line import Command, parse, read_config, recipes
from opd_fast.config.paths import looks_like_hub_id
from opd_fast.config.serialize import changed, config_hash, flatten, from_dict, leaves, teacher_leaves, to_dict, to_yaml
from opd_fast.config.validate import validate
from opd_fast.errors import UserError

TEACHER = {"name": "a", "weights": "org/a", "prompts": "a.txt"}


def made(**sections: Any) -> Config:
    """A valid configuration with some values set."""
    return from_dict({"teachers": [TEACHER], **sections})


def test_defaults_are_the_documented_ones() -> None:
    flat = flatten(made())
    for key, value in {
        "model.path": "bundled",
        "model.resolution": None,
        "student.rank": 32,
        "student.alpha": 64.0,
        "model.guidance_convention": "pipeline",
        "student.guidance": None,
        "teachers[0].guidance": None,
        "sampler.solver": "flow_sde",
        "sampler.steps": 10,
        "sampler.eta": 0.7,
        "objective.variance": "exact",
        "train.rounds": 80,
        "train.samples_per_task": 8,
        "train.lr": 1e-3,
        "train.clip": 1.0,
        "checkpoint.every": 20,
        "checkpoint.keep": 3,
        "evaluation.prompts": 64,
        "engine.placement": "merged",
        "logging.tensorboard": True,
    }.items():
        assert flat[key] == value, key


def test_solvers_are_those_of_the_solver_tables() -> None:
    from opd_fast.config import DETERMINISTIC
    from opd_fast.solvers import SOLVERS, STOCHASTIC

    assert get_args(Solver) == SOLVERS
    assert set(DETERMINISTIC) == set(SOLVERS) - set(STOCHASTIC)


def test_every_setting_is_explained() -> None:
    for key, (_, _, help) in {**leaves(), **teacher_leaves()}.items():
        assert len(help) > 3, key


@pytest.mark.parametrize("name", ["bundled", "sd35-mopd", "sd35-single-teacher", "flux-mopd"])
def test_recipes_parse(name: str) -> None:
    command = parse([name])
    assert command.recipe == name
    assert name in recipes()
    assert command.run_dir.parent == Path("runs")
    assert command.run_dir.name.startswith(f"{name}-")
    assert command.config.teachers


def test_the_default_recipe_is_bundled() -> None:
    assert parse([]).config == parse(["bundled"]).config
    assert [t.reward for t in parse([]).config.teachers] == ["composition", "text", "colour"]


def test_published_settings() -> None:
    """Guided student, unguided GenEval teacher, ODE, 72 samples a step."""
    config = parse(["sd35-mopd"]).config
    assert config.student.guidance == 4.5
    assert [t.guidance for t in config.teachers] == [1.0, 4.5, 4.5]
    assert (config.sampler.solver, config.sampler.steps, config.train.lr) == ("ode", 10, 3e-4)
    assert config.train.samples_per_task * len(config.teachers) == 72
    single = parse(["sd35-single-teacher"]).config
    assert {k.split("[")[0] for k in changed(config, single)} == {"teachers"}


def test_layers_default_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.dump({"teachers": [TEACHER], "train": {"lr": 2e-3, "rounds": 7}, "model": None}))
    command = parse([str(file), "--train.rounds", "9", "--train.betas", "[0.8, 0.95]", "--seed", "3", "--dry-run"])
    train = command.config.train
    assert (train.lr, train.rounds, train.samples_per_task, train.betas, train.seed) == (2e-3, 9, 8, (0.8, 0.95), 3)
    assert command.dry_run
    assert command.run_dir.name.startswith("mine-")


def test_teachers_from_the_command_line(tmp_path: Path) -> None:
    given = parse(["--teachers", '[{"name": "x", "weights": "org/x", "prompts": "p.txt", "guidance": 2}]']).config
    assert given.teachers == [TeacherConfig(name="x", weights="org/x", prompts="p.txt", guidance=2.0)]
    assert isinstance(given.teachers[0].guidance, float)
    added = parse(["--teachers+", "{name: x, weights: org/x, prompts: p.txt}"]).config
    assert [t.name for t in added.teachers] == ["composition", "text", "colour", "x"]


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = made(
        train={"lr": 1e-5, "betas": [0.5, 0.75], "eps": 1e-12, "micro_batch": None},
        student={"targets": ["attn.to_q", "attn.to_k"], "start": None},
        sampler={"solver": "cps", "eta": 1.0},
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = read_config(path)
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert isinstance(again.train.betas, tuple)
    assert from_dict(to_dict(config)) == config


def test_hash_follows_what_changes_numbers() -> None:
    base = made()
    assert config_hash(made(train={"lr": 2e-3})) != config_hash(base)
    assert config_hash(made(logging={"tensorboard": False}, checkpoint={"every": 1})) == config_hash(base)
    assert len(config_hash(base)) == 12


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"sampler": {"eta": 0.0}}, "sampler.eta", "solver ode"),
    ({"sampler": {"eta": -0.1}}, "sampler.eta", "0 or more"),
    ({"sampler": {"eta": -0.1, "solver": "ode"}}, "sampler.eta", "0 or more"),
    ({"sampler": {"eta": 1.5, "solver": "ddim"}}, "sampler.eta", "(0, 1]"),
    ({"sampler": {"steps": 1}}, "sampler.steps", "2 or more"),
    ({"sampler": {"steps": 0, "train_last": True}}, "sampler.steps", "1 or more"),
    ({"train": {"rounds": -1}}, "train.rounds", "0 or more"),
    ({"train": {"samples_per_task": 0}}, "train.samples_per_task", "1 or more"),
    ({"train": {"micro_batch": 0}}, "train.micro_batch", "1 or more"),
    ({"train": {"lr": 0.0}}, "train.lr", "positive"),
    ({"train": {"lr": math.nan}}, "train.lr", "finite"),
    ({"train": {"clip": 0.0}}, "train.clip", "positive"),
    ({"train": {"ema": 1.0}}, "train.ema", "below 1"),
    ({"train": {"betas": [0.9, 1.0]}}, "train.betas[1]", "below 1"),
    ({"train": {"warmup": 80}}, "train.warmup", "shorten"),
    ({"student": {"rank": 0}}, "student.rank", "1 or more"),
    ({"student": {"guidance": -1.0}}, "student.guidance", "0 or more"),
    ({"checkpoint": {"keep": 0}}, "checkpoint.keep", "1 or more"),
    ({"model": {"resolution": 0}}, "model.resolution", "1 or more"),
    ({"model": {"dtype": "bfloat16"}, "engine": {"precision": "float32"}}, "engine.precision", "model.dtype"),
    ({"teachers": []}, "teachers", "at least one"),
    ({"teachers": [TEACHER, TEACHER]}, "teachers[1].name", "own name"),
    ({"teachers": [{**TEACHER, "name": "a/b"}]}, "teachers[0].name", "letters"),
    ({"teachers": [{**TEACHER, "guidance": -1.0}]}, "teachers[0].guidance", "0 or more"),
    ({"teachers": [{**TEACHER, "weight": 0.0}]}, "teachers[0].weight", "positive"),
    ({"objective": {"kind": "ppo"}, "sampler": {"solver": "ode"}}, "objective.kind", "flow_sde"),
    ({"objective": {"kind": "ppo"}, "sampler": {"solver": "cps", "train_last": True}}, "sampler.train_last", "false"),
    ({"objective": {"reward_gradient": "detached"}}, "objective.reward_gradient", "ppo"),
    ({"objective": {"clamp": 5.0}}, "objective.clamp", "ppo"),
    ({"objective": {"log_prob": "published"}}, "objective.log_prob", "ppo and sampler.solver cps"),
    ({"objective": {"kind": "ppo", "log_prob": "published"}}, "objective.log_prob", "sampler.solver cps"),
    ({"objective": {"kind": "velocity", "variance": "published"}}, "objective.variance", "kind kl"),
    ({"objective": {"kind": "ppo", "clamp": -5.0}}, "objective.clamp", "positive"),
    ({"objective": {"anchor_weight": 0.1}}, "objective.anchor_weight", "objective.anchor"),
    ({"objective": {"anchor": "base", "anchor_weight": 0.0}}, "objective.anchor_weight", "positive"),
    ({"objective": {"queries": 10}}, "objective.queries", "1 to 9"),
    ({"objective": {"queries": 0}}, "objective.queries", "1 to 9"),
    ({"objective": {"kind": "ppo", "queries": 1}}, "objective.queries", "kl"),
    ({"objective": {"query_law": "beta"}}, "objective.query_law", "objective.queries"),
    ({"objective": {"queries": 1, "query_beta": 5.0}}, "objective.query_beta", "query_law beta"),
]


@pytest.mark.parametrize(("sections", "key", "remedy"), BAD, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(BAD)])
def test_impossible_values_are_refused(sections: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(made(**sections))
    assert caught.value.key == key
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"solver": "ode", "eta": 0.0}},
        {"sampler": {"solver": "ode"}, "objective": {"kind": "kl"}},
        {"objective": {"kind": "l2"}},
        {"objective": {"kind": "ppo", "reward_gradient": "return_to_go", "clamp": 5.0, "anchor": "base"}},
        {"objective": {"queries": 9, "query_law": "beta", "query_alpha": 2.0, "query_weights": "law"}},
        {"sampler": {"steps": 1, "train_last": True}},
        {"student": {"guidance": 4.5}},
        {"student": {"kind": "full"}, "engine": {"placement": "shared"}},
        {"parallel": {"strategy": "hsdp", "shard_size": 4}},
        {"model": {"dtype": "float32"}, "engine": {"precision": "tf32"}},
    ],
)
def test_possible_combinations_pass(sections: dict[str, Any]) -> None:
    validate(made(**sections))


def test_an_absent_logger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.wandb: .*pip install"):
        validate(made(logging={"wandb": True, "tensorboard": False}))
    with pytest.raises(UserError, match=r"logging\.tensorboard: .*false"):
        validate(made())


# --- resuming ---------------------------------------------------------------------------------------------------------


def resumed(tmp_path: Path, *argv: str) -> Command:
    (tmp_path / "config.yaml").write_text(to_yaml(made(train={"rounds": 10, "lr": 5e-4})))
    return parse(["--resume", str(tmp_path), *argv])


def test_resume_reads_the_run(tmp_path: Path) -> None:
    command = resumed(tmp_path)
    assert command.resume
    assert command.run_dir == tmp_path
    assert command.config == made(train={"rounds": 10, "lr": 5e-4})


def test_resume_allows_what_changes_no_learning(tmp_path: Path) -> None:
    options = ["--train.rounds", "20", "--evaluation.every", "5", "--checkpoint.keep", "1", "--logging.tensorboard"]
    config = resumed(tmp_path, *options, "false", "--train.lr", "5e-4", "--run-dir", str(tmp_path)).config
    assert (config.train.rounds, config.evaluation.every, config.checkpoint.keep) == (20, 5, 1)


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["--train.lr", "1e-3"], "train.lr"),
        (["--seed", "1"], "train.seed"),
        (["--sampler.solver", "ode"], "sampler.solver"),
        (["--teachers", "[{name: b, weights: org/a, prompts: a.txt}]"], "teachers[0].name"),
        (["--teachers", "[]"], "teachers[0].name"),
        (["--run-dir", "elsewhere"], "--run-dir"),
        (["bundled"], "RECIPE"),
    ],
)
def test_resume_refuses_the_rest(tmp_path: Path, argv: list[str], key: str) -> None:
    with pytest.raises(UserError) as caught:
        resumed(tmp_path, *argv)
    assert caught.value.key == key


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--resume: no config\.yaml"):
        parse(["--resume", str(tmp_path)])


def test_every_resumable_key_exists() -> None:
    from opd_fast.config.serialize import RESUMABLE

    for prefix in RESUMABLE:
        assert any(key.startswith(prefix) for key in leaves())


@pytest.mark.parametrize(
    ("text", "hub"),
    [("org/name", True), ("org/name/sub/lora", True), ("/a/b", False), ("./a/b", False), ("a", False)],
)
def test_hub_ids(text: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(text) is hub
    (tmp_path / "org").mkdir()
    assert not looks_like_hub_id(text)  # a folder of that name makes it a path with a typing mistake
