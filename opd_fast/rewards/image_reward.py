"""The reward `image_reward`: how people would rate an image for its prompt, by ImageReward-v1.0 (arXiv 2304.05977).

A BLIP reads the pair: a ViT-L/16 at 224 pixels encodes the image, and a BERT whose layers attend to it reads the
prompt. A head of five linear layers makes a number of the first token, which is normalised by the mean and standard
deviation of the training set (ImageReward/ImageReward.py). Published tables average it as it is, about -2 to 2.

The network is transformers' BLIP. `transformers_names` maps the checkpoint's names onto it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.clip_model import TOKENIZER_FILES, fetch_again, normalised, pillow_resize, read_state
from opd_fast.rewards.model_files import find_model
from opd_fast.rewards.model_reward import ModelReward

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's outputs on the training set."""
LENGTH = 35
"""Tokens of a prompt, with [CLS] and [SEP]; the rest is cut off."""
HEAD_WIDTH = 64
"""Of attention heads, in the vision transformer and in BERT."""
DROPPED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""What the checkpoint holds of BLIP's pretraining beside the weights of the score."""

_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)


class Network(nn.Module):
    """The vision transformer, the BERT and the head.

    Args:
        vision, text: configurations of transformers' BlipVisionModel and BlipTextModel.
    """

    def __init__(self, vision: Any, text: Any) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, 1024, 128, 64, 16, 1)
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the normalised scores, (B,) float32.

        Args:
            pixels: (B, 3, side, side) in the dtype of the weights, normalised.
            tokens: (B, L) int64.
            mask: (B, L) int64, 1 for tokens and 0 for what fills the rest.
        """
        image = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        score: Tensor = self.head(read[:, 0].float()).squeeze(1)  # the head is float32, as in the released code
        return (score - MEAN) / STD


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of ImageReward.pt by the names of `Network`; what the score does not use is left out.

    Names of another kind are kept as they are.
    """
    linear = {f"mlp.layers.{place}.": f"head.{i}." for i, place in enumerate((0, 2, 4, 6, 7))}  # dropout lies between
    renamed = {}
    for name, weight in state.items():
        if name.startswith(DROPPED):
            continue
        if name.startswith("blip.visual_encoder."):
            inside = name.removeprefix("blip.visual_encoder.")
            for pattern, ours in _VISION:
                if re.match(pattern, inside):
                    inside = re.sub(rf"^{pattern}", ours, inside)
                    break
            renamed[f"vision.{inside}"] = weight
        elif name.startswith("blip.text_encoder."):
            renamed[f"text.{name.removeprefix('blip.text_encoder.')}"] = weight
        else:
            prefix = next((prefix for prefix in linear if name.startswith(prefix)), "")
            renamed[linear.get(prefix, "") + name.removeprefix(prefix)] = weight
    return renamed


