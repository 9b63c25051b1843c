"""What a model family provides: its frozen parts, its noise levels, and its velocity v(x, sigma, text)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from opd_fast.errors import UserError
from opd_fast.models.techniques import AttentionSite, Modulation, dispatched_attentions, token_layers
from opd_fast.models.text import TextEmbeds, TextEncoders

ASSETS = Path(__file__).resolve().parent.parent / "assets"
TEXT_FOLDERS = ("text_encoder", "tokenizer")


class DiffusionModel(ABC):
    """One model family's frozen components.  Subclasses are listed in ``opd_fast.models.FAMILIES``.

    ``load`` makes a whole model.  ``meta`` makes one from configuration files alone, its transformer on the meta
    device: it answers everything about shapes, levels and names, and nothing that needs weights.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]  # diffusers' pipeline class, as model_index.json names it
    lora_targets: ClassVar[dict[str, list[str]]]  # named sets of LoRA target modules (suffixes of module names)
    # cfg: two branches, v = uncond + g * (cond - uncond).  embedded: g is an input of the transformer, one branch.
    # none: the model has no guidance, g is 1.  Checkpoints of a family may differ: FLUX.1 sets it on the instance.
    guidance_kind: ClassVar[Literal["cfg", "embedded", "none"]]
    # What a guidance setting is the value of: this argument of the pipeline, and the value that makes no negative pass.
    guidance_argument: ClassVar[str] = "guidance_scale"
    unguided: ClassVar[float] = 1.0
    rescales_guidance: ClassVar[bool] = False  # whether the pipeline rescales a guided velocity: ``rescale_guided``
    guidance_convention: Literal["pipeline", "linear"] = "pipeline"  # model.guidance_convention, set when it is loaded

    masks_text: ClassVar[bool] = False  # whether attention has a mask over padded text

    path: str  # what the user named
    folder: Path | None = None  # the pipeline's folder on this machine; None for a model that has none
    transformer: nn.Module  # the base, in eval mode, requires_grad False
    vae: Any  # diffusers' autoencoder, float32
    device: torch.device
    dtype: torch.dtype
    text_tokens: int  # rows of a prompt's sequence
    _text: TextEncoders | None = None  # where ``encode`` finds them, unless the family keeps them elsewhere
    text_device: torch.device | None = None  # of the text encoders, set before the first encode(); None: as device

    @classmethod
    @abstractmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str, dtype: torch.dtype, max_sequence_length: int | None = None
    ) -> Self:
        """Load the frozen components from a diffusers pipeline folder (or a hub id)."""

    @classmethod
    @abstractmethod
    def meta(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> Self:
        """The model of a pipeline folder's configuration files, without weights."""

    @classmethod  # noqa: B027 - a family may know of no files
    def check_files(cls, folder: Path, *, dtype: torch.dtype, max_sequence_length: int | None = None) -> None:
        """Raise ValueError for weights in a local folder that ``load`` would refuse, told from configurations and the
        files' headers.  A family that does not say so refuses none before it loads them.
        """

    @abstractmethod
    def encode(self, prompts: list[str]) -> TextEmbeds:
        """Embed the prompts in one call, without gradient, onto ``device``; the caller chooses the batch.

        The text encoders are loaded at the first call (``TextEncoders``), onto ``text_device``.
        """

    def text_folders(self) -> list[Path]:
        """The folders that the text encoders and tokenizers are loaded from; what is in them decides what ``encode``
        returns.  Empty for a model that keeps them elsewhere: its embeddings are not kept on disk.
        """
        if self.folder is None:
            return []
        return sorted(p for p in self.folder.iterdir() if p.is_dir() and p.name.startswith(TEXT_FOLDERS))

    def release_text_encoders(self) -> None:
        """Free the text encoders; ``encode`` raises from then on."""
        if self._text is not None:
            self._text.release()

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image of ``resolution`` pixels.  Raises ValueError if it does not divide."""

    def own_resolution(self) -> int | None:
        """Pixels along the side of the images that the pipeline makes by default; None where it states none."""
        return None

    def resolution(self, pixels: int | None) -> int:
        """``pixels``, or the pipeline's own resolution for None.  Raises ValueError where it states none."""
        found = self.own_resolution() if pixels is None else pixels
        if found is None:
            raise UserError("model.resolution", f"a {self.name} model does not state its own", "give it in pixels")
        return found

    @abstractmethod
    def image_tokens(self, resolution: int) -> int:
        """Tokens that the transformer makes of such an image."""

    @abstractmethod
    def sigmas(self, steps: int, resolution: int) -> Tensor:
        """The model's own noise levels, (steps+1,) float64 on the CPU, from its scheduler's configuration."""

    @abstractmethod
    def velocity(
        self, transformer: nn.Module, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float = 1.0
    ) -> Tensor:
        """v(x, sigma, text) by ``transformer`` (the base, a student, a teacher).

        x (B, C, H, W) float32; sigma (B,) or 0-dim, float32, on x's device; text B rows; ``guidance`` is read by
        families whose ``guidance_kind`` is "embedded" alone.  Returns (B, C, H, W) in the model's dtype.
        """

    def strength(self, guidance: float | None) -> float:
        """The number that the engine computes with for a guidance setting; None is unguided.

        Classifier-free guidance: g of v = u + g (c - u).  Under the convention "pipeline" it is what makes the
        pipeline's own formula of ``guidance``, g = 1 (the prompt's branch alone) up to its unguided value; under
        "linear" it is ``guidance`` itself.  Guidance that is an input of the transformer: that input.

        Raises ValueError for a guidance that is negative or not finite, and for any of a model that has none.
        """
        if guidance is None:
            return 1.0
        if not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance {guidance} is not a finite number of at least 0; give one")
        if self.guidance_kind == "none":
            # 0 is what the pipelines of such models are published with; they do not read it.
            if guidance not in (0.0, 1.0):
                raise ValueError(f"guidance {guidance} with family {self.name!r}, which has none; give 1")
            return 1.0
        if self.guidance_kind == "embedded" or self.guidance_convention == "linear":
            return float(guidance)
        return max(guidance + (1.0 - self.unguided), 1.0)

    @property
    def guidance_meaning(self) -> str:
        """What a guidance setting is the value of, in words."""
        if self.guidance_kind == "none":
            return "none, the model has no guidance"
        if self.guidance_kind == "cfg" and self.guidance_convention == "linear":
            return "g of v = u + g (c - u), 1 is unguided"
        unguided = f", {self.unguided:g} is unguided" if self.guidance_kind == "cfg" else ""
        return f"{self.guidance_argument} of {self.pipeline_class}{unguided}"

    def is_guided(self, guidance: float | None) -> bool:
        """Whether a guidance setting asks for the negative prompt's branch beside the prompt's."""
        return self.guidance_kind == "cfg" and self.strength(guidance) != 1.0

    def rescale_guided(self, guided: Tensor, cond: Tensor) -> Tensor:
        """What the pipeline makes of the guided velocity; of families whose ``rescales_guidance`` is True alone.

        guided, cond (B, C, H, W) float32: u + g (c - u), and c.  Returns (B, C, H, W) float32, with autograd to both.
        """
        raise NotImplementedError(f"family {self.name!r} sets rescales_guidance and defines no rescale_guided")

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H', W') float32 in [0, 1], without gradient."""

    @abstractmethod
    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The repeated blocks of ``transformer``, the unit to compile and to shard."""

    # --- what the engine's techniques ask; each has an answer that serves most transformers of diffusers --------------

    def attentions(self, transformer: nn.Module) -> list[AttentionSite]:
        """The attentions of ``transformer`` whose backend can be set, and the projections of each that can be fused.

        By default those whose processor goes through diffusers' dispatcher, without fusing.
        """
        return dispatched_attentions(transformer)

    def modulation(self, transformer: nn.Module) -> Modulation | None:
        """What in ``transformer`` depends on noise level, prompt and guidance alone; None: nothing is cached."""
        return None

    def token_layers(self, transformer: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers, by name, that work on the tokens of the repeated blocks: those that float8 pays for.

        A layer that works on a sample's embedding has too few rows, and every token feels its error.
        """
        return token_layers(transformer)

    def targets(self, name: str | Sequence[str]) -> list[str]:
        """LoRA target modules by the name of a set, or the given list itself.  Raises ValueError for an unknown set."""
        if not isinstance(name, str):
            return list(name)
        if name not in self.lora_targets:
            example = next(iter(self.lora_targets.values()))[0]
            raise ValueError(
                f"student.targets: unknown set {name!r} for family {self.name!r}; choose one of "
                f"{', '.join(self.lora_targets)}, or list module names such as {example}"
            )
        return list(self.lora_targets[name])
