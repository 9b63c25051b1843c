"""Supervised fine-tuning: its loss, a round's gradient, what is drawn, kept, learnt and refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_fast.config import Config
from opd_fast.config.command_line import parse
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.serialize import to_yaml
from opd_fast.config.validate import validate
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.seeds import SftDraw, Stream, noise_keys
from opd_fast.training.loop import train
from opd_fast.training.methods.sft import SFT, flow_matching_loss, squared_gap
from opd_fast.training.optimizer import make_optimizer
from opd_fast.training.problems import problems
from opd_fast.training.sampling import sample
from opd_fast.training.setup import prepare
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE
from tests.runs import change, settings

pytestmark = pytest.mark.usefixtures("one_thread")

REWARD = """
import torch

def bright(images, prompts):
    return images.mean((1, 2, 3))

def gone(images, prompts):
    raise OSError("server gone")
"""


@pytest.fixture
def world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sft_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return small_world


def finetuned(world: Path, reward: str | None = "sft_rewards:bright", **changes: Any) -> Config:
    config = settings(world)
    for teacher in config.teachers:
        teacher.reward = reward
    config.teachers[1].weight, config.teachers[1].guidance = 3.0, 2.0
    options: dict[str, Any] = {"train__samples_per_task": 3, "train__rounds": 2, "train__schedule": "constant"}
    config.train.method = "sft"
    return change(config, options | changes)


def ready(config: Config) -> SFT:
    """The method before its first round, of a student that has left the base."""
    method = SFT(prepare(config, log=lambda text: None))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.setup.student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return method


def gradient(method: SFT, index: int = 0) -> dict[str, Tensor]:
    """Of one round."""
    method.accumulate(index, torch.amp.GradScaler("cpu", enabled=False))
    return taken(method)


def taken(method: SFT) -> dict[str, Tensor]:
    found = {}
    for name, parameter in method.setup.student.named_parameters():
        assert parameter.grad is not None
        found[name], parameter.grad = parameter.grad, None
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    size = sum(float(w.square().sum()) for w in wanted.values()) ** 0.5
    error = sum(float((found[k] - w).square().sum()) for k, w in wanted.items()) ** 0.5
    assert size > 0
    assert error <= tolerance * size


def start(config: Config, run_dir: Path, **options: Any) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return train(config, run_dir, **options)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_definition(dtype: torch.dtype) -> None:
    """Element by element in float64, and its gradient 2 (v - (eps - x0)) / D."""
    generator = torch.Generator().manual_seed(0)
    v, base = (torch.randn(3, 4, 2, 2, generator=generator).to(dtype) for _ in range(2))
    x0, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    v.requires_grad_()
    loss = flow_matching_loss(v, x0, noise)
    assert loss.dtype == torch.float32
    found, away = loss.tolist(), squared_gap(v.detach(), base).tolist()
    for i in range(3):
        numbers = [t[i].detach().double().flatten().tolist() for t in (v, noise, x0, base)]
        terms = [(a - (e - z)) ** 2 for a, e, z, _ in zip(*numbers, strict=True)]
        assert found[i] == pytest.approx(sum(terms) / 16, rel=1e-5)
        terms = [(a - b) ** 2 for a, _, _, b in zip(*numbers, strict=True)]
        assert away[i] == pytest.approx(sum(terms) / 16, rel=1e-5)
    loss.sum().backward()
    assert v.grad is not None
    wanted = (2 * (v.detach().double() - (noise.double() - x0.double())) / 16).to(dtype)
    torch.testing.assert_close(v.grad, wanted)


# --- a round ----------------------------------------------------------------------------------------------------------


def drawn(method: SFT, task: int, prompts: list[str], epoch: int = 0) -> Tensor:
    """A teacher's images by Euler's rule and the transformer's own call, one prompt after the other."""
    setup, found = method.setup, []
    transformer = setup.teachers.teachers[task].transformer
    g = setup.model.strength(setup.teachers.teachers[task].guidance)
    keys = noise_keys(setup.config.train.seed, Stream.ROLLOUT, epoch, task, samples=len(prompts))
    sigmas = setup.table.sigmas.float()
    for i, prompt in enumerate(prompts):
        x = philox_normal(keys[i : i + 1], setup.shape, INITIAL_NOISE)
        for sigma, following in itertools.pairwise(sigmas):
            with torch.no_grad():
                v = setup.model.velocity(transformer, x, sigma, setup.text.rows([prompt]))
                if g != 1:
                    u = setup.model.velocity(transformer, x, sigma, setup.text.negative)
                    v = u + g * (v - u)
            x = x + (following - sigma) * v
        found.append(x)
    return torch.cat(found)


