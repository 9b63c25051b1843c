"""Reinforcement learning runs: what they draw, learn, save and refuse, on a random small pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opd_fast.config import Config
from opd_fast.config.serialize import to_yaml
from opd_fast.config.validate import validate
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError
from opd_fast.reporting.telemetry import read_metrics
from opd_fast.seeds import Stream
from opd_fast.training.loop import train
from opd_fast.training.methods.grpo import GRPO
from opd_fast.training.methods.nft import NFT
from opd_fast.training.problems import problems
from opd_fast.training.setup import prepare
from opd_kernels import philox_normal
from tests import runs
from tests.runs import settings

REWARD = """
import torch

def left(images, prompts):
    return images[..., :16].mean((1, 2, 3)) + torch.tensor([len(p.text) / 100 for p in prompts])

def flat(images, prompts):
    return torch.zeros(len(images))

def gone(images, prompts):
    raise OSError("server gone")
"""


@pytest.fixture
def world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rl_rewards.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return small_world


def reinforced(world: Path, method: str, reward: str = "rl_rewards:left", **changes: Any) -> Config:
    return runs.reinforced(world, method, reward, **changes)


def start(config: Config, run_dir: Path, **options: Any) -> dict[str, Any]:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return train(config, run_dir, **options)


def student(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"rl__guard": True, "rl__kl": 0.0, "student__guidance": 2.0, "train__micro_batch": 3}),
        ("grpo", {"sampler__solver": "cps", "rl__window": 2, "rl__window_range": 3, "student__kind": "full"}),
        ("nft", {"rl__updates": 1}),
        ("nft", {"rl__beta": 0.1, "rl__decay": "late", "train__micro_batch": 3, "rl__kl": 0.0}),
    ],
    ids=["grpo", "guard", "fast", "nft", "nft-late"],
)
def test_two_rounds(world: Path, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    results = start(reinforced(world, method, **changes), tmp_path / "run")
    assert set(results["rows"]) == {"base", "student"}
    assert results["recovered"] == {}
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rounds"] == 2
    rounds = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert len(rounds) == 2
    for line in rounds:
        assert line["gradient_norm"] > 0
        assert {"reward/words", "reward/plain", "images"} <= line.keys()
    assert sum(line["images"] for line in rounds) == (8 if changes.get("rl__updates") != 1 else 16)


def test_ratios_are_1_before_the_first_update_and_move_after_it(world: Path) -> None:
    method = GRPO(prepare(reinforced(world, "grpo", rl__kl=0.0), log=lambda text: None))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    first = method.metrics(0, method.accumulate(0, scaler))
    assert first["clipped"] == 0
    assert method.state()  # the other part of the rollout is still to come
    optimizer = torch.optim.AdamW(method.setup.student.parameters(), lr=1e-2)
    optimizer.step()
    optimizer.zero_grad()
    second = method.metrics(1, method.accumulate(1, scaler))
    assert second["clipped"] > 0.3
    assert all(first[f"reward/{name}"] == second[f"reward/{name}"] for name in ("words", "plain"))
    assert not method.state()


def test_windows_lie_where_they_are_asked_for(world: Path) -> None:
    method = GRPO(prepare(reinforced(world, "grpo", rl__window=1, rl__window_range=3), log=lambda text: None))
    windows = [method.trained_steps(epoch) for epoch in range(40)]
    assert {window.start for window in windows} == {0, 1, 2}
    for epoch, window in enumerate(windows[:5]):
        drawing = (method.rows(epoch)[:, 3] > 0).nonzero().flatten().tolist()
        assert drawing == list(window)
    whole = GRPO(prepare(reinforced(world, "grpo"), log=lambda text: None))
    assert whole.trained_steps(0) == range(3)


def test_groups_of_equal_rewards_teach_nothing(world: Path, tmp_path: Path) -> None:
    config = reinforced(world, "grpo", reward="rl_rewards:flat", rl__kl=0.0)
    start(config, tmp_path / "run")
    rounds = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["images"] for line in rounds] == [0, 0]
    assert [line["gradient_norm"] for line in rounds] == [0, 0]


@pytest.mark.parametrize(("method", "kind"), [("grpo", GRPO), ("nft", NFT)])
def test_a_round_that_is_not_finite_is_left_out(
    world: Path,
    tmp_path: Path,
    method: str,
    kind: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = kind.accumulate

    def poisoned(self: Any, index: int, scaler: Any) -> Tensor:
        losses: Tensor = original(self, index, scaler)
        if index == 1:
            losses[2, 5] = float("nan")  # the second of the second task's images
        return losses

    monkeypatch.setattr(kind, "accumulate", poisoned)
    options: dict[str, Any] = {"evaluation__every": 0, "train__schedule": "constant"}
    start(reinforced(world, method, train__rounds=2, **options), tmp_path / "poisoned")
    assert "round 1: the loss of task 'plain' is not finite at step 2; left out" in capsys.readouterr().err
    lines = read_metrics(tmp_path / "poisoned" / "metrics.jsonl")
    assert [line.get("skipped") for line in lines] == [None, 1]
    start(reinforced(world, method, train__rounds=1, **options), tmp_path / "one")
    for key, value in student(tmp_path / "one").items():
        assert torch.equal(student(tmp_path / "poisoned")[key], value)


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_resume_equals_not_stopping(world: Path, tmp_path: Path, method: str) -> None:
    """Two updates a rollout: the checkpoint after round 1 falls between them, that after round 2 does not."""
    options: dict[str, Any] = {"train__rounds": 4, "evaluation__every": 0, "train__schedule": "constant"}
    start(reinforced(world, method, **options), tmp_path / "whole")
    start(reinforced(world, method, **(options | {"train__rounds": 1})), tmp_path / "run")
    start(reinforced(world, method, **(options | {"train__rounds": 2})), tmp_path / "run", resume=True)
    start(reinforced(world, method, **options), tmp_path / "run", resume=True)
    whole, resumed = student(tmp_path / "whole"), student(tmp_path / "run")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_the_old_policy_follows(world: Path) -> None:
    method = NFT(prepare(reinforced(world, "nft", rl__updates=1), log=lambda text: None))
    before = [old.clone() for old in method.old]
    with torch.no_grad():
        for parameter in method.setup.student.parameters():
            parameter.add_(1.0)
    method.accumulate(0, torch.amp.GradScaler("cpu", enabled=False))
    assert all(torch.equal(a, b) for a, b in zip(method.old, before, strict=True))
    method.accumulate(1, torch.amp.GradScaler("cpu", enabled=False))
    for old, was in zip(method.old, before, strict=True):
        torch.testing.assert_close(old, was + 0.999)  # d = 0.001 after one update
    levels = method.noise_levels(0)
    assert levels.sum(1).tolist() == [3] * 8  # all four but one
    assert len({tuple(row) for row in levels.tolist()}) > 1


def test_an_image_is_drawn_by_the_old_policy(world: Path) -> None:
    method = NFT(prepare(reinforced(world, "nft"), log=lambda text: None))
    latents, _ = method.roll_out(0)
    with torch.no_grad():
        for parameter in method.setup.student.parameters():
            parameter.normal_()
    again, _ = method.roll_out(0)
    assert torch.equal(latents, again)


def test_a_reward_that_fails_ends_the_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teachers\.words\.reward: .*server gone"):
        start(reinforced(world, "grpo", reward="rl_rewards:gone", evaluation__every=0), tmp_path / "run")


REFUSED = [
    ("grpo", {"sampler__solver": "ode"}, "sampler.solver"),
    ("grpo", {"train__samples_per_task": 5}, "train.samples_per_task"),
    ("grpo", {"rl__images_per_prompt": 1}, "rl.images_per_prompt"),
    ("grpo", {"rl__guard": True, "sampler__solver": "cps"}, "rl.guard"),
    ("grpo", {"rl__window": 3}, "rl.window"),
    ("grpo", {"rl__window": 3, "rl__window_range": 4}, "rl.window_range"),
    ("grpo", {"rl__window_range": 3}, "rl.window_range"),
    ("grpo", {"rl__beta": 0.1}, "rl.beta"),
    ("grpo", {"rl__log_prob": "published"}, "rl.log_prob"),
    ("grpo", {"rl__log_prob": "published", "sampler__solver": "dance_sde"}, "rl.log_prob"),
    ("grpo", {"rl__kl": -1.0}, "rl.kl"),
    ("grpo", {"rl__updates": 0}, "rl.updates"),
    ("nft", {"rl__updates": 9}, "rl.updates"),
    ("grpo", {"rl__updates": 5, "train__tasks_per_round": 1}, "rl.updates"),
    ("grpo", {"objective__kind": "l2"}, "objective.kind"),
    ("grpo", {"sampler__train_last": True}, "sampler.train_last"),
    ("grpo", {"student__start": "merged"}, "student.start"),
    ("grpo", {"parallel__strategy": "fsdp2"}, "parallel.strategy"),
    ("nft", {"parallel__offload_teachers": True}, "parallel.offload_teachers"),
    ("nft", {"rl__guard": True}, "rl.guard"),
    ("nft", {"rl__clip": 1e-3}, "rl.clip"),
    ("nft", {"rl__log_prob": "published", "sampler__solver": "cps"}, "rl.log_prob"),
    ("nft", {"student__guidance": 2.0}, "student.guidance"),
    ("nft", {"rl__beta": 0.0}, "rl.beta"),
]


@pytest.mark.parametrize(("method", "changes", "key"), REFUSED, ids=[f"{m}-{k}" for m, _, k in REFUSED])
def test_settings_that_cannot_work(world: Path, method: str, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        reinforced(world, method, **changes)
    assert caught.value.key == key


def test_each_round_of_a_rollout_has_an_image(world: Path) -> None:
    assert reinforced(world, "nft", rl__updates=8).rl.updates == 8
    with pytest.raises(UserError, match=r"rl\.updates: 9 of 8 images, which leaves a round without any; give 1 to 8"):
        reinforced(world, "nft", rl__updates=9)


def test_tasks_need_a_reward_and_no_teacher(world: Path) -> None:
    for name, value in (("weights", "org/teacher"), ("reward", None), ("guidance", 2.0)):
        config = reinforced(world, "grpo")
        setattr(config.teachers[1], name, value)
        with pytest.raises(UserError) as caught:
            validate(config)
        assert caught.value.key == f"teachers[1].{name}"
    config = settings(world)
    config.rl.updates = 3
    with pytest.raises(UserError, match=r"rl\.updates: is not read under train\.method opd"):
        validate(config)


def test_its_plan_counts_its_rows(world: Path) -> None:
    """Two tasks of four images, four steps, two rounds of a rollout; guided rows count twice."""
    config = reinforced(world, "grpo", student__guidance=2.0)
    assert list(problems(config)) == []
    plan = make_plan(config)
    assert (plan.samples, plan.updates, plan.workload.steps, plan.teacher_rows) == (8, 2, 3, {})
    assert plan.round_rows == {
        "rollout": 2 * 8 * 4 // 2,
        **dict.fromkeys(("student forward", "student backward", "base forward"), 2 * 8 * 3 // 2),
    }
    assert plan.bytes["teachers"] == 0
    c, h, w = plan.latent
    assert plan.bytes["rollout"] == 8 * 3 * 3 * c * h * w * 4
    window = make_plan(reinforced(world, "grpo", rl__window=1, rl__kl=0.0))
    assert window.round_rows == {"rollout": 16, "student forward": 4, "student backward": 4}
    nft = make_plan(reinforced(world, "nft", rl__updates=1, rl__timestep_fraction=0.5), devices=2)
    assert nft.round_rows["old policy forward"] == nft.round_rows["base forward"] == 8 * 2
    assert nft.bytes["old policy"] == 4 * nft.workload.trainable
    assert nft.bytes["rollout"] == 4 * c * h * w * 4  # of half the images their last latents
    assert nft.strategy == "ddp"


def test_sharding_is_not_offered(world: Path) -> None:
    config = reinforced(world, "nft")
    plan = make_plan(config, devices=2, gpu_memory=1e-4)
    assert plan.strategy == "ddp"
    assert "nft shards no weights" in plan.reason


# --- a round's gradient against the loss written out ------------------------------------------------------------------


def moved(method: Any) -> None:
    """Weights that are no longer those that drew."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.setup.student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def written(method: Any, transformer: Any, x: Tensor, sigma: Tensor, epoch: int, rows: Tensor) -> Tensor:
    """The guided velocity of some images, by the transformer's own call."""
    setup = method.setup
    text, g = method.text(epoch, rows), setup.model.strength(setup.student.guidance)
    v = setup.model.velocity(transformer, x, sigma, text)
    if g == 1:
        return v
    u = setup.model.velocity(transformer, x, sigma, setup.text.negative.expand(len(rows)))
    return u + g * (v - u)


