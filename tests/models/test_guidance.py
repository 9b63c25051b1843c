"""What a guidance setting means: each family's convention, its training, older runs, and what is refused.

That a family's images are its pipeline's at every guidance stands in its own file (tests/test_models_*.py).
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from benchmarks.models import gradients, relative_error, write_random_lora
from opd_fast import evaluate as evaluation
from opd_fast.config import Config, StudentConfig, TeacherConfig
from opd_fast.config.command_line import parse
from opd_fast.config.serialize import from_dict, to_dict, to_yaml
from opd_fast.distributed.plan import Planner, make_plan
from opd_fast.errors import UserError
from opd_fast.models import SD3, DiffusionModel, ZImage, load_model
from opd_fast.models.guidance import Conditioning
from opd_fast.models.qwen_image import QwenImage
from opd_fast.objectives import Surrogate, step_weights
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.methods.grpo import GRPO
from opd_fast.training.preflight import refusals
from opd_fast.training.rollout import one_pass
from opd_fast.training.setup import prepare
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers
from tests import tiny_qwen, tiny_z_image
from tests.runs import change
from tests.tiny_flux import save_tiny_flux

pytestmark = pytest.mark.usefixtures("one_thread")


def check(config: Config) -> None:
    """Raise what a run of `config` is refused for first."""
    for error in refusals(Planner(config), sharded=False, fetches=True):
        raise error


def family(kind: type[DiffusionModel], convention: Any = "pipeline") -> DiffusionModel:
    """A model of which only guidance is asked."""
    model = object.__new__(kind)
    model.guidance_convention = convention
    return model


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image.save_tiny(tmp_path_factory.mktemp("z_image") / "pipeline")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save_tiny(tmp_path_factory.mktemp("qwen") / "pipeline")


# --- the number -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "convention", "expected"),
    [
        (SD3, "pipeline", {None: 1, 0.0: 1, 0.5: 1, 1.0: 1, 4.5: 4.5}),
        (QwenImage, "pipeline", {None: 1, 0.0: 1, 0.5: 1, 1.0: 1, 4.0: 4}),
        (ZImage, "pipeline", {None: 1, 0.0: 1, 0.5: 1.5, 1.0: 2, 5.0: 6}),
        (SD3, "linear", {None: 1, 0.0: 0, 0.5: 0.5, 1.0: 1, 4.5: 4.5}),
        (QwenImage, "linear", {None: 1, 0.0: 0, 0.5: 0.5, 1.0: 1, 4.0: 4}),
        (ZImage, "linear", {None: 1, 0.0: 0, 0.5: 0.5, 1.0: 1, 5.0: 5}),
    ],
)
def test_strength(kind: type[DiffusionModel], convention: str, expected: dict[float | None, float]) -> None:
    model = family(kind, convention)
    assert {value: model.strength(value) for value in expected} == expected
    assert {value: model.is_guided(value) for value in expected} == {v: g != 1 for v, g in expected.items()}
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="is not a finite number of at least 0"):
            model.strength(wrong)


# --- the rescaled velocity --------------------------------------------------------------------------------------------


def test_a_token_without_norm_gives_no_nan(qwen: Path) -> None:
    model = load_model(qwen, device="cpu", dtype=torch.float32)
    guided, cond = torch.randn(2, *model.latent_shape(32)), torch.randn(2, *model.latent_shape(32))
    guided[0, :, :2, :2] = 0
    guided.requires_grad_()
    found = model.rescale_guided(guided, cond)
    assert not found[0, :, :2, :2].any()
    found.sum().backward()
    assert guided.grad is not None
    assert bool(torch.isfinite(guided.grad).all())


class Team:
    """A student of a family, two teachers and an anchor, in a placement; three samples of two tasks."""

    def __init__(self, path: Path, folder: Path, guidance: tuple[float, float, float], placement: Any) -> None:
        self.model = load_model(path, device="cpu", dtype=torch.float32, max_sequence_length=32)
        targets, names = self.model.targets("attention"), ("a", "b", "anchor")
        loras = [
            write_random_lora(self.model.transformer, folder / name, rank=2, alpha=4.0, targets=targets, std=0.2)
            for name in names
        ]
        self.configs = [
            TeacherConfig(name=name, weights=str(lora), prompts="", guidance=g)
            for name, lora, g in zip(names, loras, (*guidance[1:], guidance[0]), strict=True)
        ]
        self.teachers = load_teachers(self.model, self.configs[:2], placement)
        self.anchor = load_teachers(self.model, self.configs[2:], placement)
        self.student = Student.build(self.model, StudentConfig(rank=2, alpha=4.0, guidance=guidance[0]))
        if placement == "shared":
            assert self.teachers.group() == 2
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        self.table = solver_table("flow_sde", self.model.sigmas(3, 32), 0.7)
        shape = self.model.latent_shape(32)
        self.batch = RoundBatch(
            text=self.model.encode(["a red square", "two circles", ""]),
            negative=self.model.encode([""]),
            tasks=((0, slice(0, 2)), (1, slice(2, 3))),
            keys=torch.arange(3),
            scale=torch.tensor([0.5, 0.25, 1.5]),
            shape=shape,
            x=torch.randn(3, *shape, generator=generator),
            noise=torch.randn(3, 3, *shape, generator=generator),
        )

    def round(self, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        weight = step_weights(self.table, "kl")
        anchor = (self.anchor, 0.3)
        out = one_pass(
            self.model, self.student, self.teachers, self.batch, self.table, weight, anchor=anchor, **options
        )
        return out.losses, gradients(dict(self.student.named_parameters()))

    def velocity(self, transformer: Any, x: Tensor, sigma: Tensor, rows: slice, scale: float) -> Tensor:
        """Qwen-Image's pipeline's: u + g (c - u), each 2x2 token of the norm that c's has."""
        text = self.batch.text.index(rows)
        cond = self.model.velocity(transformer, x[rows], sigma, text)
        if scale <= 1:
            return cond
        assert self.batch.negative is not None
        uncond = self.model.velocity(transformer, x[rows], sigma, self.batch.negative.expand(len(text)))
        guided = uncond + scale * (cond - uncond)

        def norm(v: Tensor) -> Tensor:
            squares = torch.nn.functional.avg_pool2d(v.square().sum(1, keepdim=True), 2) * 4
            return torch.nn.functional.interpolate(squares.sqrt(), scale_factor=2, mode="nearest")

        return guided * norm(cond) / norm(guided)


