"""A whole run on a random small pipeline with two random LoRA teachers: seconds on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opd_fast.config import Config
from opd_fast.config.command_line import read_config
from opd_fast.config.validate import validate
from opd_fast.models.lora.files import save_lora
from tests.tiny import save_tiny, tiny_transformer

PROMPTS = {
    "words": ['a sign that says "HK"', 'a sign that says "LO"', 'a sign that says "TE"'],
    "plain": ["a red circle", "two blue squares", "a green triangle"],
}


def random_lora(seed: int, size: float = 0.2, width: int | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Rank 3 on some attention projections of the small transformer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in tiny_transformer().named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("attn.to_q", "attn.to_v", "attn.add_k_proj")):
            inside = width or module.in_features
            a = torch.randn(3, inside, generator=generator) * size
            tensors[name] = (a, torch.randn(width or module.out_features, 3, generator=generator) * size)
    return tensors


def write_world(folder: Path) -> Path:
    """Pipeline, teachers, prompts and the run's settings in `folder`; the YAML file."""
    save_tiny(folder / "pipeline")
    teachers = []
    for seed, (name, lines) in enumerate(PROMPTS.items()):
        save_lora(folder / name, random_lora(seed), rank=3, alpha=6)
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        reward = ", reward: text" if name == "words" else ", reward: colour"
        held_out = f", eval_prompts: {folder / name}.txt"
        teachers.append(
            f"  - {{name: {name}, weights: {folder / name}, prompts: {folder / name}.txt{held_out}{reward}}}"
        )
    path = folder / "run.yaml"
    path.write_text(
        f"model: {{path: {folder / 'pipeline'}, resolution: 32}}\n"
        "student: {rank: 4, alpha: 8}\n"
        "teachers:\n" + "\n".join(teachers) + "\n"
        "sampler: {steps: 4}\n"
        "train: {rounds: 6, samples_per_task: 2, schedule: cosine}\n"
        "checkpoint: {every: 2}\n"
        "evaluation: {every: 3, prompts: 4, steps: 3}\n"
        "logging: {tensorboard: false}\n"
    )
    return path


def settings(path: Path, **changes: Any) -> Config:
    """The settings in `path` with dotted keys replaced (`train__rounds=2`)."""
    return change(read_config(path), changes)


def change(config: Config, changes: dict[str, Any]) -> Config:
    """`config` itself, with `section__key` set to each value, and validated."""
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    validate(config)
    return config


def reinforced(path: Path, method: str, reward: str, **changes: Any) -> Config:
    """The same settings for a method of reinforcement learning: every task with `reward`, groups of two images."""
    config = read_config(path)
    for task in config.teachers:
        task.weights, task.reward = "base", reward
    options = {"train__samples_per_task": 4, "rl__images_per_prompt": 2, "train__rounds": 2, "train__method": method}
    return change(config, options | ({"sampler__solver": "dpm2"} if method == "nft" else {}) | changes)
