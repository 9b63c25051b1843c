"""The FLUX.1 family: against the diffusers pipeline it wraps, against the published loop, and its errors."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.models import copy_parameters, gradients, relative_error, write_random_lora
from benchmarks.reference import AdapterPolicy, Batch, Reference, adapters_on
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.config.command_line import read_config
from opd_fast.config.paths import package_file
from opd_fast.distributed.plan import lora_modules
from opd_fast.models import TextEmbeds, load_model, meta_model
from opd_fast.models.flux import Flux, pack
from opd_fast.models.guidance import Conditioning
from opd_fast.objectives import step_weights
from opd_fast.solvers import solver_table
from opd_fast.training.batch import RoundBatch
from opd_fast.training.rollout import one_pass
from opd_fast.training.sampling import sample
from opd_fast.training.student import Student
from opd_fast.training.student_export import student_writer
from opd_fast.training.teacher_loading import load_teachers
from tests.family_checks import (
    COMPILERS,
    check_captured,
    check_compiled,
    check_meta_model,
    check_reads_nothing_back,
    edit,
)
from tests.tiny_flux import save_tiny_flux, tiny_flux_transformer

PROMPTS = ["a red square", "two blue circles", ""]
RESOLUTION, SHAPE, IMAGE_TOKENS = 64, (4, 8, 8), 16
TEXT_TOKENS = 24
RANK, ALPHA = 4, 8.0
STEPS = 4
DEV = "black-forest-labs/FLUX.1-dev"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("tiny") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("tiny") / "schnell", schnell=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Flux:
    return load(folder)


def load(folder: Path, dtype: torch.dtype = torch.float32, tokens: int | None = TEXT_TOKENS) -> Flux:
    loaded = load_model(folder, device="cpu", dtype=dtype, max_sequence_length=tokens)
    assert isinstance(loaded, Flux)
    return loaded


def pipeline(folder: Path) -> Any:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_text(rows: int) -> TextEmbeds:
    return TextEmbeds(torch.randn(rows, TEXT_TOKENS, 32), torch.randn(rows, 16))


def call(network: Any, x: Tensor, sigma: Tensor, text: TextEmbeds, guidance: float | None) -> Tensor:
    """A plain call of diffusers' transformer, packing by torch's pixel_unshuffle."""
    _, _, height, width = x.shape
    places = [(0.0, float(i), float(j)) for i in range(height // 2) for j in range(width // 2)]
    tokens = network(
        hidden_states=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        timestep=sigma,
        guidance=None if guidance is None else torch.tensor([guidance] * len(x)),
        pooled_projections=text.pooled,
        encoder_hidden_states=text.sequence,
        txt_ids=torch.zeros(text.sequence.shape[1], 3),
        img_ids=torch.tensor(places),
    ).sample
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


# --- the network's call -----------------------------------------------------------------------------------------------


def test_velocity_is_a_plain_call(model: Flux) -> None:
    torch.manual_seed(0)
    x, text = torch.randn(3, 4, 8, 12), random_text(3)  # not square: rows and columns cannot be mistaken
    sigma = torch.tensor([0.9601293, 0.5, 0.1])
    found = model.velocity(model.transformer, x, sigma, text, 3.5)
    torch.testing.assert_close(found, call(model.transformer, x, sigma, text, 3.5), rtol=0, atol=1e-6)
    assert found.shape == x.shape
    assert bool((found - model.velocity(model.transformer, x, sigma, text, 1.0)).abs().max() > 1e-3)
    level = torch.tensor(0.5)
    one = model.velocity(model.transformer, x, level, text, 3.5)
    torch.testing.assert_close(one, call(model.transformer, x, level.expand(3), text, 3.5), rtol=0, atol=1e-6)
    assert bool((one[0] - found[0]).abs().max() > 1e-3)


def test_without_guidance_embedding(schnell: Path) -> None:
    ours = load(schnell)
    assert (ours.guidance_kind, load(schnell, tokens=None).text_tokens) == ("none", 256)
    x, text, sigma = torch.randn(2, *SHAPE), random_text(2), torch.tensor(0.7)
    found = ours.velocity(ours.transformer, x, sigma, text)
    torch.testing.assert_close(found, call(ours.transformer, x, sigma.expand(2), text, None), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"guidance 3\.5 with family 'flux', which has none"):
        Conditioning.build(ours, text, None, 3.5)


def test_positions_are_made_once_and_levels_stay_float32(model: Flux) -> None:
    seen: list[dict[str, Any]] = []
    spy = model.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    try:
        for level, guidance in ((0.9601293, 3.5), (0.3, 2.0)):
            model.velocity(model.transformer, torch.randn(2, *SHAPE), torch.tensor(level), random_text(2), guidance)
    finally:
        spy.remove()
    first, second = seen
    assert first["img_ids"] is second["img_ids"]
    assert first["txt_ids"] is second["txt_ids"]
    assert first["timestep"].dtype == first["guidance"].dtype == torch.float32
    assert first["timestep"].tolist() == pytest.approx([0.9601293] * 2, abs=1e-7)
    assert (first["guidance"].tolist(), second["guidance"].tolist()) == ([3.5] * 2, [2.0] * 2)


def test_lower_precision_keeps_the_vae_in_float32(folder: Path, model: Flux) -> None:
    low = load(folder, torch.bfloat16)
    assert {p.dtype for p in low.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in low.vae.parameters()} == {torch.float32}
    text, x, sigma = low.encode(PROMPTS), torch.randn(3, *SHAPE), torch.tensor(0.5)
    assert text.pooled is not None
    assert text.sequence.dtype == text.pooled.dtype == torch.bfloat16
    v = low.velocity(low.transformer, x, sigma, text, 4.0)  # 500 and 4000, of which bfloat16 takes nothing away
    assert v.dtype == torch.bfloat16
    reference = model.velocity(model.transformer, x, sigma, model.encode(PROMPTS), 4.0)
    assert float((v.float() - reference).norm() / reference.norm()) < 0.05
    assert low.decode(x.to(torch.bfloat16)).dtype == torch.float32
    # A student kept in float32 is fed float32, whatever the base's dtype.
    assert low.velocity(model.transformer, x, sigma, text, 3.5).dtype == torch.float32


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_blocks_change_nothing(
    model: Flux, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_compiled(model, tmp_path, backend, monkeypatch)
    assert len(model.blocks(model.transformer)) == 1 + 2


def test_a_step_reads_nothing_back(model: Flux) -> None:
    check_reads_nothing_back(model)


def test_a_round_of_replays_is_the_round(model: Flux, tmp_path: Path) -> None:
    check_captured(model, tmp_path / "lora")


# --- the round --------------------------------------------------------------------------------------------------------


def predict(network: Any, x: Tensor, timestep: Tensor, batch: Batch, rows: slice, guidance: float) -> Tensor:
    text = TextEmbeds(batch.text.sequence[rows], batch.text.pooled[rows])
    return call(network, x, timestep / 1000, text, guidance)


def schedule(steps: int) -> dict[str, Any]:
    """What FluxPipeline hands to the scheduler."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": calculate_shift(IMAGE_TOKENS)}


