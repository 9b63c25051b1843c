"""LoRA files as other programs write them: each gives the delta of PEFT's layout of the same numbers.

The files are written here by each layout's naming rules, for the modules of the families' own transformers (on the meta
device: only names and shapes count). What is no module of diffusers' transformer goes through diffusers' converters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from torch import Tensor, nn

from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.adapters import add_frozen
from opd_fast.models.lora.files import LoraWeights, match, read_lora, save_lora
from tests.tiny import tiny_transformer

RANK, ALPHA = 2, 3.0
Pairs = dict[str, tuple[Tensor, Tensor]]
Tensors = dict[str, Tensor]
Models = dict[str, DiffusionModel]


def family(pipeline_class: str, transformer: nn.Module) -> DiffusionModel:
    """As much of a model as reading a LoRA looks at."""
    return cast(DiffusionModel, SimpleNamespace(pipeline_class=pipeline_class, transformer=transformer))


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionModel]:
    from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel

    with torch.device("meta"):
        # FLUX in its own width: diffusers' converter knows no other for the single blocks' fused projection.
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        qwen = QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)
        )
        z_image = ZImageTransformer2DModel(
            dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[4, 6, 6]
        )
        sd3 = tiny_transformer(0)
    return {
        "sd3": family("StableDiffusion3Pipeline", sd3),
        "flux": family("FluxPipeline", flux),
        "qwen_image": family("QwenImagePipeline", qwen),
        "z_image": family("ZImagePipeline", z_image),
    }


def numbers(model: DiffusionModel, names: Sequence[str] | None = None) -> Pairs:
    """Random halves for the named modules of a model; for all of its linear layers by default."""
    generator = torch.Generator().manual_seed(0)
    linear = {name: m for name, m in model.transformer.named_modules() if isinstance(m, nn.Linear)}
    return {
        name: (
            torch.randn(RANK, linear[name].in_features, generator=generator),
            torch.randn(linear[name].out_features, RANK, generator=generator),
        )
        for name in (linear if names is None else names)
    }


def read_as_peft(folder: Path, pairs: Pairs, alpha: float = ALPHA) -> LoraWeights:
    rank = next(iter(pairs.values()))[0].shape[0]
    return read_lora(save_lora(folder / "peft", pairs, rank=rank, alpha=alpha))


def read_file(folder: Path, tensors: Tensors, model: DiffusionModel) -> LoraWeights:
    """Write the tensors as one file, read it for the model, and see that it fits."""
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "lora.safetensors")
    lora = read_lora(folder / "lora.safetensors", model)
    assert len(match(lora, model.transformer)) == len(lora.tensors)
    return lora


def _square(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> float:
    """The squared norm of sum scale*B@A, which is never formed."""
    a = torch.cat([a.double() for a, _, _ in pairs])
    b = torch.cat([b.double() * scale for _, b, scale in pairs], dim=1)
    return float(((b.T @ b) * (a @ a.T)).sum())


def assert_same(found: LoraWeights, want: LoraWeights, tolerance: float = 1e-6) -> None:
    assert set(found.tensors) == set(want.tensors)
    for module, pair in want.tensors.items():
        mine = (*found.tensors[module], found.scale[module])
        theirs = (*pair, want.scale[module])
        size = _square([theirs])
        assert size > 0
        assert _square([mine, (*pair, -want.scale[module])]) <= tolerance**2 * size, module


def with_alphas(pairs: Pairs, name: Callable[[str], str], halves: tuple[str, str]) -> Tensors:
    """{name(MODULE).HALF.weight, name(MODULE).alpha}."""
    tensors: Tensors = {}
    for module, pair in pairs.items():
        tensors |= {f"{name(module)}.{half}.weight": t for half, t in zip(halves, pair, strict=True)}
        tensors[f"{name(module)}.alpha"] = torch.tensor(ALPHA)
    return tensors


def without_alphas(pairs: Pairs, name: Callable[[str], str], halves: tuple[str, str]) -> Tensors:
    """As trainers write it that multiply the scale into B."""
    scaled = {module: (a, b * (ALPHA / RANK)) for module, (a, b) in pairs.items()}
    return {key: t for key, t in with_alphas(scaled, name, halves).items() if not key.endswith(".alpha")}


DOWN_UP, A_B = ("lora_down", "lora_up"), ("lora_A", "lora_B")
OWN_NAMES: dict[str, Callable[[Pairs], Tensors]] = {
    "diffusers": lambda p: without_alphas(p, lambda m: f"transformer.{m}", A_B),
    "diffusers, alphas": lambda p: with_alphas(p, lambda m: f"transformer.{m}", A_B),
    "older diffusers": lambda p: without_alphas(p, lambda m: f"transformer.{m}", ("lora.down", "lora.up")),
    "transformer., down and up": lambda p: with_alphas(p, lambda m: f"transformer.{m}", DOWN_UP),
    "ComfyUI": lambda p: with_alphas(p, lambda m: f"diffusion_model.{m}", DOWN_UP),
    "AI-toolkit": lambda p: without_alphas(p, lambda m: f"diffusion_model.{m}", A_B),
    "adapter's name": lambda p: without_alphas(p, lambda m: m, ("lora_A.default", "lora_B.default")),
    "PEFT's keys alone": lambda p: without_alphas(p, lambda m: f"base_model.model.{m}", A_B),
    "kohya": lambda p: with_alphas(p, lambda m: "lora_unet_" + m.replace(".", "_"), DOWN_UP),
    "OneTrainer": lambda p: with_alphas(p, lambda m: "lora_transformer_" + m.replace(".", "_"), DOWN_UP),
}


@pytest.mark.parametrize("layout", OWN_NAMES)
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "z_image"])
def test_the_transformers_own_names(models: Models, tmp_path: Path, name: str, layout: str) -> None:
    model = models[name]
    pairs = numbers(model)
    assert len(pairs) > 20
    found = read_file(tmp_path, OWN_NAMES[layout](pairs), model)
    assert found.format == ("kohya" if layout in ("kohya", "OneTrainer") else "diffusers")
    assert_same(found, read_as_peft(tmp_path, pairs))


# --- names of the original repositories, through diffusers' converters -----------------------------------------------


def joined(pairs: Pairs, modules: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Halves of one fused projection over several modules: each keeps its own rank."""
    a = torch.cat([pairs[m][0] for m in modules])
    return a, torch.block_diag(*(pairs[m][1] for m in modules))


