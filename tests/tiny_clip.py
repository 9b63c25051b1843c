"""A random CLIP of a few hundred kilobytes in transformers' format, its tokenizer, and Pillow's pixels for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE = 28
CONTEXT = 77
MERGES = (("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"))
LOGIT_SCALE = 4.61
"""Neither float16 nor bfloat16 has this number."""


def save_tokenizer(folder: Path) -> int:
    """Write vocab.json and merges.txt over single bytes and a few merges; returns the number of tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    merged = ["".join(pair) for pair in MERGES]
    vocab = [*letters, *(letter + "</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocab)


def save_clip(folder: Path, *, projection: int = 32, seed: int = 0, act: str = "quick_gelu") -> Any:
    """Save a tiny CLIP and its tokenizer in a folder; returns the model, float32, eval mode.

    Its weights are large enough for scores to differ from image to image and from text to text.
    """
    from transformers import CLIPConfig, CLIPModel

    tokens = save_tokenizer(folder)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": act,
        "projection_dim": projection,
    }
    text = {**tower, "vocab_size": tokens, "max_position_embeddings": CONTEXT}
    text |= {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
    config = CLIPConfig(
        vision_config={**tower, "image_size": SIDE, "patch_size": 14}, text_config=text, projection_dim=projection
    )
    model = CLIPModel(config).eval()
    randomise(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(LOGIT_SCALE)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill all weights with normal numbers: standard deviation 0.2, around 1 for the weights of norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(std=0.2, generator=generator)
        if weight.ndim == 1 and name.endswith("weight"):
            weight.add_(1)


def processor(folder: Path) -> Any:
    """CLIPProcessor of the folder's tokenizer, its images by way of Pillow."""
    from transformers import CLIPProcessor, CLIPTokenizer

    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Images
    except ImportError:  # transformers 5.0: there the Pillow one has the plain name
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor as Images

    images = Images(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return images (count, 3, height, width) float32 in 0..1 with broad shapes and noise."""
    generator = torch.Generator().manual_seed(seed)
    broad = torch.nn.functional.interpolate(torch.rand(count, 3, 6, 6, generator=generator), (height, width))
    return (broad + 0.2 * torch.randn(count, 3, height, width, generator=generator)).clamp(0, 1)


def bytes_of(images: Tensor) -> list[Any]:
    """Return images as Pillow's, 8 bits a channel."""
    from PIL import Image

    return [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def pillow_cubic(image: Any, height: int, width: int) -> Any:
    """Return a Pillow image resized as by versions before 13: its width first, then its height."""
    from PIL import Image

    cubic = Image.Resampling.BICUBIC
    return image.resize((width, image.height), cubic).resize((width, height), cubic)


def processor_pixels_of(folder: Path, images: Tensor) -> Tensor:
    """Return what CLIPProcessor makes of images; Pillow resizes tall ones before it, in the order of old versions."""
    tall = images.shape[2] > images.shape[3]
    pictures = bytes_of(images)
    if tall:
        pictures = [pillow_cubic(picture, SIDE * images.shape[2] // images.shape[3], SIDE) for picture in pictures]
    found: Tensor = processor(folder)(images=pictures, do_resize=not tall, return_tensors="pt")["pixel_values"]
    return found


def pillow_floats(images: Tensor, height: int, width: int, filter_name: str) -> Tensor:
    """Return images (B, 3, H, W) resized by Pillow in floating point, which rounds and clamps nothing."""
    import numpy as np
    from PIL import Image

    kind = getattr(Image.Resampling, filter_name)
    planes = [np.asarray(Image.fromarray(p).resize((width, height), kind)) for p in images.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], height, width)
