"""The images' size where none is given, and what the bundled recipe alone may say about a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from opd_fast import evaluate, train
from opd_fast.config.command_line import parse
from opd_fast.config.paths import package_file
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError
from opd_fast.models import load_model, meta_model
from opd_fast.models.base import ASSETS
from opd_fast.training.setup import prepare
from tests.runs import settings
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux
from tests.tiny_qwen import save_tiny as save_tiny_qwen
from tests.tiny_z_image import save_tiny as save_tiny_z_image

TEACHER = {"name": "a", "weights": "org/a", "prompts": "p.txt"}


@pytest.mark.parametrize(
    ("name", "pixels", "latent"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 1024, (16, 128, 128)),
        ("stabilityai/stable-diffusion-3.5-large", 1024, (16, 128, 128)),
        ("black-forest-labs/FLUX.1-dev", 1024, (16, 128, 128)),
        ("Qwen/Qwen-Image", 1024, (16, 128, 128)),
        ("Tongyi-MAI/Z-Image-Turbo", 1024, (16, 128, 128)),
        ("bundled", 32, (4, 16, 16)),
    ],
)
def test_published_models_have_their_own(name: str, pixels: int, latent: tuple[int, int, int]) -> None:
    meta = meta_model(name, dtype=torch.float32)
    assert meta.resolution(None) == pixels
    assert meta.latent_shape(meta.resolution(None)) == latent
    assert meta.resolution(64) == 64


def test_it_is_what_diffusers_draws(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    save_tiny(tmp_path, sample_size=4)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("x", num_inference_steps=1, guidance_scale=1.0, max_sequence_length=0).images[0]
    assert drawn.size == (32, 32)
    assert load_model(str(tmp_path), device="cpu", dtype=torch.float32).resolution(None) == 32


def test_a_plan_says_it(small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(small_world.read_text().replace(", resolution: 32", ""))
    assert train.main([str(file), "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "resolution: null" in text
    assert "resolution 64 pixels (the pipeline's own), latents (4,8,8)" in text
    assert make_plan(settings(file)).resolution == 64
    assert train.main([str(small_world), "--dry-run"]) == 0
    assert "resolution 32 pixels, latents (4,4,4)" in " ".join(capsys.readouterr().out.split())
    setup = prepare(settings(file), lambda text: None)
    assert setup.shape == (4, 8, 8)


@pytest.mark.parametrize("save", [save_tiny_flux, save_tiny_qwen, save_tiny_z_image])
def test_evaluations_take_it_too(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every family, before weights are read; z_image's small model has too few positions for its own."""
    folder = save(tmp_path / "pipeline")
    (tmp_path / "p.txt").write_text("a red circle\n")
    seen = []

    def load(*arguments: object, **options: object) -> None:
        raise ValueError("loaded")

    meta = meta_model(str(folder), dtype=torch.float32)
    own = meta.resolution(None)
    monkeypatch.setattr(type(meta), "latent_shape", lambda model, resolution: seen.append(resolution))
    monkeypatch.setattr("opd_fast.evaluation.samplers.load_model", load)
    argv = ["--model", str(folder), "--prompts", str(tmp_path / "p.txt"), "--rewards", "colour"]
    with pytest.raises(ValueError, match="loaded"):
        evaluate.main([*argv, "--out", str(tmp_path / "out")])
    assert seen == [own]


def test_a_family_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = meta_model("bundled", dtype=torch.float32)
    monkeypatch.setattr(type(meta), "own_resolution", lambda model: None)
    with pytest.raises(UserError, match=r"model\.resolution: a sd3 model does not state its own; give it in pixels"):
        meta.resolution(None)


# --- the bundled recipe ----------------------------------------------------------------------------------------------


def test_recipes_say_their_resolution() -> None:
    for path in package_file("recipes").glob("*.yaml"):
        for config in parse([path.stem]).configs:
            assert config.model.resolution is not None, path.stem
    assert parse([]).config.model.resolution == 32


def test_another_model_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--model.path", "org/model", "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "error: model.path: org/model is given without teachers, and those of the bundled recipe fit the bundled "
        "pipeline alone; name them with --teachers '[{name: N, weights: W, prompts: P}]', or in a YAML file\n"
    )


def test_another_model_with_its_teachers_has_the_defaults(tmp_path: Path) -> None:
    """Nothing of the bundled recipe: a file that says the same gives the same settings."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.dump({"model": {"path": "org/model"}, "teachers": [TEACHER]}))
    words = ["--model.path", "org/model", "--teachers", yaml.safe_dump([TEACHER], default_flow_style=True)]
    config = parse(words).config
    assert config == parse([str(file)]).config
    assert (config.model.resolution, config.train.lr, config.train.rounds) == (None, 1e-3, 80)
    # Beside the bundled model, and beneath a recipe that is named, everything is as it was.
    assert parse(words[2:]).config.train.lr == parse(["bundled"]).config.train.lr == 2e-3
    assert parse(["bundled", *words]).config.model.resolution == 32


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"teachers": [{**TEACHER, "weights": "bundled/text"}]}, "teachers[0].weights"),
        ({"student": {"start": "bundled/text"}}, "student.start"),
        ({"objective": {"anchor": "bundled/text"}}, "objective.anchor"),
    ],
)
def test_bundled_weights_are_for_the_bundled_model(section: dict[str, object], key: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def write(path: str) -> str:
        file.write_text(yaml.dump({"model": {"path": path}, "teachers": [TEACHER], **section}))
        return str(file)

    said = re.escape(f"{key}: bundled/text is a LoRA of the bundled pipeline, and model.path is org/model; name")
    with pytest.raises(UserError, match=said):
        parse([write("org/model")])
    for path in ("bundled", str(ASSETS / "pipeline")):
        assert parse([write(path)]).config.model.path == path