class World:
    """A base and two LoRA teachers of their own rank, targets and guidance; the reference's adapters are the truth."""

    guidance = (3.5, (2.0, 5.0))  # the student's, the teachers'

    def __init__(self, folder: Path, work: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        ours = load(folder)
        base, targets = ours.transformer, ours.targets("all")
        self.loras = [
            write_random_lora(base, work / "t0", rank=4, alpha=8.0, targets=targets, std=0.3),
            write_random_lora(base, work / "t1", rank=2, alpha=2.0, targets=["attn.to_q", "attn.to_v"], std=0.3),
        ]
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        self.adapters = adapters_on(base, settings, [(f"t{i}", lora) for i, lora in enumerate(self.loras)])
        for name, parameter in self.adapters.named_parameters():
            if ".lora_B.student." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        self.policy = AdapterPolicy(self.adapters, "student", self.guidance[0])
        self.batch = RoundBatch(
            text=random_text(3),
            negative=None,
            tasks=((0, slice(0, 2)), (1, slice(2, 3))),
            keys=torch.arange(3),
            scale=torch.tensor([0.5, 0.25, 1.5]),
            shape=SHAPE,
            x=torch.randn(3, *SHAPE),
            noise=torch.randn(STEPS, 3, *SHAPE),
        )

    def reference(self, solver: str) -> tuple[Tensor, dict[str, Tensor]]:
        reference = Reference(
            FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler"),
            self.policy,
            [AdapterPolicy(self.adapters, f"t{i}", guidance) for i, guidance in enumerate(self.guidance[1])],
            solver=solver,
            steps=STEPS,
            eta=0.7,
            schedule=schedule(STEPS),
            predict=predict,
        )
        return reference.round(self.batch), gradients(reference.parameters())

    def engine(self, solver: str, placement: Any) -> tuple[Tensor, dict[str, Tensor]]:
        ours = load(self.folder)
        configs = [
            TeacherConfig(name=f"t{i}", weights=str(lora), prompts="bundled/colour", guidance=self.guidance[1][i])
            for i, lora in enumerate(self.loras)
        ]
        bank = load_teachers(ours, configs, placement)
        config = StudentConfig(rank=RANK, alpha=ALPHA, targets="all", guidance=self.guidance[0])
        student = Student.build(ours, config)
        copy_parameters(dict(self.policy.parameters()), dict(student.named_parameters()))
        table = solver_table(solver, ours.sigmas(STEPS, RESOLUTION), 0.7)
        losses = one_pass(ours, student, bank, self.batch, table, step_weights(table, "kl")).losses
        return losses, gradients(dict(student.named_parameters()))


@pytest.fixture(scope="module")
def world(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(folder, tmp_path_factory.mktemp("loras"))


@pytest.mark.parametrize("solver", ["flow_sde", "ode"])
def test_one_pass_equals_reference(world: World, solver: str) -> None:
    true_losses, truth = world.reference(solver)
    assert float(true_losses.min()) > 0
    assert all(gradient.any() for gradient in truth.values())
    for placement in ("merged", "shared"):
        losses, found = world.engine(solver, placement)
        torch.testing.assert_close(losses, true_losses, rtol=1e-4, atol=0.0)
        assert relative_error(found, truth) <= 1e-5


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(ours: Flux, transformer: Any, x: Tensor, guidance: float | None) -> Tensor:
    table = solver_table("ode", ours.sigmas(6, RESOLUTION), 0.0)
    text = ours.encode(PROMPTS[: len(x)])
    return ours.decode(sample(ours, transformer, text, None, guidance, table, x=x))


def draw_by(pipe: Any, x: Tensor, guidance: float) -> Tensor:
    images: Tensor = pipe(
        PROMPTS[: len(x)],
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2),
        max_sequence_length=TEXT_TOKENS,
        output_type="pt",
    ).images
    return images


def test_draws_the_pipelines_images(folder: Path, schnell: Path, model: Flux) -> None:
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    images, theirs = draw(model, model.transformer, x, 3.5), draw_by(pipeline(folder), x, 3.5)
    assert images.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert float(theirs.std()) > 0.02  # not a flat picture that anything would match
    assert float((images - theirs).abs().max()) <= 2 / 255
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)
    assert float((draw(model, model.transformer, x, 30.0) - theirs).abs().max()) > 1e-3
    fast = load(schnell)
    torch.testing.assert_close(
        draw(fast, fast.transformer, x, 1.0), draw_by(pipeline(schnell), x, 0.0), rtol=0, atol=1e-4
    )


