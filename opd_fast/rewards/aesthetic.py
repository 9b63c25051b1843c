"""The reward `aesthetic`: how well an image is liked whatever it shows, by LAION's aesthetic predictor V2, 1 to 10.

Five linear layers without activations between them judge the unit vector that CLIP ViT-L/14 makes of the image
(github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py; the preprocessing is Flow-GRPO's,
flow_grpo/aesthetic_scorer.py). The prompt is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards.clip_model import Clip, check_clip, fetch_again, load_clip, processor_pixels, read_state
from opd_fast.rewards.model_files import find_model
from opd_fast.rewards.model_reward import ModelReward

WIDTHS = (768, 1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Of the linear layers in the published head; dropout, which does nothing here, has the other places."""


class Aesthetic(ModelReward):
    """Judges by `reward_models.clip` and the head `reward_models.aesthetic`, which computes in float32."""

    _clip: Clip
    _head: list[tuple[Tensor, Tensor]]

    def check(self) -> None:
        super().check()
        check_clip("clip", self.models.clip)
        find_model("aesthetic", self.models.aesthetic, fetch=False)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        file = find_model("aesthetic", self.models.aesthetic)
        assert file is not None
        self._head = [(weight.to(device), bias.to(device)) for weight, bias in read_head(file)]
        self._clip = load_clip("clip", self.models.clip, device, dtype)
        if self._clip.width != WIDTHS[0]:
            raise UserError(
                "reward_models.clip",
                f"{self.models.clip} makes vectors of {self._clip.width} numbers, and the aesthetic head takes those "
                f"of CLIP ViT-L/14, {WIDTHS[0]}",
                fetch_again("clip"),
            )

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        values = self._clip.image_vectors(processor_pixels(images, self._clip.side))
        for weight, bias in self._head:
            values = F.linear(values, weight, bias)
        return values.squeeze(1)

    def identity(self) -> dict[str, Any]:
        return {"clip": self.models.clip, "aesthetic": self.models.aesthetic, "dtype": self.models.dtype}


def read_head(file: Path) -> list[tuple[Tensor, Tensor]]:
    """Return weight (out, in) and bias (out,) of each layer, float32 on the CPU. Raises UserError for another head."""
    state = read_state("aesthetic", file)
    wanted: dict[str, tuple[int, ...]] = {}
    for place, inner, outer in zip(PLACES, WIDTHS, WIDTHS[1:], strict=False):
        wanted[f"layers.{place}.weight"] = (outer, inner)
        wanted[f"layers.{place}.bias"] = (outer,)
    problem = None
    if odd := sorted(state.keys() ^ wanted.keys()):
        problem = f"{file} is not the aesthetic head: it {'lacks' if odd[0] in wanted else 'also has'} {odd[0]}"
    for name in wanted.keys() & state.keys():
        if (shape := tuple(state[name].shape)) != wanted[name]:
            problem = f"{file} is not the aesthetic head: {name} has the shape {shape}, not {wanted[name]}"
    if problem is not None:
        raise UserError("reward_models.aesthetic", problem, fetch_again("aesthetic"))
    return [(state[f"layers.{place}.weight"].float(), state[f"layers.{place}.bias"].float()) for place in PLACES]
