"""Pipeline folders that are not whole, of every family: refused in one line before anything large is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub.utils import filter_repo_objects

from opd_fast.models import load_model, meta_model
from opd_fast.models.lora.load import load_with_source
from opd_fast.models.pipeline_folder import fetch
from tests import tiny_qwen, tiny_z_image
from tests.family_checks import edit
from tests.tiny import save_tiny
from tests.tiny_flux import save_tiny_flux

SAVE: dict[str, Callable[[Path], Path]] = {
    "sd3": partial(save_tiny, t5=True),
    "flux": save_tiny_flux,
    "qwen_image": tiny_qwen.save_tiny,
    "z_image": tiny_z_image.save_tiny,
}
# A configuration that leaves some of the transformer's weights over and misses none.
CUT: dict[str, dict[str, Any]] = {
    "sd3": {"qk_norm": None},
    "flux": {"num_single_layers": 1},
    "qwen_image": {"num_layers": 1},
    "z_image": {"n_layers": 1},
}
META = partial(meta_model, dtype=torch.float32)
LOAD = partial(load_model, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module", params=SAVE)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[family](tmp_path_factory.mktemp(family) / "pipeline")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a network's weights gives another error than the one that a test waits for."""
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("weights were read")

    for kind in (ModelMixin, PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)


def refused(attempt: Callable[[Path], Any], folder: Path, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        attempt(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def components(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.usefixtures("unread")
def test_a_missing_component(copy: Path, tmp_path: Path) -> None:
    for name in components(copy):
        moved = (copy / name).rename(tmp_path / "away")
        for attempt in (META, LOAD):
            refused(attempt, copy, f"lacks its component '{name}'; fetch")
            (copy / name).mkdir()
            refused(attempt, copy, f"lacks its component '{name}'; fetch")
            (copy / name / "other.txt").touch()
            refused(attempt, copy, f"lacks the configuration of its component '{name}'; fetch")
            shutil.rmtree(copy / name)
        moved.rename(copy / name)
    refused(LOAD, copy, "weights were read")


@pytest.mark.usefixtures("unread")
def test_missing_weights(copy: Path) -> None:
    for name in components(copy):
        for file in (copy / name).glob("*.safetensors"):
            pickled = file.rename(file.with_suffix(".bin"))
            refused(LOAD, copy, f"component '{name}'.*no weights in safetensors")
            first, second = (f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2))
            shard = pickled.rename(file.with_name(first))
            index = file.with_name(f"{file.name}.index.json")
            index.write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
            refused(LOAD, copy, f"component '{name}'.*lacks {second}; fetch")
            index.write_text("{}")
            refused(LOAD, copy, "index.json is damaged")
            index.unlink()
            shard.rename(file)


def test_weights_that_the_configuration_cuts_off(family: str, whole: Path, copy: Path) -> None:
    model = LOAD(whole)
    edit(copy / "transformer" / "config.json", **CUT[family])
    refused(LOAD, copy, r"component 'transformer'.*\d+ unexpected keys")
    # As a teacher: weights of a deeper model under the base's configuration.
    shutil.copy(whole / "transformer" / "config.json", copy / "transformer")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({**load_file(file), "layers.9.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    refused(
        lambda folder: load_with_source(model, str(folder), what="teacher"),
        copy,
        r"holds layers\.9\.weight, which the base does not have",
    )


@pytest.mark.parametrize("attempt", [META, LOAD], ids=["meta", "load"])
def test_other_schedulers(family: str, copy: Path, attempt: Callable[[Path], Any]) -> None:
    file = copy / "scheduler" / "scheduler_config.json"
    edit(file, _class_name="FlowMatchHeunDiscreteScheduler")
    refused(attempt, copy, "is a FlowMatchHeunDiscreteScheduler, supported is FlowMatchEuler")
    edit(file, _class_name="FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)
    refused(attempt, copy, "sets use_karras_sigmas=True, which .* does not; switch it off")
    edit(file, use_karras_sigmas=False, num_train_timesteps=500)
    if family == "sd3":  # its transformer is called with the scheduler's timesteps
        assert attempt(copy)._timesteps == 500
    else:
        refused(attempt, copy, "sets num_train_timesteps=500, the published schedule 1000")
    edit(file, num_train_timesteps=1000)
    attempt(copy)


def test_a_scheduler_that_gives_no_numbers(family: str, copy: Path) -> None:
    """Absent keys have diffusers' defaults, for the meta model as for the loaded one."""
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5) if family == "sd3" else scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    for attempt in (META, LOAD):
        torch.testing.assert_close(attempt(copy).sigmas(5, 64), scheduler.sigmas.double(), rtol=0, atol=1e-6)


def test_a_transformer_that_cannot_be_made(family: str, copy: Path) -> None:
    edit(copy / "transformer" / "config.json", **{"n_layers" if family == "z_image" else "num_layers": "many"})
    refused(META, copy, "component 'transformer'.*config.json is damaged")


# --- the hub ---------------------------------------------------------------------------------------------------------


class ProxyError(Exception):
    """As the hub's HTTP library has it: no OSError."""


def test_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> str:
        raise ProxyError("403 Forbidden\nby the proxy")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for attempt in (META, LOAD):
        with pytest.raises(
            ValueError, match=r"nobody/nothing .*could not be fetched .*403 Forbidden\); check"
        ) as caught:
            attempt("nobody/nothing")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_what_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch("owner/name", ["model_index.json", "text_encoder_3/*"]) == tmp_path
    wanted = ["model_index.json", *(f"text_encoder_3/{file}" for file in ("config.json", "model-1-of-2.safetensors"))]
    others = ["sd.safetensors", "vae/config.json", "text_encoder_3/pytorch_model.bin"]
    others += [f"text_encoder_3/model.{middle}safetensors" for middle in ("fp16.", "fp16-1-of-2.")]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted
