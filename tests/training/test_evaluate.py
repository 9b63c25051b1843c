"""Evaluation: the same noise for every model, in any batch; the command line end to end on the tiny model."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.models import write_random_lora
from opd_fast import evaluate as module
from opd_fast.config.command_line import parse
from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import save_lora
from opd_fast.rewards import get_reward
from opd_fast.solvers import solver_table
from opd_fast.training.evaluation import EvalTask, Evaluation, ImageSampler, evaluate, task_keys
from opd_fast.training.problems import check_paths
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux, tiny_flux_transformer

SHAPE = (4, 4, 4)
PROMPTS = [Prompt(f"a red circle {i}") for i in range(5)]

DRAWN = {"guidance": 1.0, "seed": 0, "batch": 64}

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


class World:
    def __init__(self, folder: Path, prompts: list[Prompt] = PROMPTS) -> None:
        self.folder = folder
        self.model: DiffusionModel = load_model(str(folder), device="cpu", dtype=torch.float32)
        self.text = EmbeddingCache.build(self.model, [p.text for p in prompts])

    def evaluate(
        self, tasks: list[EvalTask], transformer: Any = None, solver: str = "ode", **options: Any
    ) -> Evaluation:
        table = solver_table(solver, self.model.sigmas(3, 32), 0.7)
        guidance, seed, batch = (options.pop(name, value) for name, value in DRAWN.items())
        sampler = ImageSampler(self.model, table, SHAPE, guidance, seed, self.text, batch)
        transformer = self.model.transformer if transformer is None else transformer
        return evaluate(sampler, transformer, tasks, **{"keep_images": 8, **options})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(save_tiny(tmp_path_factory.mktemp("evaluate") / "pipeline"))


@pytest.fixture(autouse=True)
def _own_judgements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))


def task(name: str = "t", prompts: list[Prompt] = PROMPTS) -> EvalTask:
    return EvalTask(name, prompts, ["colour"])


def test_means_are_those_of_the_images(world: World) -> None:
    found = world.evaluate([task()])
    images = found.images["t"]
    assert images.shape == (5, 3, 32, 32)
    assert found.rewards == {"t": {"colour": pytest.approx(float(get_reward("colour")(images, PROMPTS).mean()))}}


@pytest.mark.parametrize(("solver", "guidance"), [("ode", 1.0), ("flow_sde", 1.0), ("dpm2", 3.0)])
def test_batches_and_neighbours_change_nothing(world: World, solver: str, guidance: float) -> None:
    alone = world.evaluate([task()], solver=solver, guidance=guidance)
    options: dict[str, Any] = {"solver": solver, "guidance": guidance, "batch": 2, "keep_images": 3}
    beside = world.evaluate([task("other", PROMPTS[:2]), task()], **options)
    torch.testing.assert_close(beside.images["t"], alone.images["t"][:3], rtol=0, atol=1e-5)
    assert beside.rewards["t"]["colour"] == pytest.approx(alone.rewards["t"]["colour"], abs=1e-6)


def test_seed_and_task_choose_the_noise(world: World) -> None:
    images = world.evaluate([task()]).images["t"]
    assert not torch.allclose(world.evaluate([task()], seed=1).images["t"], images, atol=1e-3)
    assert not torch.allclose(world.evaluate([task("u")]).images["u"], images, atol=1e-3)
    keys = torch.cat([task_keys(seed, name, 50) for seed in (0, 1) for name in ("t", "u")])
    assert len(keys.unique()) == 200
    assert torch.equal(task_keys(3, "text", 4), task_keys(3, "text", 9)[:4])


def test_no_images_unless_asked(world: World) -> None:
    assert world.evaluate([task()], keep_images=0).images == {}


def test_progress(world: World) -> None:
    seen: list[tuple[int, int]] = []
    world.evaluate([task(), task("u", PROMPTS[:1])], batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (5, 6), (6, 6)]


def test_nan_weights_are_named(world: World) -> None:
    broken = copy.deepcopy(world.model.transformer)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"task 't': the model's images hold NaN"):
        world.evaluate([task()], transformer=broken)


def test_mistakes(world: World) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        world.evaluate([task(prompts=[])])
    with pytest.raises(ValueError, match="unknown reward"):
        world.evaluate([EvalTask("t", PROMPTS, ["colr"])])


def test_a_failing_reward_costs_its_value_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failing.py").write_text(
        "def some(images, prompts):\n"
        "    return [float('nan') if p.text.endswith('3') else 0.5 for p in prompts]\n"
        "def none(images, prompts):\n"
        "    raise RuntimeError('no weights')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = world.evaluate([EvalTask("t", PROMPTS, ["failing:none", "failing:some", "colour"])], reward_timeout=30.0)
    means = found.rewards["t"]
    assert means["failing:none"] != means["failing:none"]
    assert means["failing:some"] == 0.5
    assert means["colour"] == world.evaluate([task()]).rewards["t"]["colour"]
    assert found.failures == (
        "reward 'failing:none' raised RuntimeError: no weights",
        "reward 'failing:some' returned 1 of 5 values NaN or infinite, first for 'a red circle 3'",
    )
    assert "evaluation: reward 'failing:none' raised" in capsys.readouterr().err
    assert found.unjudged() == [("t", "failing:none")]
    (tmp_path / "p.txt").write_text(PROMPTS[0].text + "\n")
    argv = ["--model", str(world.folder), "--prompts", str(tmp_path / "p.txt"), "--rewards", "failing:none+colour"]
    argv += ["--steps", "2", "--resolution", "32", "--grid", "0", "--out", str(tmp_path / "out")]
    assert module.main(argv) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rewards"]["p"]["failing:none"] is None
    assert results["rewards"]["p"]["colour"] > 0
    assert results["failures"] == ["reward 'failing:none' raised RuntimeError: no weights"]
    table, _, beneath = capsys.readouterr().out.partition("Some rewards failed.")
    assert "colour" in table
    assert "  reward 'failing:none' raised RuntimeError: no weights\n" in beneath
    argv[argv.index("failing:none+colour")] = "failing:none"
    assert module.main(argv) == 2
    assert (
        "error: rewards: no image has a value: reward 'failing:none' raised RuntimeError: no weights; fix the reward"
        in capsys.readouterr().err
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rewards"] == {"p": {"failing:none": None}}


def test_what_failed_is_told_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "counting.py").write_text(
        "calls = 0\n"
        "def score(images, prompts):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    raise OSError('none') if calls < 4 else KeyError('prompt')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reported: set[tuple[str, str]] = set()
    judged = [EvalTask("t", PROMPTS, ["counting:score"])]
    first = world.evaluate(judged, batch=3, reported=reported)
    second = world.evaluate(judged, batch=3, reported=reported)
    assert first.failures == ("reward 'counting:score' raised OSError: none",)
    assert second.failures == (*first.failures, "reward 'counting:score' raised KeyError: 'prompt'")
    assert reported == second.failed.keys()
    assert capsys.readouterr().err == "".join(f"evaluation: {message}\n" for message in second.failures)


def test_rewards_do_not_see_what_others_do_to_their_images(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rescaling.py").write_text(
        "def score(images, prompts):\n"
        "    images.mul_(2).sub_(1)\n"
        "    for prompt in prompts:\n"
        "        prompt.metadata['seen'] = True\n"
        "    return images.mean((1, 2, 3))\n"
        "again = score\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompts = [Prompt(prompt.text, {}) for prompt in PROMPTS]
    alone = world.evaluate([task()])
    beside = world.evaluate([EvalTask("t", prompts, ["rescaling:score", "colour", "rescaling:again"])])
    assert beside.rewards["t"]["colour"] == alone.rewards["t"]["colour"]
    assert torch.equal(beside.images["t"], alone.images["t"])
    for name in ("rescaling:score", "rescaling:again"):
        assert beside.rewards["t"][name] == pytest.approx(float(2 * alone.images["t"].mean() - 1), abs=1e-6)
    assert prompts == PROMPTS


def test_the_documented_reward(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/rewards.md: its function and prompts, judged by its command, and its recipe read."""
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert set(blocks) == {"python", "csv", "bash", "yaml"}
    for name, language in (("my_rewards.py", "python"), ("tint.csv", "csv"), ("tint.yaml", "yaml")):
        (tmp_path / name).write_text(blocks[language])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    python, _, name, *argv = shlex.split(blocks["bash"])
    assert (python, name) == ("python", "opd_fast.evaluate")
    argv += ["--model", str(world.folder), "--steps", "3", "--resolution", "32", "--out", str(tmp_path / "out")]
    assert module.main(argv) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rewards"]
    prompts = load_prompts(tmp_path / "tint.csv")
    assert prompts == [
        Prompt("a red barn in the snow", {"colour": "red"}),
        Prompt("the sea at noon", {"colour": "blue"}),
    ]
    world = World(world.folder, prompts)
    images = world.evaluate([EvalTask("tint", prompts, ["colour"])]).images["tint"]
    red, blue = images[0].mean((1, 2)), images[1].mean((1, 2))
    expected = (red[0] - red.mean() + blue[2] - blue.mean()) / 2
    assert found == {"tint": {"my_rewards:tinted": pytest.approx(float(expected), abs=1e-6)}}
    assert abs(found["tint"]["my_rewards:tinted"]) > 1e-4
    command = parse(["tint.yaml"])
    check_paths(command.config)
    assert command.config.teachers[0].reward == "my_rewards:tinted"
    sys.modules.pop("my_rewards")


