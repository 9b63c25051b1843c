"""The Z-Image family against the diffusers pipeline it wraps, one pass on it, and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from benchmarks.reference import Batch
from opd_fast.models import ZImage, load_model, meta_model
from tests.family_checks import (
    COMPILERS,
    PROMPTS,
    RESOLUTION,
    STEPS,
    World,
    check_captured,
    check_compiled,
    check_export,
    check_foreign_lora,
    check_guidance,
    check_low_precision,
    check_meta_model,
    check_padding,
    check_reads_nothing_back,
    draw,
    edit,
    noise,
)
from tests.tiny_z_image import save_tiny, tiny_transformer

TOKENS = 64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("z_image") / "pipeline")


def load(path: Path, tokens: int | None = TOKENS, dtype: torch.dtype = torch.float32, family: str = "auto") -> ZImage:
    model = load_model(path, family, device="cpu", dtype=dtype, max_sequence_length=tokens)
    assert isinstance(model, ZImage)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> ZImage:
    return load(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pipeline(folder: Path) -> Any:
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(network: nn.Module, x: Tensor, level: Tensor, sequence: Tensor, mask: Tensor) -> Tensor:
    """diffusers' transformer as its pipeline calls it: lists, one tensor a row; level (B,)."""
    captions = [row[own] for row, own in zip(sequence, mask, strict=True)]
    out = network(list(x.unsqueeze(2).unbind()), 1 - level, captions, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def predict(network: nn.Module, x: Tensor, level: Tensor, batch: Batch, rows: slice, guidance: float) -> Tensor:
    cond = call(network, x, level, batch.text.sequence[rows], batch.text.mask[rows])
    if guidance <= 0:
        return cond
    assert batch.negative is not None
    sequence, mask = (t.repeat(len(x), *[1] * (t.dim() - 1)) for t in (batch.negative.sequence, batch.negative.mask))
    uncond = call(network, x, level, sequence, mask)
    return cond + guidance * (cond - uncond)


def theirs(pipe: Any, x: Tensor, prompts: list[str], scale: float = 0.0) -> Tensor:
    """The pipeline's images (B, 3, H, W) from x."""
    images: Tensor = pipe(
        list(prompts),  # the pipeline writes its chat template into the list
        negative_prompt=[""] * len(prompts),
        guidance_scale=scale,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        latents=x,
        output_type="pt",
    ).images
    return images


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] + PROMPTS[2:]], ids=["mixed lengths", "one length"])
def test_velocity_is_the_transformers(model: ZImage, prompts: list[str]) -> None:
    text, x = model.encode(prompts), noise(model, len(prompts))
    levels = torch.tensor([1.0, 0.6, 0.05])[: len(prompts)]
    assert text.mask is not None
    # 19: the chat template. One prompt fills two groups of 32 tokens, the others one.
    assert text.mask.sum(1).tolist() == [len(prompt.encode()) + 19 for prompt in prompts]
    plain = call(model.transformer, x, levels, text.sequence, text.mask)
    v = model.velocity(model.transformer, x, levels, text)
    torch.testing.assert_close(v, plain, rtol=1e-4, atol=1e-5)
    published = tiny_transformer()
    published.load_state_dict(model.transformer.state_dict())
    torch.testing.assert_close(call(published, x, levels, text.sequence, text.mask), plain, rtol=0, atol=0)
    once = model.velocity(model.transformer, x, torch.tensor(0.6), text)
    torch.testing.assert_close(once[1], plain[1], rtol=1e-4, atol=1e-5)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2


def test_gradient_checkpointing_changes_nothing(model: ZImage) -> None:
    text, x = model.encode(PROMPTS), noise(model, 3)
    transformer = load_model(model.path, device="cpu", dtype=torch.float32).transformer.requires_grad_(True)
    first = next(transformer.parameters())

    def gradient() -> Tensor:
        v = model.velocity(transformer, x, torch.tensor(0.6), text)
        (found,) = torch.autograd.grad(v.square().sum(), [first])
        return found

    plain = gradient()
    calls: list[nn.Module] = []
    transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    inner = transformer._gradient_checkpointing_func
    transformer._gradient_checkpointing_func = lambda block, *a: calls.append(block) or inner(block, *a)  # type: ignore[operator, assignment, func-returns-value]
    torch.testing.assert_close(gradient(), plain, rtol=1e-5, atol=1e-6)
    assert len(calls) == len(model.blocks(transformer))


def test_padding_changes_nothing(model: ZImage, folder: Path) -> None:
    check_padding(model, load(folder, 100))


def test_velocity_reads_nothing_back(model: ZImage) -> None:
    check_reads_nothing_back(model)


def test_a_round_of_replays_is_the_round(model: ZImage, tmp_path: Path) -> None:
    check_captured(model, tmp_path / "lora")


