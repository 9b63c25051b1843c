"""The OCR engines of the reward `ocr`: RapidOCR, whose models lie in its wheel, and the published PaddleOCR 2.9."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from opd_fast.errors import UserError, one_line
from opd_fast.worlds.shapes import glyph

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
"""One image, (H, W, 3) uint8, RGB."""
Engine = Callable[[Pixels], list[tuple[str, float]]]
"""Returns the strings of an image in reading order, each with the engine's confidence in 0..1."""

PADDLE = 'pip install "paddleocr==2.9.1" paddlepaddle, or set reward_models.ocr to rapidocr'

RAPID: dict[str, Any] = {
    "Global.log_level": "critical",
    "Global.use_cls": False,
    "Global.text_score": 0.5,
    "Det.limit_type": "max",
    "Det.limit_side_len": 960,
    "Det.thresh": 0.3,
    "Det.box_thresh": 0.6,
    "Det.unclip_ratio": 1.5,
    "Det.use_dilation": False,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}
"""PaddleOCR 2.9's own settings in RapidOCR's words: no classifier of angles, strings from a confidence of 0.5, and a
detector that sees the image in its own size up to 960 pixels. RapidOCR's default enlarges images to 736 pixels, which
takes twice the time at 512 and reads more only at 128 pixels and less. One thread each: readers work side by side."""


def rapidocr() -> Engine:
    """Return a RapidOCR reader with its models for onnxruntime, which runs on one CPU core.

    Raises UserError where the package does not load.
    """
    try:
        from rapidocr import RapidOCR

        engine: Any = RapidOCR(params=RAPID)
    except Exception as error:  # a system library may be missing too
        raise UserError(
            "rapidocr", f"does not start ({type(error).__name__}: {one_line(error)})", 'pip install "opd_fast[ocr]"'
        ) from error

    def read(pixels: Pixels) -> list[tuple[str, float]]:
        found = engine(np.ascontiguousarray(pixels[..., ::-1]))  # it takes arrays as BGR
        return list(zip(found.txts or (), found.scores or (), strict=True))

    return read


def check_paddleocr() -> None:
    """Raise UserError where PaddleOCR 2 or PaddlePaddle is missing; neither is imported."""
    for package in ("paddleocr", "paddle"):
        if importlib.util.find_spec(package) is None:
            raise UserError(package, "is not installed", PADDLE)
    try:
        version = importlib.metadata.version("paddleocr")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return
    if version.partition(".")[0] != "2":
        raise UserError("paddleocr", f"is version {version}, whose models and interface are not those of 2.9", PADDLE)


def paddleocr() -> Engine:
    """Return the reader of the published reward: PaddleOCR 2.9 for English on the CPU, without angles.

    Its first start fetches its models to ~/.paddleocr. Raises UserError where it does not start.
    """
    try:
        from paddleocr import PaddleOCR

        engine = PaddleOCR(use_angle_cls=False, lang="en", use_gpu=False, show_log=False)
    except (Exception, SystemExit) as error:  # it exits where a download fails
        raise UserError(
            "paddleocr",
            f"does not start ({type(error).__name__}: {one_line(error)})",
            "let it fetch its models once (to ~/.paddleocr), or set reward_models.ocr to rapidocr",
        ) from error

    def read(pixels: Pixels) -> list[tuple[str, float]]:
        lines = engine.ocr(pixels, cls=False)[0] or []  # RGB, as the published code gives it
        return [(text, confidence) for _, (text, confidence) in lines]

    return read


def probe() -> Pixels:
    """Return an image on which an engine that works uses all its models: HOTEL in white on black, (84, 248, 3)."""
    word = np.concatenate([np.kron(np.pad(glyph(letter), 1), np.ones((4, 4), bool)) for letter in "HOTEL"], axis=1)
    return np.repeat((np.pad(word, (10, 4)) * np.uint8(255))[..., None], 3, axis=2)


def readers() -> int:
    """Return how many one-core readers a process runs: half of its share of the machine's cores, at least 1, at most 8.

    The other half is left to the run, which draws the next images meanwhile.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 2))
