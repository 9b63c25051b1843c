"""The reward `clipscore`: how well an image fits its prompt, by the cosine of OpenAI's CLIP ViT-L/14.

The score is logit / 100, as DiffusionNFT's flow_grpo/clip_scorer.py has it. The model's scale is 100, so that this is
the cosine, about 0.2 to 0.35. Others divide by 30 (Flow-OPD), or multiply by 100 (torchmetrics).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards.clip_model import Clip, check_clip, float_pixels, load_clip
from opd_fast.rewards.model_reward import ModelReward

DIVISOR = 100.0


class ClipScore(ModelReward):
    """Judges by `reward_models.clip`."""

    _clip: Clip

    def check(self) -> None:
        super().check()
        check_clip("clip", self.models.clip)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self._clip = load_clip("clip", self.models.clip, device, dtype)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = float_pixels(images, self._clip.side)
        return self._clip.scale * self._clip.cosines(pixels, [prompt.text for prompt in prompts]) / DIVISOR

    def identity(self) -> dict[str, Any]:
        return {"clip": self.models.clip, "dtype": self.models.dtype}
