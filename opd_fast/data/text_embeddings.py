"""Text embeddings of a run's prompts, in memory while the run lasts. `opd_fast.data.text_store` keeps them on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from opd_fast.data.text_store import TextStore, row_layout
from opd_fast.models.base import DiffusionModel
from opd_fast.models.text import TextEmbeds


class EmbeddingCache:
    """Text embeddings of distinct prompts, each encoded once, with "" for the unconditional branch.

    The rows lie on the model's device while they fit ``device_limit`` bytes, else in host memory; ``rows`` answers on
    the model's device either way.  (SD3.5 with 128 T5 tokens: 1.7 MB a prompt in bfloat16, so 8 GiB hold 5,000.)
    """

    def __init__(self, index: dict[str, int], embeds: TextEmbeds, device: torch.device, encoded: int) -> None:
        """Use ``build``.  ``index`` maps a prompt to its row of ``embeds``; ``rows`` answers on ``device``."""
        self._index = index
        self._embeds = embeds
        self.device = device
        self.encoded = encoded
        """How many of the texts were encoded; the others were read from disk."""

    @classmethod
    def build(
        cls,
        model: DiffusionModel,
        prompts: Sequence[str],
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
        *,
        store: TextStore | None = None,
        device_limit: int = 8 * 2**30,
    ) -> EmbeddingCache:
        """Collect the embeddings of every distinct text of ``prompts`` and of "".

        They are read from ``store``; what it lacks is encoded, ``batch`` texts at a time, and put there.
        ``progress(done, total)`` is called with the number of texts that are encoded.
        """
        texts = list(dict.fromkeys(["", *prompts]))
        index = {text: row for row, text in enumerate(texts)}
        rows: TextEmbeds | None = None

        def keep(names: list[str], part: TextEmbeds) -> None:
            nonlocal rows
            if rows is None:
                rows = _allocate(part, len(texts), model.device, device_limit)
            elif row_layout(rows) != row_layout(part):
                assert store is not None
                raise ValueError(f"{store.folder} holds embeddings that this model does not make; delete the folder")
            positions = torch.tensor([index[name] for name in names], device=rows.sequence.device)
            for name, tensor in part.tensors.items():
                rows.tensors[name].index_copy_(0, positions, tensor.detach().to(positions.device))

        missing = dict.fromkeys(texts)
        for names, part in store.read(texts) if store is not None else ():
            keep(names, part)
            for name in names:
                del missing[name]
        left = list(missing)
        for start in range(0, len(left), batch):
            names = left[start : start + batch]
            part = model.encode(names)
            if store is not None:
                store.write(names, part)
            keep(names, part)
            if progress is not None:
                progress(start + len(names), len(left))
        assert rows is not None
        return cls(index, rows, model.device, len(left))

    def __len__(self) -> int:
        """Return the number of distinct texts, "" among them."""
        return len(self._index)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._index

    def rows(self, prompts: Sequence[str]) -> TextEmbeds:
        """Return one row per prompt, in order, on the model's device.  Raises KeyError for a prompt without one."""
        missing = [text for text in prompts if text not in self._index]
        if missing:
            raise KeyError(f"{len(missing)} prompts were not encoded beforehand, e.g. {missing[0]!r}")
        return self._embeds.index([self._index[text] for text in prompts]).to(self.device)

    @property
    def negative(self) -> TextEmbeds:
        """The one row of the empty prompt."""
        return self.rows([""])


def _allocate(like: TextEmbeds, count: int, device: torch.device, limit: int) -> TextEmbeds:
    """Return ``count`` rows without values. They are allocated once because joining collected parts would need twice
    the memory.
    """
    width = sum(math.prod(t.shape[1:]) * t.element_size() for t in like.tensors.values())
    device = device if width * count <= limit else torch.device("cpu")
    return TextEmbeds(**{k: t.new_empty(count, *t.shape[1:], device=device) for k, t in like.tensors.items()})
