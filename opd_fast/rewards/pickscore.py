"""The reward `pickscore`: what people would pick, by PickScore (Kirstain et al., arXiv 2305.01569).

The score is exp(logit_scale) cos(image, text) / 26, about 0.8 to 0.9 for good images. The division is Flow-GRPO's
(flow_grpo/pickscore_scorer.py); tables of results often print the value without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards.clip_model import Clip, check_clip, load_clip, processor_pixels
from opd_fast.rewards.model_reward import ModelReward

DIVISOR = 26.0


class PickScore(ModelReward):
    """Judges by a CLIP ViT-H/14 that was tuned on people's choices, `reward_models.pickscore`."""

    _clip: Clip

    def check(self) -> None:
        super().check()
        check_clip("pickscore", self.models.pickscore)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        self._clip = load_clip("pickscore", self.models.pickscore, device, dtype)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = processor_pixels(images, self._clip.side)
        return self._clip.scale * self._clip.cosines(pixels, [prompt.text for prompt in prompts]) / DIVISOR

    def identity(self) -> dict[str, Any]:
        return {"pickscore": self.models.pickscore, "dtype": self.models.dtype}
