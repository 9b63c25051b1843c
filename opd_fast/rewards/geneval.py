"""The rewards `geneval`, `geneval_strict` and `geneval_accuracy`: GenEval's judgement of images against their records.

`geneval` is the partial score, which RL trains on; `geneval_accuracy` is the benchmark's number; `geneval_strict` wants
every count exactly (`geneval_rules.py`). The three come from one look at an image, by the detector in this process
(`geneval_detector.py`, `geneval_colours.py`) or by a server (`geneval_server.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards.clip_model import check_clip, load_clip
from opd_fast.rewards.geneval_colours import ColourNamer
from opd_fast.rewards.geneval_detector import Detector, check_detector, find_detector
from opd_fast.rewards.geneval_rules import Judgement, colours_asked, judge, kept_objects, record_fault
from opd_fast.rewards.geneval_server import BATCH, GenEvalServer
from opd_fast.rewards.model_reward import ModelReward

REMEMBERED = 16_384
"""Judgements that are kept, some 200 bytes each: more than an evaluation judges between two rewards."""


def metadata_fault(metadata: dict[str, Any]) -> str | None:
    """Return why the rewards cannot judge a prompt, or None (`geneval_rules.record_fault`)."""
    return record_fault(metadata)


class Judge:
    """Judges images for all of GenEval's rewards, each image and record once.

    What was judged is found again by the content of the pixels and of the record, so rewards that are asked for the
    same images one after the other, or at the same time, cost one detection.

    Args:
        models: where the models or the server are.
    """

    def __init__(self, models: RewardModelsConfig) -> None:
        self.models = models
        self.lock = threading.Lock()
        self.detected = 0
        """Images that were looked at, for tests and reports."""
        self._known: OrderedDict[bytes, Judgement] = OrderedDict()
        self._server: GenEvalServer | None = None
        self._detector: Detector | None = None
        self._colours: ColourNamer | None = None
        self._loaded: tuple[torch.device, torch.dtype] | None = None

    def check(self) -> None:
        """Find what is missing. Raises UserError."""
        if self.models.geneval_server is not None:
            self._connect(self.models.geneval_server)
            return
        check_detector(self.models.detector)
        check_clip("clip", self.models.clip)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the models, or name the server; what is loaded for the same device stays. Raises UserError.

        The detector computes in float32 unless `reward_models.dtype` names a type: its scores meet thresholds, and the
        published ones are float32's. CLIP takes `dtype`.
        """
        with self.lock:
            if self._loaded == (device, dtype):
                return
            self._known.clear()
            if (address := self.models.geneval_server) is not None:
                self._server = self._connect(address)
            else:
                exact = torch.float32 if self.models.dtype == "auto" else dtype
                self._detector = Detector.load(find_detector(self.models.detector), device, exact)
                clip = load_clip("clip", self.models.clip, device, dtype)
                self._colours = ColourNamer(clip, device, self.models.batch)
            self._loaded = device, dtype

    def _connect(self, address: str) -> GenEvalServer:
        return GenEvalServer(address, self.models.requests, self.models.retries, self.models.request_timeout)

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Judgement]:
        """Judge images (B, 3, H, W) float in 0..1 against the records in the prompts' metadata.

        Raises:
            UserError: a prompt has no record that GenEval can judge, or the server gave no judgement.
        """
        pixels = to_pixels(images)
        array = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())
        records = [_record(prompt) for prompt in prompts]
        keys = [_key(image, record) for image, record in zip(array, records, strict=True)]
        with self.lock:
            new = {key: index for index, key in enumerate(keys) if key not in self._known}
            if new:
                picked = list(new.values())
                found = self._look(pixels[picked], array[picked], [records[index] for index in picked])
                self._known.update(zip(new, found, strict=True))
            judgements = [self._known[key] for key in keys]
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return judgements

    def _look(
        self, pixels: Tensor, array: np.ndarray[Any, Any], records: Sequence[Mapping[str, Any]]
    ) -> list[Judgement]:
        """Judge images that are not known: the same pixels as (B, 3, H, W) uint8 and as (B, H, W, 3) uint8."""
        self.detected += len(array)
        if self._server is not None:
            return self._server.judge(array, records)
        assert self._detector is not None
        assert self._colours is not None
        kept = [kept_objects(f, r) for f, r in zip(self._detector.detect(pixels), records, strict=True)]
        asked = [
            (index, name, instance)
            for index, (objects, record) in enumerate(zip(kept, records, strict=True))
            for name, count in colours_asked(objects, record).items()
            for instance in objects[name][:count]
        ]
        named = self._colours.name([(array[index], name, instance) for index, name, instance in asked])
        colours: list[dict[str, list[str]]] = [{} for _ in kept]
        for (index, name, _), colour in zip(asked, named, strict=True):
            colours[index].setdefault(name, []).append(colour)
        return [judge(*all_three) for all_three in zip(kept, colours, records, strict=True)]


_JUDGES: dict[tuple[Any, ...], Judge] = {}
_JUDGES_LOCK = threading.Lock()


def judge_of(models: RewardModelsConfig) -> Judge:
    """Return the process's judge for these settings."""
    with _JUDGES_LOCK:
        return _JUDGES.setdefault(dataclasses.astuple(models), Judge(models))


class GenEval(ModelReward):
    """The partial score, at most 1: what Flow-GRPO, DiffusionNFT and their kin train on."""

    part: ClassVar[Literal["partial", "strict", "accuracy"]] = "partial"

    def __init__(self, models: RewardModelsConfig) -> None:
        self.judge = judge_of(models)
        if models.geneval_server is not None:
            # The server gets 64 images a request, several requests at once, instead of a model's batch at a time.
            models = dataclasses.replace(models, batch=BATCH * models.requests)
        super().__init__(models)

    def check(self) -> None:
        """Find what is missing. Raises UserError."""
        super().check()
        self.judge.check()

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load detector and CLIP, once for all three rewards. Raises UserError."""
        self.judge.load(device, dtype)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Return one part of the judgements, (b,) float32."""
        return torch.tensor([getattr(judgement, self.part) for judgement in self.judge.judge(images, prompts)])

    def identity(self) -> dict[str, Any]:
        """Return the server, or the two models."""
        if self.models.geneval_server is not None:
            return {"geneval_server": self.models.geneval_server}
        return {"detector": self.models.detector, "clip": self.models.clip}


class GenEvalStrict(GenEval):
    """1 where every clause holds with exactly the count asked for, else 0."""

    part = "strict"


class GenEvalAccuracy(GenEval):
    """1 where the benchmark calls the image correct, else 0: what is compared between papers, as a mean over tags."""

    part = "accuracy"


def to_pixels(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) in 0..1 as uint8, rounded as the published clients round; NaN becomes 0."""
    return (images.float() * 255).round().nan_to_num(0).clamp(0, 255).to(torch.uint8)


def _record(prompt: Prompt) -> dict[str, Any]:
    if (fault := record_fault(prompt.metadata)) is not None:
        problem, _, remedy = fault.partition("; ")
        raise UserError(prompt.where or repr(prompt.text), problem, remedy)
    return {**prompt.metadata, "prompt": prompt.text}


def _key(image: np.ndarray[Any, Any], record: Mapping[str, Any]) -> bytes:
    """Return a digest of the pixels and of what is read of the record."""
    read = [record.get("tag") == "counting", record["include"], record.get("exclude", [])]
    text = json.dumps([image.shape, read], sort_keys=True)
    return hashlib.blake2b(image.tobytes(), person=b"geneval", key=hashlib.blake2b(text.encode()).digest()).digest()