@pytest.mark.parametrize("ppo", [False, True], ids=["kl", "ppo"])
@pytest.mark.parametrize("placement", ["merged", "shared"])
def test_training_under_a_rescaled_guidance(qwen: Path, tmp_path: Path, placement: str, ppo: bool) -> None:
    """Losses and gradients of a round are those of the pipeline's velocities, written out: of the student, of a guided
    and an unguided teacher, and of the anchor, which has the student's guidance."""
    guidance = (4.0, 3.0, 1.0)
    team = Team(qwen, tmp_path, guidance, placement)
    batch, table, student = team.batch, team.table, team.student
    assert batch.x is not None
    assert batch.noise is not None
    surrogate = Surrogate("live", 1.0, None) if ppo else None
    losses, found = team.round(surrogate=surrogate)
    x, total, kls = batch.x, torch.zeros(()), []
    for j in range(2):
        sigma = table.sigmas[j].float()
        v = team.velocity(student.transformer, x, sigma, slice(0, 3), guidance[0])
        with torch.no_grad():
            taught = []
            for index, rows in batch.tasks:
                with team.teachers.active(index) as transformer:
                    taught.append(team.velocity(transformer, x, sigma, rows, guidance[1 + index]))
            with team.anchor.active(0) as transformer:
                held = team.velocity(transformer, x, sigma, slice(0, 3), guidance[0])
        team.model.transformer.set_adapter("student")  # type: ignore[operator]
        kl, pull = (
            float(table.weight[j]) * (v - other).square().flatten(1).mean(1) for other in (torch.cat(taught), held)
        )
        mean = float(table.a[j]) * x + float(table.b[j]) * v
        following = (mean + float(table.std[j]) * batch.noise[j]).detach()
        logp = -((following - mean) ** 2 / (2 * float(table.std[j]) ** 2)).flatten(1).mean(1)
        loss = kl + kl.detach() * (logp - logp.detach()) if ppo else kl
        total = total + (batch.scale * (loss + 0.3 * pull)).sum()
        kls.append(batch.scale * (kl + 0.3 * pull).detach())
        x = following
    for parameter in student.parameters():
        parameter.grad = None
    total.backward()
    torch.testing.assert_close(losses, torch.stack(kls), rtol=1e-4, atol=0)
    assert relative_error(found, gradients(dict(student.named_parameters()))) <= 1e-5


