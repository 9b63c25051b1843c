"""Data of the shapes world for training: rendered scenes with their captions, and the prompt files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_fast.data.prompt_files import write_geneval, write_lines
from opd_fast.worlds import shapes
from opd_fast.worlds.networks import TOKENS


@dataclass(frozen=True)
class Pool:
    """Rendered scenes of one task: latents (n, C, h, w), and the text of each."""

    latents: Tensor
    texts: list[str]
    captions: list[str]
    """All distinct training prompts of the task."""


def _by_tag(prompts: list[shapes.ScenePrompt]) -> dict[str, list[shapes.ScenePrompt]]:
    groups: dict[str, list[shapes.ScenePrompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.metadata.get("tag", ""), []).append(prompt)
    return groups


def render_pool(task: str, n: int, seed: int, *, ideal: bool = False) -> tuple[Tensor, list[str]]:
    """Return n scenes, (n, 3, 32, 32) float32 in 0..1, and their prompts; each tag is equally likely."""
    rng = np.random.default_rng([seed, shapes.TASKS.index(task)])
    groups = list(_by_tag(shapes.prompts(task, "train")).values())
    chosen = [(group := groups[rng.integers(len(groups))])[rng.integers(len(group))] for _ in range(n)]
    images = np.empty((n, 3, shapes.SIZE, shapes.SIZE), np.float32)
    for image, prompt in zip(images, chosen, strict=True):
        image[:] = shapes.render(shapes.scene(task, prompt, rng, ideal=ideal))
    return torch.from_numpy(images), [p.text for p in chosen]


@torch.no_grad()
def encode_pool(vae: Any, task: str, n: int, seed: int, *, ideal: bool) -> tuple[Tensor, list[str]]:
    """Return the latents of n scenes, and their prompts."""
    images, texts = render_pool(task, n, seed, ideal=ideal)
    modes = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in images.split(256)])
    return (modes - vae.config.shift_factor) * vae.config.scaling_factor, texts


def batches(
    pools: dict[str, Pool], shares: dict[str, float], tokenizer: Any, batch: int, *, swapped: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (latents, token ids) without end.

    A tenth of the captions is dropped, for guidance. The share `swapped` of composition's and text's is wrong.
    """
    texts = ["", *(c for pool in pools.values() for c in pool.captions)]
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    row = {text: i for i, text in enumerate(texts)}
    tasks = list(shares)
    p = torch.tensor([shares[t] for t in tasks])
    while True:
        latents, rows = [], []
        for index in torch.multinomial(p, batch, replacement=True).tolist():
            pool = pools[tasks[index]]
            i = int(torch.randint(len(pool.texts), ()))
            latents.append(pool.latents[i])
            text = pool.texts[i]
            if tasks[index] != "colour" and float(torch.rand(())) < swapped:
                text = pool.captions[int(torch.randint(len(pool.captions), ()))]
            rows.append(0 if float(torch.rand(())) < 0.1 else row[text])
        yield torch.stack(latents), ids[rows]


def write_prompts(out: Path) -> None:
    for task in shapes.TASKS:
        folder = out / "prompts" / task
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            chosen = shapes.prompts(task, split)
            ordered = [chosen[i] for i in np.random.default_rng(0).permutation(len(chosen))]
            if task == "composition":  # tags alternate, so that the first n prompts of a file hold every kind
                groups = [group for _, group in sorted(_by_tag(ordered).items())]
                records = [p.metadata for row in itertools.zip_longest(*groups) for p in row if p is not None]
                write_geneval(folder / f"{split}_metadata.jsonl", records)
            else:
                write_lines(folder / f"{split}.txt", [p.text for p in ordered])