def gradient(method: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in method.setup.student.named_parameters()}
    for parameter in method.setup.student.parameters():
        parameter.grad = None
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    size = sum(float(w.square().sum()) for w in wanted.values()) ** 0.5
    error = sum(float((found[k] - w).square().sum()) for k, w in wanted.items()) ** 0.5
    assert size > 0
    assert error <= 1e-4 * size


@pytest.mark.parametrize(
    ("solver", "guard", "published"),
    [("flow_sde", False, False), ("flow_sde", True, False), ("cps", False, True)],
)
def test_gradient_of_a_later_grpo_update(world: Path, solver: str, guard: bool, published: bool) -> None:
    changes: dict[str, Any] = {"rl__guard": guard, "rl__clip": 1e-4, "rl__kl": 0.04, "student__guidance": 2.0}
    changes |= {"sampler__solver": solver, "rl__log_prob": "published" if published else "exact"}
    method = GRPO(prepare(reinforced(world, "grpo", rl__updates=1, **changes), log=lambda text: None))
    setup, table = method.setup, method.setup.table
    drawn = method._draw(0)
    method._drawn = drawn
    moved(method)
    rows = drawn["advantage"].nonzero().flatten()
    shares = torch.full((len(rows),), 1 / len(rows))
    losses, counts = method.learn(0, rows, shares, torch.amp.GradScaler("cpu", enabled=False))
    assert 0 < float(counts["clipped"]) < 1
    found = gradient(method)
    total = torch.zeros(())
    for j in range(table.steps - 1):
        x, sample, old = (drawn[name][rows, j] for name in ("x", "sample", "mean"))
        a, b, std = (float(column[j]) for column in (table.a, table.b, table.std))
        sigma = table.sigmas[j].float()
        mean = a * x + b * written(method, setup.student.transformer, x, sigma, 0, rows)
        with torch.no_grad(), setup.student.base() as base:
            frozen = a * x + b * written(method, base, x, sigma, 0, rows)
        logp = [-((sample - m) ** 2).flatten(1).mean(1) / (1 if published else 2 * std**2) for m in (mean, old)]
        change = logp[0] - logp[1]
        if guard:
            bias = ((mean - old) ** 2).flatten(1).mean(1) / (2 * std**2)
            change = std * (change + bias)
        advantage, ratio = drawn["advantage"][rows], change.exp()
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4))
        loss = loss / float(table.sigmas[j] - table.sigmas[j + 1]) if guard else loss
        g = std / (float(table.sigmas[j] - table.sigmas[j + 1]) ** 0.5 if solver == "flow_sde" else 1)
        total = total + (loss + 0.04 * ((mean - frozen) ** 2).flatten(1).mean(1) / (2 * g**2)).mean()
    (total / (table.steps - 1)).backward()
    assert_close(found, gradient(method))
    assert float(losses.sum()) == pytest.approx(total.item() / (table.steps - 1), rel=1e-3)