def test_command_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("first", "second"):
        file = tmp_path / f"{name}.txt"
        file.write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))
        files.append(str(file))
    out = tmp_path / "out"
    argv = ["--model", str(world.folder), "--prompts", ",".join(files), "--rewards", "colour,colour", "--steps", "2"]
    argv += ["--limit", "3", "--grid", "2", "--resolution", "32", "--out", str(out)]
    assert module.main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    table = solver_table("ode", world.model.sigmas(2, 32), 0.0)
    tasks = [task(name, PROMPTS[:3]) for name in ("first", "second")]
    expected = evaluate(ImageSampler(world.model, table, SHAPE, 1.0, 0, world.text), world.model.transformer, tasks)
    for name, means in expected.rewards.items():
        assert results["rewards"][name]["colour"] == pytest.approx(means["colour"], abs=1e-6)
    assert results["prompts"] == {"first": 3, "second": 3}
    for name in ("first", "second"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 2 * 32
    assert "first" in capsys.readouterr().out


def command_line(folder: Path, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    argv = ["--model", str(folder), "--prompts", str(tmp_path / "p.txt"), "--rewards", "colour", "--grid", "0"]
    return [*argv, "--steps", "2", "--resolution", "32", "--out", str(tmp_path / "out"), *more]


def test_text_is_kept(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = command_line(world.folder, tmp_path, "--text-cache", str(tmp_path / "kept"))
    assert module.main(argv) == 0
    first = json.loads((tmp_path / "out" / "results.json").read_text())["rewards"]

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr("opd_fast.models.pipeline_model._load_text", refuse)
    argv += ["--judgement-cache", "off"]
    shutil.rmtree(tmp_path / "out")
    assert module.main(argv) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rewards"] == first
    shutil.rmtree(tmp_path / "out")
    new = ("--judgement-cache", "off")
    with pytest.raises(AssertionError, match="was loaded"):
        module.main(command_line(world.folder, tmp_path, "--text-cache", "off", *new))
    with pytest.raises(AssertionError, match="was loaded"):
        module.main(command_line(world.folder, tmp_path, *new))  # auto: these encoders are too small to keep


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text-cache", "/dev/null/x"], "error: text-cache: /dev/null/x/"),
        (["--text-cache", ""], "error: text-cache: is empty"),
        (["--rewards", "+"], "error: rewards: '+' leaves a prompt file without any; name one for each file"),
        (["--text-cach", "off"], "did you mean --text-cache?"),
        (["--resolution", "33"], "error: resolution 33 is not a multiple of 16"),
        (["--lora", "/absent"], "error: lora: /absent is neither"),
    ],
)
def test_mistakes_on_the_command_line(
    world: World, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(command_line(world.folder, tmp_path, *options)) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_is_told_before_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_flux(tmp_path / "schnell", schnell=True)
    wide = tiny_flux_transformer(num_attention_heads=4)
    write_random_lora(wide, tmp_path / "lora", rank=2, alpha=2.0, targets=["attn.to_q"], std=0.1)
    monkeypatch.setattr("opd_fast.evaluation.samplers.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    for options, said in (
        (["--guidance", "3.5"], "error: guidance: 3.5 with a flux model that has none; give 1"),
        (["--lora", str(tmp_path / "lora")], "take the LoRA of this model"),
    ):
        assert module.main(command_line(folder, tmp_path, *options)) == 2
        assert said in capsys.readouterr().err


def test_command_line_with_a_lora(world: World, tmp_path: Path) -> None:
    targets = ["attn.to_q"]
    modules = {
        name: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2))
        for name, m in world.model.transformer.named_modules()
        if name.endswith("attn.to_q")
    }
    save_lora(tmp_path / "lora", modules, rank=2, alpha=4.0, targets=targets)
    (tmp_path / "p.txt").write_text(PROMPTS[0].text + "\n")
    argv = ["--model", str(world.folder), "--prompts", str(tmp_path / "p.txt"), "--rewards", "colour", "--grid", "0"]
    argv += ["--steps", "2", "--resolution", "32"]
    assert module.main([*argv, "--out", str(tmp_path / "base")]) == 0
    assert module.main([*argv, "--out", str(tmp_path / "lora-out"), "--lora", str(tmp_path / "lora")]) == 0
    base, lora = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("base", "lora-out"))
    assert base["rewards"]["p"]["colour"] != lora["rewards"]["p"]["colour"]
    assert lora["lora"] == str(tmp_path / "lora")
    assert not list((tmp_path / "base").glob("*.png"))


