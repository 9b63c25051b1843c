"""What the families of diffusers pipelines share: they load the folder's components alike and treat latents alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from opd_fast.models.base import TEXT_FOLDERS, DiffusionModel
from opd_fast.models.latents import PATCH, decode_in_chunks, latent_size
from opd_fast.models.pipeline_folder import (
    check_components,
    check_index,
    check_present,
    load_component,
    load_transformer,
    read_config,
    resolve_pipeline,
)
from opd_fast.models.schedule import check_schedule, flow_sigmas
from opd_fast.models.text import TextEmbeds, TextEncoders
from opd_fast.models.weight_files import meta_network, read_json

JOINT_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""The projections of an attention in which text and image attend to each other, as diffusers names them."""
DEFAULT_SIZE = 128
"""Latents along the side of a default image, a constant of diffusers' pipelines for FLUX.1 and Qwen-Image."""
_DEFAULT_TOKENS = 512  # of the pipelines; a family may take fewer


class PipelineModel(DiffusionModel):
    """A model in a diffusers pipeline folder: transformer, VAE, scheduler, text encoders and their tokenizers."""

    guidance_kind: ClassVar[Literal["cfg", "embedded", "none"]] = "cfg"
    _classes: ClassVar[dict[str, str]]
    """The class of each component but the scheduler: diffusers' of the networks, transformers' of the text parts."""
    _packs_latents: ClassVar[bool] = False
    """Whether the transformer takes tokens of 2x2 latents; its `in_channels` then counts those of a token."""
    _text_words: ClassVar[str] = "text"
    _decode_pixels: ClassVar[int] = 2**22
    """Pixels of the images that are decoded at once: 64 images at 256, 16 at 512."""

    def __init__(
        self,
        path: str,
        transformer: Any,
        vae: Any,
        schedule: Mapping[str, Any],
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """``vae``: the autoencoder, or its ``.config`` alone in a meta model; ``schedule``: the content of
        scheduler_config.json; ``tokens``: rows of a prompt's sequence."""
        self.path, self.device, self.dtype = path, device, dtype
        self.transformer: nn.Module = transformer
        self.vae = vae
        self.text_tokens = tokens
        self._config: Any = transformer.config
        self._schedule = schedule

    # --- what a family says of itself --------------------------------------------------------------------------------

    @classmethod
    def _components(cls, folder: Path, max_sequence_length: int | None) -> dict[str, str]:
        """The components that are used, of ``_classes``. Raises ValueError for one that model_index.json lacks."""
        check_components(folder, check_index(folder, cls), cls._classes)
        return cls._classes

    @classmethod
    def _transformer_class(cls) -> Any:
        import diffusers

        return getattr(diffusers, cls._classes["transformer"])

    @classmethod
    def _check_schedule(cls, folder: Path, schedule: Mapping[str, Any]) -> None:
        """Raise ValueError for a scheduler whose levels ``sigmas`` does not follow."""
        check_schedule(folder, schedule)

    @classmethod
    def _text_limit(cls, folder: Path, transformer: Mapping[str, Any]) -> tuple[str, int]:
        """Whose limit it is, and the longest text. Raises ValueError for a transformer that the family cannot call."""
        raise NotImplementedError

    @classmethod
    def _text_tokens(cls, folder: Path, max_sequence_length: int | None) -> int:
        """The rows of a prompt's sequence, told from configurations. Raises ValueError for a length out of range."""
        whose, most = cls._text_limit(folder, vars(read_config(folder, "transformer").config))
        if max_sequence_length is None:
            return min(_DEFAULT_TOKENS, most)
        if not 1 <= max_sequence_length <= most:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}; {whose} takes 1 to {most} {cls._text_words} tokens"
            )
        return max_sequence_length

    @abstractmethod
    def _embed(self, pipeline: Any, prompts: list[str], device: torch.device) -> TextEmbeds:
        """The pipeline's own embeddings on ``device``."""

    @property
    def _patch(self) -> int:
        return PATCH

    @property
    def _most_patches(self) -> int | None:
        """Patches along a side that the transformer has positions for; None where any number will do."""
        return None

    @property
    def _vae_factor(self) -> int:
        """Pixels that a latent stands for, along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _pixels(self, z: Tensor) -> Tensor:
        """Latents (B, C, H, W) float32 to pixels (B, 3, H', W') in [-1, 1]."""
        pixels: Tensor = self.vae.decode(
            z / self.vae.config.scaling_factor + self.vae.config.shift_factor, return_dict=False
        )[0]
        return pixels

    # --- the protocol ------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int | None = None
    ) -> Self:
        """Load the components of the family's pipeline folder; the VAE stays float32.

        ``max_sequence_length``: text tokens; None takes the family's default.  The text encoders wait for the first
        ``encode``.  Raises ValueError naming what is missing or damaged.
        """
        classes = cls._components(resolve_pipeline(path), max_sequence_length)
        folder = resolve_pipeline(path, [*classes, "scheduler"])
        cls.check_files(folder, dtype=dtype, max_sequence_length=max_sequence_length)
        schedule, tokens = cls._check(folder, max_sequence_length)

        import diffusers

        device = torch.device(device)
        transformer = load_transformer(cls._transformer_class(), folder, dtype)
        vae = load_component(getattr(diffusers, classes["vae"]), folder, "vae", torch_dtype=torch.float32)
        model = cls(str(path), transformer.to(device), vae.to(device), schedule, tokens, device, dtype)

        def pipeline(device: torch.device) -> Any:
            unused = dict.fromkeys(("scheduler", *cls._classes))
            parts = unused | {"transformer": transformer, "vae": vae} | _load_text(folder, classes, device, dtype)
            return getattr(diffusers, cls.pipeline_class)(**parts)

        model._text = TextEncoders(pipeline)
        return model

    @classmethod
    def check_files(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> None:
        """See ``DiffusionModel.check_files``."""
        check_present(folder, cls._components(folder, max_sequence_length), weights=True, dtype=dtype)

    @classmethod
    def meta(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> Self:
        """The model of a folder's configuration files.  Raises ValueError naming what is missing or damaged."""
        check_present(folder, cls._components(folder, max_sequence_length), weights=False)
        schedule, tokens = cls._check(folder, max_sequence_length)
        config = read_json(folder / "transformer" / "config.json")
        transformer = meta_network(cls._transformer_class(), config, f"component 'transformer' in {folder}")
        return cls(str(folder), transformer, read_config(folder, "vae"), schedule, tokens, torch.device("meta"), dtype)

    @classmethod
    def _check(cls, folder: Path, max_sequence_length: int | None) -> tuple[dict[str, Any], int]:
        """The scheduler's configuration and the number of text tokens, from files alone."""
        schedule = vars(read_config(folder, "scheduler").config)
        cls._check_schedule(folder, schedule)
        return schedule, cls._text_tokens(folder, max_sequence_length)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """The pipeline's own embeddings in the model's dtype, with ``text_tokens`` rows for each prompt.

        Raises ValueError for an empty list, RuntimeError after ``release_text_encoders``.
        """
        if not prompts:
            raise ValueError("encode() needs at least one prompt")
        assert self._text is not None  # a meta model has no weights
        device = self.text_device or self.device
        return self._embed(self._text.get(device), list(prompts), device).to(self.device, self.dtype)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents.

        Raises ValueError unless ``resolution`` is a multiple of VAE factor x patch size, and where the transformer has
        no positions for so many patches.
        """
        factor, patch, most = self._vae_factor, self._patch, self._most_patches
        size = latent_size(resolution, factor, patch)
        if most is not None and size // patch > most:
            raise ValueError(
                f"resolution {resolution} needs {size // patch} patches a side, the model's position table has "
                f"{most}; use at most {most * patch * factor}"
            )
        return int(self._config.in_channels) // (PATCH**2 if self._packs_latents else 1), size, size

    def own_resolution(self) -> int | None:
        """128 latents a side, as the pipelines of FLUX.1 and Qwen-Image take it."""
        return DEFAULT_SIZE * self._vae_factor

    def image_tokens(self, resolution: int) -> int:
        _, height, width = self.latent_shape(resolution)
        return height * width // self._patch**2

    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """The scheduler's levels; see ``flow_sigmas``."""
        return flow_sigmas(steps, self.image_tokens(resolution), self._schedule)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Through the float32 VAE, in chunks that bound its memory."""
        z = latents.to(self.device, torch.float32)
        return decode_in_chunks(z, self._pixels, self._vae_factor, self._decode_pixels)

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)  # type: ignore[arg-type]


def _load_text(folder: Path, classes: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The tokenizers, and the text encoders on ``device``."""
    import transformers

    parts: dict[str, Any] = {}
    for name in (name for name in classes if name.startswith(TEXT_FOLDERS)):
        kind = getattr(transformers, classes[name])
        if name.startswith("tokenizer"):
            parts[name] = load_component(kind, folder, name)
        else:
            parts[name] = load_component(kind, folder, name, dtype=dtype).to(device)
    return parts
