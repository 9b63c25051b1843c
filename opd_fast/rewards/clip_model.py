"""What the rewards with a CLIP share: its files, its pixels, its tokens, and the unit vectors that it makes of both."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.model_files import find_model

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels in 0..1: what CLIPProcessor and open_clip subtract and divide by, for all models named here."""

TOKENIZER_FILES = ("*.json", "*.txt")
TOKENIZER_NEEDS = ("tokenizer.json|vocab.json", "tokenizer.json|merges.txt")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""What is fetched, and what is read too where it is there."""
MODEL_FILES = (*TOKENIZER_FILES, _WEIGHTS[0])
_NEEDS = ("config.json", "|".join(_WEIGHTS), *TOKENIZER_NEEDS)
TEXTS = 4096
"""Texts whose vectors are kept. The oldest ones are dropped first."""


# --- pixels ----------------------------------------------------------------------------------------------------------


def processor_pixels(images: Tensor, side: int) -> Tensor:
    """Return images as CLIPProcessor hands them to a CLIP: 8-bit pixels, Pillow's cubic filter, a crop at the centre.

    The levels are those of Pillow, bit for bit (`pillow_resize`). An odd rest is cropped by one row or column less at
    the top or left.

    Args:
        images: (B, 3, H, W) float32 in 0..1.
        side: of the model's square images, in pixels.

    Returns:
        (B, 3, side, side) float32, normalised.
    """
    height, width = _shorter_to(side, images)
    levels = pillow_resize((images * 255).round().clamp(0, 255), height, width)
    return normalised(_crop(levels, (height - side) // 2, (width - side) // 2, side) / 255)


def pillow_resize(levels: Tensor, height: int, width: int) -> Tensor:
    """Return what Pillow's `resize` with the cubic filter makes of 8-bit images.

    Pillow changes the width first, then the height. It multiplies by weights of 22 binary places and rounds to whole
    levels each time (its src/libImaging/Resample.c). The products are exact in float64, in whatever order they are
    added. Since version 13 Pillow begins with the height for some tall images, which changes levels by one or two;
    published scores were computed before that.

    Args:
        levels: (..., H, W), whole numbers 0..255 of any dtype.
        height, width: of the result.

    Returns:
        (..., height, width) float32, whole numbers 0..255.
    """
    found = levels.double()
    if found.shape[-1] != width:
        found = _rounded(found @ _cubic_weights(found.shape[-1], width, str(found.device)).T)
    if found.shape[-2] != height:
        found = _rounded(_cubic_weights(found.shape[-2], height, str(found.device)) @ found)
    return found.float()


_PLACES = 2.0**22


def _rounded(sums: Tensor) -> Tensor:
    return (sums / _PLACES + 0.5).floor().clamp(0, 255)


@lru_cache(maxsize=32)
def _cubic_weights(inner: int, outer: int, device: str) -> Tensor:
    """Return Pillow's weights from `inner` pixels to `outer`, (outer, inner) float64, as whole multiples of 2^-22."""
    scale = inner / outer
    stretch = max(scale, 1.0)
    centre = (torch.arange(outer, dtype=torch.float64) + 0.5) * scale
    first = (centre - 2 * stretch + 0.5).trunc().clamp(min=0)
    last = (centre + 2 * stretch + 0.5).trunc().clamp(max=inner)
    pixel = torch.arange(inner, dtype=torch.float64)
    x = ((pixel - centre[:, None] + 0.5) / stretch).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)  # the cubic of a = -0.5
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((pixel >= first[:, None]) & (pixel < last[:, None]))
    weights = weights / weights.sum(1, keepdim=True) * _PLACES
    return (weights + 0.5 * weights.sign()).trunc().to(device)


def float_pixels(images: Tensor, side: int) -> Tensor:
    """Return images as torchvision's Resize, CenterCrop and Normalize make them of float tensors, by their defaults.

    The filter is linear and antialiased, and nothing is rounded. An odd rest is halved to the even number.

    Args:
        images: (B, 3, H, W) float32 in 0..1.
        side: of the model's square images, in pixels.

    Returns:
        (B, 3, side, side) float32, normalised.
    """
    height, width = _shorter_to(side, images)
    resized = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return normalised(_crop(resized, round((height - side) / 2), round((width - side) / 2), side))


