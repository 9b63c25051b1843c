"""GenEval's detector: a Mask2Former of transformers that finds COCO's objects, with mmdet's way in and out.

GenEval (arXiv 2310.11513) uses mmdet's `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`. What is done to an image
before the network and to its outputs follows that configuration of mmdet 2.x, not the image processor of transformers:

- **Size.** mmdet resizes so that the short side is 800 pixels and the long side at most 1333, keeping the ratio, by
  bilinear interpolation without antialiasing, on 8-bit pixels (here within one level of OpenCV's, which computes in
  whole numbers); it normalises, then pads to multiples of 32 with zeros.
  Facebook evaluated its own checkpoints with the same 800 and 1333 (`MIN_SIZE_TEST`, `MAX_SIZE_TEST`), but the
  `preprocessor_config.json` of its transformers folders says 384 x 384 whatever the ratio. 800 is used here.
- **Masks.** mmdet brings logits to the padded size, cuts the padding off, brings them to the image's size, and only
  then thresholds and scores; transformers' `post_process_instance_segmentation` scores masks of 384 x 384 and enlarges
  them by nearest neighbours, which moves the borders of boxes.
- **Weights.** mmdet's are its own training of the same architecture on the same images with the same schedule (mask AP
  46.1 as mmdet reports; Facebook's Swin-S: 46.3). Scores near a threshold differ between the two, so a number to be
  compared with published ones wants mmdet's: its `.pth` file is read as it is (`geneval_mmdet.py`). The default is
  Facebook's, `facebook/mask2former-swin-small-coco-instance`, which the hub has.

The colours of an image go in as RGB. The public training servers (github.com/yifan123/reward-server and its kin) hand
RGB arrays to a function of mmdet that takes BGR, so that their detector sees red and blue exchanged; the benchmark,
which reads files, does not, and neither does this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.geneval_mmdet import read_mmdet
from opd_fast.rewards.geneval_rules import ALIASES, CLASSES, THRESHOLD, Instance
from opd_fast.rewards.model_files import find_model

SHORT_SIDE, LONG_SIDE = 800, 1333
"""Pixels of the image that the network sees."""
DIVISOR = 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet, red, green and blue in 0..255."""
MOST_INSTANCES = 100
"""Pairs of query and class of an image that are looked at, those with the highest class scores."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""What is fetched, and what is read too where it is there."""
FILES = ("*.json", _WEIGHTS[0])
_UNUSED = r"^criterion\.|\.encoder\.(swin\.)?layernorm\."
"""Weights that checkpoints need not have: the loss's, and a norm of Swin that a Mask2Former does not use."""
KEY = "reward_models.detector"
REMEDY = "run: hf download facebook/mask2former-swin-small-coco-instance, or give such a folder or mmdet's .pth file"


def find_detector(name: str) -> Path:
    """Return the folder, or mmdet's file, that the setting `reward_models.detector` names; it may be fetched.

    Raises UserError for one that can be neither found nor fetched, and for another model.
    """
    source = find_model("detector", name, patterns=FILES, needs=_needs(name))
    assert source is not None
    _check_source(source)
    return source


def check_detector(name: str) -> None:
    """Raise UserError where the detector is on this machine and is another model or lacks a file."""
    if (source := find_model("detector", name, fetch=False, patterns=FILES, needs=_needs(name))) is not None:
        _check_source(source)


def _needs(name: str) -> Sequence[str]:
    """Return what a repository must have: of one file in it nothing but that file."""
    return () if name.endswith(".pth") else ("config.json", "|".join(_WEIGHTS))


def _check_source(folder: Path) -> None:
    if folder.is_file():  # mmdet's; loading says what is wrong with it
        return
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(KEY, f"{folder} has no config.json of a model ({one_line(error)})", REMEDY) from error
    if kind != "mask2former":
        raise UserError(KEY, f"{folder} holds a model of type {kind}, not mask2former", REMEDY)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise UserError(KEY, f"{folder} has no model.safetensors", REMEDY)


