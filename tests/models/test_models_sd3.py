"""The SD3 family against the diffusers pipeline it wraps, and its errors."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd_fast.models import SD3, TextEmbeds, load_model
from tests.family_checks import COMPILERS, STEPS, check_compiled, check_guidance
from tests.tiny import save_tiny

PROMPTS = ["a red square", "two blue circles", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "with_t5", t5=True)


@pytest.fixture(scope="module")
def model(folder) -> SD3:
    loaded = load_model(folder, device="cpu", dtype=torch.float32)
    assert isinstance(loaded, SD3)
    return loaded


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pipeline(folder: Path):
    from diffusers import StableDiffusion3Pipeline

    # diffusers wants to be told of every part that a folder leaves out.
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(path, **options) -> SD3:
    loaded = load_model(path, device="cpu", dtype=torch.float32, **options)
    assert isinstance(loaded, SD3)
    return loaded


def sample(model: SD3, x: torch.Tensor, prompts: list[str], guidance: float, steps: int) -> torch.Tensor:
    """Euler with guidance, by the model's own velocity and levels."""
    text, negative = model.encode(prompts), model.encode([""]).expand(len(prompts))
    sigmas = model.sigmas(steps, 64).float()
    for s, n in itertools.pairwise(sigmas):
        cond, uncond = (model.velocity(model.transformer, x, s, t) for t in (text, negative))
        x = x + (n - s) * (uncond + guidance * (cond - uncond))
    return x


