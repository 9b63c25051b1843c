"""Stable Diffusion 3 and 3.5 (MMDiT, https://arxiv.org/abs/2403.03206), from a diffusers pipeline folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel
from opd_fast.models.joint_attention import joint_attentions
from opd_fast.models.latents import decode_in_chunks, kl_pixels, latent_size, vae_factor, weight_dtype
from opd_fast.models.pipeline_folder import (
    check_components,
    check_index,
    check_present,
    has_component,
    load_component,
    meta_transformer,
    read_config,
    resolve_pipeline,
)
from opd_fast.models.schedule import check_options
from opd_fast.models.techniques import AttentionSite, Modulation, ada_modulation
from opd_fast.models.text import TextEmbeds, TextEncoders
from opd_fast.solvers import sd3_sigmas

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_T5_PARTS = ("text_encoder_3", "tokenizer_3")
_KINDS = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL", "text_encoder_3": "t5"}
_KINDS |= {"text_encoder": "clip_text_model", "text_encoder_2": "clip_text_model"}
# What sd3_sigmas follows, and the options that it does not beyond those of all schedules.
_SCHEDULE = ("SD3's published schedule", ("use_dynamic_shifting", "shift_terminal"))
_DECODE_PIXELS = 2**22  # decoded at once: 64 images at 256, 16 at 512


class SD3(DiffusionModel):
    """SD3 / SD3.5: two CLIP encoders, an optional T5 encoder, MMDiT transformer, 8x VAE, classifier-free guidance."""

    name: ClassVar[str] = "sd3"
    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    guidance_kind: ClassVar[Literal["cfg", "embedded", "none"]] = "cfg"
    # "attention": the published set of joint-attention projections; attn2 of the dual-attention blocks is not in it.
    lora_targets: ClassVar[dict[str, list[str]]] = {
        "attention": [f"attn.{name}" for name in _ATTENTION],
        "all": [f"attn.{name}" for name in _ATTENTION] + _FEED_FORWARD,
    }

    def __init__(self, path: str, pipeline: Any, max_sequence_length: int, device: torch.device, dtype: torch.dtype):
        """``pipeline``: the parts of a StableDiffusion3Pipeline but the text encoders, or what stands for them."""
        self.path = path
        self.device = device
        self.dtype = dtype
        self.max_sequence_length = max_sequence_length
        self.transformer: nn.Module = pipeline.transformer
        self.vae: Any = pipeline.vae
        self._config: Any = pipeline.transformer.config
        self.text_tokens = int(pipeline.tokenizer.model_max_length) + max_sequence_length
        self._timesteps = int(getattr(pipeline.scheduler.config, "num_train_timesteps", 1000))
        self._shift = float(getattr(pipeline.scheduler.config, "shift", 1.0))

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int | None = None
    ) -> Self:
        """Load the components of a StableDiffusion3Pipeline folder.

        ``max_sequence_length``: T5 tokens, 0 to 512; None takes 128 (the published setting) with a T5 encoder and 0
        without one.  0 leaves T5 out altogether.  The text encoders wait for the first ``encode``.
        Raises ValueError naming what is missing or damaged.
        """
        names, tokens = _wanted(cls, resolve_pipeline(path), max_sequence_length)
        folder = resolve_pipeline(path, names)
        cls.check_files(folder, dtype=dtype, max_sequence_length=max_sequence_length)
        check_options(folder, vars(read_config(folder, "scheduler").config), *_SCHEDULE)
        device = torch.device(device)
        parts = _load_parts(folder, device, dtype)
        tokenizer = read_config(folder, "tokenizer").config
        model = cls(str(path), SimpleNamespace(**parts, tokenizer=tokenizer), tokens, device, dtype)

        def pipeline(device: torch.device) -> Any:
            from diffusers import StableDiffusion3Pipeline

            return StableDiffusion3Pipeline(**parts, **_load_text(folder, tokens > 0, device, dtype))

        model._text = TextEncoders(pipeline)
        return model

    @classmethod
    def check_files(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> None:
        """See ``DiffusionModel.check_files``."""
        names, _ = _wanted(cls, folder, max_sequence_length)
        check_present(folder, names, weights=True, kinds=_KINDS, dtype=dtype)

    @classmethod
    def meta(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> Self:
        """The model of a folder's configuration files.  Raises ValueError naming what is missing or damaged."""
        names, tokens = _wanted(cls, folder, max_sequence_length)
        check_present(folder, names, weights=False, kinds=_KINDS)
        parts = SimpleNamespace(
            transformer=meta_transformer(folder),
            vae=read_config(folder, "vae"),
            scheduler=read_config(folder, "scheduler"),
            tokenizer=read_config(folder, "tokenizer").config,
        )
        check_options(folder, vars(parts.scheduler.config), *_SCHEDULE)
        return cls(str(folder), parts, tokens, torch.device("meta"), dtype)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """The pipeline's own embeddings: sequence (B, 77 + max_sequence_length, D), pooled (B, P), model dtype.

        Raises ValueError for an empty list, RuntimeError after ``release_text_encoders``.
        """
        if not prompts:
            raise ValueError("encode() needs at least one prompt")
        assert self._text is not None  # a meta model has no weights
        device = self.text_device or self.device
        sequence, _, pooled, _ = self._text.get(device).encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return TextEmbeds(sequence, pooled).to(self.device, self.dtype)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ``resolution`` must be a multiple of VAE factor x patch size."""
        factor, patch = vae_factor(self.vae), int(self._config.patch_size)
        size = latent_size(resolution, factor, patch)
        limit = self._config.pos_embed_max_size
        if limit is not None and size // patch > limit:
            raise ValueError(
                f"resolution {resolution} needs {size // patch} patches a side, the model's position table has "
                f"{limit}; use at most {limit * patch * factor}"
            )
        return int(self._config.in_channels), size, size

    def own_resolution(self) -> int | None:
        """The transformer's sample_size in pixels, as StableDiffusion3Pipeline takes it."""
        size = self._config.sample_size
        return size * vae_factor(self.vae) if isinstance(size, int) else None

    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """SD3's levels do not depend on the resolution."""
        return sd3_sigmas(steps, self._shift, num_train_timesteps=self._timesteps)

    def image_tokens(self, resolution: int) -> int:
        _, height, width = self.latent_shape(resolution)
        return height * width // int(self._config.patch_size) ** 2

    def timestep(self, sigma: Tensor) -> Tensor:
        """The transformer's number for a level, of sigma's shape.

        It stays float32: truncating it to an integer, or rounding it to bfloat16, moves the level.
        """
        return sigma.to(torch.float32) * self._timesteps

    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        timestep = self.timestep(sigma).expand(x.shape[0])
        dtype = weight_dtype(getattr(getattr(transformer, "pos_embed", None), "proj", None), self.dtype)
        text = text.to(dtype=dtype)
        return transformer(
            hidden_states=x.to(dtype),
            timestep=timestep,
            encoder_hidden_states=text.sequence,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """z / scaling_factor + shift_factor through the float32 VAE, in chunks that bound its memory."""
        z = latents.to(self.device, torch.float32)
        return decode_in_chunks(z, partial(kl_pixels, self.vae), vae_factor(self.vae), _DECODE_PIXELS)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)  # type: ignore[arg-type]

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


