"""The reward `text`: it reads the word from the pixels by matching block letters, and compares it with the target.

The score is the one of OCR rewards in diffusion RL (Flow-GRPO, arXiv 2505.05470): 1 - min(edit distance, n) / n, where
n is the target's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards.edit_distance import closeness
from opd_fast.worlds.shapes import LETTERS, glyph

MATCH = 0.7
"""Normalised correlation from which a letter counts as read."""
MIN_CONTRAST = 0.3


def metadata_fault(metadata: dict[str, Any]) -> str | None:
    """Return why the reward cannot judge a prompt, or None: it compares what it reads with `metadata["target"]`."""
    if "target" not in metadata:
        return "has no target; put exactly one piece of the line in double quotes, or add the key or column target"
    target = metadata["target"]
    if not isinstance(target, str) or not target.strip():
        return f"has the target {target!r}; give the words that the image must show"
    return None


@cache
def _templates() -> Tensor:
    """Return zero-mean templates of unit norm, (letters, 1, 16, 12): each glyph with a rim of ground."""
    masks = np.stack([np.pad(glyph(letter), 1) for letter in LETTERS]).astype(np.float32)
    flat = torch.from_numpy(masks).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return (flat / flat.norm(dim=1, keepdim=True)).view(len(LETTERS), 1, *masks.shape[1:])


def read(images: Tensor) -> list[str]:
    """Return the word in each image (B, 3, H, W) in 0..1, read left to right; it is empty where no letter is found."""
    templates = _templates()
    height, width = templates.shape[2:]
    bright = F.pad(images.detach().float().cpu().amax(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    patches = F.unfold(bright, (height, width))
    spread = (patches - patches.mean(1, keepdim=True)).norm(dim=1)
    match = F.conv2d(bright, templates).flatten(2) / spread.clamp_min(1e-6)[:, None]
    match = match.masked_fill(spread[:, None] < MIN_CONTRAST * (height * width) ** 0.5 / 2, 0)
    columns = bright.shape[3] - width + 1
    words = []
    for scores in match.view(len(images), len(LETTERS), -1, columns):
        letters: list[tuple[int, str]] = []
        while float(scores.max()) >= MATCH:
            letter, _, column = np.unravel_index(int(scores.argmax()), scores.shape)
            letters.append((int(column), LETTERS[letter]))
            # Letters stand side by side: nothing else is read within a letter's width.
            scores[:, :, max(0, int(column) - width + 4) : int(column) + width - 3] = 0
        words.append("".join(letter for _, letter in sorted(letters)))
    return words


def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Return 1 - min(edit distance, n) / n against metadata["target"], (B,) float32 in 0..1."""
    targets = [p.metadata["target"].upper() for p in prompts]
    values = [closeness(word, target) for word, target in zip(read(images), targets, strict=True)]
    return torch.tensor(values, dtype=torch.float32)