def shared_a(pairs: Pairs, modules: Sequence[str]) -> tuple[Tensor, Tensor]:
    """As a trainer of the fused projection has it: one A for all; ``pairs`` is changed to say the same."""
    a = pairs[modules[0]][0]
    for m in modules:
        pairs[m] = (a.clone(), pairs[m][1])
    return a, torch.cat([pairs[m][1] for m in modules])


FLUX_DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
}
FLUX_SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
FLUX = {
    **{f"double_blocks.0.{k}": [f"transformer_blocks.0.{m}" for m in v] for k, v in FLUX_DOUBLE.items()},
    **{f"single_blocks.0.{k}": [f"single_transformer_blocks.0.{m}" for m in v] for k, v in FLUX_SINGLE.items()},
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "final_layer.linear": ["proj_out"],
}


def as_kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def as_comfy(module: str) -> str:
    return f"diffusion_model.{module}"


def as_original(
    pairs: Pairs, names: dict[str, list[str]], fuse: Any = joined, name: Callable[[str], str] = as_kohya
) -> Tensors:
    """A file in the original names, {original module: the transformer's}, projections fused as they were there."""
    tensors: Tensors = {}
    for key, modules in names.items():
        a, b = fuse(pairs, modules)
        tensors[f"{name(key)}.lora_down.weight"], tensors[f"{name(key)}.lora_up.weight"] = a, b
        tensors[f"{name(key)}.alpha"] = torch.tensor(ALPHA * a.shape[0] / RANK)
    return tensors


@pytest.mark.parametrize("fuse", [joined, shared_a])
@pytest.mark.parametrize("name", [as_kohya, as_comfy])
def test_flux_in_the_original_names(models: Models, tmp_path: Path, fuse: Any, name: Callable[[str], str]) -> None:
    model = models["flux"]
    pairs = numbers(model, [m for modules in FLUX.values() for m in modules])
    found = read_file(tmp_path, as_original(pairs, FLUX, fuse, name), model)
    assert found.format == "converted"
    assert_same(found, read_as_peft(tmp_path, pairs))


