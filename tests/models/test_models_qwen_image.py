"""The Qwen-Image family against the diffusers pipeline it wraps, one pass on it, and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor, nn

from benchmarks.reference import Batch
from opd_fast.models import QwenImage, load_model, meta_model
from opd_fast.models.schedule import flow_sigmas
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
from tests.tiny_qwen import save_tiny, tiny_transformer

TOKENS = 64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen") / "pipeline")


def load(
    path: Path, tokens: int | None = TOKENS, dtype: torch.dtype = torch.float32, family: str = "auto"
) -> QwenImage:
    model = load_model(path, family, device="cpu", dtype=dtype, max_sequence_length=tokens)
    assert isinstance(model, QwenImage)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> QwenImage:
    return load(folder)


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pipeline(folder: Path) -> Any:
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pack(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2)).movedim((2, 4), (1, 2)).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    b, c, h, w = shape
    return tokens.reshape(b, h // 2, w // 2, c, 2, 2).movedim(3, 1).movedim(4, 3).reshape(b, c, h, w)


def call(network: nn.Module, x: Tensor, level: Tensor, sequence: Tensor, mask: Tensor) -> Tensor:
    """diffusers' transformer, a row at a time, each with its own tokens and no mask; level (B,)."""
    _, _, h, w = x.shape
    rows = [
        network(
            hidden_states=pack(x[i : i + 1]),
            timestep=level[i : i + 1],
            encoder_hidden_states=sequence[i : i + 1, mask[i]],
            img_shapes=[[(1, h // 2, w // 2)]],
            return_dict=False,
        )[0]
        for i in range(len(x))
    ]
    return unpack(torch.cat(rows), x.shape)


def predict(network: nn.Module, x: Tensor, level: Tensor, batch: Batch, rows: slice, guidance: float) -> Tensor:
    cond = call(network, x, level, batch.text.sequence[rows], batch.text.mask[rows])
    if guidance <= 1:
        return cond
    assert batch.negative is not None
    sequence, mask = (t.repeat(len(x), *[1] * (t.dim() - 1)) for t in (batch.negative.sequence, batch.negative.mask))
    uncond = call(network, x, level, sequence, mask)
    mixed = pack(uncond + guidance * (cond - uncond))
    return unpack(mixed * (pack(cond).norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)), x.shape)


def theirs(pipe: Any, x: Tensor, prompts: list[str], scale: float = 1.0) -> Tensor:
    """The pipeline's images (B, 3, H, W) from x."""
    images: Tensor = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),  # without one it has no guidance
        true_cfg_scale=scale,
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=STEPS,
        max_sequence_length=TOKENS,
        latents=pack(x),
        output_type="pt",
    ).images
    return images


def test_velocity_is_the_transformers(model: QwenImage) -> None:
    text, x, levels = model.encode(PROMPTS), noise(model, 3), torch.tensor([1.0, 0.6, 0.05])
    assert text.mask is not None
    assert text.mask.sum(1).tolist() == [len(prompt.encode()) + 13 for prompt in PROMPTS]  # 13: the template's end
    plain = call(model.transformer, x, levels, text.sequence, text.mask)
    torch.testing.assert_close(model.velocity(model.transformer, x, levels, text), plain, rtol=1e-4, atol=1e-5)
    once = model.velocity(model.transformer, x, torch.tensor(0.6), text)
    torch.testing.assert_close(once[1], plain[1], rtol=1e-4, atol=1e-5)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2


def test_padding_changes_nothing(model: QwenImage, folder: Path) -> None:
    check_padding(model, load(folder, 100))


def test_velocity_reads_nothing_back(model: QwenImage) -> None:
    check_reads_nothing_back(model)


def test_a_round_of_replays_is_the_round(model: QwenImage, tmp_path: Path) -> None:
    check_captured(model, tmp_path / "lora")


def test_low_precision(model: QwenImage, folder: Path) -> None:
    check_low_precision(load(folder, dtype=torch.bfloat16), model)


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_blocks(model: QwenImage, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled(model, tmp_path, backend, monkeypatch)


@pytest.fixture(scope="module")
def world(model: QwenImage, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    mu = calculate_shift(model.image_tokens(RESOLUTION), 256, 8192, 0.5, 0.9)
    schedule = {"sigmas": np.linspace(1.0, 1 / STEPS, STEPS), "mu": mu}
    return World(model, tmp_path_factory.mktemp("loras"), predict, scheduler, schedule)


@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (4.0, 3.0, 1.0)], ids=["unguided", "guided"])
@pytest.mark.parametrize("solver", ["flow_sde", "ode"])
def test_one_pass_equals_reference(world: World, solver: str, guidance: tuple[float, float, float]) -> None:
    world.check(solver, guidance)


def test_samples_are_the_pipelines(model: QwenImage, folder: Path) -> None:
    x, prompts = noise(model, 2), PROMPTS[:2]
    images = draw(model, model.transformer, x, prompts)
    expected = theirs(pipeline(folder), x, prompts)
    assert images.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert float(expected.std()) > 0.02  # not a flat picture that anything would match
    assert float((images - expected).abs().max()) <= 2 / 255