def test_the_linear_convention_does_not_rescale(qwen: Path, tmp_path: Path) -> None:
    rescaled = Team(qwen, tmp_path, (4.0, 3.0, 1.0), "merged")
    linear = copy.copy(rescaled.model)
    linear.guidance_convention = "linear"
    asked = [
        Conditioning.build(model, rescaled.batch.text, rescaled.batch.negative, 4.0)
        for model in (rescaled.model, linear)
    ]
    assert [(c.guided, c.branch_guidance) for c in asked] == [(True, 1.0), (True, 4.0)]
    assert rescaled.batch.x is not None
    sigma = torch.tensor(0.7)
    one, two = (
        rescaled.student.velocities(m, rescaled.batch.x, sigma, c)
        for m, c in zip((rescaled.model, linear), asked, strict=True)
    )
    assert one.uncond is None
    assert two.uncond is not None
    torch.testing.assert_close(
        one.cond, linear.rescale_guided(two.uncond + 4 * (two.cond - two.uncond), two.cond), rtol=1e-5, atol=1e-5
    )


# --- whole runs -------------------------------------------------------------------------------------------------------


def bright(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3))


def settings(path: Path, folder: Path, **changes: Any) -> Config:
    (folder / "p.txt").write_text("a red circle\na blue square\n")
    task = {"name": "t", "weights": str(path), "prompts": str(folder / "p.txt")}
    data = {
        "model": {"path": str(path), "resolution": 32, "max_sequence_length": 32, "text_cache": "off"},
        "student": {"rank": 2, "alpha": 4.0},
        "teachers": [task],
        "sampler": {"steps": 3},
        "train": {"rounds": 2, "samples_per_task": 4},
        "evaluation": {"every": 0},
        "engine": {"attention": "native"},
    }
    return change(from_dict(data), changes)


def test_grpo_under_a_rescaled_guidance(qwen: Path, tmp_path: Path) -> None:
    """The rollout's means are those of the pipeline's velocity, and the ratio is 1 before the first update."""
    config = settings(qwen, tmp_path, student__guidance=4.0)
    config.teachers[0].weights, config.teachers[0].reward = "base", f"{__name__}:bright"
    changes: dict[str, Any] = {"train__method": "grpo", "rl__images_per_prompt": 2, "rl__updates": 1, "rl__kl": 0.04}
    method = GRPO(prepare(change(config, changes), log=lambda text: None))
    setup, table = method.setup, method.setup.table
    method._drawn = drawn = method._draw(0)
    rows = torch.arange(4)
    asked = Conditioning.build(setup.model, method.text(0, rows), setup.text.negative, 4.0)
    for j in range(2):
        x = drawn["x"][:, j]
        with torch.no_grad():
            both = setup.model.velocity(
                setup.student.transformer, torch.cat([x, x]), table.sigmas[j].float(), asked.text
            )
        cond, uncond = both.chunk(2)
        v = setup.model.rescale_guided(uncond + 4 * (cond - uncond), cond)
        mean = float(table.a[j]) * x + float(table.b[j]) * v
        torch.testing.assert_close(drawn["mean"][:, j], mean, rtol=1e-4, atol=1e-4)
    losses = method.accumulate(0, torch.amp.GradScaler("cpu", enabled=False))
    # -A at ratio 1, and no KL while the student is the base.
    wanted = -drawn["advantage"] / 4 / 2
    torch.testing.assert_close(losses, wanted.float().expand(2, 4), rtol=1e-4, atol=1e-6)
    assert method.metrics(0, losses)["clipped"] == 0
    assert any(bool(p.grad.any()) for p in setup.student.parameters() if p.grad is not None)


def test_a_run_takes_the_convention_from_its_settings(z_image: Path, tmp_path: Path) -> None:
    found = {}
    for convention in ("pipeline", "linear"):
        config = settings(z_image, tmp_path, model__guidance_convention=convention, student__guidance=2.0)
        config.teachers[0].guidance = 1.0
        said: list[str] = []
        setup = prepare(config, log=said.append)
        meaning = "guidance_scale of ZImagePipeline, 0 is unguided"
        meaning = meaning if convention == "pipeline" else "g of v = u + g (c - u), 1 is unguided"
        assert f"guidance: {meaning}" in said
        asked = Conditioning.build(setup.model, setup.text.negative, setup.text.negative, setup.student.guidance)
        batch = RoundBatch(
            setup.text.negative, setup.text.negative, ((0, slice(0, 1)),), torch.arange(1), torch.ones(1), setup.shape
        )
        found[convention] = (asked.branch_guidance, float(setup.teachers.condition(batch).guidance))
        plan = make_plan(config)
        assert (plan.student_rows, plan.teacher_rows["t"]) == (8, 8 if convention == "pipeline" else 4)
    assert found == {"pipeline": (3.0, 2.0), "linear": (2.0, 1.0)}