class Detector:
    """Finds the objects in images.

    Args:
        model: a `Mask2FormerForUniversalSegmentation`, on its device.
        short, long: the sides that images are brought to, in pixels.

    Raises:
        UserError: the model does not know one of COCO's 80 classes.
    """

    def __init__(self, model: Any, short: int = SHORT_SIDE, long: int = LONG_SIDE) -> None:
        self.model, self.short, self.long = model, short, long
        self.names = class_names(model.config.id2label)

    @classmethod
    def load(cls, source: Path, device: torch.device, dtype: torch.dtype) -> Detector:
        """Load from a folder in transformers' layout, or from a file of mmdet's, with all the weights.

        Raises UserError where it cannot be read, lacks weights, which transformers would draw at random, or does not
        know COCO's classes.
        """
        from transformers import Mask2FormerForUniversalSegmentation

        given: dict[str, Any] = {"pretrained_model_name_or_path": source}
        if source.is_file():
            config, state = read_mmdet(source)
            given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
        try:
            model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
                **given, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        except Exception as error:  # transformers, safetensors and torch share no base
            raise UserError(KEY, f"{source} cannot be loaded ({short(one_line(error), 300)})", REMEDY) from error
        names = {str(name) for what in ("missing_keys", "mismatched_keys") for name in info[what]}
        lacking = sorted(name for name in names if not re.search(_UNUSED, name))
        if lacking:
            problem = f"{source} lacks {len(lacking)} of the weights, such as {lacking[0]}"
            raise UserError(KEY, problem, REMEDY)
        return cls(model.eval().requires_grad_(False).to(device))

    def detect(self, images: Tensor) -> list[list[tuple[str, Instance]]]:
        """Return the objects in each image with their classes, those that score above 0.3.

        Args:
            images: (B, 3, H, W) uint8, RGB, on any device.
        """
        device, dtype = self.model.device, self.model.dtype
        pixels, inner = self.prepare(images.to(device))
        outputs = self.model(pixel_values=pixels.to(dtype))
        outer = (int(pixels.shape[2]), int(pixels.shape[3]))
        size = (int(images.shape[2]), int(images.shape[3]))
        return [
            self._instances(classes.float(), masks.float(), outer, inner, size)
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        ]

    def prepare(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return what the network sees, (B, 3, H', W') float32, H' and W' multiples of 32, and its size before padding.

        Args:
            images: (B, 3, H, W) uint8, RGB.
        """
        inner = self.inner_size(int(images.shape[2]), int(images.shape[3]))
        pixels = images.float()
        if inner != tuple(images.shape[2:]):
            pixels = F.interpolate(pixels, inner, mode="bilinear", align_corners=False).round()
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        height, width = inner
        return F.pad((pixels - mean) / std, (0, -width % DIVISOR, 0, -height % DIVISOR)), inner

    def inner_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the resized image; halves are rounded up, as in mmcv."""
        scale = min(self.short / min(height, width), self.long / max(height, width))
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def _instances(
        self, classes: Tensor, masks: Tensor, outer: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]
    ) -> list[tuple[str, Instance]]:
        """Return the objects of one image, of logits (Q, labels + 1) and (Q, h, w); sizes: padded, resized, its own.

        An object's score is its class score times the mean probability inside its mask. The latter is at most 1, so a
        mask whose class score is too low need not be enlarged.
        """
        scores = classes.softmax(-1)[:, :-1]
        best = scores.flatten().topk(min(MOST_INSTANCES, scores.numel()))
        pairs = [
            (index // scores.shape[1], self.names[index % scores.shape[1]], score)
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if score > THRESHOLD and index % scores.shape[1] in self.names
        ]
        found = []
        for query, name, score in pairs:
            logits = F.interpolate(masks[query][None, None], outer, mode="bilinear", align_corners=False)
            logits = logits[..., : inner[0], : inner[1]]
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0]
            mask = logits > 0
            score *= float((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
            if score > THRESHOLD:
                shape = mask.cpu().numpy()
                found.append((name, Instance(_box(shape), score, shape)))
        return found


def class_names(labels: Mapping[int, str]) -> dict[int, str]:
    """Return GenEval's name of each label of a checkpoint that is one of COCO's 80 classes.

    80 labels without names are COCO's in COCO's order. Raises UserError where a class is missing.
    """
    if len(labels) == len(CLASSES) and all(name == f"LABEL_{index}" for index, name in labels.items()):
        return dict(enumerate(CLASSES))
    named = {int(index): ALIASES.get(name.lower(), name.lower()) for index, name in labels.items()}
    known = {index: name for index, name in named.items() if name in CLASSES}
    if missing := [name for name in CLASSES if name not in known.values()]:
        problem = f"the detector does not know {len(missing)} of COCO's 80 classes, such as {missing[0]}"
        raise UserError(KEY, problem, REMEDY)
    return known


def _box(mask: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    """Return the tight box of a mask that is not empty: left, top, right, bottom; the last two are exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