# --- images and names ------------------------------------------------------------------------------------------------


def test_several_images_of_a_prompt_are_averaged(world: World) -> None:
    """Image i is of prompt i % 5 with the noise of index i, as that of a list that holds the prompts again."""
    several = world.evaluate([EvalTask("t", PROMPTS, ["colour"], images=13)])
    again = [PROMPTS[i % 5] for i in range(13)]
    listed = world.evaluate([EvalTask("t", again, ["colour"])], keep_images=13)
    assert several.rewards == listed.rewards
    assert torch.equal(several.images["t"], listed.images["t"][:5])  # one of each prompt
    values = get_reward("colour")(listed.images["t"], again)
    assert several.rewards["t"]["colour"] == pytest.approx(float(values.double().mean()), abs=1e-7)
    first, second = listed.images["t"][0], listed.images["t"][5]
    assert not torch.allclose(first, second, atol=1e-3)
    batched = world.evaluate([EvalTask("t", PROMPTS, ["colour"], images=13)], batch=4)
    assert batched.rewards["t"]["colour"] == pytest.approx(several.rewards["t"]["colour"], abs=1e-6)


def test_tasks_that_would_overwrite_each_other_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="two evaluation tasks are named 't'"):
        world.evaluate([task(), task(prompts=PROMPTS[:2])])
    with pytest.raises(ValueError, match="'t' names a reward twice"):
        world.evaluate([EvalTask("t", PROMPTS, ["colour", "colour"])])
    with pytest.raises(ValueError, match="2 images for 5 prompts"):
        world.evaluate([EvalTask("t", PROMPTS, ["colour"], images=2)])