def test_low_precision(model: ZImage, folder: Path) -> None:
    check_low_precision(load(folder, dtype=torch.bfloat16), model)


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_blocks(model: ZImage, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled(model, tmp_path, backend, monkeypatch)


@pytest.fixture(scope="module")
def world(model: ZImage, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    schedule = {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS)}
    return World(model, tmp_path_factory.mktemp("loras"), predict, scheduler, schedule)


@pytest.mark.parametrize("guidance", [(0.0, 0.0, 0.0), (4.0, 1.0, 0.0)], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", ["flow_sde", "ode"])
def test_one_pass_equals_reference(world: World, solver: str, guidance: tuple[float, float, float]) -> None:
    world.check(solver, guidance)


def test_samples_are_the_pipelines(model: ZImage, folder: Path) -> None:
    x, prompts = noise(model, 2), PROMPTS[:2]
    images = draw(model, model.transformer, x, prompts)
    expected = theirs(pipeline(folder), x, prompts)
    assert images.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert float(expected.std()) > 0.02  # not a flat picture that anything would match
    assert float((images - expected).abs().max()) <= 2 / 255


def test_guidance_is_the_pipelines(model: ZImage, folder: Path) -> None:
    """0 is without guidance; 5 is the pipeline's own default, 0 that of Z-Image-Turbo."""
    pipe = pipeline(folder)
    check_guidance(
        model, lambda x, prompts, scale: theirs(pipe, x, prompts, scale), [[0.0], [0.5], [1.0], [4.0], [5.0]]
    )


def test_exported_student_draws_the_same(model: ZImage, folder: Path, tmp_path: Path) -> None:
    check_export(model, pipeline(folder), tmp_path / "student", theirs)


def test_a_full_export_is_diffusers_own(model: ZImage, tmp_path: Path) -> None:
    """The transformer is saved under diffusers' class name, and diffusers reads it."""
    from diffusers import ZImageTransformer2DModel

    model.transformer.save_pretrained(tmp_path)  # type: ignore[operator]
    again = ZImageTransformer2DModel.from_pretrained(tmp_path)
    assert again.config._class_name == "ZImageTransformer2DModel"
    mine = model.transformer.state_dict()
    assert mine.keys() == again.state_dict().keys()
    assert all(torch.equal(value, mine[name]) for name, value in again.state_dict().items())


def test_embeddings_are_the_pipelines(model: ZImage, folder: Path) -> None:
    rows, _ = pipeline(folder).encode_prompt(
        list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    prompts = list(PROMPTS)
    got = model.encode(prompts)
    assert prompts == PROMPTS
    assert got.sequence.shape == (3, TOKENS, 32)
    assert got.pooled is None
    assert got.mask is not None
    for sequence, mask, row in zip(got.sequence, got.mask, rows, strict=True):
        assert mask.tolist() == [True] * len(row) + [False] * (TOKENS - len(row))
        torch.testing.assert_close(sequence[mask], row, rtol=1e-5, atol=1e-5)
        assert not sequence[~mask].any()
    assert load(folder, 20).encode(PROMPTS).sequence.shape[1] == 20


def test_released_encoders_say_so(folder: Path) -> None:
    mine = load(folder)
    with pytest.raises(ValueError, match="at least one prompt"):
        mine.encode([])
    mine.release_text_encoders()
    with pytest.raises(RuntimeError, match="encode every prompt before"):
        mine.encode(["a"])


def test_meta_model_agrees(model: ZImage, folder: Path) -> None:
    check_meta_model(model, meta_model(folder, dtype=torch.float32, max_sequence_length=TOKENS))


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_levels_are_the_schedulers(model: ZImage, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    torch.testing.assert_close(model.sigmas(steps, 64), scheduler.sigmas.double(), rtol=0, atol=2e-7)


def test_latent_shape(model: ZImage) -> None:
    assert model.latent_shape(64) == (4, 8, 8)
    assert model.image_tokens(64) == 16
    with pytest.raises(ValueError, match=r"resolution 72 is not a multiple of 16.*try 64 or 80"):
        model.latent_shape(72)
    with pytest.raises(ValueError, match="use at most 256"):
        model.latent_shape(272)


def test_lora_of_another_width(model: ZImage, tmp_path: Path) -> None:
    check_foreign_lora(model, tiny_transformer(dim=64, n_heads=4, n_kv_heads=4), tmp_path / "lora")


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "ZImageOmniPipeline"}, "family 'z_image' needs ZImagePipeline"),
        ("model_index.json", {"vae": [None, None]}, "lists no 'vae'"),
        ("transformer/config.json", {"n_layers": 3}, "component 'transformer'.*missing keys"),
        ("scheduler/scheduler_config.json", {"use_beta_sigmas": True}, "sets use_beta_sigmas=True"),
    ],
)
def test_wrong_folders_are_named_in_one_line(broken: Path, file: str, changes: dict[str, Any], said: str) -> None:
    edit(broken / file, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        load(broken, family="z_image")
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [0, 129])
def test_text_tokens_out_of_range(folder: Path, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_sequence_length is {tokens}; family 'z_image' takes 1 to 128"):
        load(folder, tokens)
