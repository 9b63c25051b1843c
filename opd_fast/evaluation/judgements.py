"""The judgements of one model on one task: a folder that survives an interruption at any image.

identity.json       what the images and the values follow from
scores*.jsonl       a line for each judged image, {"index": n, "scores": {REWARD: value}}; one file a process
drawn/*.safetensors images that have been drawn and still lack a value
thumbs/NNNNNN.*     a small picture of each judged image, for the report
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_fast.files import put_in_place, replace_text, replacing
from opd_fast.reporting.image_grid import to_picture

THUMB = 192
"""Pixels of a thumbnail's longer side; a smaller image is kept as it is."""


class Judgements:
    """What has been judged of one model's images of one task.

    Args:
        folder: where it is kept.
        images: hash of what the images follow from.
        rewards: reward to hash of what its values follow from.
        count: images of the task.
        rank: of this process, which writes files of its own.
    """

    def __init__(self, folder: Path, images: str, rewards: dict[str, str], count: int, rank: int = 0) -> None:
        self.folder, self.images, self.rewards, self.count, self.rank = folder, images, rewards, count, rank
        self.scores: dict[int, dict[str, float]] = {}
        """Image to its values so far, by reward."""

    # --- before the first image --------------------------------------------------------------------------------------

    def clear_others(self) -> bool:
        """Remove the images of another evaluation; returns whether there were any. Called before `prepare`."""
        before = read_identity(self.folder)
        if before is not None and before["images"] == self.images:
            return False
        shutil.rmtree(self.folder, ignore_errors=True)
        return before is not None

    def prepare(self) -> None:
        """Make the folder; called by one process, before any reads it. Values of a changed reward are removed."""
        before = read_identity(self.folder)
        former: dict[str, str] = {} if before is None else before["rewards"]
        self._join({name for name, digest in former.items() if self.rewards.get(name, digest) != digest})
        (self.folder / "drawn").mkdir(parents=True, exist_ok=True)
        (self.folder / "thumbs").mkdir(exist_ok=True)
        identity = {"images": self.images, "rewards": former | self.rewards, "count": self.count}
        replace_text(self.folder / "identity.json", json.dumps(identity, indent=2) + "\n")

    def read(self) -> None:
        """Read what all processes have judged so far."""
        self.scores = read_scores(self.folder)

    def missing(self) -> list[int]:
        """Return the images that lack a value, ascending."""
        return [i for i in range(self.count) if not self.rewards.keys() <= self.scores.get(i, {}).keys()]

    def lacking(self, index: int) -> list[str]:
        """Return the rewards that image `index` has no value of."""
        return [name for name in self.rewards if name not in self.scores.get(index, {})]

    # --- while images are drawn and judged ---------------------------------------------------------------------------

    def keep_drawn(self, indices: Sequence[int], images: Tensor) -> None:
        """Keep images (B, 3, H, W) until `record` has all their values."""
        from safetensors.torch import save_file

        path = self.folder / "drawn" / f"{indices[0]:06d}-{self.rank}.safetensors"
        with replacing(path) as part:
            save_file({"images": images.float().cpu().contiguous(), "indices": torch.tensor(indices)}, part)

    def drawn(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (indices, images (B, 3, H, W) float32) of what was drawn and lacks a value; others' files are left."""
        from safetensors.torch import load_file

        for path in sorted((self.folder / "drawn").glob("*.safetensors")):
            content = load_file(path)
            indices = [int(i) for i in content["indices"]]
            places = [place for place, index in enumerate(indices) if self.lacking(index)]
            if places:
                yield [indices[place] for place in places], content["images"][places]
            else:
                path.unlink(missing_ok=True)

    def record(self, indices: Sequence[int], values: dict[str, Tensor], images: Tensor) -> None:
        """Write the values of judged images, reward to (B,), NaN where one is missing, and a thumbnail of each."""
        lines = []
        for place, index in enumerate(indices):
            found = {name: float(of_images[place]) for name, of_images in values.items()}
            found = {name: value for name, value in found.items() if value == value}
            self.scores.setdefault(index, {}).update(found)
            lines.append(json.dumps({"index": index, "scores": found}) + "\n")
            self._write_thumb(index, images[place])
        with (self.folder / f"scores-{self.rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        if all(not self.lacking(index) for index in indices):
            (self.folder / "drawn" / f"{min(indices):06d}-{self.rank}.safetensors").unlink(missing_ok=True)

    def _write_thumb(self, index: int, image: Tensor) -> None:
        picture = to_picture(image)
        small = max(picture.size) <= THUMB
        picture.thumbnail((THUMB, THUMB))
        path = self.folder / "thumbs" / f"{index:06d}.{'png' if small else 'jpg'}"
        if not path.exists():
            with replacing(path) as part:
                picture.save(part, "PNG" if small else "JPEG", quality=85)

    # --- afterwards --------------------------------------------------------------------------------------------------

    def _join(self, dropped: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Make one file of those of all processes, without the values of the rewards `dropped`."""
        scores = read_scores(self.folder)
        lines = [
            json.dumps({"index": i, "scores": {k: v for k, v in scores[i].items() if k not in dropped}}) + "\n"
            for i in sorted(scores)
        ]
        if lines:
            replace_text(self.folder / "scores.jsonl", "".join(lines))
        for part in self.folder.glob("scores-*.jsonl"):
            part.unlink()

    def finish(self) -> None:
        """Join the files of all processes; called by one of them, after all have ended."""
        self._join()
        self.read()
        for _ in self.drawn():  # removes what has all its values
            pass

    def column(self, reward: str) -> list[float]:
        """Return the values of a reward in the images' order, NaN where one is missing."""
        return [self.scores.get(i, {}).get(reward, float("nan")) for i in range(self.count)]

    # --- for other evaluations ---------------------------------------------------------------------------------------

    def fetch(self, cache: Path) -> None:
        """Take over what another evaluation judged of the same images, unless the folder has as much."""
        kept = cache / self.images
        identity = read_identity(kept)
        if identity is None or read_identity(self.folder) is not None:
            return
        part = self.folder.with_name(f".{self.folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(kept, part)
        put_in_place(part, self.folder)

    def offer(self, cache: Path) -> None:
        """Keep the judgements for other evaluations, where every image has its values."""
        if self.missing():
            return
        kept = cache / self.images
        former = read_identity(kept)
        if former is not None and former["rewards"].items() >= self.rewards.items():
            return
        part = kept.with_name(f".{kept.name}-{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(self.folder, part, ignore=shutil.ignore_patterns("drawn"))
        put_in_place(part, kept)


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Return what identity.json says; None where there is none, or a damaged one."""
    try:
        found = json.loads((folder / "identity.json").read_text(encoding="utf-8"))
        return found if {"images", "rewards", "count"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def read_scores(folder: Path) -> dict[int, dict[str, float]]:
    """Return image to {reward: value} of all processes' files; a line that was cut short is passed over."""
    scores: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("scores*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                entry = json.loads(line)
                scores.setdefault(int(entry["index"]), {}).update(entry["scores"])
            except (ValueError, KeyError, TypeError):
                continue
    return scores


def thumb(folder: Path, index: int) -> Path | None:
    """Return the thumbnail of an image; None where there is none."""
    return next((folder / "thumbs").glob(f"{index:06d}.*"), None)


def hashed(*parts: Any) -> str:
    """Return a hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