def _wanted(cls: type[SD3], folder: Path, max_sequence_length: int | None) -> tuple[list[str], int]:
    """The components that a pipeline folder must hold, and T5's tokens, of which 0 leaves T5 out."""
    if max_sequence_length is not None and not 0 <= max_sequence_length <= 512:
        raise ValueError(f"max_sequence_length is {max_sequence_length}; T5 takes 0 (left out) to 512 tokens")
    index = check_index(folder, cls)
    use_t5 = has_component(index, "text_encoder_3") and max_sequence_length != 0
    names = ["transformer", "vae", "scheduler", *_TEXT_PARTS, *(_T5_PARTS if use_t5 else ())]
    check_components(folder, index, names)
    if not use_t5:
        return names, 0
    return names, 128 if max_sequence_length is None else max_sequence_length


def _load_parts(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of StableDiffusion3Pipeline that are no text, networks on ``device``."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    transformer = load_component(SD3Transformer2DModel, folder, "transformer", exact=True, torch_dtype=dtype)
    return {
        "scheduler": load_component(FlowMatchEulerDiscreteScheduler, folder, "scheduler"),
        "transformer": transformer.to(device),
        "vae": load_component(AutoencoderKL, folder, "vae", torch_dtype=torch.float32).to(device),
    }


def _load_text(folder: Path, use_t5: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Its other arguments, text encoders on ``device``; T5 parts are None without T5."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    def network(cls: Any, name: str, **options: Any) -> Any:
        return load_component(cls, folder, name, **options).to(device)

    parts: dict[str, Any] = {
        "tokenizer": load_component(CLIPTokenizer, folder, "tokenizer"),
        "tokenizer_2": load_component(CLIPTokenizer, folder, "tokenizer_2"),
        "text_encoder": network(CLIPTextModelWithProjection, "text_encoder", dtype=dtype),
        "text_encoder_2": network(CLIPTextModelWithProjection, "text_encoder_2", dtype=dtype),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    if use_t5:
        from transformers import T5EncoderModel, T5TokenizerFast

        parts["tokenizer_3"] = load_component(T5TokenizerFast, folder, "tokenizer_3")
        parts["text_encoder_3"] = network(T5EncoderModel, "text_encoder_3", dtype=dtype)
    return parts