def written(method: SFT, x0: dict[int, Tensor], base_weight: float) -> dict[str, Tensor]:
    """The gradient of the loss of all images of the first draw, each by itself."""
    setup = method.setup
    weights = {task: setup.config.teachers[task].weight for task in x0}
    whole = sum(weights[task] * len(images) for task, images in x0.items())
    for task, prompts in method.tasks(0):
        keys = noise_keys(setup.config.train.seed, Stream.SFT_NOISE, 0, task, samples=len(prompts))
        for i, prompt in enumerate(prompts):
            image, key = x0[task][i : i + 1], keys[i : i + 1]
            eps = philox_normal(key, setup.shape, SftDraw.NOISE)
            t = torch.sigmoid(philox_normal(key, (1,), SftDraw.LEVEL))[0, 0]
            x, text = (1 - t) * image + t * eps, setup.text.rows([prompt.text])
            v = setup.model.velocity(setup.student.transformer, x, t, text)
            with torch.no_grad(), setup.student.base() as base:
                frozen = setup.model.velocity(base, x, t, text)
            loss = ((v - (eps - image)) ** 2).mean() + base_weight * ((v - frozen) ** 2).mean()
            (loss * weights[task] / whole).backward()
    return taken(method)


def texts(method: SFT) -> dict[int, list[str]]:
    return {task: [p.text for p in prompts] for task, prompts in method.tasks(0)}


@pytest.mark.parametrize(
    "changes",
    [
        {"sft__base_weight": 100.0, "student__guidance": 3.0},
        {"engine__placement": "shared", "train__micro_batch": 4, "student__kind": "full"},
    ],
    ids=["merged", "shared-full"],
)
def test_gradient_of_a_round(world: Path, changes: dict[str, Any]) -> None:
    """A guided teacher draws with guidance, and the student's conditional branch learns whatever its own is."""
    method = ready(finetuned(world, sampler__solver="ode", **changes))
    if "engine__placement" in changes:  # what its teachers draw is judged in the other case
        latents = method._draw(0)["x0"].split(3)
        x0 = dict(enumerate(latents))
        merged = ready(finetuned(world, sampler__solver="ode"))
        torch.testing.assert_close(torch.cat(latents), merged._draw(0)["x0"], rtol=1e-4, atol=1e-4)
    else:
        x0 = {task: drawn(method, task, prompts) for task, prompts in texts(method).items()}
    found = gradient(method)
    assert_close(found, written(method, x0, method.sft.base_weight))


def test_gradient_of_a_round_of_the_bundled_model() -> None:
    argv = ["bundled", "--train.method", "sft", "--train.samples_per_task", "1", "--train.rounds", "1"]
    argv += ["--objective.kind", "kl"]  # the default, as no other is read
    argv += ["--sampler.solver", "ode", "--sampler.steps", "3", "--evaluation.every", "0", "--logging.tensorboard"]
    method = ready(parse([*argv, "false", "--engine.attention", "native"]).config)
    x0 = {task: drawn(method, task, prompts) for task, prompts in texts(method).items()}
    found = gradient(method)
    assert_close(found, written(method, x0, 0.0))


def test_micro_batches_change_nothing(world: Path) -> None:
    options: dict[str, Any] = {"sft__base_weight": 1.0, "sft__updates": 2, "sft__images_per_prompt": 2}
    whole = ready(finetuned(world, **options))
    wanted = [gradient(whole, index) for index in range(2)]
    parts = ready(finetuned(world, train__micro_batch=2, **options))
    for index in range(2):
        assert_close(gradient(parts, index), wanted[index], 1e-5)


