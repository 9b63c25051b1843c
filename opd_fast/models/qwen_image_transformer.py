"""Qwen-Image's transformer for a padded batch whose lengths stay on the device.

Given a mask, diffusers' forward copies the text's length from the host to the device at every call. No CUDA graph can
record this stop, and the number is not used.  The forward here computes the same without the copy.
"""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageTransformer2DModel as Published
from torch import Tensor


class QwenImageTransformer2DModel(Published):
    """diffusers' class (of the same name, so that it is saved under it) with a second way of calling it."""

    def forward(self, hidden_states: Tensor, *args: Any, text_mask: Tensor | None = None, **more: Any) -> Any:
        """With ``text_mask`` (B, L) bool: packed latents (B, N, C), and by name ``timestep`` (B,) from 0 to 1,
        ``encoder_hidden_states`` (B, L, D), ``img_shapes``; returns (B, N, C).  Without it: as diffusers.
        """
        if text_mask is None:
            return super().forward(hidden_states, *args, **more)
        assert not args
        return self._padded(hidden_states, text_mask=text_mask, **more)

    def _padded(
        self, image: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_mask: Tensor, img_shapes: Any
    ) -> Tensor:
        image = self.img_in(image)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        # The level is rounded to the transformer's dtype, as diffusers rounds it.
        clock = self.time_text_embed(timestep.to(image.dtype), image, None)
        turns = self.pos_embed(img_shapes, max_txt_seq_len=text.shape[1], device=image.device)
        for block in self.transformer_blocks:
            text, image = block(
                hidden_states=image,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=text_mask,
                temb=clock,
                image_rotary_emb=turns,
            )
        tokens: Tensor = self.proj_out(self.norm_out(image, clock))
        return tokens