def build(state: Mapping[str, Tensor]) -> Network:
    """Return the network of the weights of ImageReward.pt, float32; its sizes are read from them.

    Raises KeyError or ValueError, which name the weight, where one is missing or does not fit.
    """
    from transformers import BlipTextConfig, BlipVisionConfig

    named = transformers_names(state)
    positions = named["vision.embeddings.position_embedding"]
    patches = named["vision.embeddings.patch_embedding.weight"]
    words = named["text.embeddings.word_embeddings.weight"]
    width, text_width = positions.shape[-1], words.shape[1]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(named["vision.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(named, "vision.encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(positions.shape[1] - 1) * patches.shape[2],
        patch_size=patches.shape[2],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(named["text.encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(named, "text.encoder.layer."),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=len(named["text.embeddings.position_embeddings.weight"]),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # this is what gives the layers their cross-attention
    )
    with torch.device("meta"):
        network = Network(vision, text)
    wanted = network.state_dict()
    for name, weight in wanted.items():
        if name not in named:
            raise KeyError(name)
        if named[name].shape != weight.shape:
            raise ValueError(f"{name} has the shape {tuple(named[name].shape)}, not {tuple(weight.shape)}")
    network.load_state_dict({name: named[name].float() for name in wanted}, assign=True)
    network.text.embeddings.position_ids = torch.arange(text.max_position_embeddings)[None]
    return network.eval().requires_grad_(False)


def _layers(named: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in named if name.startswith(prefix)})


def pixels_of(images: Tensor, side: int) -> Tensor:
    """Return images as the released code prepares them: Pillow's cubic filter, a crop at the centre, CLIP's constants.

    The shorter edge becomes `side`; torchvision's CenterCrop halves an odd rest to the even number.

    Args:
        images: (B, 3, H, W) float32 in 0..1.
        side: of the network's square images, in pixels.

    Returns:
        (B, 3, side, side) float32.
    """
    shorter = min(images.shape[2:])
    height, width = (int(side * size / shorter) for size in images.shape[2:])
    levels = pillow_resize((images * 255).round().clamp(0, 255), height, width)
    top, left = (round((size - side) / 2) for size in (height, width))
    return normalised(levels[:, :, top : top + side, left : left + side] / 255)


class ImageReward(ModelReward):
    """Judges by `reward_models.image_reward`, ImageReward.pt, with the tokenizer `reward_models.bert`."""

    _network: Network

    def check(self) -> None:
        super().check()
        if (file := find_model("image_reward", self.models.image_reward, fetch=False)) is not None:
            _check_file(file)
        if (folder := _find_tokenizer(self.models.bert, fetch=False)) is not None:
            _check_tokenizer(folder)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        file = find_model("image_reward", self.models.image_reward)
        assert file is not None
        _check_file(file)
        try:
            network = build(read_state("image_reward", file))
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            fault = f"it lacks {error.args[0]}" if isinstance(error, KeyError) else short(one_line(error), 200)
            problem = f"{file} does not hold ImageReward's weights: {fault}"
            raise UserError("reward_models.image_reward", problem, fetch_again("image_reward")) from error
        self._tokenizer = load_tokenizer(self.models.bert, network.text.config.vocab_size)
        network.vision.to(dtype=dtype)
        network.text.to(dtype=dtype)
        self._network, self._dtype_used = network.to(device), dtype

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return ImageReward's score of each image for its prompt, (b,) float32."""
        texts = [prompt.text for prompt in prompts]
        read = self._tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").to(
            images.device
        )
        pixels = pixels_of(images, self._network.vision.config.image_size).to(self._dtype_used)
        scores: Tensor = self._network(pixels, read["input_ids"], read["attention_mask"])
        return scores

    def identity(self) -> dict[str, Any]:
        return {"image_reward": self.models.image_reward, "bert": self.models.bert, "dtype": self.models.dtype}


def load_tokenizer(name: str, words: int) -> Any:
    """Return BLIP's tokenizer: that of bert-base-uncased, with the tokens [DEC] and [ENC] at its end.

    Args:
        name: a folder in transformers' format, or such a repository of the hub (`find_model`).
        words: rows of the model's table of words, 30524.

    Raises:
        UserError: it cannot be found or read, or its size is not that of the model.
    """
    from transformers import BertTokenizer

    folder = _find_tokenizer(name)
    assert folder is not None
    _check_tokenizer(folder)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=True)  # not transformers 5.0's default
    except Exception as error:  # of tokenizers, which raises Exception itself
        problem = f"the tokenizer in {folder} cannot be loaded ({short(one_line(error), 200)})"
        raise UserError("reward_models.bert", problem, fetch_again("bert")) from error
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) != words:
        problem = f"the tokenizer in {folder} has {len(tokenizer) - 2} tokens, and the model knows {words - 2}"
        raise UserError("reward_models.bert", problem, fetch_again("bert"))
    return tokenizer


def _check_file(file: Path) -> None:
    if file.is_dir():
        problem = f"{file} is a folder, not a file of weights"
        raise UserError("reward_models.image_reward", problem, "give the path of ImageReward.pt")


def _find_tokenizer(name: str, *, fetch: bool = True) -> Path | None:
    return find_model("bert", name, fetch=fetch, patterns=TOKENIZER_FILES, needs=("tokenizer.json|vocab.txt",))


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        problem = f"{folder} has no tokenizer of BERT (vocab.txt or tokenizer.json)"
        raise UserError("reward_models.bert", problem, fetch_again("bert"))
