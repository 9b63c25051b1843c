"""The aesthetic predictor: values against its published head behind transformers' CLIP, and refusals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward
from opd_fast.rewards.aesthetic import Aesthetic, read_head
from tests.tiny_clip import pictures, processor_pixels_of, save_clip

PROMPTS = [Prompt(f"prompt {i}") for i in range(3)]
REMEDY = "run: hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth, or give the path of that file"


class Head(nn.Module):
    """The published head as its authors wrote it: the places of its layers are the names in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_clip(path, projection=768)
    return path


@pytest.fixture(scope="module")
def head() -> nn.Module:
    """A head whose layers keep the length of vectors about as it is."""
    head = Head().eval()
    torch.manual_seed(0)
    for layer in head.layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.out_features**-0.5)
            nn.init.normal_(layer.bias, std=0.1)
    return head


@pytest.fixture
def file(tmp_path: Path, head: nn.Module) -> Path:
    torch.save(head.state_dict(), tmp_path / "head.pth")
    return tmp_path / "head.pth"


def settings(folder: Path, file: Path, **changes: Any) -> RewardModelsConfig:
    return RewardModelsConfig(clip=str(folder), aesthetic=str(file), **changes)


def plain(folder: Path, head: nn.Module, images: Tensor) -> Tensor:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        # Not `get_image_features`, which the reward itself asks.
        vectors = model.visual_projection(model.vision_model(processor_pixels_of(folder, images)).pooler_output)
        values: Tensor = head.layers(vectors / vectors.norm(dim=-1, keepdim=True)).squeeze(1)  # type: ignore[operator]
    return values


@pytest.mark.parametrize("size", [(512, 512), (64, 64), (45, 96), (97, 33)])
def test_values_are_those_of_the_published_head(
    folder: Path, file: Path, head: nn.Module, size: tuple[int, int]
) -> None:
    images = pictures(3, *size)
    wanted = plain(folder, head, images)
    found = get_reward("aesthetic", settings(folder, file))(images, PROMPTS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.03


def test_a_head_in_safetensors_and_one_in_a_checkpoint(file: Path, head: nn.Module, tmp_path: Path) -> None:
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    torch.save({"state_dict": {f"module.{k}": v.half() for k, v in head.state_dict().items()}}, tmp_path / "half.pth")
    for other, dtype in (("head.pth", torch.float32), ("head.safetensors", torch.float32), ("half.pth", torch.float16)):
        layers = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
        for (weight, bias), layer in zip(read_head(tmp_path / other), layers, strict=True):
            assert torch.equal(weight, layer.weight.to(dtype).float())
            assert torch.equal(bias, layer.bias.to(dtype).float())


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_is_near(folder: Path, file: Path, dtype: str, most: float) -> None:
    """Only the CLIP computes in half precision."""
    images = pictures(3, 64, 64)
    exact = Aesthetic(settings(folder, file))(images, PROMPTS)
    reward = Aesthetic(settings(folder, file, dtype=dtype))
    found = reward(images, PROMPTS)
    assert found.dtype == reward._head[0][0].dtype == torch.float32
    assert 0 < (found - exact).abs().max() < most


def test_the_batch_size_does_not_matter(folder: Path, file: Path) -> None:
    images = pictures(5, 40, 64)
    prompts = [Prompt("")] * 5
    wanted = torch.cat([Aesthetic(settings(folder, file))(images[i : i + 1], prompts[:1]) for i in range(5)])
    for batch in (1, 2, 16):
        found = Aesthetic(settings(folder, file, batch=batch))(images, prompts)
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)


def test_what_the_values_depend_on(folder: Path, file: Path) -> None:
    found = Aesthetic(settings(folder, file)).identity()
    assert found == {"clip": str(folder), "aesthetic": str(file), "dtype": "auto"}


# --- refusals --------------------------------------------------------------------------------------------------------


def narrower(state: dict[str, Tensor]) -> Any:
    return {**state, "layers.0.weight": torch.zeros(1024, 512)}


def with_one_more(state: dict[str, Tensor]) -> Any:
    return {**state, "layers.8.weight": torch.zeros(1)}


def without_one(state: dict[str, Tensor]) -> Any:
    return {name: weight for name, weight in state.items() if name != "layers.6.bias"}


def no_weights(state: dict[str, Tensor]) -> Any:
    return ["layers.0.weight"]


BAD: dict[Callable[[dict[str, Tensor]], Any], str] = {
    narrower: "layers.0.weight has the shape (1024, 512), not (1024, 768)",
    with_one_more: "it also has layers.8.weight",
    without_one: "it lacks layers.6.bias",
    no_weights: "holds no weights by name",
}


@pytest.mark.parametrize(("change", "problem"), BAD.items())
def test_another_head_is_refused(
    folder: Path, file: Path, head: nn.Module, change: Callable[[dict[str, Tensor]], Any], problem: str
) -> None:
    torch.save(change(head.state_dict()), file)
    with pytest.raises(UserError) as caught:
        Aesthetic(settings(folder, file))(pictures(1, 64, 64), PROMPTS[:1])
    assert str(caught.value).startswith(f"reward_models.aesthetic: {file} ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith(REMEDY)


class Runs:
    """What a pickle may hold: a call that is made when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))

    def __init__(self, path: Path) -> None:
        self.path = str(path)


@pytest.mark.parametrize("what", ["cut short", "empty", "a page", "a pickle that runs code"])
def test_a_damaged_file_is_refused(folder: Path, file: Path, tmp_path: Path, what: str) -> None:
    match what:
        case "cut short":
            file.write_bytes(file.read_bytes()[:10000])
        case "empty":
            file.write_bytes(b"")
        case "a page":
            file.write_text("<html>404: not found</html>")
        case "a pickle that runs code":
            file.write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError) as caught:
        Aesthetic(settings(folder, file))(pictures(1, 64, 64), PROMPTS[:1])
    assert str(caught.value).startswith(f"reward_models.aesthetic: {file} cannot be read (")
    assert str(caught.value).endswith(REMEDY)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_found_by_the_check(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^reward_models.aesthetic: .*/nothing\.pth does not exist; give a path"):
        Aesthetic(settings(folder, tmp_path / "nothing.pth")).check()
    with pytest.raises(UserError, match=r"^reward_models.clip: .*/nowhere does not exist; give a path"):
        Aesthetic(settings(tmp_path / "nowhere", tmp_path)).check()


def test_a_smaller_clip_is_refused(file: Path, tmp_path: Path) -> None:
    """CLIP ViT-B/32 has 512 numbers a vector; the head would not fit."""
    save_clip(tmp_path / "small", projection=512)
    with pytest.raises(UserError) as caught:
        Aesthetic(settings(tmp_path / "small", file))(pictures(1, 64, 64), PROMPTS[:1])
    assert str(caught.value) == (
        f"reward_models.clip: {tmp_path / 'small'} makes vectors of 512 numbers, and the aesthetic head takes those of "
        "CLIP ViT-L/14, 768; run: hf download openai/clip-vit-large-patch14, or give the path of such a folder"
    )
