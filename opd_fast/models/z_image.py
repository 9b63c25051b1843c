"""Z-Image (single-stream S3-DiT, https://arxiv.org/abs/2511.22699), from a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opd_fast.models.latents import weight_dtype
from opd_fast.models.pipeline_model import PipelineModel
from opd_fast.models.text import TextEmbeds, padded

_ATTENTION = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"]
_FEED_FORWARD = ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
_AXES_LENS = (1024, 512, 512)  # the transformer's default


class ZImage(PipelineModel):
    """Z-Image and Z-Image-Turbo: Qwen3 with a chat template as text encoder, single-stream transformer, 8x VAE.

    The transformer's time runs the other way (t = 1 - sigma), and it predicts -v.

    ZImagePipeline counts its ``guidance_scale`` s from 0: v = c + s (c - u), which is u + (1 + s) (c - u).  Two of its
    options are not supported: ``cfg_normalization`` (off by default), which bounds the norm of the guided prediction,
    and ``cfg_truncation`` below 1.
    """

    name: ClassVar[str] = "z_image"
    pipeline_class: ClassVar[str] = "ZImagePipeline"
    unguided: ClassVar[float] = 0.0
    masks_text: ClassVar[bool] = True
    # The refiners' blocks are built alike, so these names choose layers of theirs too.
    lora_targets: ClassVar[dict[str, list[str]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}
    _classes: ClassVar[dict[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
    }
    _decode_pixels: ClassVar[int] = 2**21

    @classmethod
    def _transformer_class(cls) -> Any:
        from opd_fast.models.z_image_transformer import ZImageTransformer2DModel

        return ZImageTransformer2DModel

    @classmethod
    def _text_limit(cls, folder: Path, transformer: Mapping[str, Any]) -> tuple[str, int]:
        from opd_fast.models.z_image_transformer import MULTIPLE

        # Text sits at positions 1, 2, ... of the first axis, the image one further.
        positions = transformer.get("axes_lens", _AXES_LENS)[0]
        return f"family {cls.name!r}", int((positions - 2) // MULTIPLE * MULTIPLE)

    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> TextEmbeds:
        rows, _ = pipeline.encode_prompt(
            prompt=prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        lengths = torch.tensor([len(row) for row in rows], device=device)
        sequence = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(sequence.shape[1], device=device) < lengths[:, None]
        return padded(sequence, mask, self.text_tokens)

    @property
    def _most_patches(self) -> int:
        return int(min(self._config.axes_lens[1:]))

    def own_resolution(self) -> int:
        """1024 pixels, as ZImagePipeline takes it."""
        return 1024

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        embedder = getattr(transformer, "all_x_embedder", {})
        dtype = weight_dtype(next(iter(embedder.values()), None), self.dtype)
        time = (1 - sigma.to(torch.float32)).expand(x.shape[0])
        v: Tensor = transformer(x.to(dtype), time, text.sequence.to(dtype), cap_mask=text.mask)
        return -v

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The refiners' blocks and the main ones."""
        parts: Any = transformer
        return [*parts.noise_refiner, *parts.context_refiner, *parts.layers]
