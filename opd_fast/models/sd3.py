"""Stable Diffusion 3 and 3.5 (MMDiT, https://arxiv.org/abs/2403.03206), from a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opd_fast.models.joint_attention import joint_attentions
from opd_fast.models.latents import weight_dtype
from opd_fast.models.pipeline_folder import check_components, check_index, has_component, read_config
from opd_fast.models.pipeline_model import JOINT_ATTENTION, PipelineModel
from opd_fast.models.schedule import check_options
from opd_fast.models.techniques import AttentionSite, Modulation, ada_modulation
from opd_fast.models.text import TextEmbeds
from opd_fast.solvers import sd3_sigmas

_ATTENTION = [f"attn.{name}" for name in JOINT_ATTENTION]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
_T5_PARTS = ("text_encoder_3", "tokenizer_3")


class SD3(PipelineModel):
    """SD3 / SD3.5: two CLIP encoders, an optional T5 encoder, MMDiT transformer, 8x VAE, classifier-free guidance.

    ``max_sequence_length`` is the number of T5 tokens, 0 to 512; None takes 128 (the published setting) with a T5
    encoder and 0 without one.  0 leaves T5 out altogether.
    """

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    # "attention": the published set of joint-attention projections; attn2 of the dual-attention blocks is not in it.
    lora_targets: ClassVar[dict[str, list[str]]] = {"attention": _ATTENTION, "all": _ATTENTION + _FEED_FORWARD}
    _classes: ClassVar[dict[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5TokenizerFast",
    }

    @classmethod
    def _components(cls, folder: Path, max_sequence_length: int | None) -> dict[str, str]:
        if max_sequence_length is not None and not 0 <= max_sequence_length <= 512:
            raise ValueError(f"max_sequence_length is {max_sequence_length}; T5 takes 0 (left out) to 512 tokens")
        index = check_index(folder, cls)
        use_t5 = has_component(index, "text_encoder_3") and max_sequence_length != 0
        classes = {name: kind for name, kind in cls._classes.items() if use_t5 or name not in _T5_PARTS}
        check_components(folder, index, classes)
        return classes

    @classmethod
    def _check_schedule(cls, folder: Path, schedule: Mapping[str, Any]) -> None:
        check_options(folder, schedule, "SD3's published schedule", ("use_dynamic_shifting", "shift_terminal"))

    @classmethod
    def _text_tokens(cls, folder: Path, max_sequence_length: int | None) -> int:
        tokens = int(read_config(folder, "tokenizer").config.model_max_length)
        if "text_encoder_3" not in cls._components(folder, max_sequence_length):
            return tokens
        return tokens + (128 if max_sequence_length is None else max_sequence_length)

    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> TextEmbeds:
        sequence, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens - pipeline.tokenizer_max_length,
        )
        return TextEmbeds(sequence, pooled)

    @property
    def _patch(self) -> int:
        return int(self._config.patch_size)

    @property
    def _most_patches(self) -> int | None:
        most: int | None = self._config.pos_embed_max_size
        return most

    def own_resolution(self) -> int | None:
        """The transformer's sample_size in pixels, as StableDiffusion3Pipeline takes it."""
        size = self._config.sample_size
        return size * self._vae_factor if isinstance(size, int) else None

    @property
    def _timesteps(self) -> int:
        return int(self._schedule.get("num_train_timesteps", 1000))

    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """SD3's levels do not depend on the resolution."""
        return sd3_sigmas(steps, float(self._schedule.get("shift", 1.0)), num_train_timesteps=self._timesteps)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The transformer's number for a level, of sigma's shape.

        It stays float32: truncating it to an integer, or rounding it to bfloat16, moves the level.
        """
        return sigma.to(torch.float32) * self._timesteps

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        dtype = weight_dtype(getattr(getattr(transformer, "pos_embed", None), "proj", None), self.dtype)
        text = text.to(dtype=dtype)
        return transformer(
            hidden_states=x.to(dtype),
            timestep=self.timestep(sigma).expand(x.shape[0]),
            encoder_hidden_states=text.sequence,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]

    def attentions(self, transformer: nn.Module) -> list[AttentionSite]:
        """See ``DiffusionModel.attentions``; SD3's published processor does not go through the dispatcher."""
        return joint_attentions(transformer)

    def modulation(self, transformer: nn.Module) -> Modulation:
        """See ``DiffusionModel.modulation``."""
        parts: Any = transformer

        def numbers(levels: Tensor, dtype: torch.dtype, guidance: float) -> list[tuple[Tensor, nn.Module]]:
            return [(self.timestep(levels), parts.time_text_embed.timestep_embedder)]

        dtype = weight_dtype(parts.pos_embed.proj, self.dtype)
        return ada_modulation(transformer, self.blocks(transformer), numbers, dtype)