def test_gradient_of_an_nft_update(world: Path) -> None:
    method = NFT(prepare(reinforced(world, "nft", rl__beta=0.5, rl__kl=0.1), log=lambda text: None))
    setup, table = method.setup, method.setup.table
    method._drawn = drawn = method._draw(0)
    moved(method)
    rows = torch.arange(method.images)
    shares = torch.full((len(rows),), 1 / len(rows))
    method.learn(0, rows, shares, torch.amp.GradScaler("cpu", enabled=False))
    found = gradient(method)
    keys, levels = method.keys(0, Stream.NFT_NOISE), method.noise_levels(0)
    olds = []
    with torch.no_grad(), setup.student.with_weights(method.old) as transformer:
        for j in range(table.steps):
            some, t = levels[:, j].nonzero().flatten(), table.sigmas[j].float()
            x = (1 - t) * drawn["x0"][some] + t * philox_normal(keys[some], setup.shape, j)
            olds.append(written(method, transformer, x, t, 0, some))
    total = torch.zeros(())
    for j in range(table.steps):
        some = levels[:, j].nonzero().flatten()
        t, x0 = table.sigmas[j].float(), drawn["x0"][some]
        x = (1 - t) * x0 + t * philox_normal(keys[some], setup.shape, j)
        with torch.no_grad(), setup.student.base() as base:
            frozen = written(method, base, x, t, 0, some)
        v, old = written(method, setup.student.transformer, x, t, 0, some), olds[j]
        r = drawn["advantage"][some] / 10 + 0.5
        loss = 0.1 * ((v - frozen) ** 2).flatten(1).mean(1)
        for weight, sign in ((r, 0.5), (1 - r, -0.5)):
            error = (x - t * (old + sign * (v - old)) - x0).flatten(1)
            loss = loss + 5 * weight * (error**2).mean(1) / error.detach().abs().mean(1) / 0.5
        total = total + loss.sum() / len(rows)
    (total / 3).backward()  # three of the four levels of each image
    assert_close(found, gradient(method))