def test_guidance_is_the_pipelines(folder: Path, schnell: Path, model: Flux) -> None:
    """dev takes its number into the transformer, 0 too. schnell reads none: 0, as it is published with, and 1 are
    accepted, and what would be ignored is refused."""
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    pipe, found = pipeline(folder), []
    for guidance in (0.0, 1.0, 3.5):
        found.append(draw(model, model.transformer, x, guidance))
        torch.testing.assert_close(found[-1], draw_by(pipe, x, guidance), rtol=0, atol=1e-4)
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(found, 2))
    assert torch.equal(draw(model, model.transformer, x, None), found[1])
    fast, pipe = load(schnell), pipeline(schnell)
    for scale in (0.0, 1.0):
        torch.testing.assert_close(draw(fast, fast.transformer, x, scale), draw_by(pipe, x, scale), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"guidance 3\.5 with family 'flux', which has none; give 1"):
        draw(fast, fast.transformer, x, 3.5)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_pipeline_draws_with_the_exported_student(folder: Path, tmp_path: Path, targets: str) -> None:
    ours = load(folder)
    student = Student.build(ours, StudentConfig(rank=RANK, alpha=ALPHA, targets=targets, guidance=3.5))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    student.ema.update(0, 0.0)
    student_writer(student)(tmp_path)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))
    with student.ema_weights() as transformer:
        images = draw(ours, transformer, x, 3.5)
    pipe = pipeline(folder)
    base = draw_by(pipe, x, 3.5)
    pipe.load_lora_weights(tmp_path)
    assert float((images - draw_by(pipe, x, 3.5)).abs().max()) <= 2 / 255
    assert float((images - base).abs().max()) > 10 / 255


