"""What the training loop asks of a method, and where it gets the method that a run names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module

import torch
from torch import Tensor

from opd_fast.config.methods.spec import MethodSpec, method_spec
from opd_fast.training.setup import Setup


class Method(ABC):
    """The gradients of a run's rounds. A round's losses are float32 on the model's device until the loop moves them."""

    samples: float
    """Samples that a round learns from on all devices, on average."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        """Add the gradient of round `index`, times the scaler's factor, to the student's parameters.

        Returns the weighed loss of every sample at every trained step (steps, samples), unscaled, those of all ranks.
        """

    @abstractmethod
    def fault(self, index: int, row: int, sample: int) -> str:
        """Say that losses[row, sample] of a round is not finite."""

    @abstractmethod
    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """What the round just accumulated has for metrics.jsonl; losses (steps, samples) on the CPU."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the method beside the student, by name; nothing where a round follows from its
        number."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - nothing was kept
        """Take over what `state` gave, on however many processes."""


def method_class(spec: MethodSpec) -> type[Method]:
    """The class that a spec names."""
    module, _, name = spec.implementation.partition(":")
    found: type[Method] = getattr(import_module(module), name)
    return found


def make_method(setup: Setup) -> Method:
    """The method that `train.method` names, for a run's parts."""
    return method_class(method_spec(setup.config))(setup)