# --- several rewards --------------------------------------------------------------------------------------------------


def test_a_sum_of_rewards_is_their_weighted_sum(world: Path) -> None:
    """Raw scores added up, as multi-reward GRPO does."""
    drawn = {}
    for reward in ("rl_rewards:left", "colour", "0.5*rl_rewards:left + 3*colour"):
        method = NFT(prepare(reinforced(world, "nft", reward), log=lambda text: None))
        drawn[reward] = method._draw(0)["reward"]
    left, colour, both = drawn.values()
    torch.testing.assert_close(both, 0.5 * left + 3 * colour)
    assert float(colour.std()) > 0


@pytest.mark.parametrize("statistics", ["task", "all"])
def test_statistics_are_a_tasks_own_or_those_of_all(world: Path, statistics: str) -> None:
    """With one standard deviation for all, the task with the larger rewards has the larger advantages."""
    config = reinforced(world, "nft", rl__statistics=statistics, train__samples_per_task=6, rl__images_per_prompt=3)
    config.teachers[0].reward = "100*rl_rewards:left"
    drawn = NFT(prepare(config, log=lambda text: None))._draw(0)
    reward, task, advantage = drawn["reward"].double(), drawn["task"], drawn["advantage"].double()
    gap = (reward.view(-1, 3) - reward.view(-1, 3).mean(1, keepdim=True)).flatten()
    own = torch.stack([reward[task == i].std(correction=0) for i in (0, 1)])[task]
    spread = own if statistics == "task" else reward.std(correction=0)
    torch.testing.assert_close(advantage, gap / (spread + 1e-4), rtol=1e-4, atol=1e-6)
    sizes = [float(advantage[task == i].abs().mean()) for i in (0, 1)]
    assert (sizes[0] > 20 * sizes[1]) == (statistics == "all")