def test_guidance_is_the_pipelines(model: QwenImage, folder: Path) -> None:
    """4 is the pipeline's own default; up to 1 it makes no negative pass."""
    pipe = pipeline(folder)
    groups = [[0.0, 0.5, 1.0], [1.5], [4.0]]
    check_guidance(model, lambda x, prompts, scale: theirs(pipe, x, prompts, scale), groups)


def test_decode_in_chunks_is_decode_at_once(model: QwenImage, monkeypatch: pytest.MonkeyPatch) -> None:
    z = noise(model, 3)
    whole = model.decode(z)
    monkeypatch.setattr(QwenImage, "_decode_pixels", 2 * RESOLUTION**2)
    torch.testing.assert_close(model.decode(z), whole, rtol=0, atol=1e-5)


def test_exported_student_draws_the_same(model: QwenImage, folder: Path, tmp_path: Path) -> None:
    check_export(model, pipeline(folder), tmp_path / "student", theirs)


def test_embeddings_are_the_pipelines(model: QwenImage, folder: Path) -> None:
    sequence, mask = pipeline(folder).encode_prompt(PROMPTS, max_sequence_length=TOKENS)
    got = model.encode(PROMPTS)
    assert got.sequence.shape == (3, TOKENS, 32)
    assert got.pooled is None
    assert got.mask is not None
    own = mask.bool()
    assert torch.equal(got.mask[:, : own.shape[1]], own)
    assert not got.mask[:, own.shape[1] :].any()
    torch.testing.assert_close(got.sequence[got.mask], sequence[own], rtol=1e-5, atol=1e-5)
    assert not got.sequence[~got.mask].any()
    alone = model.encode(PROMPTS[1:2])  # one prompt has no padding, and the pipeline then gives no mask
    torch.testing.assert_close(alone.sequence[0], got.sequence[1], rtol=1e-4, atol=1e-5)
    assert alone.mask is not None
    assert torch.equal(alone.mask, got.mask[1:2])
    cut = load(folder, 20).encode(PROMPTS)
    assert cut.sequence.shape[1] == 20
    torch.testing.assert_close(cut.sequence[0], got.sequence[0, :20], rtol=1e-5, atol=1e-5)


def test_released_encoders_say_so(folder: Path) -> None:
    mine = load(folder)
    with pytest.raises(ValueError, match="at least one prompt"):
        mine.encode([])
    mine.release_text_encoders()
    with pytest.raises(RuntimeError, match="encode every prompt before"):
        mine.encode(["a"])


def test_meta_model_agrees(model: QwenImage, folder: Path) -> None:
    check_meta_model(model, meta_model(folder, dtype=torch.float32, max_sequence_length=TOKENS))


@pytest.mark.parametrize("resolution", [64, 512, 1328])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_levels_are_the_schedulers(model: QwenImage, folder: Path, steps: int, resolution: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    mu = calculate_shift((resolution // 16) ** 2, 256, 8192, 0.5, 0.9)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas = model.sigmas(steps, resolution)
    assert sigmas.dtype == torch.float64
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=0, atol=2e-7)
    assert float(sigmas[-2]) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 1.6},
    ],
)
def test_levels_follow_every_option(config: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(1000, 256, 4096, 0.5, config.get("max_shift", 1.15))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=mu)
    torch.testing.assert_close(flow_sigmas(7, 1000, config), scheduler.sigmas.double(), rtol=0, atol=2e-7)
    assert flow_sigmas(1, 1000, config).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 1 step"):
        flow_sigmas(0, 1000, config)


def test_latent_shape(model: QwenImage) -> None:
    assert model.latent_shape(64) == (4, 8, 8)
    assert model.image_tokens(64) == 16
    with pytest.raises(ValueError, match=r"resolution 72 is not a multiple of 16.*try 64 or 80"):
        model.latent_shape(72)


def test_lora_of_another_width(model: QwenImage, tmp_path: Path) -> None:
    check_foreign_lora(model, tiny_transformer(num_attention_heads=4), tmp_path / "lora")


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "family 'qwen_image' needs QwenImagePipeline"),
        ("model_index.json", {"text_encoder": [None, None]}, "lists no 'text_encoder'"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds.*does not support"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope.*does not support"),
        ("transformer/config.json", {"num_layers": 3}, "component 'transformer'.*missing keys"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "sets use_karras_sigmas=True"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler, supported is"),
    ],
)
def test_wrong_folders_are_named_in_one_line(broken: Path, file: str, changes: dict[str, Any], said: str) -> None:
    edit(broken / file, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        load(broken, family="qwen_image")
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tokens", [0, 1025])
def test_text_tokens_out_of_range(folder: Path, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_sequence_length is {tokens}; family 'qwen_image' takes 1 to 1024"):
        load(folder, tokens)