def test_decode_in_chunks_is_decode_at_once(model: Flux, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(5, *SHAPE)
    whole = model.decode(z)
    calls: list[int] = []
    decode = model.vae.decode

    def counted(z: Tensor, **options: Any) -> Any:
        calls.append(len(z))
        return decode(z, **options)

    monkeypatch.setattr(model.vae, "decode", counted)
    monkeypatch.setattr(Flux, "_decode_pixels", 2 * RESOLUTION**2)
    torch.testing.assert_close(model.decode(z), whole, rtol=0, atol=1e-5)
    assert calls == [2, 2, 1]


# --- text, levels, shapes, names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, 16])
def test_embeddings_are_the_pipelines(folder: Path, tokens: int | None) -> None:
    length = 512 if tokens is None else tokens
    sequence, pooled, _ = pipeline(folder).encode_prompt(PROMPTS, max_sequence_length=length)
    ours = load(folder, tokens=tokens)
    got = ours.encode(PROMPTS)
    assert got.sequence.shape == (3, length, 32)
    assert ours.text_tokens == length
    torch.testing.assert_close(got.sequence, sequence, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.pooled, pooled, rtol=0, atol=1e-6)
    assert bool((got.sequence[0] - got.sequence[1]).abs().max() > 1e-2)
    ours.release_text_encoders()
    with pytest.raises(RuntimeError, match="encode every prompt before"):
        ours.encode(PROMPTS)
    with pytest.raises(ValueError, match="at least one prompt"):
        ours.encode([])


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_levels_are_the_schedulers(folder: Path, schnell: Path, steps: int) -> None:
    for path in (folder, schnell):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
        scheduler.set_timesteps(**schedule(steps))
        found = meta_model(path, dtype=torch.float32).sigmas(steps, RESOLUTION)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, scheduler.sigmas.double(), rtol=0, atol=2e-7)


def test_meta_model_agrees_with_load(folder: Path, schnell: Path) -> None:
    for path in (folder, schnell):
        for tokens in (None, 16):
            whole = load(path, tokens=tokens)
            meta = meta_model(path, dtype=torch.float32, max_sequence_length=tokens)
            check_meta_model(whole, meta)
            assert meta.latent_shape(RESOLUTION) == SHAPE
            assert meta.image_tokens(RESOLUTION) == IMAGE_TOKENS
            assert meta.guidance_kind == whole.guidance_kind
            assert meta.targets("all") == whole.targets("all")


