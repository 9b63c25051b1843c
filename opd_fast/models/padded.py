"""What Qwen-Image and Z-Image share: a language model as the only text encoder, prompts padded to one length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel
from opd_fast.models.latents import DEFAULT_SIZE, PATCH, decode_in_chunks, latent_size
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
from opd_fast.models.text import TextEmbeds, TextEncoders

_COMPONENTS = ("scheduler", "vae", "transformer", "tokenizer", "text_encoder")
_DEFAULT_TOKENS = 512  # of both pipelines
_DECODE_PIXELS = 2**21  # decoded at once


class PaddedTextModel(DiffusionModel):
    """A pipeline of transformer, vae, scheduler, one text encoder and its tokenizer.

    A prompt's own tokens come first in its row of ``text_tokens``, zeros follow, and the mask tells them apart, so that
    rows of different prompts can be stacked, cached and indexed.
    """

    guidance_kind: ClassVar[Literal["cfg", "embedded", "none"]] = "cfg"
    masks_text: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, str]]
    """diffusers' class of each network, or transformers' model type."""

    def __init__(
        self,
        path: str,
        pipeline: Any,
        schedule: Mapping[str, Any],
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """``pipeline``: its transformer and vae, or what stands for them in a meta model; ``schedule``: the content of
        scheduler_config.json."""
        self.path = path
        self.device = device
        self.dtype = dtype
        self.transformer: nn.Module = pipeline.transformer
        self.vae: Any = pipeline.vae
        self.text_tokens = tokens
        self._config: Any = pipeline.transformer.config
        self._schedule = schedule

    # --- what a family says of itself --------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _classes(cls) -> dict[str, Any]:
        """The class of each component, and that of the whole under "pipeline"."""

    @classmethod
    @abstractmethod
    def _transformer_class(cls) -> type:
        """That of the transformer, imported alone."""

    @classmethod
    @abstractmethod
    def _most_tokens(cls, folder: Path, transformer: Mapping[str, Any]) -> int:
        """The longest text that the model takes.  Raises ValueError for a transformer that the family cannot call."""

    @abstractmethod
    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """The pipeline's own embeddings (B, L, D) and mask (B, L) on ``device``, L at most ``text_tokens``."""

    @property
    @abstractmethod
    def _channels(self) -> int:
        """Of the latents."""

    @property
    @abstractmethod
    def _vae_factor(self) -> int:
        """Pixels that a latent stands for, along each side."""

    @abstractmethod
    def _pixels(self, z: Tensor) -> Tensor:
        """Latents (B, C, H, W) float32 to pixels (B, 3, H', W') in [-1, 1]."""

    # --- the protocol ------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int | None = None
    ) -> Self:
        """Load the components of the family's pipeline folder; the VAE stays float32.

        ``max_sequence_length``: text tokens, None takes 512.  The text encoder waits for the first ``encode``.
        Raises ValueError naming what is missing or damaged.
        """
        cls._check_index(resolve_pipeline(path))
        folder = resolve_pipeline(path, _COMPONENTS)
        cls.check_files(folder, dtype=dtype)
        schedule, tokens = cls._check(folder, max_sequence_length)
        device = torch.device(device)
        classes = cls._classes()

        def component(name: str, **options: Any) -> Any:
            return load_component(classes[name], folder, name, **options)

        parts = {
            "scheduler": component("scheduler"),
            "vae": component("vae", torch_dtype=torch.float32).to(device),
            "transformer": component("transformer", exact=True, torch_dtype=dtype).to(device),
        }

        def pipeline(device: torch.device) -> Any:
            tokenizer = component("tokenizer")
            encoder = component("text_encoder", dtype=dtype).to(device)
            return classes["pipeline"](**parts, tokenizer=tokenizer, text_encoder=encoder)

        model = cls(str(path), SimpleNamespace(**parts), schedule, tokens, device, dtype)
        model._text = TextEncoders(pipeline)
        return model

    @classmethod
    def check_files(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> None:
        """See ``DiffusionModel.check_files``."""
        check_present(folder, _COMPONENTS, weights=True, kinds=cls._kinds, dtype=dtype)

    @classmethod
    def meta(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> Self:
        """The model of a folder's configuration files.  Raises ValueError naming what is missing or damaged."""
        cls._check_index(folder)
        check_present(folder, _COMPONENTS, weights=False, kinds=cls._kinds)
        schedule, tokens = cls._check(folder, max_sequence_length)
        parts = SimpleNamespace(
            transformer=meta_transformer(folder, cls._transformer_class()), vae=read_config(folder, "vae")
        )
        return cls(str(folder), parts, schedule, tokens, torch.device("meta"), dtype)

    @classmethod
    def _check_index(cls, folder: Path) -> None:
        check_components(folder, check_index(folder, cls), _COMPONENTS)

    @classmethod
    def _check(cls, folder: Path, max_sequence_length: int | None) -> tuple[dict[str, Any], int]:
        """The scheduler's configuration and the number of text tokens, from files alone."""
        schedule = vars(read_config(folder, "scheduler").config)
        check_schedule(folder, schedule)
        most = cls._most_tokens(folder, vars(read_config(folder, "transformer").config))
        if max_sequence_length is not None and not 1 <= max_sequence_length <= most:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}; family {cls.name!r} takes 1 to {most} text tokens"
            )
        return schedule, min(_DEFAULT_TOKENS, most) if max_sequence_length is None else max_sequence_length

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """The pipeline's own embeddings, padded: sequence (B, text_tokens, D) in the model's dtype, mask (B,
        text_tokens) bool.

        Raises ValueError for an empty list, RuntimeError after ``release_text_encoders``.
        """
        if not prompts:
            raise ValueError("encode() needs at least one prompt")
        assert self._text is not None  # a meta model has no weights
        device = self.text_device or self.device
        sequence, mask = self._embed(self._text.get(device), list(prompts), device)
        room = self.text_tokens - sequence.shape[1]
        text = TextEmbeds(F.pad(sequence, (0, 0, 0, room)), mask=F.pad(mask.bool(), (0, room)))
        return text.to(self.device, self.dtype)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ``resolution`` must be a multiple of VAE factor x patch size."""
        size = latent_size(resolution, self._vae_factor, PATCH)
        return self._channels, size, size

    def own_resolution(self) -> int:
        """128 latents a side, as QwenImagePipeline takes it."""
        return DEFAULT_SIZE * self._vae_factor

    def image_tokens(self, resolution: int) -> int:
        _, height, width = self.latent_shape(resolution)
        return height * width // PATCH**2

    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """The scheduler's levels; see ``flow_sigmas``."""
        return flow_sigmas(steps, self.image_tokens(resolution), self._schedule)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Through the float32 VAE, in chunks that bound its memory."""
        z = latents.to(self.device, torch.float32)
        return decode_in_chunks(z, self._pixels, self._vae_factor, _DECODE_PIXELS)
