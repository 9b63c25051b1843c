"""What a model family provides: its frozen parts, its noise levels, and its velocity v(x, sigma, text)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from opd_fast.device import to_device
from opd_fast.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class TextEmbeds:
    """Text conditioning, one row per prompt, on one device."""

    sequence: Tensor
    """(B, L, D), padded to one length."""
    pooled: Tensor | None = None
    """(B, P), of the sequence's dtype; None where the family has no pooled vector."""
    mask: Tensor | None = None
    """(B, L) bool, True at the prompt's own tokens; None where every token counts."""

    def __len__(self) -> int:
        return self.sequence.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        named = {"sequence": self.sequence, "pooled": self.pooled, "mask": self.mask}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> TextEmbeds:
        return TextEmbeds(**{name: change(tensor) for name, tensor in self.tensors.items()})

    def index(self, idx: Tensor | Sequence[int] | slice) -> TextEmbeds:
        """The chosen rows: a view for a slice, a gather for indices (a list, or an int64 tensor on any device)."""
        if isinstance(idx, slice):
            return self._map(lambda tensor: tensor[idx])
        rows = to_device(torch.as_tensor(idx, dtype=torch.int64), self.sequence.device)
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeds:
        """On another device, or the floating-point tensors in another dtype."""
        return self._map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def expand(self, n: int) -> TextEmbeds:
        """A single row seen as ``n`` rows, without copying."""
        if len(self) != 1:
            raise ValueError(f"only a single row can be expanded, this has {len(self)}")
        return self._map(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[TextEmbeds]) -> TextEmbeds:
        names = parts[0].tensors
        return TextEmbeds(**{name: torch.cat([part.tensors[name] for part in parts]) for name in names})


class TextEncoders:
    """What ``encode`` needs, loaded when it is first asked for: where every embedding is kept on disk, never."""

    def __init__(self, load: Callable[[torch.device], Any]) -> None:
        """``load(device)``: the family's assembled pipeline, its text encoders on ``device``."""
        self._load: Callable[[torch.device], Any] | None = load
        self._loaded: Any = None

    def get(self, device: torch.device) -> Any:
        """The pipeline; the first call decides the device.  Raises RuntimeError after ``release``."""
        if self._load is None:
            raise RuntimeError("the text encoders were released; encode every prompt before release_text_encoders()")
        if self._loaded is None:
            self._loaded = self._load(device)
        return self._loaded

    def release(self) -> None:
        self._load = self._loaded = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
    transformer: nn.Module  # the base, in eval mode, requires_grad False
    vae: Any  # diffusers' autoencoder, float32
    device: torch.device
    dtype: torch.dtype
    text_tokens: int  # rows of a prompt's sequence
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
        from opd_fast.models.pipeline_folder import resolve_pipeline

        try:
            folder = resolve_pipeline(self.path)
        except ValueError:  # a family from elsewhere may have no pipeline folder
            return []
        return sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(("text_encoder", "tokenizer")))

    @abstractmethod
    def release_text_encoders(self) -> None:
        """Free the text encoders; ``encode`` raises from then on."""

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

    def save_lora(
        self,
        directory: str | Path,
        tensors: dict[str, tuple[Tensor, Tensor]],
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
    ) -> None:
        """Write a LoRA of this model for PEFT and for diffusers; see ``opd_fast.models.lora.files.save_lora``."""
        from opd_fast.models.lora.files import save_lora

        save_lora(directory, tensors, rank=rank, alpha=alpha, targets=targets, base_model=self.path)
