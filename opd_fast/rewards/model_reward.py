"""`ModelReward`: a reward whose network, engine or server is made ready at its first call, in batches."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError


class ModelReward(ABC):
    """A reward that needs more than the pixels: a package, weights, or a server.

    A subclass names the packages that it imports, says in `check` what is missing, loads in `load` and judges in
    `score`. `REWARDS` names the class; one object serves a process, whatever number of tasks it judges.

    Args:
        models: where models and servers are, and how they are asked.
    """

    packages: ClassVar[dict[str, str]] = {}
    """Package that is imported, to the extra of opd_fast that installs it."""
    remote: bool = False
    """Whether a server judges: a call then waits and hardly computes, and is made beside the drawing from the first."""

    def __init__(self, models: RewardModelsConfig) -> None:
        self.models = models
        self._lock = threading.Lock()
        self._device: torch.device | None = None

    def check(self) -> None:
        """Find what is missing, without loading or asking the network. Raises UserError, which has the remedy."""
        for package, extra in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise UserError(package, "is not installed", f'pip install "opd_fast[{extra}]"')

    @abstractmethod
    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make ready what `score` needs. Called once, by the first call, and again only for another device.

        Raises UserError for what is missing or damaged, with the remedy.
        """

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Judge images (b, 3, H, W) float32 in 0..1 on the device of `load`, b at most `batch_size`; (b,) values."""

    def batch_size(self, count: int) -> int:
        """Return how many of `count` images `score` takes at once."""
        return self.models.batch

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Judge images as `rewards.Reward` says; (B,) float32 on the CPU. Calls of several threads come in turns."""
        device = torch.device("cpu") if self.models.device == "cpu" else images.device
        with self._lock, torch.inference_mode():
            if self._device != device:
                self.check()
                self.load(device, self._dtype(device))
                self._device = device
            images, size = images.to(device), self.batch_size(len(images))
            values = [
                self.score(images[i : i + size], prompts[i : i + size]).float().cpu()
                for i in range(0, len(images), size)
            ]
        return torch.cat(values) if values else torch.empty(0)

    def is_loaded(self, device: torch.device) -> bool:
        """Whether a call with images on `device` would load nothing."""
        return self._device == (torch.device("cpu") if self.models.device == "cpu" else device)

    def identity(self) -> dict[str, Any]:
        """What decides the values beside the code: the settings of `models` that the reward reads.

        Judgements are kept under it, so a subclass that reads other settings lists them.
        """
        return {}

    def _dtype(self, device: torch.device) -> torch.dtype:
        if self.models.dtype == "auto":
            return torch.float16 if device.type == "cuda" else torch.float32
        dtype: torch.dtype = getattr(torch, self.models.dtype)
        return dtype
