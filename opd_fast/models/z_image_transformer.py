"""Z-Image's transformer for a padded batch.

diffusers' forward takes lists with one tensor for each prompt and works through them row by row, so that the host must
know the lengths and the shapes depend on the prompts.  The forward here computes the same from one padded tensor and
its mask: the shape is always the same, and nothing is read back from the device.  It is a method of the model, so that
whatever wraps or hooks the model as a whole sees every call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel as Published
from torch import Tensor, nn

from opd_fast.models.latents import PATCH

MULTIPLE = 32  # the transformer adds learned tokens to a prompt's and to an image's, up to a multiple of this


class ZImageTransformer2DModel(Published):
    """diffusers' class (of the same name, so that it is saved under it) with a second way of calling it."""

    def forward(
        self, x: Any, t: Tensor, cap_feats: Any, *args: Any, cap_mask: Tensor | None = None, **more: Any
    ) -> Any:
        """With ``cap_mask``: x (B, C, H, W), t (B,) from 0 (noise) to 1, cap_feats (B, L, D) and cap_mask (B, L) bool,
        true at the first n_i places of row i; returns (B, C, H, W).  Without it: as diffusers.
        """
        if cap_mask is None:
            return super().forward(x, t, cap_feats, *args, **more)
        assert not args
        assert not more
        return self._padded(x, t, cap_feats, cap_mask)

    def _padded(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        clock = self.t_embedder(t * self.t_scale).type_as(x)

        # Text: the prompt's tokens, then learned ones up to the next multiple (attended to), then nothing.
        room = -text.shape[1] % MULTIPLE
        mask = F.pad(mask, (0, room))
        captions = self.cap_embedder(F.pad(text, (0, 0, 0, room)))
        captions = torch.where(mask[..., None], captions, self.cap_pad_token.to(captions.dtype))
        filled = (mask.sum(1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE  # (B,)
        places = torch.arange(mask.shape[1], device=x.device)
        attended = places < filled[:, None]

        # Image: one position past the text on the first axis, rows and columns on the others.
        patches = x.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
        image = self.all_x_embedder[f"{PATCH}-1"](patches.reshape(batch, rows * columns, -1))
        spare = -image.shape[1] % MULTIPLE
        image = torch.cat([image, self.x_pad_token.to(image.dtype).expand(batch, spare, -1)], 1)

        text_ids = F.pad((places + 1)[:, None], (0, 2)).expand(batch, -1, -1)
        grid = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        image_ids = torch.cat([(filled + 1)[:, None, None].expand(-1, len(grid), 1), grid.expand(batch, -1, -1)], 2)
        image_ids = F.pad(image_ids, (0, 0, 0, spare))
        text_turns, image_turns = self._turns(text_ids), self._turns(image_ids)

        for block in self.noise_refiner:
            image = self._run(block, image, None, image_turns, clock)
        for block in self.context_refiner:
            captions = self._run(block, captions, attended, text_turns)
        tokens = torch.cat([image, captions], 1)
        turns = torch.cat([image_turns, text_turns], 1)
        attended = F.pad(attended, (image.shape[1], 0), value=True)
        for block in self.layers:
            tokens = self._run(block, tokens, attended, turns, clock)
        tokens = self.all_final_layer[f"{PATCH}-1"](tokens[:, : rows * columns], c=clock)
        pixels = tokens.view(batch, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(batch, channels, height, width)

    def _turns(self, ids: Tensor) -> Tensor:
        """Rotary factors (B, L, head size / 2) complex64 of positions (B, L, 3)."""
        return self.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
