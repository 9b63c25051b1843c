"""SD3.5-Large's shape, every block without dual attention, through the checks that all families pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.reference import Batch
from opd_fast.models import SD3, TextEmbeds, load_model, meta_model
from tests.family_checks import (
    PROMPTS,
    RESOLUTION,
    STEPS,
    World,
    check_captured,
    check_export,
    check_foreign_lora,
    check_low_precision,
    check_meta_model,
    check_reads_nothing_back,
    draw,
    noise,
)
from tests.tiny import save_tiny, tiny_transformer

LARGE: dict[str, Any] = {"dual_attention_layers": (), "layers": 3}
TOKENS = 16

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("large") / "pipeline", t5=True, **LARGE)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> SD3:
    loaded = load_model(folder, device="cpu", dtype=dtype, max_sequence_length=TOKENS)
    assert isinstance(loaded, SD3)
    return loaded


@pytest.fixture(scope="module")
def model(folder: Path) -> SD3:
    return load(folder)


def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(network: nn.Module, x: Tensor, level: Tensor, text: TextEmbeds) -> Tensor:
    """diffusers' transformer as its pipeline calls it; level (B,)."""
    out: Tensor = network(
        hidden_states=x,
        timestep=1000 * level,
        encoder_hidden_states=text.sequence,
        pooled_projections=text.pooled,
        return_dict=False,
    )[0]
    return out


def predict(network: nn.Module, x: Tensor, level: Tensor, batch: Batch, rows: slice, guidance: float) -> Tensor:
    assert isinstance(batch.text, TextEmbeds)
    cond = call(network, x, level, batch.text.index(rows))
    if guidance <= 1:
        return cond
    assert isinstance(batch.negative, TextEmbeds)
    uncond = call(network, x, level, batch.negative.expand(len(x)))
    return uncond + guidance * (cond - uncond)


def theirs(pipe: Any, x: Tensor, prompts: list[str], guidance: float = 1.0) -> Tensor:
    images: Tensor = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        max_sequence_length=TOKENS,
        latents=x,
        output_type="pt",
    ).images
    return images


def test_blocks(model: SD3) -> None:
    blocks = model.blocks(model.transformer)
    assert len(blocks) == 3
    assert all(block.attn2 is None for block in blocks)


def test_velocity_is_the_transformers(model: SD3) -> None:
    text, x, levels = model.encode(PROMPTS), noise(model, 3), torch.tensor([1.0, 0.6, 0.05])
    plain = call(model.transformer, x, levels, text)
    torch.testing.assert_close(model.velocity(model.transformer, x, levels, text), plain, rtol=0, atol=1e-6)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2


@pytest.fixture(scope="module")
def world(model: SD3, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return World(model, tmp_path_factory.mktemp("loras"), predict, scheduler, {"num_inference_steps": STEPS})


@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (4.0, 3.0, 1.0)], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", ["flow_sde", "ode"])
def test_one_pass_equals_reference(world: World, solver: str, guidance: tuple[float, float, float]) -> None:
    world.check(solver, guidance)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_samples_are_the_pipelines(model: SD3, folder: Path, guidance: float) -> None:
    x, prompts = noise(model, 2), PROMPTS[:2]
    images = draw(model, model.transformer, x, prompts, guidance)
    expected = theirs(pipeline(folder), x, prompts, guidance)
    assert float(expected.std()) > 0.02  # not a flat picture that anything would match
    assert float((images - expected).abs().max()) <= 2 / 255


def test_exported_student_draws_the_same(model: SD3, folder: Path, tmp_path: Path) -> None:
    check_export(model, pipeline(folder), tmp_path / "student", theirs)


def test_low_precision(model: SD3, folder: Path) -> None:
    check_low_precision(load(folder, torch.bfloat16), model)


def test_velocity_reads_nothing_back(model: SD3) -> None:
    check_reads_nothing_back(model)


def test_a_round_of_replays_is_the_round(model: SD3, tmp_path: Path) -> None:
    check_captured(model, tmp_path / "lora")


def test_meta_model_agrees(model: SD3, folder: Path) -> None:
    check_meta_model(model, meta_model(folder, dtype=torch.float32, max_sequence_length=TOKENS))


def test_lora_of_another_width(model: SD3, tmp_path: Path) -> None:
    wider = tiny_transformer(num_attention_heads=6, caption_projection_dim=48, **LARGE)
    check_foreign_lora(model, wider, tmp_path / "lora")