def test_every_term_of_a_sum_is_reported(world: Path, tmp_path: Path) -> None:
    results = start(reinforced(world, "nft", "colour + 0.1*rl_rewards:left", evaluation__every=2), tmp_path / "run")
    keys = {"words/colour", "words/rl_rewards:left", "plain/colour", "plain/rl_rewards:left"}
    assert set(results["rows"]["student"]) == keys


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("0.5*", "is not a sum"),
        ("half*colour", "is not a sum"),
        ("colour + colurful", "unknown reward 'colurful'"),
        ("colour + rl_rewards:right", "cannot be imported"),
        ("nan*colour", "is not a sum"),
    ],
)
def test_mistakes_in_sums_are_named(world: Path, reward: str, message: str) -> None:
    found = [str(error) for error in problems(reinforced(world, "nft", reward))]
    assert len(found) == 1
    assert found[0].startswith("teachers[0].reward")
    assert message in found[0]


def test_distillation_takes_several_rewards_but_no_weights(world: Path) -> None:
    config = settings(world)
    config.teachers[0].reward = "text + colour"
    assert list(problems(config)) == []
    config.teachers[0].reward = "0.5*text + colour"
    assert ["no loss uses its weights" in str(error) for error in problems(config)] == [True]


def test_tasks_that_are_left_out_draw_nothing(world: Path, tmp_path: Path) -> None:
    config = reinforced(world, "grpo", train__tasks=["plain"], evaluation__every=2)
    config.teachers[0].reward = "text"
    results = start(config, tmp_path / "run")
    assert set(results["rows"]["student"]) == {"text", "rl_rewards:left"}
    rounds = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert all("reward/plain" in line and "reward/words" not in line for line in rounds)
    assert sum(line["images"] for line in rounds) == 4