def normalised(images: Tensor) -> Tensor:
    """Return (images - MEAN) / STD for images (B, 3, H, W) in 0..1."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _shorter_to(side: int, images: Tensor) -> tuple[int, int]:
    """Return the height and width at which the shorter edge is `side`; the longer one is cut to whole pixels."""
    height, width = images.shape[2:]
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def _crop(images: Tensor, top: int, left: int, side: int) -> Tensor:
    return images[:, :, top : top + side, left : left + side]


# --- the model -------------------------------------------------------------------------------------------------------


class Clip:
    """A CLIP and its tokenizer on one device.

    Args:
        model: transformers' CLIPModel in float32.
        tokenizer: transformers' CLIPTokenizer.
        device, dtype: of the model from here on.
        clean: what is done to a text before the tokenizer sees it.

    Attributes:
        side: of its square images, in pixels.
        width: of its vectors.
        scale: exp(logit_scale), read before the weights are rounded to `dtype`: bfloat16 would move it by a percent.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        device: torch.device,
        dtype: torch.dtype,
        clean: Callable[[str], str] = str,
    ) -> None:
        self.side: int = model.config.vision_config.image_size
        self.width: int = model.config.projection_dim
        self.scale = float(model.logit_scale.detach().exp())
        self.dtype = dtype
        self._device = device
        self._model = model.eval().requires_grad_(False).to(device, dtype)
        self._tokenizer, self._clean = tokenizer, clean
        self._length: int = model.config.text_config.max_position_embeddings
        self._texts: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """Return the unit vectors (B, width) float32 of normalised pixels (B, 3, side, side)."""
        return _unit(features(self._model.get_image_features(pixel_values=pixels.to(self.dtype))))

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, width) float32 of texts; a text that came before is not encoded again."""
        with self._lock:
            missing = list(dict.fromkeys(text for text in texts if text not in self._texts))
            if missing:
                ids = self.token_ids(missing).to(self._device)
                vectors = _unit(features(self._model.get_text_features(input_ids=ids)))
                self._texts.update(zip(missing, vectors, strict=True))
            found = torch.stack([self._texts[text] for text in texts])
            while len(self._texts) > TEXTS:
                del self._texts[next(iter(self._texts))]
        return found

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens (B, L) int64, cut and padded to the model's L, 77.

        A long text loses its end but keeps the token that ends it, where the features are read. The attention is
        causal: what fills the rest, and whether a mask hides it, does not touch them.
        """
        cleaned = [self._clean(text) for text in texts]
        tokens = self._tokenizer(
            cleaned, padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        ids: Tensor = tokens["input_ids"]
        return ids

    def cosines(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the cosine (B,) float32 between each image and its own text; pixels as for `image_vectors`."""
        return (self.image_vectors(pixels) * self.text_vectors(texts)).sum(1)


def features(output: Any) -> Tensor:
    """Return the projected features (B, width) of CLIPModel.get_image_features or get_text_features.

    transformers 5 returns an object that has them as `pooler_output`, or a tuple where a configuration asks for tuples;
    transformers 4 returns the tensor.
    """
    found = output if isinstance(output, Tensor) else output[1] if isinstance(output, tuple) else output.pooler_output
    assert isinstance(found, Tensor)
    return found


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True)


# --- loading ---------------------------------------------------------------------------------------------------------

_LOADED: WeakValueDictionary[tuple[Any, ...], Clip] = WeakValueDictionary()
"""Models in use: rewards with the same one share it."""
_LOADING = threading.Lock()


def load_clip(key: str, name: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """Load the CLIP that the setting `reward_models.{key}` names.

    Args:
        key: the setting, for messages.
        name: a folder in transformers' format, or such a repository of the hub (`find_model`).
        device, dtype: of the model.

    Raises:
        UserError: it cannot be found or read, or it is not a CLIP.
    """
    folder = find_model(key, name, patterns=MODEL_FILES, needs=_NEEDS)
    assert folder is not None
    _check_folder(key, folder)
    with _LOADING:
        place = (str(folder.resolve()), device, dtype)
        if (clip := _LOADED.get(place)) is None:
            model = _build_model(key, str(folder), folder)
            clip = Clip(model, load_tokenizer(key, folder, model.config.text_config.vocab_size), device, dtype)
            _LOADED[place] = clip
    return clip


def check_clip(key: str, name: str) -> None:
    """Raise UserError where the CLIP named by `reward_models.{key}` is on this machine and lacks a file."""
    if (folder := find_model(key, name, fetch=False, patterns=MODEL_FILES, needs=_NEEDS)) is not None:
        _check_folder(key, folder)


def build_clip(key: str, source: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a CLIPModel of transformers with the given weights, float32 on the CPU.

    Args:
        key: the setting that the weights come from, for messages.
        source: their file, for messages.
        config: a CLIPConfig.
        state: the weights by transformers' names.

    Raises:
        UserError: a weight is missing, has another shape, or is none of the model's.
    """
    return _build_model(key, source, None, config=config, state_dict=dict(state))


def _build_model(key: str, source: str, folder: Path | None, **given: Any) -> Any:
    from transformers import CLIPModel

    try:
        model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **given)
    except Exception as error:  # OSError, SafetensorError, RuntimeError: the libraries share no base
        problem = f"{source} cannot be loaded ({short(one_line(error), 300)})"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key)) from error
    # transformers fills what is missing with random numbers and goes on.
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[what]):
            problem = f"{source} is not a whole CLIP: {what.replace('_', ' ')} {', '.join(names[:3])}"
            raise UserError(f"reward_models.{key}", problem, fetch_again(key))
    return model


