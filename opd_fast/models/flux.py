"""FLUX.1 (https://github.com/black-forest-labs/flux), from a diffusers pipeline folder: dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel
from opd_fast.models.latents import (
    DEFAULT_SIZE,
    PATCH,
    decode_in_chunks,
    kl_pixels,
    latent_size,
    pack,
    unpack,
    vae_factor,
    weight_dtype,
)
from opd_fast.models.pipeline_folder import (
    check_components,
    check_index,
    check_present,
    load_component,
    meta_transformer,
    read_config,
    resolve_pipeline,
)
from opd_fast.models.schedule import check_schedule, flow_sigmas
from opd_fast.models.techniques import AttentionSite, Modulation, ada_modulation, dispatched_attentions
from opd_fast.models.text import TextEmbeds, TextEncoders

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"]
_COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_KINDS = {"transformer": "FluxTransformer2DModel", "vae": "AutoencoderKL"}
_KINDS |= {"text_encoder": "clip_text_model", "text_encoder_2": "t5"}
_DECODE_PIXELS = 2**22  # decoded at once


class Flux(DiffusionModel):
    """FLUX.1: CLIP's pooled vector, T5's sequence, double and single blocks, 8x VAE of 16 channels.

    dev's guidance is an input of its transformer (distilled, https://arxiv.org/abs/2210.03142); schnell has none.
    """

    name: ClassVar[str] = "flux"
    pipeline_class: ClassVar[str] = "FluxPipeline"
    # "attention": the joint attention of the double blocks; its to_q, to_k and to_v also name the single blocks'.
    # "all": the feed-forwards too, as far as suffixes can name them; `targets` adds the single blocks' proj_out.
    lora_targets: ClassVar[dict[str, list[str]]] = {
        "attention": [f"attn.{name}" for name in _ATTENTION],
        "all": [f"attn.{name}" for name in _ATTENTION] + _FEED_FORWARD,
    }
    guidance_kind: Literal["cfg", "embedded", "none"]  # type: ignore[misc]  # of the checkpoint, not of the class

    def __init__(
        self,
        path: str,
        transformer: Any,
        vae: Any,
        schedule: Mapping[str, Any],
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """``vae``: the autoencoder, or what stands for it in a meta model; ``schedule``: the content of
        scheduler_config.json."""
        self.path = path
        self.device = device
        self.dtype = dtype
        self.transformer: nn.Module = transformer
        self.vae: Any = vae
        self.text_tokens = tokens
        self._config: Any = transformer.config
        self._schedule = schedule
        self.guidance_kind = "embedded" if self._config.guidance_embeds else "none"
        self._positions: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int | None = None
    ) -> Self:
        """Load the components of a FluxPipeline folder.

        ``max_sequence_length``: T5 tokens, 1 to 512 for dev and 1 to 256 for schnell; None takes the most.  The text
        encoders wait for the first ``encode``.  Raises ValueError naming what is missing or damaged.
        """
        folder = resolve_pipeline(path)
        check_components(folder, check_index(folder, cls), _COMPONENTS)
        folder = resolve_pipeline(path, _COMPONENTS)
        cls.check_files(folder, dtype=dtype)
        schedule, tokens = _check(folder, max_sequence_length)

        from diffusers import AutoencoderKL, FluxTransformer2DModel

        device = torch.device(device)
        transformer = load_component(FluxTransformer2DModel, folder, "transformer", exact=True, torch_dtype=dtype).to(
            device
        )
        vae = load_component(AutoencoderKL, folder, "vae", torch_dtype=torch.float32).to(device)
        model = cls(str(path), transformer, vae, schedule, tokens, device, dtype)
        model._text = TextEncoders(lambda device: _text_pipeline(folder, device, dtype))
        return model

    @classmethod
    def check_files(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> None:
        """See ``DiffusionModel.check_files``."""
        check_present(folder, _COMPONENTS, weights=True, kinds=_KINDS, dtype=dtype)

    @classmethod
    def meta(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> Self:
        """The model of a folder's configuration files.  Raises ValueError naming what is missing or damaged."""
        check_components(folder, check_index(folder, cls), _COMPONENTS)
        check_present(folder, _COMPONENTS, weights=False, kinds=_KINDS)
        schedule, tokens = _check(folder, max_sequence_length)
        transformer, vae = meta_transformer(folder), read_config(folder, "vae")
        return cls(str(folder), transformer, vae, schedule, tokens, torch.device("meta"), dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """The pipeline's own embeddings: T5's sequence (B, text_tokens, D) and CLIP's pooled (B, P), model dtype.

        Raises ValueError for an empty list, RuntimeError after ``release_text_encoders``.
        """
        if not prompts:
            raise ValueError("encode() needs at least one prompt")
        assert self._text is not None  # a meta model has no weights
        device = self.text_device or self.device
        sequence, pooled, _ = self._text.get(device).encode_prompt(
            prompt=list(prompts), device=device, max_sequence_length=self.text_tokens
        )
        return TextEmbeds(sequence, pooled).to(self.device, self.dtype)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ``resolution`` must be a multiple of VAE factor x patch size."""
        size = latent_size(resolution, vae_factor(self.vae), PATCH)
        return int(self._config.in_channels) // PATCH**2, size, size

    def own_resolution(self) -> int:
        """128 latents a side, as FluxPipeline takes it."""
        return DEFAULT_SIZE * vae_factor(self.vae)

    def image_tokens(self, resolution: int) -> int:
        _, height, width = self.latent_shape(resolution)
        return height * width // PATCH**2

    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """The scheduler's levels (see ``flow_sigmas``): dev's are shifted by the number of image tokens."""
        return flow_sigmas(steps, self.image_tokens(resolution), self._schedule)

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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z / scaling_factor + shift_factor through the float32 VAE, in chunks that bound its memory."""
        z = latents.to(self.device, torch.float32)
        return decode_in_chunks(z, partial(kl_pixels, self.vae), vae_factor(self.vae), _DECODE_PIXELS)

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


def _check(folder: Path, max_sequence_length: int | None) -> tuple[dict[str, Any], int]:
    """The scheduler's configuration and the T5 tokens (None: all that the model was trained with), from files alone."""
    schedule = vars(read_config(folder, "scheduler").config)
    check_schedule(folder, schedule)
    # dev and schnell were trained with different lengths; the guidance embedding tells them apart.
    embeds = getattr(read_config(folder, "transformer").config, "guidance_embeds", False)
    kind, most = ("FLUX.1-dev", 512) if embeds else ("FLUX.1-schnell", 256)
    if max_sequence_length is not None and not 1 <= max_sequence_length <= most:
        raise ValueError(f"max_sequence_length is {max_sequence_length}; {kind} takes 1 to {most} T5 tokens")
    return schedule, most if max_sequence_length is None else max_sequence_length


def _text_pipeline(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A FluxPipeline of the text encoders alone, on ``device``."""
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    return FluxPipeline(
        tokenizer=load_component(CLIPTokenizer, folder, "tokenizer"),
        tokenizer_2=load_component(T5TokenizerFast, folder, "tokenizer_2"),
        text_encoder=load_component(CLIPTextModel, folder, "text_encoder", dtype=dtype).to(device),
        text_encoder_2=load_component(T5EncoderModel, folder, "text_encoder_2", dtype=dtype).to(device),
        transformer=None,
        vae=None,
        scheduler=None,
    )
