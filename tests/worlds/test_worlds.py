"""The shapes world: prompts, scenes, and verifiers proven on scenes whose truth is known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.models.base import ASSETS
from opd_fast.models.lora.files import read_lora
from opd_fast.rewards import REWARDS, colour, composition, get_reward, text
from opd_fast.rewards.edit_distance import closeness, edit_distance
from opd_fast.worlds import build, networks, pools, shapes

SCENES = 500


def _truth(task: str, *, ideal: bool = False) -> tuple[torch.Tensor, list[Prompt]]:
    rng = np.random.default_rng(0)
    pool = shapes.prompts(task, "train") + shapes.prompts(task, "test")
    chosen = [pool[i] for i in rng.integers(len(pool), size=SCENES)]
    images = np.stack([shapes.render(shapes.scene(task, p, rng, ideal=ideal)) for p in chosen])
    return torch.from_numpy(images), [Prompt(p.text, p.metadata) for p in chosen]


@pytest.mark.parametrize(
    ("task", "reward"), [("composition", "composition_strict"), ("composition", "composition"), ("text", "text")]
)
@pytest.mark.parametrize("ideal", [False, True])
def test_verifiers_read_ground_truth(task: str, reward: str, ideal: bool) -> None:
    images, prompts = _truth(task, ideal=ideal)
    judge = get_reward(reward)
    assert judge(images, prompts).mean() >= 0.99
    order = np.random.default_rng(1).permutation(SCENES)
    shuffled = float(judge(images, [prompts[i] for i in order]).mean())
    assert shuffled <= (0.4 if reward == "composition" else 0.2)  # half a composition is right by chance more often


def test_verifiers_read_pixels_only() -> None:
    images, prompts = _truth("composition")
    blank = torch.full_like(images[:50], 0.05)
    assert composition.strict(blank, prompts[:50]).max() == 0
    assert text.read(blank) == [""] * 50
    noise = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert composition.strict(noise, prompts[:50]).mean() < 0.1


def test_verifiers_stand_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    for task, judge in (("composition", composition.strict), ("text", text.score)):
        images, prompts = _truth(task)
        noisy = (images + 0.04 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        assert judge(noisy, prompts).mean() >= 0.95


def test_partial_score_terms() -> None:
    found = [composition.DetectedObject("circle", "red", 8, 16), composition.DetectedObject("circle", "blue", 24, 16)]
    assert composition.score_record(found, [{"class": "circle", "count": 2}]) == (1.0, True)
    assert composition.score_record(found, [{"class": "circle", "count": 2, "color": "red"}]) == (0.75, False)
    assert composition.score_record(found, [{"class": "circle", "count": 1, "color": "red"}]) == (0.0, False)
    assert composition.score_record(found, [{"class": "square", "count": 1}]) == (0.0, False)
    pair = [composition.DetectedObject("square", "red", 8, 16), composition.DetectedObject("circle", "blue", 24, 16)]
    include = [
        {"class": "circle", "count": 1, "color": "blue"},
        {"class": "square", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    assert composition.score_record(pair, include) == (1.0, True)
    include[1]["position"] = ["above", 0]
    assert composition.score_record(pair, include) == (0.8, False)


@pytest.mark.parametrize(("a", "b", "distance"), [("", "HK", 2), ("HK", "HK", 0), ("H", "HK", 1), ("KH", "HK", 2)])
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert closeness(a, b) == 1 - min(distance, len(b)) / len(b)


def test_colourfulness_formula() -> None:
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    red, green, blue = (images * 255).numpy().transpose(1, 0, 2, 3)
    rg, yb = red - green, 0.5 * (red + green) - blue
    for i in range(3):
        expected = np.hypot(rg[i].std(), yb[i].std()) + 0.3 * np.hypot(rg[i].mean(), yb[i].mean())
        assert float(colour.colourfulness(images)[i]) == pytest.approx(expected, rel=1e-5)
    grey = torch.rand(2, 1, 8, 8).expand(2, 3, 8, 8)
    assert float(colour.score(grey, []).max()) < 1e-5


def test_ideal_paintings_score_higher() -> None:
    """All of them are vivid, of the others a quarter."""
    ideal = colour.score(*_truth("colour", ideal=True)).mean()
    open_ = colour.score(*_truth("colour")).mean()
    assert ideal - open_ > 0.4


def test_splits_are_disjoint_and_files_hold_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pools.write_prompts(tmp_path)
    for task in shapes.TASKS:
        train = {p.metadata.get("target", p.text) for p in shapes.prompts(task, "train")}
        test = {p.metadata.get("target", p.text) for p in shapes.prompts(task, "test")}
        assert train
        assert test
        assert not train & test
        for split in ("train", "test"):
            suffix = f"{split}_metadata.jsonl" if task == "composition" else f"{split}.txt"
            read = load_prompts(tmp_path / "prompts" / task / suffix)
            assert sorted(p.text for p in read) == sorted(p.text for p in shapes.prompts(task, split))
            if task != "colour":
                truth = {p.text: p.metadata for p in shapes.prompts(task, split)}
                assert all(p.metadata == truth[p.text] for p in read)


def test_scenes_follow_from_the_seed() -> None:
    for task in shapes.TASKS:
        prompt = shapes.prompts(task, "test")[0]
        first, again = (
            shapes.render(shapes.scene(task, prompt, np.random.default_rng(3), ideal=True)) for _ in range(2)
        )
        assert np.array_equal(first, again)
        assert first.shape == (3, 32, 32)
        assert first.dtype == np.float32
        assert first.min() >= 0
        assert first.max() <= 1


def test_tokenizer_keeps_letters_of_words_apart(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = networks.make_tokenizer(tmp_path)
    prompts = [p for task in shapes.TASKS for split in ("train", "test") for p in shapes.prompts(task, split)]
    lengths = [len(tokenizer(p.text).input_ids) for p in prompts]
    assert max(lengths) <= networks.TOKENS
    words = tokenizer.tokenize('a sign that says "HK"')
    assert words[-4:] == ['"</w>', "h", "k</w>", '"</w>']
    assert tokenizer.tokenize("three red triangles") == ["three</w>", "red</w>", "triangles</w>"]


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'composition'"):
        get_reward("compositon")
    assert all(callable(get_reward(name)) for name in REWARDS)


def test_a_teacher_is_what_its_recipe_ends_with(tmp_path: Path) -> None:
    """In PEFT's and in diffusers' layout, loadable, with seed, seconds and curve beside it."""
    options = ("--train.rounds", "2", "--train.samples_per_task", "12", "--evaluation.prompts", "4")
    options += ("--evaluation.every", "1", "--logging.tensorboard", "false")
    out = tmp_path / "bundle"
    shutil.copytree(ASSETS / "pipeline", out / "pipeline")
    recipe = build.Recipe(seed=3, teacher_options=options)
    build.make_teacher(recipe, out, tmp_path / "work", "colour")
    folder = out / "teachers" / "colour"
    assert {path.name for path in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "training.json"),
    }
    lora, own = read_lora(folder), read_lora(folder / "pytorch_lora_weights.safetensors")
    assert lora.scale == own.scale
    assert all(torch.equal(one, own.tensors[name][0]) for name, (one, _) in lora.tensors.items())
    assert sum(bool(b.any()) for _, b in lora.tensors.values()) > len(lora.tensors) // 2
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    told = json.loads((folder / "training.json").read_text())
    assert (told["recipe"], told["seed"], told["rounds"]) == ("teacher-colour", 3, 2)
    assert [point["round"] for point in told["curve"]] == [0, 1, 2]
    assert told["curve"][-1]["rewards"]["colour"] == told["rows"]["student"]
    assert len(told["training_rewards"]) == 2
    before = (tmp_path / "work" / "teacher-colour" / "metrics.jsonl").stat().st_mtime_ns
    build.make_teacher(recipe, out, tmp_path / "work", "colour")  # there already
    assert (tmp_path / "work" / "teacher-colour" / "metrics.jsonl").stat().st_mtime_ns == before
