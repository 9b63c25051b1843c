"""The reward `image_reward`, held to a plain model of the published description through files of the published form."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward, image_reward
from opd_fast.rewards.image_reward import ImageReward, build, load_tokenizer, pixels_of
from opd_fast.rewards.runner import RewardFailure, RewardRunner, call_reward
from tests.tiny_image_reward import WORDS, ReferenceImageReward, random_reference, write_tokenizer

SIDE = 48
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TEXTS = {
    "red cat": [2, WORDS.index("red"), WORDS.index("cat"), 3],
    "The DOG on the hill.": [2, *(WORDS.index(w) for w in ("the", "dog", "on", "the", "hill", ".")), 3],
    "": [2, 3],
    "blue sky, " * 20: [2, *([WORDS.index(w) for w in ("blue", "sky", ",")] * 11), 3],  # 35 tokens of 62
    "cat [DEC] [ENC]": [2, WORDS.index("cat"), len(WORDS), len(WORDS) + 1, 3],
    "catso ?": [2, WORDS.index("cat"), WORDS.index("##s"), WORDS.index("##o"), WORDS.index("[UNK]"), 3],
}
"""Prompts and their tokens."""


@pytest.fixture(scope="module")
def reference() -> ReferenceImageReward:
    return random_reference(0, words=len(WORDS) + 2)


@pytest.fixture(scope="module")
def models(reference: ReferenceImageReward, tmp_path_factory: pytest.TempPathFactory) -> RewardModelsConfig:
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(reference.state_dict(), folder / "ImageReward.pt")
    tokenizer = write_tokenizer(folder / "bert")
    return RewardModelsConfig(image_reward=str(folder / "ImageReward.pt"), bert=str(tokenizer), batch=4)


def pillow_pixels(image: Tensor) -> Tensor:
    """Return an image (3, H, W) as torchvision prepares Pillow's: Resize(48, BICUBIC), CenterCrop(48), Normalize."""
    pixels = Image.fromarray((image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
    width, height = pixels.size
    long = int(SIDE * max(width, height) / min(width, height))
    pixels = pixels.resize((SIDE, long) if width <= height else (long, SIDE), Image.Resampling.BICUBIC)
    left, top = (round((size - SIDE) / 2) for size in pixels.size)
    levels = torch.from_numpy(np.array(pixels.crop((left, top, left + SIDE, top + SIDE)))).permute(2, 0, 1)
    return (levels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def expected(reference: ReferenceImageReward, images: Tensor, texts: list[str]) -> Tensor:
    """Return the reference's scores; each prompt is read by itself, without anything that fills the rest."""
    with torch.no_grad():
        scores = [
            reference(pillow_pixels(image)[None], torch.tensor([TEXTS[text]]), torch.ones(1, len(TEXTS[text])))
            for image, text in zip(images, texts, strict=True)
        ]
    return torch.cat(scores)


@pytest.mark.parametrize("size", [(48, 48), (96, 96), (60, 97)])
def test_scores_are_those_of_the_published_description(
    reference: ReferenceImageReward, models: RewardModelsConfig, size: tuple[int, int]
) -> None:
    texts = [*TEXTS, "red cat", "red cat", ""]
    images = torch.rand(len(texts), 3, *size, generator=torch.Generator().manual_seed(1))
    values = call_reward(get_reward("image_reward", models), images, [Prompt(text) for text in texts])
    wanted = expected(reference, images, texts)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    # The comparison could tell: images and prompts move the score by far more than its tolerance.
    assert float(wanted[[0, 6, 7]].std()) > 0.01
    assert float(wanted.std()) > 0.1


@pytest.mark.parametrize("size", [(48, 48), (48, 51), (51, 48), (49, 99), (512, 512), (300, 401), (401, 300), (20, 30)])
def test_pixels_are_those_of_pillow(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    images[0, :, : size[0] // 2] = images[0, :, :1, :1]  # flat regions and an edge
    off = (pixels_of(images, SIDE) - torch.stack([pillow_pixels(image) for image in images])).abs()
    levels = off * 255 * torch.tensor(STD).view(3, 1, 1)
    # Pillow 13 resizes some tall images in another order, which moves levels by one or two.
    assert float(levels.max()) < (2.01 if size[0] > size[1] else 0.01)
    assert float(levels.mean()) < 0.2


def test_the_published_sizes_are_read_from_the_weights() -> None:
    with torch.device("meta"):
        published = ReferenceImageReward(
            224, 16, 1024, 24, words=30524, positions=512, text_width=768, inner=3072, layers=12
        )
    state = published.state_dict()
    size = sum(weight.numel() * weight.element_size() for weight in state.values())
    assert size == pytest.approx(1.79e9, rel=3e-3)  # the hub gives the file's size as 1.79 GB
    network = build(state)
    vision, text = network.vision.config, network.text.config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.num_attention_heads) == (
        224,
        16,
        24,
        16,
    )
    assert (vision.hidden_size, vision.intermediate_size, vision.layer_norm_eps) == (1024, 4096, 1e-6)
    assert (text.num_hidden_layers, text.num_attention_heads, text.vocab_size, text.layer_norm_eps) == (
        12,
        12,
        30524,
        1e-12,
    )
    unused = {name for name in state if name.startswith(("blip.vision_proj", "blip.text_proj"))}
    assert (image_reward.MEAN, image_reward.STD) == (
        0.16717362830052426,
        1.0333394966054072,
    )  # ImageReward/ImageReward.py
    assert len(network.state_dict()) == len(state) - len(unused) - 1  # and position_ids


def test_prompts_become_the_tokens_of_berts_uncased_vocabulary(models: RewardModelsConfig, tmp_path: Path) -> None:
    """From all the files of the repository, from the vocabulary alone, and from the tokenizer alone."""
    vocabulary, alone = tmp_path / "vocabulary", tmp_path / "alone"
    vocabulary.mkdir()
    alone.mkdir()
    shutil.copy(Path(models.bert) / "vocab.txt", vocabulary)
    shutil.copy(Path(models.bert) / "tokenizer.json", alone)
    for folder in (models.bert, vocabulary, alone):
        tokenizer = load_tokenizer(str(folder), len(WORDS) + 2)
        read = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=35)
        for tokens, found, mask in zip(TEXTS.values(), read["input_ids"], read["attention_mask"], strict=True):
            assert found == tokens + [0] * (35 - len(tokens))
            assert mask == [1] * len(tokens) + [0] * (35 - len(tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_the_head_in_float32(
    reference: ReferenceImageReward, models: RewardModelsConfig, dtype: Any
) -> None:
    reward = get_reward(
        "image_reward", RewardModelsConfig(image_reward=models.image_reward, bert=models.bert, dtype=dtype)
    )
    assert isinstance(reward, ImageReward)
    texts = list(TEXTS)
    images = torch.rand(len(texts), 3, 48, 48, generator=torch.Generator().manual_seed(3))
    values = call_reward(reward, images, [Prompt(text) for text in texts])
    wanted = expected(reference, images, texts)
    off = (values - wanted).abs().max() / wanted.std()
    assert 0 < float(off) < (0.02 if dtype == "float16" else 0.15)
    assert reward._network.head[0].weight.dtype == torch.float32
    assert reward._network.text.embeddings.word_embeddings.weight.dtype == getattr(torch, dtype)
    assert reward.identity() == {"image_reward": models.image_reward, "bert": models.bert, "dtype": dtype}


def test_the_hub_has_what_the_settings_name(models: RewardModelsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the files come from the hub: those of the published repositories, and no other."""
    asked = []

    def snapshot_download(repo: str, *, allow_patterns: list[str], local_files_only: bool, **other: Any) -> str:
        asked.append((repo, tuple(allow_patterns)))
        return {
            "zai-org/ImageReward": str(Path(models.image_reward).parent),
            "google-bert/bert-base-uncased": models.bert,
        }[repo]

    monkeypatch.setattr(importlib.import_module("huggingface_hub"), "snapshot_download", snapshot_download)
    reward = ImageReward(RewardModelsConfig())
    reward.check()
    assert call_reward(reward, torch.rand(1, 3, 48, 48), [Prompt("red cat")], name="image_reward").isfinite().all()
    assert set(asked) == {
        ("zai-org/ImageReward", ("ImageReward.pt",)),
        ("google-bert/bert-base-uncased", ("*.json", "*.txt")),
    }


def test_a_tokenizer_of_which_a_part_is_cached_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.import_module("huggingface_hub"), "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"^reward_models\.bert: owner/name .* lacks tokenizer\.json or vocab\.txt"):
        load_tokenizer("owner/name", 30524)


def test_what_is_not_on_this_machine_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(importlib.import_module("huggingface_hub"), "snapshot_download", snapshot_download)
    runner = RewardRunner("record", models=RewardModelsConfig(batch=3))
    assert runner("image_reward", torch.rand(2, 3, 8, 8), [Prompt("red cat")] * 2).isnan().all()
    assert runner.failures == {("image_reward", "unavailable"): 2}
    assert "run: hf download zai-org/ImageReward ImageReward.pt" in str(runner.messages)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "does not exist"),
        ("folder", "is a folder, not a file of weights; give the path of ImageReward.pt"),
        ("damaged", "cannot be read"),
        ("cut", "cannot be read"),
        ("code", "cannot be read"),
        ("another model", "does not hold ImageReward's weights: it lacks vision.embeddings.position_embedding"),
        (
            "lacks one",
            "does not hold ImageReward's weights: it lacks text.encoder.layer.1.crossattention.self.key.bias",
        ),
        ("lacks the head", "does not hold ImageReward's weights: it lacks head.4.weight"),
        ("shape", "head.0.weight has the shape (1024, 191), not (1024, 192)"),
        ("no tokenizer", "has no tokenizer of BERT (vocab.txt or tokenizer.json)"),
        ("another tokenizer", f"has {len(WORDS) - 3} tokens, and the model knows {len(WORDS)}"),
        ("damaged tokenizer", "cannot be loaded"),
        ("missing tokenizer", "does not exist"),
    ],
)
def test_faulty_files_are_named_in_one_line(
    reference: ReferenceImageReward, models: RewardModelsConfig, tmp_path: Path, fault: str, words: str
) -> None:
    file, folder = tmp_path / "ImageReward.pt", tmp_path / "bert"
    state = dict(reference.state_dict())
    if fault == "folder":
        file.mkdir()
    elif fault == "damaged":
        file.write_bytes(b"not weights" * 100)
    elif fault == "cut":
        whole = Path(models.image_reward).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif fault == "code":
        torch.save({"mlp": Harmful()}, file)
    elif fault == "another model":
        torch.save({"model.diffusion_model.weight": torch.zeros(3)}, file)
    elif fault == "lacks one":
        torch.save({k: v for k, v in state.items() if "layer.1.crossattention.self.key.bias" not in k}, file)
    elif fault == "lacks the head":
        torch.save({k: v for k, v in state.items() if k != "mlp.layers.7.weight"}, file)
    elif fault == "shape":
        torch.save({**state, "mlp.layers.0.weight": torch.zeros(1024, 191)}, file)
    elif fault == "no tokenizer":
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    elif fault == "another tokenizer":
        write_tokenizer(folder, WORDS[:-3])
    elif fault == "damaged tokenizer":
        write_tokenizer(folder)
        (folder / "tokenizer.json").write_text('{"version": ')
    of_tokenizer = "tokenizer" in fault
    settings = RewardModelsConfig(
        image_reward=models.image_reward if of_tokenizer else str(file),
        bert=str(folder) if of_tokenizer else models.bert,
    )
    reward = ImageReward(settings)
    key = "reward_models.bert" if of_tokenizer else "reward_models.image_reward"
    with pytest.raises(RewardFailure) as failure:
        call_reward(reward, torch.rand(1, 3, 48, 48), [Prompt("red cat")], name="image_reward")
    message = str(failure.value)
    assert failure.value.kind == "unavailable"
    assert f"cannot judge: {key}: " in message
    assert words in message
    assert "\n" not in message
    if fault in ("missing", "folder", "no tokenizer", "missing tokenizer"):  # seen before a run begins, without loading
        with pytest.raises(UserError, match=f"^{key}: "):
            reward.check()
    else:
        reward.check()
