"""Text as a transformer takes it, and the encoders that make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.device import to_device


@dataclass(frozen=True)
class TextEmbeds:
    """Text conditioning, one row per prompt, on one device."""

    sequence: Tensor
    """(B, L, D), padded to one length."""
    pooled: Tensor | None = None
    """(B, P), of the sequence's dtype; None where the family has no pooled vector."""
    mask: Tensor | None = None
    """(B, L) bool, True at the prompt's own tokens; None where every token counts."""

    def __len__(self) -> int:
        return self.sequence.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        named = {"sequence": self.sequence, "pooled": self.pooled, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> TextEmbeds:
        return TextEmbeds(**{name: change(tensor) for name, tensor in self.tensors.items()})

    def index(self, idx: Tensor | Sequence[int] | slice) -> TextEmbeds:
        """The chosen rows: a view for a slice, a gather for indices (a list, or an int64 tensor on any device)."""
        if isinstance(idx, slice):
            return self._map(lambda tensor: tensor[idx])
        rows = to_device(torch.as_tensor(idx, dtype=torch.int64), self.sequence.device)
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeds:
        """On another device, or the floating-point tensors in another dtype."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def expand(self, n: int) -> TextEmbeds:
        """A single row seen as ``n`` rows, without copying."""
        if len(self) != 1:
            raise ValueError(f"only a single row can be expanded, this has {len(self)}")
        return self._map(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[TextEmbeds]) -> TextEmbeds:
        names = parts[0].tensors
        return TextEmbeds(**{name: torch.cat([part.tensors[name] for part in parts]) for name in names})


def padded(sequence: Tensor, mask: Tensor, length: int) -> TextEmbeds:
    """Embeddings (B, L, D) with their mask (B, L), filled up with zeros to ``length`` rows.

    A prompt's own tokens come first in its row and the mask tells them apart, so that rows of different prompts can be
    stacked, cached and indexed.
    """
    room = length - sequence.shape[1]
    return TextEmbeds(F.pad(sequence, (0, 0, 0, room)), mask=F.pad(mask.bool(), (0, room)))


class TextEncoders:
    """What ``encode`` needs, loaded when it is first asked for: where every embedding is kept on disk, never."""

    def __init__(self, load: Callable[[torch.device], Any]) -> None:
        """``load(device)``: the family's assembled pipeline, its text encoders on ``device``."""
        self._load: Callable[[torch.device], Any] | None = load
        self._loaded: Any = None

    def get(self, device: torch.device) -> Any:
        """The pipeline; the first call decides the device.  Raises RuntimeError after ``release``."""
        if self._load is None:
            raise RuntimeError("the text encoders were released; encode every prompt before release_text_encoders()")
        if self._loaded is None:
            self._loaded = self._load(device)
        return self._loaded

    def release(self) -> None:
        self._load = self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