def test_full_size() -> None:
    dev = meta_model(DEV, dtype=torch.bfloat16)
    assert sum(p.numel() for p in dev.transformer.parameters()) == 11_901_408_320
    assert len(dev.blocks(dev.transformer)) == 19 + 38
    assert (dev.guidance_kind, dev.text_tokens) == ("embedded", 512)
    assert (dev.latent_shape(512), dev.image_tokens(512)) == ((16, 64, 64), 1024)
    levels = [1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0]
    assert dev.sigmas(6, 512).tolist() == pytest.approx(levels, abs=5e-7)
    attention = lora_modules(dev.transformer, dev.targets("attention"))
    assert len(attention) == 19 * 8 + 38 * 3
    everything = lora_modules(dev.transformer, dev.targets("all"))
    assert len(everything) == len(attention) + 19 * 4 + 38 * 2
    assert everything["single_transformer_blocks.37.proj_out"] == (5 * 3072, 3072)


@pytest.mark.parametrize("kind", ["attention", "all"])
def test_peft_finds_the_same_modules(model: Flux, kind: str) -> None:
    wanted = set(lora_modules(model.transformer, model.targets(kind)))
    wrapped = get_peft_model(copy.deepcopy(model.transformer), LoraConfig(r=1, target_modules=model.targets(kind)))
    assert set(wrapped.targeted_module_names) == wanted
    assert "proj_out" not in wanted
    assert all(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in wanted)
    assert len(wanted) == {"attention": 8 + 2 * 3, "all": 8 + 4 + 2 * 5}[kind]
    assert model.targets(["attn.to_q"]) == ["attn.to_q"]
    with pytest.raises(ValueError, match=r"unknown set 'mlp'.*attention, all"):
        model.targets("mlp")


def test_pack_is_the_pipelines() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 8))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "FluxFillPipeline"}, "family 'flux' needs FluxPipeline"),
        ("model_index.json", {"text_encoder_2": [None, None]}, "lists no 'text_encoder_2'"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "sets use_karras_sigmas=True"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "sets invert_sigmas=True"),
    ],
)
def test_other_pipelines(folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], said: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copied / part, **changes)
    attempts: list[Callable[..., Flux]] = [Flux.meta, partial(Flux.load, device="cpu")]
    for attempt in attempts:
        with pytest.raises(ValueError, match=said) as caught:
            attempt(copied, dtype=torch.float32)
        assert str(copied) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_lengths_and_resolutions(folder: Path, schnell: Path, model: Flux) -> None:
    for path, tokens in ((folder, 0), (folder, 513), (schnell, 257)):
        with pytest.raises(ValueError, match=rf"max_sequence_length is {tokens}; FLUX\.1-\w+ takes 1 to \d+ T5 tokens"):
            load(path, tokens=tokens)
    with pytest.raises(ValueError, match=r"resolution 72 is not a multiple of 16.*try 64 or 80"):
        model.latent_shape(72)
    with pytest.raises(ValueError, match="resolution 0 is not a multiple"):
        model.image_tokens(0)


@pytest.mark.parametrize("placement", ["merged", "shared"])
def test_a_lora_of_another_width(folder: Path, tmp_path: Path, placement: Any) -> None:
    wider = tiny_flux_transformer(num_attention_heads=4)
    lora = write_random_lora(wider, tmp_path / "lora", rank=2, alpha=2.0, targets=["attn.to_q"], std=0.1)
    teacher = TeacherConfig(name="wide", weights=str(lora), prompts="bundled/colour")
    with pytest.raises(ValueError, match=r"teacher 'wide'.*changes .*attn\.to_q by \(64, 64\).*\(32, 32\)") as caught:
        load_teachers(load(folder), [teacher], placement)
    assert "\n" not in str(caught.value)


def test_recipe() -> None:
    config = read_config(package_file("recipes", "flux-mopd.yaml"))
    assert (config.model.path, config.model.resolution, config.model.dtype) == (DEV, 512, "bfloat16")
    assert {config.student.guidance, *(teacher.guidance for teacher in config.teachers)} == {3.5}
    assert (config.student.rank, config.student.alpha, config.engine.placement) == (32, 64, "shared")
    dev = meta_model(config.model.path, dtype=torch.bfloat16, max_sequence_length=config.model.max_sequence_length)
    assert dev.latent_shape(config.model.resolution) == (16, 64, 64)
    assert len(lora_modules(dev.transformer, dev.targets(config.student.targets))) == 266