@pytest.mark.parametrize("t5", [False, True])
def test_reproduces_the_pipeline(folder, t5_folder, t5):
    """Embeddings, levels, velocity and decoder in one: our Euler loop gives the pipeline's images."""
    path = t5_folder if t5 else folder
    ours = load(path)
    tokens = 128 if t5 else 0
    assert ours.text_tokens == 77 + tokens
    x = torch.randn(2, *ours.latent_shape(64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = ours.decode(sample(ours, x, PROMPTS[:2], 4.5, 5))
    theirs = pipeline(path)(
        PROMPTS[:2],
        negative_prompt=["", ""],
        height=64,
        width=64,
        num_inference_steps=5,
        guidance_scale=4.5,
        max_sequence_length=tokens,
        latents=x.clone(),
        output_type="pt",
    ).images
    assert images.shape == (2, 3, 64, 64)
    assert float(theirs.std()) > 0.02  # not a flat picture that anything would match
    torch.testing.assert_close(images, theirs, rtol=0, atol=2e-5)


def test_guidance_is_the_pipelines(model, folder):
    """7 is the pipeline's own default; up to 1 it makes no negative pass."""
    pipe = pipeline(folder)

    def theirs(x, prompts, scale):
        return pipe(
            list(prompts),
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            max_sequence_length=0,
            latents=x.clone(),
            output_type="pt",
        ).images

    check_guidance(model, theirs, [[0.0, 0.5, 1.0], [1.5], [4.5], [7.0]])


@pytest.mark.parametrize("tokens", [None, 0, 16])
def test_embeddings_are_the_pipelines(t5_folder, folder, tokens):
    for path in (folder, t5_folder):
        ours = load(path, max_sequence_length=tokens)
        pipe = pipeline(path)
        length = ours.text_tokens - 77
        if length == 0:
            pipe.text_encoder_3 = None  # a T5 tokenizer cannot produce zero tokens
        sequence, _, pooled, _ = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        got = ours.encode(PROMPTS)
        assert got.sequence.shape == (3, 77 + length, 32)
        torch.testing.assert_close(got.sequence, sequence, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.pooled, pooled, rtol=0, atol=1e-6)
        assert not got.sequence.requires_grad
        assert bool((got.sequence[0] - got.sequence[1]).abs().max() > 1e-2)


def test_velocity_keeps_the_timestep_whole(model):
    seen = {}

    def spy(module, args, kwargs):
        seen.update(kwargs)

    hook = model.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    text = model.encode(PROMPTS)
    x = torch.randn(3, *model.latent_shape(64))
    level = 0.9601293
    try:
        one = model.velocity(model.transformer, x, torch.tensor(level), text)
        assert seen["timestep"].dtype == torch.float32
        assert seen["timestep"].tolist() == pytest.approx([960.1293] * 3, abs=1e-4)
        each = model.velocity(model.transformer, x, torch.full((3,), level), text)
        mixed = model.velocity(model.transformer, x, torch.tensor([level, 0.5, 0.1]), text)
    finally:
        hook.remove()
    torch.testing.assert_close(one, each, rtol=0, atol=0)
    torch.testing.assert_close(one[0], mixed[0], rtol=0, atol=1e-6)
    truncated = model.velocity(model.transformer, x, torch.tensor(0.96), text)
    assert bool((one - truncated).abs().max() > 1e-6)


def test_lower_precision_keeps_vae_and_timestep_in_float32(folder):
    low = load_model(folder, device="cpu", dtype=torch.bfloat16)
    assert isinstance(low, SD3)
    assert {p.dtype for p in low.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in low.vae.parameters()} == {torch.float32}
    text = low.encode(PROMPTS)
    assert text.sequence.dtype == text.pooled.dtype == torch.bfloat16
    x = torch.randn(3, *low.latent_shape(64))
    v = low.velocity(low.transformer, x, torch.tensor(0.7), text)
    assert v.dtype == torch.bfloat16
    full = load(folder)
    reference = full.velocity(full.transformer, x, torch.tensor(0.7), full.encode(PROMPTS))
    assert float((v.float() - reference).norm() / reference.norm()) < 0.05
    assert low.decode(x.to(torch.bfloat16)).dtype == torch.float32
    # A student kept in float32 is fed float32, whatever the base's dtype.
    assert low.velocity(full.transformer, x, torch.tensor(0.7), text).dtype == torch.float32


def test_components_are_frozen(model):
    assert not model.transformer.training
    assert not any(p.requires_grad for p in model.transformer.parameters())
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert len(model.blocks(model.transformer)) == 2


@pytest.mark.parametrize("backend", COMPILERS)
def test_compiled_blocks(model, tmp_path, backend, monkeypatch):
    check_compiled(model, tmp_path, backend, monkeypatch)


def test_decode_in_chunks_is_decode_at_once(model, monkeypatch):
    z = torch.randn(5, *model.latent_shape(64))
    whole = model.decode(z)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    calls = []
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda z, **k: calls.append(len(z)) or decode(z, **k))
    monkeypatch.setattr(SD3, "_decode_pixels", 2 * 64 * 64)
    torch.testing.assert_close(model.decode(z), whole, rtol=0, atol=1e-5)
    assert calls == [2, 2, 1]


def test_levels_follow_the_schedulers_configuration(copy):
    config = copy / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text())
    values.update(shift=2.0)
    config.write_text(json.dumps(values))
    pipe = pipeline(copy)
    pipe.scheduler.set_timesteps(7)
    torch.testing.assert_close(load(copy).sigmas(7, 64), pipe.scheduler.sigmas.double(), rtol=0, atol=1e-7)
    values.update(use_karras_sigmas=True)
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="sets use_karras_sigmas=True"):
        load(copy)


def test_latent_shape(model):
    assert model.latent_shape(64) == (4, 8, 8)
    assert model.latent_shape(256) == (4, 32, 32)
    with pytest.raises(ValueError, match=r"resolution 72 is not a multiple of 16.*try 64 or 80"):
        model.latent_shape(72)
    with pytest.raises(ValueError, match="at most 256"):
        model.latent_shape(272)


