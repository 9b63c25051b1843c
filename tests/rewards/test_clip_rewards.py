"""PickScore, CLIPScore and the CLIP under them: values against transformers' own forward and Pillow, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward
from opd_fast.rewards.clip_model import MEAN, STD, TEXTS, Clip, features, load_clip, pillow_resize, processor_pixels
from opd_fast.rewards.clipscore import ClipScore
from opd_fast.rewards.model_files import find_model
from opd_fast.rewards.pickscore import PickScore
from opd_fast.rewards.runner import RewardRunner
from tests.tiny_clip import (
    CONTEXT,
    LOGIT_SCALE,
    SIDE,
    bytes_of,
    pictures,
    pillow_cubic,
    pillow_floats,
    processor,
    processor_pixels_of,
    save_clip,
)

TEXTS_OF_THREE = ["A red  cat", "", "three blue circles, " * 20]
"""The last is longer than the context."""
PROMPTS = [Prompt(text) for text in TEXTS_OF_THREE]
SIZES = [(512, 512), (64, 64), (45, 96), (96, 45), (97, 33), (28, 28), (20, 20)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


def settings(folder: Path, **changes: Any) -> RewardModelsConfig:
    return RewardModelsConfig(**{"clip": str(folder), "pickscore": str(folder), **changes})


def plain_logits(folder: Path, pixels: Tensor, texts: list[str], **padding: Any) -> Tensor:
    """Return the logit of each image and its own text by CLIPModel.forward, with the masks of CLIPProcessor."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    tokens = processor(folder)(text=texts, truncation=True, max_length=CONTEXT, return_tensors="pt", **padding)
    with torch.no_grad():
        logits: Tensor = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    return logits


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_clip_processor(folder: Path, size: tuple[int, int]) -> None:
    images = pictures(2, *size)
    wanted = processor_pixels_of(folder, images)
    torch.testing.assert_close(processor_pixels(images, SIDE), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [(224, 224), (7, 500), (64, 13), (100, 300)])