def test_the_command_line_judges_by_the_pipeline_s_number(z_image: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")

    def judged(*options: str) -> tuple[float, dict[str, Any]]:
        argv = ["--model", str(z_image), "--prompts", str(tmp_path / "p.txt"), "--rewards", f"{__name__}:bright"]
        argv += ["--grid", "0", "--steps", "2", "--resolution", "32", "--out", str(tmp_path / "out"), *options]
        assert evaluation.main(argv) == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        return results["rewards"]["p"][f"{__name__}:bright"], results["settings"]

    plain, recorded = judged()
    assert (recorded["guidance"], recorded["guidance_convention"]) == (0.0, "pipeline")
    assert judged("--guidance", "0")[0] == plain
    assert judged("--guidance", "1", "--guidance-convention", "linear")[0] == plain
    guided, recorded = judged("--guidance", "3")
    assert recorded["guidance"] == 3.0
    assert abs(guided - plain) > 1e-4
    assert judged("--guidance", "4", "--guidance-convention", "linear")[0] == guided


@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_the_command_line_refuses_what_is_no_guidance(
    z_image: Path, tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(z_image), "--prompts", "p.txt", "--rewards", "colour", "--guidance", value]
    assert evaluation.main(argv) == 2
    assert "error: guidance: " in capsys.readouterr().err


def test_what_a_model_has_no_guidance_for_is_refused_by_name(z_image: Path, tmp_path: Path) -> None:
    schnell = save_tiny_flux(tmp_path / "schnell", schnell=True)
    for value, said in ((0.0, None), (1.0, None), (3.5, r"teachers\.t\.guidance: 3.5 with a flux model.*give 1")):
        config = settings(schnell, tmp_path)
        config.teachers[0].guidance = value
        if said is None:
            check(config)
        else:
            with pytest.raises(UserError, match=said):
                check(config)
    nft: dict[str, Any] = {"train__method": "nft", "sampler__solver": "dpm2", "rl__images_per_prompt": 2}
    for value, said in ((0.0, None), (1.0, r"student\.guidance: 1 under nft, which has none; give 0")):
        config = settings(z_image, tmp_path)
        config.teachers[0].weights, config.teachers[0].reward = "base", "colour"
        change(config, {**nft, "student__guidance": value})
        if said is None:
            check(config)
        else:
            with pytest.raises(UserError, match=said):
                check(config)


# --- runs of earlier versions -----------------------------------------------------------------------------------------


def earlier(config: Config) -> dict[str, Any]:
    """config.yaml as it was before guidance had a convention, when unguided was 1."""
    data = to_dict(config)
    del data["model"]["guidance_convention"]
    del data["rl"]["log_prob"], data["objective"]["log_prob"]
    data["student"]["guidance"] = data["student"]["guidance"] or 1.0
    for teacher in data["teachers"]:
        teacher["guidance"] = 1.0 if teacher["guidance"] is None else teacher["guidance"]
    return data


def test_an_earlier_run_goes_on_with_the_guidance_it_had(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, student__guidance=4.0)
    config.teachers[0].guidance = 0.5
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier(config)))
    for argv in (["--resume", str(tmp_path)], [str(tmp_path / "config.yaml")]):
        found = parse(argv).config
        assert found.model.guidance_convention == "linear"
        assert (found.student.guidance, found.teachers[0].guidance) == (4.0, 0.5)
        assert found.rl.log_prob == "exact"
    with pytest.raises(UserError, match=r"model\.guidance_convention: a resumed run keeps its value \(linear\)"):
        parse(["--resume", str(tmp_path), "--model.guidance_convention", "pipeline"])
    # What a run writes now says so itself, and stays what it is.
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(["--resume", str(tmp_path)]).config == config
    # A file that a user writes has the sections it changes.
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({k: earlier(config)[k] for k in ("model", "teachers")}))
    assert parse([str(tmp_path / "mine.yaml")]).config.model.guidance_convention == "pipeline"


def test_an_earlier_run_without_teachers_and_one_in_stages_go_on(tmp_path: Path) -> None:
    """Teachers of reinforcement learning stood at 1, the default then, which nothing reads."""
    config = settings(tmp_path, tmp_path)
    config.teachers[0].weights, config.teachers[0].reward = "base", "colour"
    change(config, {"train__method": "grpo", "rl__images_per_prompt": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(earlier(config)))
    found = parse(["--resume", str(tmp_path)]).config
    assert (found.teachers[0].guidance, found.model.guidance_convention) == (None, "linear")
    stages = {"stages": [{"name": name, **earlier(config)} for name in ("first", "second")]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stages))
    command = parse(["--resume", str(tmp_path)])
    assert [stage.config.model.guidance_convention for stage in command.stages] == ["linear", "linear"]