def test_every_image_is_learnt_from_once(world: Path) -> None:
    method = ready(finetuned(world, sft__updates=4))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learnt = []
    for index in range(8):
        losses = method.accumulate(index, scaler)
        assert losses.shape == (1, 6)
        learnt.append(losses[0] > 0)
        assert bool(method.state()) == (index not in (3, 7))
    assert [int(rows.sum()) for rows in learnt] == [2, 2, 1, 1] * 2
    assert torch.stack(learnt[:4]).sum(0).tolist() == [1] * 6
    assert torch.stack(learnt[4:]).sum(0).tolist() == [1] * 6
    assert not torch.equal(torch.stack(learnt[:4]), torch.stack(learnt[4:]))


def test_levels_are_logit_normal() -> None:
    t = philox_normal(noise_keys(0, Stream.SFT_NOISE, samples=20000), (1, 1, 1), SftDraw.LEVEL).sigmoid().double()
    logit = (t / (1 - t)).log().flatten()
    assert float(logit.mean()) == pytest.approx(0, abs=0.02)
    assert float(logit.std()) == pytest.approx(1, abs=0.02)


def test_the_best_of_a_group_is_learnt_from(world: Path) -> None:
    """The first prompt's images are the first three that the teacher draws, and so on."""
    method = ready(finetuned(world, sft__images_per_prompt=3))
    found, setup = method._draw(0), method.setup
    first = 0
    for task, prompts in method.tasks(0):
        keys = noise_keys(setup.config.train.seed, Stream.ROLLOUT, 0, task, samples=9)
        teacher = setup.teachers.teachers[task]
        for i, prompt in enumerate(prompts):
            with setup.teachers.active(task) as transformer:
                group = sample(
                    setup.model,
                    transformer,
                    setup.text.rows([prompt.text] * 3),
                    setup.text.negative,
                    teacher.guidance,
                    setup.table,
                    shape=setup.shape,
                    keys=keys[3 * i : 3 * i + 3],
                )
            bright = setup.model.decode(group).mean((1, 2, 3))
            assert float(bright.max() - bright.min()) > 1e-4
            assert float(found["reward"][first]) == pytest.approx(float(bright.max()), abs=1e-5)
            torch.testing.assert_close(found["x0"][first], group[int(bright.argmax())], rtol=1e-4, atol=1e-4)
            first += 1
    assert first == len(found["x0"]) == 6


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run(world: Path, tmp_path: Path) -> None:
    config = finetuned(world, sft__images_per_prompt=2, sft__updates=2, sft__base_weight=0.1)
    results = start(config, tmp_path / "run")
    assert set(results["rows"]) == {"base", "teacher:words", "teacher:plain", "student"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    rounds = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(rounds) == 2
    for line in rounds:
        assert line["gradient_norm"] > 0
        assert {"reward/words", "reward/plain", "base_gap"} <= line.keys()
        assert line["loss/task_words"] + line["loss/task_plain"] == pytest.approx(line["loss"])
    assert rounds[0]["base_gap"] == pytest.approx(0, abs=1e-9)  # it starts from the base
    assert rounds[1]["base_gap"] > 1e-9


def test_resume_equals_not_stopping(world: Path, tmp_path: Path) -> None:
    """Two updates a draw: the checkpoint after round 1 falls between them, that after round 2 does not."""
    options: dict[str, Any] = {"sft__updates": 2, "sft__images_per_prompt": 2, "evaluation__every": 0}
    start(finetuned(world, train__rounds=4, **options), tmp_path / "whole")
    for rounds in (1, 2, 4):
        start(finetuned(world, train__rounds=rounds, **options), tmp_path / "run", resume=rounds > 1)
    whole, resumed = (load_file(tmp_path / run / "student" / "adapter_model.safetensors") for run in ("whole", "run"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_a_round_that_is_not_finite_is_left_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = SFT.accumulate

    def poisoned(self: Any, index: int, scaler: Any) -> Tensor:
        losses: Tensor = original(self, index, scaler)
        losses[0, 4] = float("nan")  # the second of the second task's images
        return losses

    monkeypatch.setattr(SFT, "accumulate", poisoned)
    start(finetuned(world, evaluation__every=0, train__rounds=1), tmp_path / "run")
    assert "round 0: the loss of task 'plain' is not finite; left out" in capsys.readouterr().err


def test_a_reward_that_fails_ends_the_run(world: Path, tmp_path: Path) -> None:
    config = finetuned(world, "sft_rewards:gone", sft__images_per_prompt=2, evaluation__every=0)
    with pytest.raises(UserError, match=r"^teachers\.words\.reward: .*server gone"):
        start(config, tmp_path / "run")


def test_it_learns_what_the_bundled_teacher_draws() -> None:
    """Ten rounds lower the loss on the teacher's images of held-out prompts, the noise being the same."""
    names = "name: composition, weights: bundled/composition, prompts: bundled/composition, reward: composition"
    argv = ["bundled", "--teachers", f"[{{{names}}}]", "--train.method", "sft", "--sft.updates", "2"]
    argv += ["--objective.kind", "kl"]
    argv += ["--train.samples_per_task", "8", "--train.rounds", "10", "--train.lr", "4e-3", "--sampler.solver", "dpm2"]
    argv += ["--sampler.steps", "5", "--evaluation.prompts", "16", "--engine.attention", "native"]
    method = SFT(prepare(parse(argv).config, log=lambda text: None))
    setup = method.setup
    text = setup.text.rows([prompt.text for prompt in setup.tasks[0].prompts])
    keys = noise_keys(99, samples=len(text))
    with setup.teachers.active(0) as teacher:
        x0 = sample(setup.model, teacher, text, None, 1.0, setup.table, shape=setup.shape, keys=keys)
    eps, t = philox_normal(keys, setup.shape, 8), philox_normal(keys, (1, 1, 1), 9).sigmoid()

    @torch.no_grad()
    def loss(transformer: Any) -> float:
        v = setup.model.velocity(transformer, torch.lerp(x0, eps, t), t.flatten(), text)
        return float(flow_matching_loss(v, x0, eps).mean())

    with setup.student.base() as base:
        before = loss(base)
    goal = loss(setup.teachers.teachers[0].transformer)
    optimizer, scaler = make_optimizer(setup.student, setup.config), torch.amp.GradScaler("cpu", enabled=False)
    for index in range(10):
        method.accumulate(index, scaler)
        torch.nn.utils.clip_grad_norm_(setup.student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = loss(setup.student.transformer)
    assert goal < before
    assert after < before - 0.2 * (before - goal), (before, after, goal)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sft__updates": 0}, "sft.updates"),
    ({"sft__updates": 7}, "sft.updates"),
    ({"sft__updates": 4, "train__tasks_per_round": 1}, "sft.updates"),
    ({"sft__images_per_prompt": 0}, "sft.images_per_prompt"),
    ({"sft__base_weight": -1.0}, "sft.base_weight"),
    ({"sft__base_weight": float("nan")}, "sft.base_weight"),
    ({"objective__kind": "l2"}, "objective.kind"),
    ({"objective__anchor": "base"}, "objective.anchor"),
    ({"rl__updates": 3}, "rl.updates"),
    ({"sampler__train_last": True}, "sampler.train_last"),
    ({"parallel__strategy": "fsdp2"}, "parallel.strategy"),
]


@pytest.mark.parametrize(("changes", "key"), REFUSED, ids=[f"{key}-{i}" for i, (_, key) in enumerate(REFUSED)])
def test_settings_that_cannot_work(world: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        finetuned(world, **changes)
    assert caught.value.key == key


def test_a_choice_needs_a_reward(world: Path) -> None:
    finetuned(world, reward=None)
    with pytest.raises(UserError, match=r"^teachers\[0\]\.reward: .*sft\.images_per_prompt = 2"):
        finetuned(world, reward=None, sft__images_per_prompt=2)


def test_its_settings_are_read_under_it_alone(world: Path) -> None:
    config = settings(world)
    config.sft.base_weight = 1.0
    with pytest.raises(UserError, match=r"^sft\.base_weight: is not read under train\.method opd"):
        validate(config)


def test_teachers_are_looked_for_and_its_plan_counts_its_rows(world: Path) -> None:
    config = finetuned(world)
    assert method_spec(config).has_teachers
    assert list(problems(config)) == []
    plan = make_plan(config)
    images, drawn = plan.samples, sum(plan.teacher_rows.values())  # one teacher is guided
    assert plan.round_rows["teacher rollout"] == drawn * config.sampler.steps
    assert plan.round_rows["student forward"] == images
    assert plan.bytes["teachers"] > 0
    config.teachers[0].weights = "./nowhere"
    assert [error.key for error in problems(config)] == ["teachers[0].weights"]