def test_a_resize_is_pillows_bit_for_bit(target: tuple[int, int]) -> None:
    """Levels of 0 and 255 make the cubic overshoot, so that clamping between the passes counts."""
    images = torch.cat([pictures(1, 100, 300), pictures(1, 100, 300).round()])
    levels = (images * 255).round()
    found = pillow_resize(levels, *target).byte().permute(0, 2, 3, 1).numpy()
    for image, resized in zip(bytes_of(images), found, strict=True):
        assert (resized == np.asarray(pillow_cubic(image, *target))).all()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pickscore_is_the_published_formula(folder: Path, size: tuple[int, int]) -> None:
    images = pictures(3, *size)
    pixels = processor_pixels_of(folder, images)
    wanted = plain_logits(folder, pixels, TEXTS_OF_THREE, padding=True) / 26
    found = get_reward("pickscore", settings(folder))(images, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.1


@pytest.mark.parametrize("size", SIZES)
def test_clipscore_is_the_published_formula(folder: Path, size: tuple[int, int]) -> None:
    """torchvision cuts the longer edge to whole pixels and crops from round(rest / 2), half to even."""
    images = pictures(3, *size)
    height, width = (SIDE * edge // min(size) for edge in size)
    resized = pillow_floats(images, height, width, "BILINEAR")
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    cropped = resized[:, :, top : top + SIDE, left : left + SIDE]
    pixels = (cropped - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    wanted = plain_logits(folder, pixels, TEXTS_OF_THREE, padding="max_length") / 100
    found = get_reward("clipscore", settings(folder))(images, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def test_values_are_cosines_times_the_scale(folder: Path) -> None:
    """The largest values there can be: a text is not compared with an image but with its own vector."""
    reward = ClipScore(settings(folder))
    reward(pictures(1, 64, 64), PROMPTS[:1])
    vectors = reward._clip.text_vectors(TEXTS_OF_THREE)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert reward._clip.scale == pytest.approx(torch.tensor(LOGIT_SCALE).exp().item(), rel=1e-6)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_half_precision_is_near(folder: Path, name: str, dtype: str, most: float) -> None:
    """Relative to the scale, which half precision does not round: bfloat16 would make exp(4.61) one percent larger."""
    images = pictures(3, 64, 64)
    exact = get_reward(name, settings(folder))(images, PROMPTS)
    reward = get_reward(name, settings(folder, dtype=dtype))
    found = reward(images, PROMPTS)
    assert found.dtype == torch.float32
    scale = exact.new_tensor(LOGIT_SCALE).exp() / (26 if name == "pickscore" else 100)
    assert 0 < (found - exact).abs().max() / scale < most
    assert reward._clip.scale == pytest.approx(torch.tensor(LOGIT_SCALE).exp().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_the_batch_size_does_not_matter(folder: Path, name: str) -> None:
    images = pictures(5, 40, 64)
    prompts = [PROMPTS[i % 3] for i in range(5)]
    alone = [get_reward(name, settings(folder))(images[i : i + 1], prompts[i : i + 1]) for i in range(5)]
    for batch in (1, 2, 5, 16):
        found = get_reward(name, settings(folder, batch=batch))(images, prompts)
        torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=2e-6)


def test_a_text_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    plain = Clip.token_ids
    monkeypatch.setattr(Clip, "token_ids", lambda self, texts: asked.append(list(texts)) or plain(self, texts))
    clip = load_clip("clip", str(folder), torch.device("cpu"), torch.float32)
    first = clip.text_vectors(["new a", "new b", "new a"])
    again = clip.text_vectors(["new b", "new c", "new a"])
    assert asked == [["new a", "new b"], ["new c"]]
    assert torch.equal(first[[1, 2]], again[[0, 2]])
    clip._texts.update({str(i): first[0] for i in range(TEXTS)})
    clip.text_vectors(["new d"])
    assert len(clip._texts) == TEXTS
    assert "new a" not in clip._texts
    assert "new d" in clip._texts


def test_long_texts_keep_the_token_that_ends_them(folder: Path) -> None:
    clip = load_clip("clip", str(folder), torch.device("cpu"), torch.float32)
    vocab = json.loads((folder / "vocab.json").read_text())
    short, long = clip.token_ids(["Cat red", "red " * 100]).tolist()
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    assert short == [start, vocab["cat</w>"], vocab["red</w>"]] + [end] * 74
    assert long == [start] + [vocab["red</w>"]] * 75 + [end]


def test_rewards_with_one_clip_share_it(folder: Path) -> None:
    pick, clip = PickScore(settings(folder)), ClipScore(settings(folder))
    for reward in (pick, clip):
        reward(pictures(1, 64, 64), PROMPTS[:1])
    assert pick._clip is clip._clip


def test_features_of_every_form() -> None:
    """transformers 4 returns the tensor, 5 an object or, where a configuration asks for it, a tuple."""
    tensor, other = torch.rand(2, 3), torch.rand(2, 5, 4)
    assert features(tensor) is tensor
    assert features(SimpleNamespace(last_hidden_state=other, pooler_output=tensor)) is tensor
    assert features((other, tensor)) is tensor


def test_what_the_values_depend_on(folder: Path) -> None:
    models = settings(folder, clip="a", dtype="bfloat16")
    assert PickScore(models).identity() == {"pickscore": str(folder), "dtype": "bfloat16"}
    assert ClipScore(models).identity() == {"clip": "a", "dtype": "bfloat16"}


# --- refusals --------------------------------------------------------------------------------------------------------


def broken(folder: Path, tmp_path: Path, what: str) -> Path:
    """Return a copy of the folder with one thing wrong."""
    copied = Path(shutil.copytree(folder, tmp_path / what))
    config = json.loads((copied / "config.json").read_text())
    match what:
        case "missing":
            shutil.rmtree(copied)
        case "no config":
            (copied / "config.json").unlink()
        case "siglip":
            (copied / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
        case "no weights":
            (copied / "model.safetensors").unlink()
        case "damaged":
            file = copied / "model.safetensors"
            file.write_bytes(file.read_bytes()[:5000])
        case "other shapes":
            (copied / "config.json").write_text(json.dumps({**config, "projection_dim": 16}))
        case "more layers":
            config["text_config"]["num_hidden_layers"] = 3
            (copied / "config.json").write_text(json.dumps(config))
        case "no tokenizer":
            (copied / "merges.txt").unlink()
        case "damaged tokenizer":
            (copied / "vocab.json").write_text("{")
        case "other tokenizer":
            vocab = json.loads((copied / "vocab.json").read_text())
            (copied / "vocab.json").write_text(json.dumps({**vocab, "extra": len(vocab)}))
    return copied


PROBLEMS = {
    "missing": "does not exist; give a path that does, or a hub id",
    "no config": "has no config.json of a transformers model",
    "siglip": "holds a model of type siglip, not clip",
    "no weights": "has no model.safetensors",
    "no tokenizer": "has no tokenizer (vocab.json and merges.txt, or tokenizer.json)",
}
FOUND_LATER = {
    "damaged": "cannot be loaded",
    "other shapes": "cannot be loaded",
    "more layers": "is not a whole CLIP: missing keys text_model.encoder.layers.2.",
    "damaged tokenizer": "cannot be loaded",
    "other tokenizer": "tokens, and the model",
}


@pytest.mark.parametrize(("reward", "key"), [(PickScore, "pickscore"), (ClipScore, "clip")])
@pytest.mark.parametrize(("what", "problem"), {**PROBLEMS, **FOUND_LATER}.items())
def test_a_clip_that_cannot_be_used(
    folder: Path, tmp_path: Path, reward: Any, key: str, what: str, problem: str
) -> None:
    """One line names the setting, what is wrong and the remedy; `check` finds it without loading where it can."""
    models = settings(folder, **{key: str(broken(folder, tmp_path, what))})
    use = reward(models).check if what in PROBLEMS else lambda: reward(models)(pictures(1, 64, 64), PROMPTS[:1])
    with pytest.raises(UserError) as caught:
        use()
    text = str(caught.value)
    assert text.startswith(f"reward_models.{key}: ")
    assert problem in text
    assert "\n" not in text
    repository = {"clip": "openai/clip-vit-large-patch14", "pickscore": "yuvalkirstain/PickScore_v1"}[key]
    assert what == "missing" or text.endswith(f"run: hf download {repository}, or give the path of such a folder")


def test_an_evaluation_names_what_is_missing(folder: Path, tmp_path: Path) -> None:
    models = settings(folder, pickscore=str(tmp_path / "nowhere"))
    runner = RewardRunner("record", 30.0, models)
    images = pictures(2, 64, 64)
    assert runner("pickscore", images, PROMPTS[:2]).isnan().all()
    assert runner("clipscore", images, PROMPTS[:2]).isfinite().all()
    assert runner.failures == {("pickscore", "unavailable"): 2}
    assert "reward_models.pickscore" in runner.messages["pickscore", "unavailable"]


# --- the hub's cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached; returns the folder of the one commit of owner/name in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    commit = repository / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    return commit


def test_a_repository_of_which_a_part_is_cached_is_not_there(folder: Path, cache: Path) -> None:
    """Another library may have fetched the tokenizer alone. `check` says nothing: the rest may still be fetched."""
    shutil.copy(folder / "config.json", cache)
    reward = PickScore(settings(folder, pickscore="owner/name"))
    reward.check()
    with pytest.raises(
        UserError, match=r"owner/name is not on .* lacks model\*.safetensors or .*hf download owner/name"
    ):
        reward(pictures(1, 64, 64), PROMPTS[:1])
    for file in folder.iterdir():
        shutil.copy(file, cache)
    reward.check()
    wanted = get_reward("pickscore", settings(folder))(pictures(1, 64, 64), PROMPTS[:1])
    assert torch.equal(reward(pictures(1, 64, 64), PROMPTS[:1]), wanted)


def test_half_of_a_tokenizer_is_not_one(folder: Path, cache: Path) -> None:
    """Without tokenizer.json both vocab.json and merges.txt are wanted, whichever another library fetched."""
    whole = [file for file in folder.iterdir() if file.name not in ("tokenizer.json", "vocab.json", "merges.txt")]
    for file in whole:
        shutil.copy(file, cache)
    for name, absent in (("merges.txt", "vocab.json"), ("vocab.json", "merges.txt")):
        (cache / name).write_text("{}")
        PickScore(settings(folder, pickscore="owner/name")).check()  # what is absent may still be fetched
        with pytest.raises(UserError, match=rf"lacks tokenizer\.json or {absent}.*hf download owner/name"):
            load_clip("pickscore", "owner/name", torch.device("cpu"), torch.float32)
        (cache / name).unlink()


def test_weights_of_which_a_shard_is_absent_are_not_there(cache: Path) -> None:
    needs = ("config.json", "model*.safetensors|pytorch_model*.bin")
    (cache / "config.json").write_text("{}")
    for number in (1, 3, 2):
        assert find_model("detector", "owner/name", fetch=False, needs=needs) is None
        (cache / f"model-0000{number}-of-00003.safetensors").write_bytes(b"")
    assert find_model("detector", "owner/name", fetch=False, needs=needs) == cache
    (cache / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\*\.safetensors or .*hf download owner/name"):
        find_model("detector", "owner/name", needs=needs)
    (cache / "model.safetensors").write_bytes(b"")
    assert find_model("detector", "owner/name", needs=needs) == cache


@pytest.mark.parametrize("file", ["HPS_v2.1_compressed.pt", "sac+logos.pth", "weights.bin", "model.safetensors"])
def test_one_file_of_a_repository(cache: Path, file: str) -> None:
    with pytest.raises(UserError, match="hf download owner/name"):
        find_model("hps", f"owner/name/{file}")
    assert find_model("hps", f"owner/name/{file}", fetch=False) is None
    (cache / file).write_bytes(b"")
    assert find_model("hps", f"owner/name/{file}") == cache / file
