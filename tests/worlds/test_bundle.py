"""The bundle: a pipeline diffusers loads, a weak generalist, teachers that beat it, and a student that draws alike."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from opd_fast.data.prompt_files import load_prompts
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.models import DiffusionModel, load_model
from opd_fast.models.base import ASSETS
from opd_fast.models.lora.files import DIFFUSERS_WEIGHTS, merge_into, read_lora
from opd_fast.solvers import solver_table
from opd_fast.training.evaluation import EvalTask, ImageSampler, evaluate, task_keys
from opd_fast.training.loop import train
from opd_fast.training.sampling import sample
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE
from tests.runs import settings

TASKS = ("composition", "text", "colour")
PROMPTS = 64
RECIPE = Path(__file__).resolve().parents[2] / "opd_fast" / "recipes" / "bundled.yaml"


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model("bundled", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def rewards(model: DiffusionModel) -> dict[str, dict[str, float]]:
    """Rewards of the base, and of each teacher on its own task."""
    prompts = {task: load_prompts(f"bundled/{task}", "test") for task in TASKS}
    tasks = {t: EvalTask(t, [p[i % len(p)] for i in range(PROMPTS)], [t]) for t, p in prompts.items()}
    text = EmbeddingCache.build(model, [p.text for source in prompts.values() for p in source])
    table = solver_table("ode", model.sigmas(20, 32), 0.0)

    def judge(transformer: torch.nn.Module, *names: str) -> dict[str, float]:
        chosen, shape = [tasks[name] for name in names], model.latent_shape(32)
        result = evaluate(ImageSampler(model, table, shape, 1.0, 0, text), transformer, chosen)
        return {name: result.rewards[name][name] for name in names}

    found = {"base": judge(model.transformer, *TASKS)}
    for task in TASKS:
        teacher = copy.deepcopy(model.transformer)
        merge_into(teacher, read_lora(f"bundled/{task}"))
        found[task] = judge(teacher, task)
    return found


def test_size(model: DiffusionModel) -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 24 * 10**6
    assert 3e6 < sum(p.numel() for p in model.transformer.parameters()) < 8e6


@pytest.mark.parametrize("task", TASKS)
def test_teachers_lie_in_both_layouts(task: str) -> None:
    """Diffusers looks for its own file alone, and draws the base where there is none."""
    folder = ASSETS / "teachers" / task
    peft, own = read_lora(folder), read_lora(folder / DIFFUSERS_WEIGHTS)
    assert (peft.format, own.format) == ("peft", "diffusers")
    assert peft.scale == own.scale
    assert set(peft.scale.values()) == {2.0}
    for module, pair in peft.tensors.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, own.tensors[module], strict=True))
    assert peft.tensors.keys() == own.tensors.keys()


def test_base_is_a_weak_generalist(rewards: dict[str, dict[str, float]]) -> None:
    for task, value in rewards["base"].items():
        assert 0.15 <= value <= 0.7, (task, value)


@pytest.mark.parametrize("task", TASKS)
def test_each_teacher_beats_the_base(rewards: dict[str, dict[str, float]], task: str) -> None:
    assert rewards[task][task] - rewards["base"][task] >= 0.2


def test_diffusers_draws_what_the_engine_draws(model: DiffusionModel, tmp_path: Path) -> None:
    """After two rounds: the exported student in diffusers' own pipeline, from the same noise."""
    from diffusers import StableDiffusion3Pipeline

    config = settings(RECIPE, train__rounds=2, train__samples_per_task=4, evaluation__every=0, train__lr=1e-2)
    train(config, tmp_path)

    prompts = [load_prompts(f"bundled/{task}", "test")[0].text for task in TASKS]
    keys, shape, steps = task_keys(0, "x", len(prompts)), model.latent_shape(32), 20
    text = EmbeddingCache.build(model, prompts)
    table = solver_table("ode", model.sigmas(steps, 32), 0.0)
    ours = load_model("bundled", device="cpu", dtype=torch.float32)
    merge_into(ours.transformer, read_lora(tmp_path / "student"))

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        ASSETS / "pipeline", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    base = model.decode(sample(model, model.transformer, text.rows(prompts), None, 1.0, table, shape=shape, keys=keys))
    pipeline.load_lora_weights(tmp_path / "student")
    for guidance in (1.0, 3.0):
        latents = sample(
            ours, ours.transformer, text.rows(prompts), text.negative, guidance, table, shape=shape, keys=keys
        )
        images = ours.decode(latents).permute(0, 2, 3, 1).numpy()
        theirs = pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=philox_normal(keys, shape, INITIAL_NOISE),
            height=32,
            width=32,
            max_sequence_length=0,
            output_type="np",
        ).images
        assert np.abs(images - theirs).max() <= 2 / 255
        if guidance == 1.0:
            assert np.abs(base.permute(0, 2, 3, 1).numpy() - theirs).max() > 2 / 255  # the LoRA does something
