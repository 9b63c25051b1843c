"""Z-Image (single-stream S3-DiT, https://arxiv.org/abs/2511.22699), from a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opd_fast.models.latents import PATCH, kl_pixels, vae_factor, weight_dtype
from opd_fast.models.padded import PaddedTextModel
from opd_fast.models.text import TextEmbeds

_ATTENTION = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
_FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
_AXES_LENS = (1024, 512, 512)  # the transformer's default


class ZImage(PaddedTextModel):
    """Z-Image and Z-Image-Turbo: Qwen3 with a chat template as text encoder, single-stream transformer, 8x VAE.

    The transformer's clock runs the other way (t = 1 - sigma), and what it predicts is -v.

    ZImagePipeline counts its ``guidance_scale`` s from 0: v = c + s (c - u), which is u + (1 + s) (c - u).  Its
    ``cfg_normalization`` (off by default), which bounds the norm of the guided prediction, and ``cfg_truncation`` below
    1 are not done here.
    """

    name: ClassVar[str] = "z_image"
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    unguided: ClassVar[float] = 0.0
    _kinds: ClassVar[dict[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "qwen3",
    }
    # Of the refiners' blocks too: they are built alike.
    lora_targets: ClassVar[dict[str, list[str]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}

    @classmethod
    def _classes(cls) -> dict[str, Any]:
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
        from transformers import Qwen2Tokenizer, Qwen3Model

        return {
            "pipeline": ZImagePipeline,
            "transformer": cls._transformer_class(),
            "vae": AutoencoderKL,
            "scheduler": FlowMatchEulerDiscreteScheduler,
            "text_encoder": Qwen3Model,
            "tokenizer": Qwen2Tokenizer,
        }

    @classmethod
    def _transformer_class(cls) -> type:
        from opd_fast.models.z_image_transformer import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    @classmethod
    def _most_tokens(cls, folder: Path, transformer: Mapping[str, Any]) -> int:
        from opd_fast.models.z_image_transformer import MULTIPLE

        # Text sits at positions 1, 2, ... of the first axis, the image one further.
        positions = transformer.get("axes_lens", _AXES_LENS)[0]
        return int((positions - 2) // MULTIPLE * MULTIPLE)

    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        rows, _ = pipeline.encode_prompt(
            prompt=prompts,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        lengths = torch.tensor([len(row) for row in rows], device=device)
        sequence = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return sequence, torch.arange(sequence.shape[1], device=device) < lengths[:, None]

    @property
    def _channels(self) -> int:
        return int(self._config.in_channels)

    @property
    def _vae_factor(self) -> int:
        return vae_factor(self.vae)

    def own_resolution(self) -> int:
        """1024 pixels, as ZImagePipeline takes it."""
        return 1024

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ``resolution`` must divide, and fit the transformer's position tables."""
        shape = super().latent_shape(resolution)
        limit = min(self._config.axes_lens[1:])
        if shape[1] // PATCH > limit:
            raise ValueError(
                f"resolution {resolution} needs {shape[1] // PATCH} patches a side, the model's position tables have "
                f"{limit}; use at most {limit * PATCH * self._vae_factor}"
            )
        return shape

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        embedder = getattr(transformer, "all_x_embedder", {})
        dtype = weight_dtype(next(iter(embedder.values()), None), self.dtype)
        time = (1 - sigma.to(torch.float32)).expand(x.shape[0])
        v: Tensor = transformer(x.to(dtype), time, text.sequence.to(dtype), cap_mask=text.mask)
        return -v

    def _pixels(self, z: Tensor) -> Tensor:
        return kl_pixels(self.vae, z)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The refiners' blocks and the main ones."""
        parts: Any = transformer
        return [*parts.noise_refiner, *parts.context_refiner, *parts.layers]
