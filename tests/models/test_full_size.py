"""Published models at their full size, from the configurations in the package: counts, shapes, levels, the dry run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opd_fast import train
from opd_fast.distributed.plan import lora_modules
from opd_fast.models import DiffusionModel, meta_model


@dataclass(frozen=True)
class Published:
    repo: str
    parameters: int
    modules: dict[str, int]
    """LoRA modules of each set of targets."""
    tokens: tuple[int, int]
    """Of an image of 1024 pixels, of text."""
    sigmas: list[float]
    """Of 4 steps at 1024 pixels."""
    guidance: str = "cfg"


MODELS = [
    Published(
        "stabilityai/stable-diffusion-3.5-medium",
        2_243_171_520,
        {"attention": 24 * 8 - 1, "all": 24 * 12 - 3},  # the last block has neither to_add_out nor ff_context
        (4096, 77 + 128),
        [1.0, 0.857692, 0.602151, 0.008929, 0.0],
    ),
    Published(
        "stabilityai/stable-diffusion-3.5-large",
        8_056_627_520,
        {"attention": 38 * 8 - 1, "all": 38 * 12 - 3},
        (4096, 77 + 128),
        [1.0, 0.857692, 0.602151, 0.008929, 0.0],
    ),
    Published(
        "black-forest-labs/FLUX.1-dev",
        11_901_408_320,
        {"attention": 19 * 8 + 38 * 3, "all": 19 * 12 + 38 * 5},
        (4096, 512),
        [1.0, 0.904531, 0.759511, 0.512843, 0.0],
        guidance="embedded",
    ),
    Published(
        "Qwen/Qwen-Image",
        20_430_401_088,
        {"attention": 60 * 8, "all": 60 * 12},
        (4096, 512),
        [1.0, 0.766709, 0.455614, 0.02, 0.0],
    ),
    Published(
        "Tongyi-MAI/Z-Image-Turbo",
        6_154_908_736,
        {"attention": 34 * 4, "all": 34 * 7},
        (4096, 512),
        [1.0, 0.9, 0.75, 0.5, 0.0],
    ),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.repo.split("/")[1])
def published(request: pytest.FixtureRequest) -> Published:
    found: Published = request.param
    return found


@pytest.fixture(scope="module")
def meta(published: Published) -> DiffusionModel:
    return meta_model(published.repo, dtype=torch.bfloat16)


def test_counts_and_shapes(published: Published, meta: DiffusionModel) -> None:
    assert sum(p.numel() for p in meta.transformer.parameters()) == published.parameters
    modules = {name: len(lora_modules(meta.transformer, meta.targets(name))) for name in meta.lora_targets}
    assert modules == published.modules
    assert meta.latent_shape(1024) == (16, 128, 128)
    assert (meta.image_tokens(1024), meta.text_tokens) == published.tokens
    assert meta.guidance_kind == published.guidance


def test_levels(published: Published, meta: DiffusionModel) -> None:
    assert meta.sigmas(4, 1024).tolist() == pytest.approx(published.sigmas, abs=5e-6)


def test_large_has_no_dual_attention() -> None:
    blocks = {
        size: meta_model(f"stabilityai/stable-diffusion-3.5-{size}", dtype=torch.bfloat16).transformer
        for size in ("medium", "large")
    }
    dual = {size: sum(name.endswith("attn2.to_q") for name, _ in b.named_modules()) for size, b in blocks.items()}
    assert dual == {"medium": 13, "large": 0}


def test_dry_run(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan needs neither weights nor a network, and says the same."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    teachers = "[{name: a, weights: some/teacher, prompts: p.txt}]"
    argv = ["--model.path", published.repo, "--model.resolution", "1024", "--model.dtype", "bfloat16"]
    argv += ["--teachers", teachers, "--student.rank", "16", "--train.samples_per_task", "2", "--dry-run"]
    assert train.main(argv) == 0
    text = " ".join(capsys.readouterr().out.replace("─", " ").split())
    image, words = published.tokens
    for said in (
        f"{image} image + {words} text",
        f"{published.parameters:,} in the transformer",
        f"{published.modules['attention']} LoRA modules of rank 16",
        "(2,16,128,128)",
        f"on the hub, checked when a run begins {published.repo} some/teacher",
    ):
        assert said in text, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.txt"]
