"""FLUX.1 (https://github.com/black-forest-labs/flux), from a diffusers pipeline folder: dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from opd_fast.models.latents import PATCH, pack, unpack, weight_dtype
from opd_fast.models.pipeline_model import JOINT_ATTENTION, PipelineModel
from opd_fast.models.techniques import AttentionSite, Modulation, ada_modulation, dispatched_attentions
from opd_fast.models.text import TextEmbeds

_ATTENTION = [f"attn.{name}" for name in JOINT_ATTENTION]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]


class Flux(PipelineModel):
    """FLUX.1: CLIP's pooled vector, T5's sequence, double and single blocks, 8x VAE of 16 channels.

    dev's guidance is an input of its transformer (distilled, https://arxiv.org/abs/2210.03142); schnell has none.
    ``max_sequence_length`` is the number of T5 tokens, at most 512 for dev and 256 for schnell; None takes the most.
    """

    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    # "attention": the joint attention of the double blocks; its to_q, to_k and to_v also name the single blocks'.
    # "all": the feed-forwards too, as far as suffixes can name them; `targets` adds the single blocks' proj_out.
    lora_targets: ClassVar[dict[str, list[str]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}
    guidance_kind: Literal["cfg", "embedded", "none"]  # type: ignore[misc]  # of the checkpoint, not of the class
    _classes: ClassVar[dict[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5TokenizerFast",
    }
    _packs_latents: ClassVar[bool] = True
    _text_words: ClassVar[str] = "T5"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.guidance_kind = "embedded" if self._config.guidance_embeds else "none"
        self._positions: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def _text_limit(cls, folder: Path, transformer: Mapping[str, Any]) -> tuple[str, int]:
        # dev and schnell were trained with different lengths; the guidance embedding tells them apart.
        return ("FLUX.1-dev", 512) if transformer.get("guidance_embeds") else ("FLUX.1-schnell", 256)

    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> TextEmbeds:
        sequence, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, device=device, max_sequence_length=self.text_tokens
        )
        return TextEmbeds(sequence, pooled)

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        rows, _, height, width = x.shape
        dtype = weight_dtype(getattr(transformer, "x_embedder", None), self.dtype)
        text = text.to(dtype=dtype)
        text_ids, image_ids = self._ids(text.sequence.shape[1], height // PATCH, width // PATCH, x.device)
        embedded = self.guidance_kind == "embedded"
        # The transformer scales sigma and guidance by 1000, and rounds both to its own dtype.
        tokens = transformer(
            hidden_states=pack(x.to(dtype)),
            timestep=sigma.to(torch.float32).expand(rows),
            guidance=torch.full((rows,), guidance, dtype=torch.float32, device=x.device) if embedded else None,
            encoder_hidden_states=text.sequence,
            pooled_projections=text.pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def _ids(self, tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of the text (tokens, 3), all 0, and of the image (height*width, 3): 0, row, column.  Made once."""
        key = (tokens, height, width, device)
        if key not in self._positions:
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
            self._positions[key] = torch.zeros(tokens, 3, device=device), image.to(device)
        return self._positions[key]

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]  # type: ignore[misc]

    def attentions(self, transformer: nn.Module) -> list[AttentionSite]:
        """See ``DiffusionModel.attentions``; FLUX's processor can read fused projections."""
        return flux_attentions(transformer)

    def modulation(self, transformer: nn.Module) -> Modulation:
        """See ``DiffusionModel.modulation``."""
        parts: Any = transformer
        embedders = parts.time_text_embed

        def numbers(levels: Tensor, dtype: torch.dtype, guidance: float) -> list[tuple[Tensor, nn.Module]]:
            # The transformer rounds level and guidance to its own dtype, then scales them.
            found = [(levels.to(dtype) * 1000, embedders.timestep_embedder)]
            if self.guidance_kind == "embedded":
                strength = torch.full((1,), guidance, dtype=torch.float32, device=levels.device)
                found.append((strength.to(dtype) * 1000, embedders.guidance_embedder))
            return found

        dtype = weight_dtype(parts.x_embedder, self.dtype)
        return ada_modulation(transformer, self.blocks(transformer), numbers, dtype)

    def targets(self, name: str | Sequence[str]) -> list[str]:
        """As the base class has it.  In "all" the single blocks' proj_out go by their full names, since the suffix
        would also name the transformer's last layer.
        """
        found = super().targets(name)
        if name == "all":
            found += [f"single_transformer_blocks.{i}.proj_out" for i in range(int(self._config.num_single_layers))]
        return found


def flux_attentions(transformer: nn.Module) -> list[AttentionSite]:
    """The attentions of a FLUX transformer, of its double and single blocks."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    return dispatched_attentions(transformer, fusing=(FluxAttnProcessor,))
