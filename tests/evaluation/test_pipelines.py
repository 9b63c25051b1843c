"""Pipelines that the engine has no family for are drawn by diffusers: SD-XL, with LoRAs as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opd_fast import evaluate
from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards import get_reward
from opd_fast.training.evaluation import task_keys
from tests.tiny_sdxl import save_tiny_sdxl, save_unet_lora

PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(autouse=True)
def _own_judgements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))


def run(pipeline: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    argv = ["--model", str(pipeline), "--prompts", str(tmp_path / "p.txt"), "--rewards", "colour", "--steps", "2"]
    out = tmp_path / "out"
    assert evaluate.main([*argv, "--resolution", "32", "--out", str(out), *more]) == 0
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def test_images_are_those_of_the_pipeline(pipeline: Path, tmp_path: Path) -> None:
    """Also one at a time: each image has a generator of its own, made from the evaluation's noise keys."""
    from diffusers import StableDiffusionXLPipeline

    found = run(pipeline, tmp_path, "--guidance", "1,3", "--batch", "2")
    own = StableDiffusionXLPipeline.from_pretrained(pipeline)
    own.set_progress_bar_config(disable=True)
    keys = task_keys(0, "p", 3)
    for guidance in (1.0, 3.0):
        images = [
            own(
                prompt=text,
                num_inference_steps=2,
                guidance_scale=guidance,
                height=32,
                width=32,
                output_type="pt",
                generator=torch.Generator("cpu").manual_seed(int(key) & (2**63 - 1)),
            ).images
            for text, key in zip(PROMPTS, keys, strict=True)
        ]
        expected = get_reward("colour")(torch.cat(images), [Prompt(text) for text in PROMPTS])
        row = f"base, guidance {guidance:g}"
        assert found["rows"][row]["colour"] == pytest.approx(float(torch.as_tensor(expected).mean()), abs=1e-5)
    assert found["settings"]["guidance"] == {"base, guidance 1": 1.0, "base, guidance 3": 3.0}


def test_loras_are_rows_and_leave_the_pipeline_as_it_was(pipeline: Path, tmp_path: Path) -> None:
    loras = [str(save_unet_lora(pipeline, tmp_path / name, seed)) for seed, name in enumerate(("bright", "dark"))]
    found = run(pipeline, tmp_path, "--lora", f"base,{','.join(loras)}")
    assert list(found["rows"]) == ["base", "bright", "dark"]
    means = [row["colour"] for row in found["rows"].values()]
    assert len({round(mean, 6) for mean in means}) == 3
    (tmp_path / "alone").mkdir()
    alone = run(pipeline, tmp_path / "alone", "--lora", loras[1], "--judgement-cache", "off")
    assert alone["rewards"]["p"]["colour"] == pytest.approx(means[2], abs=1e-6)


def test_images_are_saved_as_geneval_reads_them(pipeline: Path, tmp_path: Path) -> None:
    run(pipeline, tmp_path)
    found = run(pipeline, tmp_path, "--save-images")  # judged before, but not saved
    assert found["drawn"] == 3
    folder = tmp_path / "out" / "images" / "base" / "p"
    for index, text in enumerate(PROMPTS):
        with Image.open(folder / f"{index:05d}" / "samples" / "0000.png") as picture:
            assert picture.size == (32, 32)
        assert json.loads((folder / f"{index:05d}" / "metadata.jsonl").read_text())["prompt"] == text
    assert run(pipeline, tmp_path, "--save-images")["drawn"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--solver", "dpm2"], "error: solver: dpm2 with a pipeline that diffusers draws, which has its own"),
        (["--lora", "/absent"], "error: lora: /absent cannot be loaded as a LoRA"),
    ],
)
def test_mistakes(
    pipeline: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n")
    argv = ["--model", str(pipeline), "--prompts", str(tmp_path / "p.txt"), "--rewards", "colour", "--resolution", "32"]
    assert evaluate.main([*argv, "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
