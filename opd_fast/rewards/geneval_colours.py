"""GenEval's colours: CLIP ViT-L/14 names the colour of a detected object, zero-shot.

Source: evaluation/evaluate_images.py of github.com/djghosh13/geneval with open_clip's `ViT-L-14`, `openai`, and
clip_benchmark's zero-shot classifier. What is not the object is painted #999, the picture is cut to the object's box,
and its vector is compared with those of ten colours, each the mean of three sentences that name the object's class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opd_fast.rewards.clip_model import normalised
from opd_fast.rewards.geneval_rules import COLOURS, Instance

BACKGROUND = "#999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


class ImageTextModel(Protocol):
    """What is needed of a CLIP (`clip_model.Clip`); `side` is that of its square images, in pixels."""

    side: int

    def image_vectors(self, pixels: Tensor, /) -> Tensor:
        """Return unit vectors (B, D) float32 of normalised pixels (B, 3, side, side)."""
        ...

    def text_vectors(self, texts: Sequence[str], /) -> Tensor:
        """Return unit vectors (B, D) float32 of texts."""
        ...


class ColourNamer:
    """Names the colours of objects.

    Args:
        clip: the model.
        device: that of the model.
        batch: crops that it takes at once.
    """

    def __init__(self, clip: ImageTextModel, device: torch.device, batch: int) -> None:
        self.clip, self.device, self.batch = clip, device, batch
        self._classifiers: dict[str, Tensor] = {}

    def name(self, objects: Sequence[tuple[np.ndarray[Any, Any], str, Instance]]) -> list[str]:
        """Return the colour of each object, one of COLOURS.

        Args:
            objects: for each the whole image (H, W, 3) uint8, the class and the instance.
        """
        colours: list[str] = []
        for start in range(0, len(objects), self.batch):
            part = objects[start : start + self.batch]
            pixels = torch.stack([crop_pixels(image, instance, self.clip.side) for image, _, instance in part])
            vectors = self.clip.image_vectors(normalised(pixels.to(self.device)))
            texts = torch.stack([self._classifier(name) for _, name, _ in part])
            best = torch.einsum("bd,bcd->bc", vectors, texts).argmax(1)
            colours += [COLOURS[index] for index in best.tolist()]
        return colours

    def _classifier(self, name: str) -> Tensor:
        """Return the unit vectors of the colours for objects of a class, (10, D) float32."""
        if name not in self._classifiers:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            means = self.clip.text_vectors(texts).view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = means / means.norm(dim=1, keepdim=True)
        return self._classifiers[name]


def crop_pixels(image: np.ndarray[Any, Any], instance: Instance, side: int) -> Tensor:
    """Return what CLIP sees of an object, before it is normalised: (3, side, side) float32 in 0..1.

    The crop's short side becomes `side` by Pillow's cubic filter, the long one is cut to a whole pixel, and the middle
    is kept, as torchvision does it for open_clip.

    Args:
        image: (H, W, 3) uint8.
        instance: its box must not be empty; without a mask nothing is painted over.
        side: in pixels.
    """
    picture = Image.fromarray(image)
    if instance.mask is not None:
        blank = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, blank, Image.fromarray(instance.mask))
    left, top, right, bottom = (round(edge) for edge in instance.box)
    picture = picture.crop((left, top, right, bottom))
    width, height = picture.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    picture = picture.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
