"""HPSv2.1: open_clip's weights renamed for transformers, its preprocessing and tokens, and refusals.

`OpenClip` below writes open_clip's CLIP down anew, from the names and shapes of its weights. Where open_clip itself is
installed, the last tests hold the renaming and the tokens against it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward
from opd_fast.rewards.clip_model import MEAN, STD
from opd_fast.rewards.hps import HPS, clean_text, padded_pixels
from tests.tiny_clip import CONTEXT, SIDE, pictures, pillow_floats, randomise, save_tokenizer

TEXTS = ["A red  cat", "", "three blue circles, " * 20]
"""The last is longer than the context."""
PROMPTS = [Prompt(text) for text in TEXTS]
SIZES = [(512, 512), (64, 64), (45, 96), (96, 45), (97, 33), (28, 28), (20, 28)]
IMAGE_WIDTH, TEXT_WIDTH, PROJECTION = 160, 128, 48
REMEDY = "run: hf download xswu/HPSv2 HPS_v2.1_compressed.pt, or give the path of that file"


class Block(nn.Module):
    """Attention and two layers, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 3 * width), "c_proj": nn.Linear(3 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    """Blocks one after another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(2)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """The image side: the class token's vector, projected."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, IMAGE_WIDTH, 14, 14, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(IMAGE_WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(5, IMAGE_WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(IMAGE_WIDTH), nn.LayerNorm(IMAGE_WIDTH)
        self.transformer = Tower(IMAGE_WIDTH, IMAGE_WIDTH // 80)
        self.proj = nn.Parameter(torch.zeros(IMAGE_WIDTH, PROJECTION))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first, patches], 1) + self.positional_embedding
        pooled: Tensor = self.ln_post(self.transformer(self.ln_pre(x))[:, 0])
        return pooled @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP with heads as wide as those of ViT-H-14."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(tokens, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT, TEXT_WIDTH))
        self.transformer = Tower(TEXT_WIDTH, TEXT_WIDTH // 64)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, PROJECTION))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, ids: Tensor) -> Tensor:
        mask = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding, mask))
        return x[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(tokenizer: Path) -> OpenClip:
    model = OpenClip(len(json.loads((tokenizer / "vocab.json").read_text()))).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def file(model: OpenClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS.pt"
    torch.save({"epoch": 1, "name": "HPS", "state_dict": model.state_dict()}, path)
    return path


def settings(file: Path, tokenizer: Path, **changes: Any) -> RewardModelsConfig:
    return RewardModelsConfig(hps=str(file), clip=str(tokenizer), **changes)


def zero_padded(tokenizer: Path, texts: list[str]) -> Tensor:
    """Return tokens as open_clip pads them, with zeros."""
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(tokenizer)(texts, truncation=True, max_length=CONTEXT)["input_ids"]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in ids])


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_padded_as_published(size: tuple[int, int]) -> None:
    """The black border is black before the mean is taken off. Pillow resizes in floating point here."""
    images = pictures(2, *size)
    height, width = (round(edge * SIDE / max(size)) for edge in size)
    square = torch.zeros(2, 3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square[:, :, top : top + height, left : left + width] = pillow_floats(images, height, width, "BICUBIC")
    wanted = (square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(padded_pixels(images, SIDE), wanted, rtol=0, atol=1e-5)


def test_features_are_those_of_open_clip(file: Path, model: OpenClip, tokenizer: Path) -> None:
    images = pictures(3, 64, 64)
    reward = HPS(settings(file, tokenizer))
    reward(images, PROMPTS)
    pixels = padded_pixels(images, SIDE)
    ids = zero_padded(tokenizer, [clean_text(text) for text in TEXTS])
    with torch.no_grad():
        torch.testing.assert_close(
            reward._clip.image_vectors(pixels), F.normalize(model.visual(pixels), dim=1), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            reward._clip.text_vectors(TEXTS), F.normalize(model.encode_text(ids), dim=1), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("size", SIZES)
def test_values_are_unscaled_cosines(file: Path, model: OpenClip, tokenizer: Path, size: tuple[int, int]) -> None:
    images = pictures(3, *size)
    ids = zero_padded(tokenizer, [clean_text(text) for text in TEXTS])
    with torch.no_grad():
        wanted = F.cosine_similarity(model.visual(padded_pixels(images, SIDE)), model.encode_text(ids))
    found = get_reward("hps", settings(file, tokenizer))(images, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.01


def test_texts_are_cleaned_as_open_clip_does_it() -> None:
    assert clean_text("  An astronaut’s “glove” &amp;amp; a\u00a0Ｃat\n") == 'an astronaut\'s "glove" & a cat'
    assert clean_text("cafe\u0301 ﬂag") == "café flag"


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_is_near(file: Path, tokenizer: Path, dtype: str, most: float) -> None:
    images = pictures(3, 64, 64)
    exact = HPS(settings(file, tokenizer))(images, PROMPTS)
    found = HPS(settings(file, tokenizer, dtype=dtype))(images, PROMPTS)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < most


def test_weights_saved_in_half_precision(model: OpenClip, tokenizer: Path, tmp_path: Path) -> None:
    """The published file is of half precision; the settings say what is computed in."""
    half = {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save({"state_dict": half}, tmp_path / "half.pt")
    torch.save({"state_dict": {name: weight.float() for name, weight in half.items()}}, tmp_path / "whole.pt")
    images = pictures(3, 64, 64)
    found = [HPS(settings(tmp_path / name, tokenizer))(images, PROMPTS) for name in ("half.pt", "whole.pt")]
    assert torch.equal(*found)


def test_the_batch_size_does_not_matter(file: Path, tokenizer: Path) -> None:
    images = pictures(5, 40, 64)
    prompts = [PROMPTS[i % 3] for i in range(5)]
    reward = HPS(settings(file, tokenizer))
    wanted = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    for batch in (1, 2, 16):
        found = HPS(settings(file, tokenizer, batch=batch))(images, prompts)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_what_the_values_depend_on(file: Path, tokenizer: Path) -> None:
    found = HPS(settings(file, tokenizer)).identity()
    assert found == {"hps": str(file), "clip": str(tokenizer), "dtype": "auto"}


# --- refusals --------------------------------------------------------------------------------------------------------


def altered(state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    match what:
        case "of transformers":
            return {"vision_model.embeddings.class_embedding": torch.zeros(3)}
        case "of ViT-L-14":
            return {**state, "visual.conv1.weight": torch.zeros(1024, 3, 14, 14)}
        case "of another kind":
            return {**state, "text.transformer.embeddings.word_embeddings.weight": torch.zeros(3)}
        case "lacking a layer":
            return {name: weight for name, weight in state.items() if "visual.transformer.resblocks.0.attn" not in name}
        case "of a wrong shape":
            return {**state, "ln_final.weight": torch.zeros(3)}
        case "of too many dimensions":
            return {**state, "text_projection": torch.zeros(3, 3, 3)}
    raise AssertionError(what)


BAD = {
    "of transformers": "is not open_clip's ViT-H-14: it has no visual.conv1.weight",
    "of ViT-L-14": "is not open_clip's ViT-H-14: its widths are 1024 and 128, not multiples of 80 and 64",
    "of another kind": "is not open_clip's ViT-H-14: it has text.transformer.embeddings.word_embeddings.weight",
    "lacking a layer": "is not a whole CLIP: missing keys vision_model.encoder.layers.0.self_attn.",
    "of a wrong shape": "cannot be loaded",
    "of too many dimensions": "is not open_clip's ViT-H-14",
}


@pytest.mark.parametrize(("what", "problem"), BAD.items())
def test_other_weights_are_refused(model: OpenClip, tokenizer: Path, tmp_path: Path, what: str, problem: str) -> None:
    torch.save({"state_dict": altered(dict(model.state_dict()), what)}, tmp_path / "other.pt")
    with pytest.raises(UserError) as caught:
        HPS(settings(tmp_path / "other.pt", tokenizer))(pictures(1, 64, 64), PROMPTS[:1])
    assert str(caught.value).startswith(f"reward_models.hps: {tmp_path / 'other.pt'} {problem}")
    assert str(caught.value).endswith(REMEDY)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(file: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:9999])
    with pytest.raises(UserError, match=r"^reward_models.hps: .*/cut.pt cannot be read \(") as caught:
        HPS(settings(tmp_path / "cut.pt", tokenizer))(pictures(1, 64, 64), PROMPTS[:1])
    assert str(caught.value).endswith(REMEDY)


def test_the_check_finds_what_is_missing(
    file: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HPS(settings(file, tokenizer)).check()
    with pytest.raises(UserError, match=r"^reward_models.hps: .*/nothing.pt does not exist; give a path"):
        HPS(settings(tmp_path / "nothing.pt", tokenizer)).check()
    with pytest.raises(UserError, match=r"^reward_models.clip: .* has no tokenizer \(vocab.json and merges.txt, or"):
        HPS(settings(file, tmp_path)).check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^ftfy: is not installed; pip install "opd_fast\[rewards\]"$'):
        HPS(settings(file, tokenizer)).check()


def test_a_tokenizer_of_another_vocabulary_is_refused(file: Path, tokenizer: Path, tmp_path: Path) -> None:
    vocab = json.loads((tokenizer / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "extra": len(vocab)}))
    (tmp_path / "merges.txt").write_text((tokenizer / "merges.txt").read_text())
    with pytest.raises(UserError, match=r"^reward_models.clip: the tokenizer in .* tokens, and the model "):
        HPS(settings(file, tmp_path))(pictures(1, 64, 64), PROMPTS[:1])


# --- against open_clip -----------------------------------------------------------------------------------------------

NASTY = [
    "A astronaut’s glove floating in zero-g with “NASA 2049” on the wrist",
    "",
    "New York Skyline with 'Hello World' written with fireworks, 1234 &amp; &lt;b&gt;",
    "don't they've we'll I'd it's I'm you're",
    "naïve café, Ελλάς ΟΔΟΣ, İstanbul, ẞ straße, 東京タワー, 🎨🖼️ emoji\u200bzero",
    "cafe\u0301 ﬂag ＦＵＬＬ ½ ² ™ … — –",
    "word " * 200,
    "  tabs\tand\n\nlines  ",
    "Ã©tÃ© mojibake â€œquotesâ€\u009d",
    "price $5.00/10% @home #tag a_b c-d (e) [f] {g} <h> \\ | ~ ^",
]


@pytest.fixture(scope="module")
def open_clip() -> Any:
    """The library itself, which CI does not install: it wants torchvision."""
    try:
        return importlib.import_module("open_clip")
    except Exception as error:  # torchvision may be there and not load
        return pytest.skip(f"open_clip cannot be imported: {error}")


def test_open_clips_own_model_has_the_same_features(open_clip: Any, tmp_path: Path) -> None:
    """A small model of open_clip's class with ViT-H-14's head widths, its real tokenizer, its own forward."""
    simple = open_clip.tokenizer.SimpleTokenizer()
    save_real_tokenizer(simple, tmp_path)
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 56, "layers": 3, "width": 160, "head_width": 80, "patch_size": 14},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
        output_dict=True,
    ).eval()
    randomise(theirs, 0)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "HPS.pt")
    images = pictures(len(NASTY), 100, 80)
    prompts = [Prompt(text) for text in NASTY]
    reward = HPS(settings(tmp_path / "HPS.pt", tmp_path))
    found = reward(images, prompts)
    with torch.no_grad():
        out = theirs(padded_pixels(images, 56), simple(NASTY))
    torch.testing.assert_close(
        reward._clip.image_vectors(padded_pixels(images, 56)), out["image_features"], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(reward._clip.text_vectors(NASTY), out["text_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, (out["image_features"] * out["text_features"]).sum(1), rtol=0, atol=1e-5)


def test_tokens_are_those_of_open_clip(open_clip: Any, tmp_path: Path) -> None:
    """Up to the token that ends the text, after which open_clip has zeros."""
    from opd_fast.rewards.clip_model import load_tokenizer

    simple = open_clip.tokenizer.SimpleTokenizer()
    save_real_tokenizer(simple, tmp_path)
    ours = load_tokenizer("clip", tmp_path, 49408)
    for text, wanted in zip(NASTY, simple(NASTY).tolist(), strict=True):
        found = ours(clean_text(text), truncation=True, max_length=77)["input_ids"]
        assert found == wanted[: wanted.index(49407) + 1], text


def save_real_tokenizer(simple: Any, folder: Path) -> None:
    """Write CLIP's whole vocabulary, as open_clip has it, in transformers' format."""
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {special.get(token, token): i for token, i in simple.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(pair) for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
