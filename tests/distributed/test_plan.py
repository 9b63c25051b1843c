"""The plan's numbers against the real thing: the tiny model, loaded, wrapped and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opd_fast import train
from opd_fast.config import Config
from opd_fast.config.serialize import from_dict
from opd_fast.distributed.memory import GIB, RESERVE
from opd_fast.distributed.plan import make_plan
from opd_fast.distributed.resolve import pick_dtype, resolve
from opd_fast.models import load_model
from opd_fast.models.lora.files import save_lora
from opd_fast.training.student import Student
from tests.runs import random_lora
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("plan") / "pipeline"
    return save_tiny(folder)


def made(pipeline: Path, **sections: Any) -> Config:
    teachers = [
        {"name": "a", "weights": "org/a", "prompts": "p.txt", "reward": "text", "eval_prompts": "p.txt"},
        {"name": "b", "weights": "org/b", "prompts": "p.txt", "guidance": 4.5},
    ]
    data = {"model": {"path": str(pipeline), "resolution": 64}, "teachers": teachers, **sections}
    return from_dict(data)


@pytest.mark.parametrize(("kind", "targets"), [("lora", "attention"), ("lora", ["attn.to_q"]), ("full", "attention")])
def test_parameters_and_memory(pipeline: Path, kind: str, targets: Any) -> None:
    config = made(pipeline, student={"kind": kind, "rank": 4, "targets": targets}, train={"samples_per_task": 2})
    plan = make_plan(config)
    model = load_model(str(pipeline), device="cpu", dtype=torch.float32)
    assert plan.latent == model.latent_shape(64)
    assert plan.workload.parameters == sum(p.numel() for p in model.transformer.parameters())
    assert plan.text_tokens == model.encode(["x"]).sequence.shape[1]
    student = Student.build(model, config.student)
    assert plan.workload.trainable == sum(p.numel() for p in student.parameters())
    modules = [name for name, _ in student.named_parameters() if ".lora_A." in name]
    assert plan.lora_modules == (len(modules) if kind == "lora" else None)
    assert plan.bytes["base"] == plan.workload.parameters * 4
    assert plan.bytes["teachers"] == 2 * plan.workload.parameters * 4
    five = ("trained weights", "gradients", "optimizer", "average")  # the optimizer keeps two
    assert sum(plan.bytes[purpose] for purpose in five) == plan.workload.trainable * 4 * 5


def test_rows_of_a_round(pipeline: Path) -> None:
    plan = make_plan(made(pipeline, student={"guidance": 4.5}, train={"samples_per_task": 3, "micro_batch": 4}))
    assert plan.samples == 6
    assert plan.student_rows == 12
    assert plan.teacher_rows == {"a": 3, "b": 6}
    assert plan.workload.forwards_per_step(plan.devices) == 2
    assert plan.workload.steps == 9
    assert plan.round_rows == {"student forward": 108, "student backward": 108, "teacher forward": 81}
    assert make_plan(made(pipeline, sampler={"train_last": True})).workload.steps == 10


def test_rows_of_the_rival_objectives(pipeline: Path) -> None:
    plan = make_plan(made(pipeline, objective={"kind": "ppo", "reward_gradient": "return_to_go", "anchor": "base"}))
    plain = make_plan(made(pipeline))
    assert plan.round_rows == {
        "student forward": 2 * plain.round_rows["student forward"],
        "student backward": plain.round_rows["student backward"],
        "teacher forward": 2 * plain.round_rows["teacher forward"],
        "anchor forward": plain.samples * 9,
    }
    assert plan.bytes == plain.bytes
    held = make_plan(made(pipeline, objective={"anchor": "org/name"}))
    assert held.bytes["teachers"] == 3 * plain.workload.parameters * 4
    queried = make_plan(made(pipeline, objective={"queries": 3, "query_law": "beta"}))
    assert queried.round_rows["student backward"] == round(plain.samples * queried.asked_steps)
    assert 2.5 < queried.asked_steps <= 3


def test_solver_rows_are_the_engine_s(pipeline: Path) -> None:
    from opd_fast.objectives import step_weights
    from opd_fast.solvers import solver_table

    config = made(pipeline, sampler={"solver": "cps", "eta": 0.8, "steps": 5}, objective={"kind": "l2"})
    plan = make_plan(config)
    model = load_model(str(pipeline), device="cpu", dtype=torch.float32)
    table = solver_table("cps", model.sigmas(5, 64), 0.8)
    for column in ("sigmas", "a", "b", "h", "std"):
        assert torch.equal(getattr(plan.table, column), getattr(table, column)), column
    assert plan.weight == step_weights(table, "l2").tolist()


def test_evaluation_cost(pipeline: Path) -> None:
    evaluation = {"every": 4, "prompts": 8, "steps": 5, "guidance": 2.0}
    plan = make_plan(made(pipeline, evaluation=evaluation, train={"rounds": 10}))
    assert plan.evaluations == 3  # after 4, 8 and 10 rounds
    assert plan.evaluation_rows == (3 + 1 + 2) * 1 * 8 * 5 * 2  # one task has a reward; base and two teachers once
    assert make_plan(made(pipeline, evaluation={"every": 0})).evaluations == 0


def test_shared_teachers_need_no_copies(pipeline: Path, tmp_path: Path) -> None:
    save_lora(tmp_path / "a", random_lora(0), rank=3, alpha=6)
    config = made(pipeline, engine={"placement": "shared"}, student={"rank": 4})
    guessed = make_plan(config)
    assert (
        guessed.bytes["teachers"] == 2 * 4 * guessed.workload.trainable
    )  # not on this machine: as large as the student
    config.teachers[0].weights = str(tmp_path / "a")
    own = sum(half.numel() for pair in random_lora(0).values() for half in pair)
    assert make_plan(config).bytes["teachers"] == 4 * (own + guessed.workload.trainable)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"student": {"targets": "attn"}}, r"student\.targets: unknown set 'attn'"),
        ({"student": {"targets": ["nothing"]}}, r"student\.targets: no linear layer is named nothing"),
        ({"model": {"path": "/absent"}}, "does not exist"),
    ],
)
def test_mistakes(pipeline: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(made(pipeline, **sections))


def test_auto(pipeline: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", "auto", cpu) == torch.float32
    assert pick_dtype("bfloat16", "auto", cpu) == torch.bfloat16
    assert pick_dtype("auto", "float32", gpu) == torch.float32
    if not torch.cuda.is_available():
        resolved = resolve(made(pipeline))
        assert (resolved.device, resolved.compile) == (cpu, False)
        assert resolve(made(pipeline, engine={"compile": "on"})).compile
        with pytest.raises(ValueError, match=r"engine\.precision: tf32"):
            resolve(made(pipeline, engine={"precision": "tf32"}))


def test_dry_run_prints_and_writes_nothing(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    teachers = f"[{{name: a, weights: {pipeline}, prompts: p.txt, guidance: 2}}]"
    argv = ["--teachers", teachers, "--model.path", str(pipeline), "--model.resolution", "64", "--dry-run"]
    argv += ["--train.samples_per_task", "8", "--train.lr", "0.001", "--sampler.solver", "flow_sde"]
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    for words in (
        "lr: 0.001",
        "a (16,4,8,8) a step",
        "16 image + 77 text",
        "15 LoRA modules",
        "0.75500",
        "runs/bundled-",
    ):
        assert words in text, words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.txt"]
    assert train.main([*argv, "--model.resolution", "60"]) == 2
    assert "resolution 60 is not a multiple of 16" in capsys.readouterr().err


def test_plan_for_several_devices(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = made(pipeline, train={"samples_per_task": 4, "micro_batch": 3})
    alone, four = make_plan(config), make_plan(config, 4, 24.0)
    assert (alone.strategy, alone.sent) == ("single", {})
    assert (four.strategy, four.devices, four.samples) == ("ddp", 4, 8)
    assert [plan.workload.forwards_per_step(plan.devices) for plan in (alone, four)] == [3, 1]  # 8 samples, 2 on each
    assert four.bytes["activations"] * 3 == alone.bytes["activations"] * 2
    assert four.sent == {"all-reduce": 2 * 4 * four.workload.trainable * 3 // 4}
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert make_plan(config).devices == 4
    config.parallel.strategy, config.parallel.shard_size = "hsdp", 2
    grouped = make_plan(config, 4)
    assert (grouped.strategy, grouped.shard_size) == ("hsdp", 2)
    assert grouped.bytes["base"] * 2 == alone.bytes["base"]
    with pytest.raises(ValueError, match=r"parallel\.shard_size: 2 does not divide 5 devices"):
        make_plan(config, 5)
    config.parallel.strategy = "single"
    with pytest.raises(ValueError, match=r"parallel\.strategy: single on 4 devices"):
        make_plan(config, 4)


def test_a_strategy_that_was_asked_for_is_kept_and_judged(pipeline: Path) -> None:
    plan = make_plan(made(pipeline, parallel={"strategy": "fsdp2"}), 2, 80.0)
    assert plan.strategy == "fsdp2"
    assert "auto would take ddp" in plan.reason
    tight = make_plan(made(pipeline, parallel={"strategy": "ddp"}), 2, 0.0001)
    assert tight.strategy == "ddp"
    assert "do not fit" in tight.reason


def test_options_of_a_plan(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    argv = ["--teachers", f"[{{name: a, weights: {pipeline}, prompts: p.txt}}]", "--model.path", str(pipeline)]
    argv += ["--model.resolution", "64"]
    assert train.main([*argv, "--dry-run", "--devices", "16", "--gpu-memory", "40"]) == 0
    text = capsys.readouterr().out
    for words in ("ddp on 16 device(s) of 40 GiB", "all-reduce", "merged layers", "GFLOP forward", "(traced)"):
        assert words in text, words
    for mistake, words in (
        (["--devices", "2"], "--devices: is for a plan; add --dry-run"),
        (["--dry-run", "--devices", "0"], "--devices: 0 is not above 0"),
        (["--dry-run", "--devices", "two"], "devices: 'two' is not a whole number"),
        (["--dry-run", "--gpu-memory", ".nan"], "--gpu-memory: nan is not above 0"),
    ):
        assert train.main([*argv, *mistake]) == 2
        assert words in capsys.readouterr().err


def test_blocks_are_checkpointed_where_a_round_does_not_fit(pipeline: Path) -> None:
    config = made(pipeline, train={"samples_per_task": 64})
    plain = make_plan(config)
    assert plain.workload.checkpointed == 0
    need, room = sum(plain.bytes.values()), 1 - RESERVE
    tight = make_plan(config, gpu_memory=(need / room - plain.bytes["activations"] / 4) / GIB)
    assert 0 < tight.workload.checkpointed <= tight.workload.blocks
    assert sum(tight.bytes.values()) < need
    assert "activation checkpointing of" in tight.reason
    asked = make_plan(made(pipeline, train={"samples_per_task": 64}, engine={"recompute": 1}))
    assert asked.workload.checkpointed == 1
    never = make_plan(
        made(pipeline, train={"samples_per_task": 64}, engine={"recompute": 0}),
        gpu_memory=(need / room - plain.bytes["activations"] / 4) / GIB,
    )
    assert never.workload.checkpointed == 0
    assert "engine.recompute" in never.reason
