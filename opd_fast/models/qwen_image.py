"""Qwen-Image (double-stream MMDiT, https://arxiv.org/abs/2508.02324), from a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opd_fast.models.latents import PATCH, pack, unpack, weight_dtype
from opd_fast.models.pipeline_model import JOINT_ATTENTION, PipelineModel
from opd_fast.models.text import TextEmbeds, padded

_ATTENTION = [f"attn.{name}" for name in JOINT_ATTENTION]
_FEED_FORWARD = ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
_MOST_TOKENS = 1024  # the pipeline's own limit
# Variants whose transformer takes more inputs than image, text and level.
_VARIANTS = {
    "guidance_embeds": "a guidance-distilled transformer",
    "use_additional_t_cond": "Qwen-Image-Layered's transformer",
    "use_layer3d_rope": "Qwen-Image-Layered's transformer",
}


class QwenImage(PipelineModel):
    """Qwen-Image: Qwen2.5-VL as text encoder, packed 2x2 latents, 8x VAE on single-frame video latents.

    QwenImagePipeline guides by v = u + g (c - u), where g is its ``true_cfg_scale``, and then rescales each packed
    token of v to the norm of the same token of c.
    """

    name: ClassVar[str] = "qwen_image"
    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    guidance_argument: ClassVar[str] = "true_cfg_scale"
    rescales_guidance: ClassVar[bool] = True
    masks_text: ClassVar[bool] = True
    lora_targets: ClassVar[dict[str, list[str]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}
    _classes: ClassVar[dict[str, str]] = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
    }
    _packs_latents: ClassVar[bool] = True
    _decode_pixels: ClassVar[int] = 2**21

    @classmethod
    def _transformer_class(cls) -> Any:
        from opd_fast.models.qwen_image_transformer import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel

    @classmethod
    def _text_limit(cls, folder: Path, transformer: Mapping[str, Any]) -> tuple[str, int]:
        for key, what in _VARIANTS.items():
            if transformer.get(key):
                raise ValueError(
                    f"{folder}/transformer sets {key} ({what}), which family {cls.name!r} does not support; "
                    f"use Qwen-Image itself"
                )
        return f"family {cls.name!r}", _MOST_TOKENS

    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> TextEmbeds:
        sequence, mask = pipeline.encode_prompt(prompt=prompts, device=device, max_sequence_length=self.text_tokens)
        # The pipeline leaves out a mask that is all true.
        mask = torch.ones_like(sequence[..., 0], dtype=torch.bool) if mask is None else mask
        return padded(sequence, mask, self.text_tokens)

    @property
    def _vae_factor(self) -> int:
        return int(2 ** len(self.vae.config.temperal_downsample))

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        batch, _, height, width = x.shape
        dtype = weight_dtype(getattr(transformer, "img_in", None), self.dtype)
        tokens = transformer(
            pack(x.to(dtype)),
            timestep=sigma.to(torch.float32).expand(batch),
            encoder_hidden_states=text.sequence.to(dtype),
            text_mask=text.mask,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch,
        )
        return unpack(tokens, height, width)

    def rescale_guided(self, guided: Tensor, cond: Tensor) -> Tensor:
        """Rescale each packed token (2x2 latents of all channels) to the norm of the conditional prediction's token."""
        _, _, height, width = guided.shape
        tokens = pack(guided)
        norms = [torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (pack(cond), tokens)]
        # The pipeline divides by a norm of 0 where a token is 0; such a token stays 0 here.
        return unpack(tokens * (norms[0] / norms[1].clamp(min=torch.finfo(tokens.dtype).tiny)), height, width)

    def _pixels(self, z: Tensor) -> Tensor:
        config = self.vae.config
        both = torch.tensor([config.latents_mean, config.latents_std], device=z.device)
        mean, std = both.view(2, 1, -1, 1, 1)
        frames: Tensor = self.vae.decode((z * std + mean).unsqueeze(2), return_dict=False)[0]
        return frames[:, :, 0]