def load_tokenizer(key: str, folder: Path, tokens: int) -> Any:
    """Return the CLIPTokenizer of a folder, for a model with a vocabulary of `tokens`. Raises UserError."""
    from transformers import CLIPTokenizer

    check_tokenizer(key, folder)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # of tokenizers, which raises Exception itself
        problem = f"the tokenizer in {folder} cannot be loaded ({short(one_line(error), 300)})"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key)) from error
    if len(tokenizer) != tokens:
        problem = f"the tokenizer in {folder} has {len(tokenizer)} tokens, and the model {tokens}"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key))
    return tokenizer


def _check_folder(key: str, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{folder} has no config.json of a transformers model ({short(one_line(error), 200)})"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key)) from error
    if kind != "clip":
        raise UserError(f"reward_models.{key}", f"{folder} holds a model of type {kind}, not clip", fetch_again(key))
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise UserError(f"reward_models.{key}", f"{folder} has no model.safetensors", fetch_again(key))
    check_tokenizer(key, folder)


def check_tokenizer(key: str, folder: Path) -> None:
    """Raise UserError where a folder has no CLIP tokenizer: transformers would make one of three tokens."""
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        problem = f"{folder} has no tokenizer (vocab.json and merges.txt, or tokenizer.json)"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key))


def read_state(key: str, file: Path) -> dict[str, Tensor]:
    """Return the weights in a file of torch or safetensors, by name, on the CPU.

    A `state_dict` inside the file is taken for the whole, and `module.` is cut from names. Raises UserError, which
    names the setting `reward_models.{key}`, for what is damaged or holds anything but weights.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zip files, safetensors and the disk
        problem = f"{file} cannot be read ({short(one_line(error), 200)})"
        raise UserError(f"reward_models.{key}", problem, fetch_again(key)) from error
    if isinstance(loaded, Mapping):
        loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"reward_models.{key}", f"{file} holds no weights by name", fetch_again(key))
    return {str(name).removeprefix("module."): value for name, value in loaded.items()}


def fetch_again(key: str) -> str:
    """Return the remedy for weights that cannot be used: how the published ones are had."""
    owner, repo, *inside = getattr(RewardModelsConfig(), key).split("/")
    what = "the path of that file" if inside else "the path of such a folder"
    return f"run: hf download {' '.join([f'{owner}/{repo}', *inside])}, or give {what}"
