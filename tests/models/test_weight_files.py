"""Weights as diffusers and other programs save them: variants, shards, wrapped names, one file; each loads to the bit,
or is refused with its cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from opd_fast.models import load_model, meta_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.load import check_weights, load_with_source
from opd_fast.models.pipeline_folder import check_index, resolve_pipeline
from opd_fast.models.sd3 import SD3
from opd_fast.models.weight_files import find_weights
from tests import tiny_qwen, tiny_z_image
from tests.family_checks import edit
from tests.models.test_module_names import WRAPPED
from tests.tiny import save_tiny, tiny_pipeline, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline

LOAD = partial(load_model, device="cpu")
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NETWORKS = ("transformer", "vae", "text_encoder")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("plain") / "pipeline")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def base(plain: Path) -> DiffusionModel:
    return LOAD(plain, dtype=torch.float32)


def state_equal(found: nn.Module, want: nn.Module) -> None:
    mine, theirs = found.state_dict(), want.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def refused(attempt: Callable[[], Any], *said: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        attempt()
    line = str(caught.value)
    assert "\n" not in line
    for words in said:
        assert words in line, line
    return line


def renamed(file: Path, name: Callable[[str], str]) -> None:
    save_file({name(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


# --- variants --------------------------------------------------------------------------------------------------------

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": partial(tiny_pipeline, t5=True),
    "flux": tiny_flux_pipeline,
    "qwen_image": tiny_qwen.tiny_pipeline,
    "z_image": tiny_z_image.tiny_pipeline,
}


@pytest.mark.parametrize(
    ("family", "shards"),
    [("sd3", None), ("sd3", "100KB"), ("flux", "100KB"), ("qwen_image", "100KB"), ("z_image", None)],
)
def test_variants_load(family: str, shards: str | None, tmp_path: Path) -> None:
    """As diffusers and transformers name them, in float16: the same as the plain weights in the dtype asked for."""
    pipeline = PIPELINES[family]().to(torch.float16)
    more = {} if shards is None else {"max_shard_size": shards}
    pipeline.save_pretrained(tmp_path / "plain")
    pipeline.save_pretrained(tmp_path / "variant", variant="fp16", **more)
    assert len(list((tmp_path / "variant" / "transformer").glob("*fp16*.safetensors"))) > (shards is not None)
    assert not (tmp_path / "variant" / "transformer" / WEIGHTS).exists()
    for dtype in (torch.float32, torch.bfloat16) if family == "sd3" else (torch.float32,):
        want, found = (LOAD(tmp_path / kind, dtype=dtype) for kind in ("plain", "variant"))
        state_equal(found.transformer, want.transformer)
        state_equal(found.vae, want.vae)
        assert torch.equal(found.encode(["a red circle"]).sequence, want.encode(["a red circle"]).sequence)
    teacher, _ = load_with_source(want, str(tmp_path / "variant"), what="weights")
    state_equal(teacher, want.transformer)


def test_which_variant(folder: Path, base: DiffusionModel) -> None:
    """Plain weights come first, then the only variant, then that of the dtype; else the user says which."""
    where = folder / "transformer"
    for variant, factor in (("fp16", 2.0), ("bf16", 3.0)):
        tensors = {k: t * factor for k, t in load_file(where / WEIGHTS).items()}
        save_file(tensors, where / f"diffusion_pytorch_model.{variant}.safetensors", metadata={"format": "pt"})
    name, first = next(iter(base.transformer.named_parameters()))

    def scale(dtype: torch.dtype) -> float:
        found = LOAD(folder, dtype=dtype).transformer.get_parameter(name)
        return float((found.float() / first.to(dtype).float()).nanmean())

    assert scale(torch.float16) == pytest.approx(1.0)
    (where / WEIGHTS).unlink()
    assert scale(torch.float16) == pytest.approx(2.0, rel=1e-3)
    assert scale(torch.bfloat16) == pytest.approx(3.0, rel=1e-2)
    refused(lambda: scale(torch.float32), "no plain weights but the variants bf16, fp16", "model.dtype")
    (where / "diffusion_pytorch_model.bf16.safetensors").unlink()
    assert scale(torch.float32) == pytest.approx(2.0)


def test_older_names_of_sharded_variants(tmp_path: Path) -> None:
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    index = tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", files, strict=True))}))
    for file in files:
        save_file({"a": torch.ones(1)}, tmp_path / file)
    found = find_weights(tmp_path, "it")
    assert ([file.name for file in found.files], found.variant) == (files, "fp16")


def test_one_file_behind_an_index(folder: Path, base: DiffusionModel) -> None:
    """A single shard, under its own name or the whole file's."""
    where = folder / "transformer"
    index = where / f"{WEIGHTS}.index.json"
    for shard in (WEIGHTS, "diffusion_pytorch_model-00001-of-00001.safetensors"):
        next(where.glob("*.safetensors")).rename(where / shard)
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(where / shard), shard)}))
        state_equal(LOAD(folder, dtype=torch.float32).transformer, base.transformer)
    index.unlink()
    refused(
        lambda: LOAD(folder, dtype=torch.float32), "has the shard", "no diffusion_pytorch_model.safetensors.index.json"
    )
    (where / shard).rename(where / WEIGHTS)
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))
    refused(lambda: LOAD(folder, dtype=torch.float32), f"weights in {WEIGHTS}, but its index", "delete the index")