def test_sources_of_one_name_keep_their_own_numbers_and_pictures(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`p-2` is taken by a file of that name, so that the third source cannot have it."""
    files = []
    for name, lines in {"p-2": PROMPTS[:1], "a/p": PROMPTS[1:2], "b/p": PROMPTS[2:4]}.items():
        file = tmp_path / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{prompt.text}\n" for prompt in lines))
        files.append(str(file))
    out = tmp_path / "out"
    argv = ["--model", str(world.folder), "--prompts", ",".join(files), "--rewards", "colour,colour,colour"]
    argv += ["--steps", "2", "--resolution", "32", "--images-per-prompt", "2", "--limit", "2", "--out", str(out)]
    assert module.main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    names = ("p-2", "p", "p-3")
    assert results["prompts"] == dict(zip(names, (1, 1, 2), strict=True))
    assert results["images"] == dict(zip(names, (2, 2, 4), strict=True))
    assert {path.name for path in out.glob("*.png")} == {f"{name}.png" for name in names}
    table = solver_table("ode", world.model.sigmas(2, 32), 0.0)
    tasks = [EvalTask("p-3", PROMPTS[2:4], ["colour"], images=4)]
    expected = evaluate(ImageSampler(world.model, table, SHAPE, 1.0, 0, world.text), world.model.transformer, tasks)
    assert results["rewards"]["p-3"]["colour"] == pytest.approx(expected.rewards["p-3"]["colour"], abs=1e-6)
    said = capsys.readouterr()
    assert f"{files[0]}: 1 prompts, fewer than limit = 2; all are taken" in said.err
    assert files[2] not in said.err
    assert [line.split("│")[2].strip() for line in said.out.splitlines() if "p-3" in line] == ["4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images-per-prompt", "0"], "error: images-per-prompt: 0 is below 1; give 1 or more"),
        (["--rewards", "colour+text+colour"], "error: rewards: colour stands twice beside one prompt file; name it"),
    ],
)
def test_mistakes_in_images_and_rewards(
    world: World, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(command_line(world.folder, tmp_path, *options)) == 2
    assert said in capsys.readouterr().err
