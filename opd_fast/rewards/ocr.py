"""The reward `ocr`: an OCR engine reads the image, and what it reads is compared with the text that the prompt quotes.

It is the reward of Flow-GRPO (arXiv 2505.05470, flow_grpo/ocr.py) and of DiffusionOPD's table. All strings are joined
in reading order. Spaces are removed and letters are lower-cased, in the target too. An image that contains the target
earns 1, any other 1 - min(edit distance, n) / n, where n is the target's length.

The target is `metadata["target"]`. A prompt without one has its first piece in double quotes as the target, as in the
published code; in a line of text that quotes one piece the two are the same.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError, one_line, short
from opd_fast.rewards.edit_distance import closeness
from opd_fast.rewards.model_reward import ModelReward
from opd_fast.rewards.ocr_engines import Engine, Pixels, check_paddleocr, paddleocr, probe, rapidocr, readers


def prompt_fault(prompt: Prompt) -> str | None:
    """Return why the reward cannot judge a prompt, or None: it needs a target of at least one visible character."""
    target = _target(prompt)
    if target is None:
        return "has no target; put the words that the image must show in double quotes, or add the key or column target"
    if not isinstance(target, str) or not target.strip():
        return f"has the target {target!r}; give the words that the image must show"
    return None


def _target(prompt: Prompt) -> Any:
    if "target" in prompt.metadata:
        return prompt.metadata["target"]
    pieces = prompt.text.split('"')
    return pieces[1] if len(pieces) > 2 else None


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


def similarity(strings: Sequence[tuple[str, float]], target: str) -> float:
    """Return the reward of an image, in 0..1.

    Args:
        strings: what an engine read, in reading order, each with its confidence; those without confidence do not count.
        target: the words that the image must show.
    """
    found = _plain("".join(text for text, confidence in strings if confidence > 0))
    wanted = _plain(target)
    return 1.0 if wanted in found else closeness(found, wanted)


class Ocr(ModelReward):
    """The published OCR reward with RapidOCR, or with PaddleOCR where `reward_models.ocr` says so; both use the CPU.

    An image on which the engine fails earns 0, as published, and a warning names the error. Where the engine then fails
    on `ocr_engines.probe` too, it is broken and its error is passed on. Several images are read at a time, in threads.
    """

    packages: ClassVar[dict[str, str]] = {"rapidocr": "ocr", "onnxruntime": "ocr"}

    def check(self) -> None:
        if self.models.ocr == "paddleocr":
            check_paddleocr()
        else:
            super().check()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the engines, one for each reader, and let each read a word. `device` and `dtype` do not matter.

        Raises UserError where an engine does not start or cannot read.
        """
        # PaddleOCR has threads of its own.
        engines = [paddleocr()] if self.models.ocr == "paddleocr" else [rapidocr() for _ in range(readers())]
        for engine in engines:
            try:
                engine(probe())
            except Exception as error:
                problem = f"{self.models.ocr} cannot read ({type(error).__name__}: {one_line(error)})"
                raise UserError("reward_models.ocr", problem, "install it anew, or take the other engine") from error
        self._engines = engines

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return the similarity of what stands in each image to its target, (b,) float32 in 0..1.

        Raises UserError for a prompt without a target.
        """
        for prompt in prompts:
            if (fault := prompt_fault(prompt)) is not None:
                problem, _, remedy = fault.partition("; ")
                raise UserError(prompt.where or repr(prompt.text), problem, remedy)
        pixels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        values = [
            0.0 if strings is None else similarity(strings, _target(prompt))
            for strings, prompt in zip(self._read(list(pixels)), prompts, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float32)

    def identity(self) -> dict[str, Any]:
        try:
            version = importlib.metadata.version(self.models.ocr)
        except importlib.metadata.PackageNotFoundError:
            version = None
        return {"ocr": self.models.ocr, "version": version}  # a version has its own models

    def _read(self, images: list[Pixels]) -> list[list[tuple[str, float]] | None]:
        """Return what stands in each image; None where the engine failed. The engines take the images in turns."""
        found: list[list[tuple[str, float]] | None] = [None] * len(images)
        errors: list[BaseException] = []
        turns = itertools.count()

        def work(engine: Engine) -> None:
            try:
                while not errors and (turn := next(turns)) < len(images):
                    found[turn] = _strings(engine, images[turn])
            except BaseException as error:
                errors.append(error)

        # Threads of a pool would keep the process alive where an engine hangs.
        engines = self._engines[: len(images)]
        threads = [threading.Thread(target=work, args=(engine,), name="ocr", daemon=True) for engine in engines[1:]]
        for thread in threads:
            thread.start()
        work(engines[0])
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found


def _strings(engine: Engine, pixels: Pixels) -> list[tuple[str, float]] | None:
    try:
        return engine(pixels)
    except Exception as error:
        engine(probe())
        warnings.warn(f"the OCR engine failed on an image, which earns 0: {short(one_line(error), 200)}", stacklevel=2)
        return None