def test_a_hub_repository_of_variants_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Variants are fetched only where there is nothing else."""
    asked: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_pipeline("owner/name", NETWORKS) == folder
    assert len(asked) == 1
    (folder / "vae" / WEIGHTS).unlink()
    resolve_pipeline("owner/name", NETWORKS)
    assert asked[-1]["allow_patterns"] == ["vae/*.safetensors*"]
    assert "*.fp16.*" in asked[0]["ignore_patterns"]
    assert "*.fp16.*" not in asked[-1]["ignore_patterns"]
    assert "*.bin" in asked[-1]["ignore_patterns"]


def test_a_transformers_own_repository_of_variants(
    monkeypatch: pytest.MonkeyPatch, plain: Path, base: DiffusionModel, tmp_path: Path
) -> None:
    """The first look leaves the variant out; the second fetches it."""
    whole = plain / "transformer"

    def download(repo: str, *, ignore_patterns: list[str], **options: Any) -> str:
        shutil.copy(whole / "config.json", tmp_path)
        if "*.fp16.*" not in ignore_patterns:
            shutil.copy(whole / WEIGHTS, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    state_equal(load_with_source(base, "owner/transformer", what="weights")[0], base.transformer)


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (NF4, "quantised by bitsandbytes (nf4, 4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes (int8)"),
        ({"quant_method": "torchao", "quant_type": "int4wo"}, "quantised by torchao (int4wo)"),
        ({"quant_method": "quanto", "weights_dtype": "float8"}, "quantised by quanto (float8)"),
        ({"quant_method": "gguf"}, "quantised by gguf"),
    ],
)
def test_quantised_weights_are_named(folder: Path, base: DiffusionModel, settings: Any, said: str) -> None:
    for name in NETWORKS:
        file = folder / name / "config.json"
        before = file.read_text()
        edit(file, quantization_config=settings)
        attempts: list[Callable[[], Any]] = [lambda: LOAD(folder, dtype=torch.float32)]
        attempts.append(lambda: meta_model(folder, dtype=torch.float32))
        if name == "transformer":
            attempts.append(lambda: check_weights(base, str(folder), what="weights"))
        for attempt in attempts:
            line = refused(attempt, said, name, "bfloat16 or float16", "dequantize()")
            assert "fetch" not in line
            assert ("is not installed; install" in line) == (name == "text_encoder")
        file.write_text(before)


def test_a_quantised_text_encoder_is_left_to_its_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It only ever stands frozen."""
    edit(folder / "text_encoder" / "config.json", quantization_config=NF4)
    found = {"bitsandbytes": object()}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: found.get(name))
    meta_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("diffusion_pytorch_model.bin", "pickles, which can run code"),
        ("model.ckpt", "pickles, which can run code"),
        ("flux1-Q4_0.gguf", "GGUF's quantised weights"),
        ("model.msgpack", "Flax's weights"),
        ("sd3.safetensors", "diffusers reads diffusion_pytorch_model.safetensors; rename it"),
    ],
)
def test_other_weights_are_named(folder: Path, base: DiffusionModel, name: str, said: str) -> None:
    (folder / "transformer" / WEIGHTS).rename(folder / "transformer" / name)
    for attempt in (
        lambda: LOAD(folder, dtype=torch.float32),
        lambda: check_weights(base, str(folder), what="weights"),
    ):
        assert "fetch" not in refused(attempt, said, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", "from_single_file(FILE).save_pretrained(FOLDER)"),
        ("model.gguf", "GGUF holds quantised weights"),
        ("model.txt", "the one with model_index.json"),
    ],
)
def test_a_file_as_the_model(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    refused(lambda: LOAD(tmp_path / name, dtype=torch.float32), "is a file; give the pipeline's folder", said)
    if not name.endswith("txt"):
        refused(lambda: LOAD(tmp_path, dtype=torch.float32), "no model_index.json", name, said)


def test_components_and_classes(folder: Path, plain: Path) -> None:
    index = folder / "model_index.json"
    whole = json.loads(index.read_text())

    def attempt() -> Any:
        return meta_model(folder, dtype=torch.float32)

    edit(index, text_encoder=[None, None])
    refused(attempt, "lists no 'text_encoder'", "saved without it")
    index.write_text(json.dumps({key: value for key, value in whole.items() if key != "text_encoder"}))
    refused(attempt, "lists no 'text_encoder'", "though its folder is there", '"text_encoder": [LIBRARY, CLASS]')
    edit(index, _class_name=["my_pipeline", "Mine"])
    refused(attempt, "a pipeline class of its own (my_pipeline.Mine)", "model.family as package.module:Class")
    index.write_text(json.dumps(whole))
    for name, change, kind in (
        ("transformer", {"_class_name": "MyTransformer"}, "is a MyTransformer, and this family needs a SD3Transformer"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny, and this family needs a AutoencoderKL"),
        ("text_encoder", {"model_type": "gemma2"}, "is a gemma2, and this family needs a clip_text_model"),
    ):
        edit(folder / name / "config.json", **change)
        refused(attempt, f"component '{name}'", kind)
        shutil.copy(plain / name / "config.json", folder / name)
    attempt()
    refused(lambda: meta_model(folder / "transformer", dtype=torch.float32), "one component alone", "the folder above")


def test_headers_tell_what_loading_would(folder: Path) -> None:
    """`check_files` reads no tensor."""

    def check() -> None:
        SD3.check_files(folder, dtype=torch.float32)

    check()
    assert check_index(folder, SD3)["transformer"][1] == "SD3Transformer2DModel"
    for name in NETWORKS:
        file = next((folder / name).glob("*.safetensors"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        refused(check, str(file), "damaged or cut short")
        file.write_bytes(whole)
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    key = "transformer_blocks.0.attn.to_q.weight"
    for changed, said in (
        ({k: t for k, t in tensors.items() if k != key}, f"1 missing keys, e.g. {key}"),
        ({**tensors, "more": torch.ones(1)}, "1 unexpected keys, e.g. more"),
        ({**tensors, key: torch.ones(3, 3)}, f"{key} of shape [3, 3], not [32, 32]"),
        ({**tensors, key: tensors[key].to(torch.int8)}, f"{key} is I8, not a floating-point number"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        refused(check, "component 'transformer'", said)


# --- wrapped names, and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_whole_weights_under_wrapped_names(folder: Path, base: DiffusionModel, tmp_path: Path, wrapper: str) -> None:
    """As base, as a teacher's folder and as a teacher's file."""

    def name(key: str) -> str:
        module, _, leaf = key.rpartition(".")
        return f"{WRAPPED[wrapper](module)}.{leaf}"

    file = folder / "transformer" / WEIGHTS
    renamed(file, name)
    state_equal(LOAD(folder, dtype=torch.float32).transformer, base.transformer)
    want = tiny_transformer(0).to(torch.bfloat16)
    low = LOAD(folder, dtype=torch.bfloat16)
    state_equal(low.transformer, want)
    for weights in (folder, folder / "transformer", file):
        check_weights(base, str(weights), what="weights")
        loaded, source = load_with_source(base, str(weights), what="weights")
        state_equal(loaded, base.transformer)
        assert source.format == "transformer"


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model.", "diffusion_model.module."])
def test_a_file_of_all_weights(plain: Path, base: DiffusionModel, tmp_path: Path, prefix: str) -> None:
    file = tmp_path / "teacher.safetensors"
    tensors = {k: t + 1 for k, t in load_file(plain / "transformer" / WEIGHTS).items()}
    save_file({prefix + key: tensor for key, tensor in tensors.items()}, file)
    loaded, source = load_with_source(base, str(file), what="weights")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.state_dict().items())
    assert len(loaded.state_dict()) == len(tensors) == source.tensors
    assert next(loaded.parameters()).requires_grad is False


def test_files_that_are_no_transformer_of_the_base(plain: Path, base: DiffusionModel, tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"

    def attempt() -> None:
        check_weights(base, str(file), what="weights")

    original = {f"model.diffusion_model.joint_blocks.{i}.x_block.attn.qkv.weight": torch.ones(2, 2) for i in range(3)}
    save_file(original, file)
    refused(attempt, "none of the names of a SD3Transformer2DModel", "SD3Transformer2DModel.from_single_file(FILE)")
    tensors = load_file(plain / "transformer" / WEIGHTS)
    key = "transformer_blocks.0.attn.to_q"
    save_file({k: t for k, t in tensors.items() if not k.startswith(key)}, file)
    refused(attempt, "2 missing keys", f"{key}.bias")
    save_file({k.replace(key, f"{key}.base_layer"): t for k, t in tensors.items()}, file)
    refused(attempt, "saved with PEFT's adapters on it", "merge_and_unload")
    save_file({**tensors, f"module.{key}.weight": torch.ones(32, 32)}, file)
    refused(attempt, f"holds {key}.weight twice")
    file.rename(file.with_suffix(".gguf"))
    refused(
        lambda: check_weights(base, str(file.with_suffix(".gguf")), what="weights"),
        "GGUF's quantised weights",
        "diffusers",
    )
    shutil.copy(plain / "transformer" / WEIGHTS, file)
    refused(lambda: check_weights(base, str(tmp_path), what="weights"), "it holds teacher.safetensors: name that file")
    assert isinstance(load_with_source(base, str(file), what="weights")[0], SD3Transformer2DModel)
