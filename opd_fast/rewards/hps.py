"""The reward `hps`: what people prefer, by the Human Preference Score v2.1 (Wu et al., arXiv 2306.09341).

The score is cos(image, text) of an open_clip ViT-H-14, unscaled, about 0.2 to 0.35; tables often print it times 100.
The weights are open_clip's; here they are renamed for transformers' CLIPModel. Preprocessing and tokens are those of
DiffusionNFT's flow_grpo/hpsv2_scorer.py and of hpsv2/src/open_clip, which agree where torchvision is 0.17 or later.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards.clip_model import (
    TOKENIZER_FILES,
    TOKENIZER_NEEDS,
    Clip,
    build_clip,
    check_tokenizer,
    fetch_again,
    load_tokenizer,
    normalised,
    read_state,
)
from opd_fast.rewards.model_files import find_model
from opd_fast.rewards.model_reward import ModelReward

IMAGE_HEAD, TEXT_HEAD = 80, 64
"""Width of an attention head in ViT-H-14. The number of heads cannot be read from weights."""


class HPS(ModelReward):
    """Judges by `reward_models.hps`, with the tokenizer in `reward_models.clip`: all CLIPs have the same one."""

    packages: ClassVar[dict[str, str]] = {"ftfy": "rewards"}
    _clip: Clip

    def check(self) -> None:
        super().check()
        find_model("hps", self.models.hps, fetch=False)
        folder = find_model("clip", self.models.clip, fetch=False, patterns=TOKENIZER_FILES, needs=TOKENIZER_NEEDS)
        if folder is not None:
            check_tokenizer("clip", folder)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        file = find_model("hps", self.models.hps)
        folder = find_model("clip", self.models.clip, patterns=TOKENIZER_FILES, needs=TOKENIZER_NEEDS)
        assert file is not None
        assert folder is not None
        state = read_state("hps", file)
        try:
            config, renamed = clip_config(state), transformers_state(state)
        except ValueError as error:
            raise UserError("reward_models.hps", f"{file} {error}", fetch_again("hps")) from error
        tokenizer = load_tokenizer("clip", folder, config.text_config.vocab_size)
        model = build_clip("hps", str(file), config, renamed)
        self._clip = Clip(model, tokenizer, device, dtype, clean_text)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = padded_pixels(images, self._clip.side)
        return self._clip.cosines(pixels, [prompt.text for prompt in prompts])

    def identity(self) -> dict[str, Any]:
        return {"hps": self.models.hps, "clip": self.models.clip, "dtype": self.models.dtype}


def padded_pixels(images: Tensor, side: int) -> Tensor:
    """Return images resized to a longer edge of `side` and padded to a square with black, then normalised.

    The filter is cubic and antialiased, and nothing is rounded or clamped. An odd rest is padded more at the bottom or
    right.

    Args:
        images: (B, 3, H, W) float32 in 0..1.
        side: of the model's square images, in pixels.

    Returns:
        (B, 3, side, side) float32.
    """
    scale = side / max(images.shape[2:])
    height, width = (round(edge * scale) for edge in images.shape[2:])
    resized = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
    down, right = side - height, side - width
    return normalised(F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2)))


def clean_text(text: str) -> str:
    """Return a text as open_clip's tokenizer reads it: mended by ftfy, without HTML entities, in lower case."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


# --- the weights -----------------------------------------------------------------------------------------------------

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
"""open_clip's name to transformers'."""
_TRANSPOSED = ("text_projection", "visual.proj")
"""open_clip multiplies by these from the right, without a Linear."""
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def transformers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of open_clip's CLIP by the names of transformers' CLIPModel.

    Raises ValueError, a predicate without its subject, for a name that open_clip's ViT-H-14 does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _NAMES:
            renamed[_NAMES[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
            continue
        # The product that makes queries, keys and values is one parameter without a module of its own.
        found = _BLOCK.fullmatch(re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name))
        part = found and found[3]
        if found is None or (part not in _IN_BLOCK and part != "attn.in_proj"):
            raise ValueError(f"is not open_clip's ViT-H-14: it has {name}")
        layer = f"{'vision' if found[1] else 'text'}_model.encoder.layers.{found[2]}"
        if part == "attn.in_proj":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{found[4]}"] = piece.contiguous()
        else:
            renamed[f"{layer}.{_IN_BLOCK[part]}.{found[4]}"] = tensor
    return renamed


def clip_config(state: Mapping[str, Tensor]) -> Any:
    """Return the CLIPConfig of open_clip's weights, its sizes read from their shapes.

    Raises ValueError, a predicate without its subject, for weights that have not the form of ViT-H-14.
    """
    from transformers import CLIPConfig

    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        text_width, projection = state["text_projection"].shape
        places = state["visual.positional_embedding"].shape[0] - 1
        vocabulary, context = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
        inner = [state[f"{tower}transformer.resblocks.0.mlp.c_fc.bias"].shape[0] for tower in ("visual.", "")]
    except KeyError as error:
        raise ValueError(f"is not open_clip's ViT-H-14: it has no {error.args[0]}") from error
    except ValueError as error:  # a tensor with another number of dimensions
        raise ValueError(f"is not open_clip's ViT-H-14: {error}") from error
    grid = round(places**0.5)
    if grid * grid != places or width % IMAGE_HEAD or text_width % TEXT_HEAD:
        raise ValueError(
            f"is not open_clip's ViT-H-14: its widths are {width} and {text_width}, not multiples of {IMAGE_HEAD} and "
            f"{TEXT_HEAD}, or its {places} patches are no square"
        )
    vision = {
        "hidden_size": width,
        "num_attention_heads": width // IMAGE_HEAD,
        "num_hidden_layers": _layers(state, "visual."),
        "intermediate_size": inner[0],
        "patch_size": patch,
        "image_size": grid * patch,
        "hidden_act": "gelu",
        "projection_dim": projection,
    }
    text = {
        "hidden_size": text_width,
        "num_attention_heads": text_width // TEXT_HEAD,
        "num_hidden_layers": _layers(state, ""),
        "intermediate_size": inner[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "hidden_act": "gelu",
        "projection_dim": projection,
        # The features are read where the token that ends the text first stands, the largest number, as in open_clip.
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    return len({found[2] for name in state if (found := _BLOCK.match(name)) and (found[1] or "") == tower})