def test_flux_final_modulation_is_turned_round(models: Models, tmp_path: Path) -> None:
    """The original has shift before scale, diffusers scale before shift; alpha, which the converter drops, counts."""
    model = models["flux"]
    pairs = numbers(model, ["norm_out.linear"])
    a, b = pairs["norm_out.linear"]
    turned = {"final_layer.adaLN_modulation.1": ["norm_out.linear"]}
    tensors = as_original({"norm_out.linear": (a, b.roll(len(b) // 2, 0))}, turned)
    assert_same(read_file(tmp_path, tensors, model), read_as_peft(tmp_path, pairs))


def test_flux_as_xlabs_writes_it(models: Models, tmp_path: Path) -> None:
    model = models["flux"]
    names = {
        "double_blocks.0.processor.qkv_lora1": FLUX["double_blocks.0.img_attn.qkv"],
        "double_blocks.0.processor.qkv_lora2": FLUX["double_blocks.0.txt_attn.qkv"],
        "double_blocks.0.processor.proj_lora1": FLUX["double_blocks.0.img_attn.proj"],
        "double_blocks.0.processor.proj_lora2": FLUX["double_blocks.0.txt_attn.proj"],
        "single_blocks.0.processor.qkv_lora": FLUX["single_blocks.0.linear1"][:3],
        "single_blocks.0.processor.proj_lora": FLUX["single_blocks.0.linear2"],
    }
    pairs = numbers(model, [m for modules in names.values() for m in modules])
    tensors: Tensors = {}
    for key, modules in names.items():
        tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = shared_a(pairs, modules)
    found = read_file(tmp_path, tensors, model)
    assert found.format == "converted"
    assert_same(found, read_as_peft(tmp_path, pairs, alpha=RANK))


@pytest.mark.parametrize("fuse", [joined, shared_a])
def test_z_image_in_the_original_names(models: Models, tmp_path: Path, fuse: Any) -> None:
    model = models["z_image"]
    names = {
        "layers.1.attention.qkv": [f"layers.1.attention.to_{x}" for x in "qkv"],
        "layers.1.attention.out": ["layers.1.attention.to_out.0"],
        "layers.0.feed_forward.w2": ["layers.0.feed_forward.w2"],
    }
    pairs = numbers(model, [m for modules in names.values() for m in modules])
    found = read_file(tmp_path, as_original(pairs, names, fuse), model)
    assert found.format == "converted"
    assert_same(found, read_as_peft(tmp_path, pairs))


def test_half_precision_files_are_scaled_in_float32(models: Models, tmp_path: Path) -> None:
    model = models["qwen_image"]
    pairs = {m: (a.bfloat16(), b.bfloat16()) for m, (a, b) in numbers(model).items()}
    found = read_file(tmp_path, OWN_NAMES["kohya"](pairs), model)
    assert_same(found, read_as_peft(tmp_path, pairs), tolerance=1e-7)
    fused = numbers(models["flux"], FLUX["double_blocks.0.img_attn.qkv"])
    fused = {m: (a.bfloat16(), b.bfloat16()) for m, (a, b) in fused.items()}
    names = {"double_blocks.0.img_attn.qkv": list(fused)}
    found = read_file(tmp_path, as_original(fused, names, shared_a), models["flux"])
    assert_same(found, read_as_peft(tmp_path, fused), tolerance=1e-7)


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, tensors: Tensors, model: DiffusionModel) -> str:
    """The one line for a file that cannot be read, or does not fit."""
    with pytest.raises(ValueError, match=r"lora\.safetensors") as caught:
        read_file(folder, tensors, model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "text_encoder_2.encoder.layers.0.q.lora_A.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_down.weight",
    ],
)
def test_text_encoder_keys_are_refused_in_every_layout(models: Models, tmp_path: Path, key: str) -> None:
    tensors = as_original(numbers(models["flux"]), {"img_in": ["x_embedder"]})
    assert "changes the text encoders" in refused(tmp_path, {**tensors, key: torch.ones(2, 2)}, models["flux"])


@pytest.mark.parametrize("leaf", ["dora_scale", "diff", "diff_b", "lokr_w1", "hada_w1_a"])
def test_other_adapters_are_refused(models: Models, tmp_path: Path, leaf: str) -> None:
    tensors = as_original(numbers(models["flux"]), {"img_in": ["x_embedder"]})
    message = refused(tmp_path, {**tensors, f"lora_unet_img_in.{leaf}": torch.ones(2)}, models["flux"])
    assert "not a plain LoRA weight" in message
    if leaf.startswith(("lokr", "hada")):  # a file without a single LoRA key is named for what it is
        alone = {f"diffusion_model.img_in.{leaf}": torch.ones(2)}
        assert "not a plain LoRA weight" in refused(tmp_path, alone, models["flux"])


def test_what_a_converter_would_drop_is_refused(models: Models, tmp_path: Path) -> None:
    """Beside `transformer.` keys diffusers passes over all others without a word."""
    model = models["flux"]
    pairs = numbers(model, ["x_embedder", "transformer_blocks.0.attn.to_out.0"])
    tensors = as_original(pairs, {"double_blocks.0.img_attn.proj": [list(pairs)[1]]})
    tensors |= with_alphas({"x_embedder": pairs["x_embedder"]}, lambda m: f"transformer.{m}", DOWN_UP)
    assert "converts only a part of it" in refused(tmp_path, tensors, model)


def test_one_module_under_two_names_is_refused(models: Models, tmp_path: Path) -> None:
    pairs = numbers(models["sd3"], ["transformer_blocks.0.attn.to_q"])
    tensors = {**OWN_NAMES["kohya"](pairs), **OWN_NAMES["ComfyUI"](pairs)}
    assert "holds transformer_blocks.0.attn.to_q twice" in refused(tmp_path, tensors, models["sd3"])


def test_files_of_other_families_are_refused(models: Models, tmp_path: Path) -> None:
    blocks = {key: modules for key, modules in FLUX.items() if "blocks" in key}
    kohya = as_original(numbers(models["flux"], [m for modules in blocks.values() for m in modules]), blocks)
    assert "fits no module of the transformer" in refused(tmp_path, kohya, models["sd3"])
    for other in ("qwen_image", "z_image"):
        assert any(word in refused(tmp_path, kohya, models[other]) for word in ("fits no module", "only a part of it"))
    unknown = {f"lora_unet_down_blocks_0_to_q.{half}.weight": torch.ones(2, 2) for half in DOWN_UP}
    assert "FluxPipeline cannot convert its keys (ValueError: Incompatible keys" in refused(
        tmp_path, unknown, models["flux"]
    )
    # Names that both families have: one is there in another width, or a part is missing.
    assert "fits" in refused(tmp_path, OWN_NAMES["diffusers"](numbers(models["sd3"])), models["qwen_image"])
    # diffusers has no converter for SD3's original names.
    original = {f"lora_unet_joint_blocks_0_x_block_attn_qkv.{half}.weight": torch.ones(2, 2) for half in DOWN_UP}
    assert "diffusers does not convert its names for this one" in refused(tmp_path, original, models["sd3"])


def test_a_missing_module_is_named_as_the_transformer_would(models: Models, tmp_path: Path) -> None:
    model = models["qwen_image"]
    pairs = numbers(model, ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"])
    more = {**pairs, "transformer_blocks.9.attn.to_q": pairs["transformer_blocks.0.attn.to_q"]}
    message = refused(tmp_path, OWN_NAMES["kohya"](more), model)
    assert "fits 2 of its 3 modules; the transformer has no transformer_blocks.9.attn.to_q" in message
    partial = read_lora(tmp_path / "lora.safetensors", model)
    assert match(partial, model.transformer, allow_partial=True) == list(pairs)


# --- as adapters -----------------------------------------------------------------------------------------------------


def test_a_module_whose_name_ends_others_is_adapted_alone(tmp_path: Path) -> None:
    """FLUX's proj_out is also the ending of every single block's: those stay as they are."""
    from diffusers import FluxTransformer2DModel

    small = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    model = family("FluxPipeline", small)
    lora = read_as_peft(tmp_path, numbers(model, ["proj_out", "single_transformer_blocks.1.proj_mlp"]))
    wrapped = copy.deepcopy(small)
    assert add_frozen(wrapped, "one", lora) == ["single_transformer_blocks.1.proj_mlp", "proj_out"]
    layers = {name: m for name, m in wrapped.named_modules() if isinstance(m, LoraLinear)}
    assert set(layers) == set(lora.tensors)
    for name, layer in layers.items():
        a, b = lora.tensors[name]
        torch.testing.assert_close(layer.get_delta_weight("one"), lora.scale[name] * b @ a)