def test_lora_targets_pick_the_published_modules(model):
    names = [name for name, m in model.transformer.named_modules() if isinstance(m, torch.nn.Linear)]

    def picked(kind):
        return {n for n in names if any(n.endswith("." + t) for t in model.targets(kind))}

    # Eight projections a block, but the last block has no to_add_out; attn2 is not among them.
    assert len(picked("attention")) == 2 * 8 - 1
    assert not any("attn2" in n for n in picked("all"))
    feed_forward = picked("all") - picked("attention")
    assert len(feed_forward) == 2 * 4 - 2
    assert all(".ff" in n for n in feed_forward)
    assert model.targets(["to_q"]) == ["to_q"]
    with pytest.raises(ValueError, match=r"unknown set 'mlp'.*attention, all"):
        model.targets("mlp")


def test_released_encoders_say_so(folder):
    ours = load(folder)
    ours.release_text_encoders()
    with pytest.raises(RuntimeError, match="encode every prompt before"):
        ours.encode(["a"])
    with pytest.raises(ValueError, match="at least one prompt"):
        load(folder).encode([])


def test_text_embeds():
    text = TextEmbeds(torch.arange(24.0).view(4, 3, 2), torch.arange(8.0).view(4, 2))
    assert len(text) == 4
    assert torch.equal(text.index([2, 0, 2]).pooled, text.pooled[[2, 0, 2]])
    assert torch.equal(text.index(torch.tensor([3])).sequence, text.sequence[3:])
    part = text.index(slice(1, 3))
    assert part.sequence.data_ptr() == text.sequence[1].data_ptr()
    assert torch.equal(TextEmbeds.cat([part, text]).pooled, torch.cat([text.pooled[1:3], text.pooled]))
    many = text.index(slice(0, 1)).expand(5)
    assert many.sequence.shape == (5, 3, 2)
    assert many.sequence.data_ptr() == text.sequence.data_ptr()
    assert text.to(dtype=torch.bfloat16).pooled.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="only a single row"):
        text.expand(2)


def corrupt_weights(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_index(folder: Path, **changes) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is damaged"),
        (
            lambda f: edit_index(f, _class_name="KolorsPipeline"),
            "'KolorsPipeline' pipeline; supported are StableDiffusion3",
        ),
        (lambda f: edit_index(f, text_encoder_2=[None, None]), "lists no 'text_encoder_2'"),
        (lambda f: shutil.rmtree(f / "vae"), "lacks its component 'vae'"),
        (lambda f: (f / "transformer" / "config.json").unlink(), "component 'transformer'"),
        (corrupt_weights, "component 'transformer'.*cannot be loaded"),
        (drop_tensor, "component 'transformer'.*1 missing keys, e.g. proj_out.weight"),
        (reshape_tensor, "component 'text_encoder'"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "component 'vae'"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("]"), "scheduler_config.json is damaged"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("]"), "component 'tokenizer'"),
    ],
)
def test_damaged_folders_are_named_in_one_line(copy, damage, said):
    damage(copy)
    with pytest.raises(ValueError, match=said) as caught:
        load(copy).encode(["a red square"])
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_other_family_and_length_mistakes(copy, monkeypatch):
    edit_index(copy, _class_name="FluxPipeline")
    with pytest.raises(ValueError, match="family 'sd3' needs StableDiffusion3Pipeline"):
        load(copy, family="sd3")
    with pytest.raises(ValueError, match="did you mean 'sd3'"):
        load(copy, family="sd35")
    with pytest.raises(ValueError, match=r"0 .* to 512"):
        SD3.load(copy, device="cpu", dtype=torch.float32, max_sequence_length=1000)


def test_missing_paths_say_what_to_do(tmp_path, monkeypatch):
    absent = tmp_path / "no" / "such"
    with pytest.raises(ValueError, match="does not exist") as caught:
        load(absent)
    assert str(absent) in str(caught.value)
    (tmp_path / "file.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file; give the pipeline's folder"):
        load(tmp_path / "file.safetensors")
    monkeypatch.setattr("opd_fast.config.paths.ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"python -m opd_fast\.worlds\.build"):
        load("bundled")
    save_tiny(tmp_path / "pipeline")
    assert load("bundled").name == "sd3"


def test_hub_ids_respect_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"nobody/nothing is neither a folder nor in the hub's cache.*HF_HUB_OFFLINE"):
        load("nobody/nothing")
