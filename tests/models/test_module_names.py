"""LoRA files whose names carry wrappers' segments, prefixes or other spellings: each gives the clean file's deltas, to
the bit, or the cause why it cannot be read.

Where diffusers loads such a file as well, what its own converter makes of it is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file

from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraWeights,
    delta,
    match,
    read_lora,
    save_lora,
)
from opd_fast.models.lora.load import WeightsSource
from tests.models.test_lora_origins import (
    A_B,
    ALPHA,
    DOWN_UP,
    FLUX,
    Models,
    Pairs,
    Tensors,
    as_original,
    models,
    numbers,
    read_file,
    refused,
    with_alphas,
    without_alphas,
)

__all__ = ["models"]  # the fixture

ATTENTION = {
    "sd3": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "norm_out.linear"],
    "flux": ["transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.proj_out", "proj_out"],
    "qwen_image": ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2", "txt_in"],
    "z_image": ["layers.0.attention.to_q", "context_refiner.0.feed_forward.w2", "t_embedder.mlp.0"],
}


def in_block(segment: str) -> Callable[[str], str]:
    """A name whose repeated block was wrapped: the segment follows the block's number."""

    def name(module: str) -> str:
        parts = module.split(".")
        place = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
        return ".".join([*parts[:place], segment, *parts[place:]])

    return name


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda m: f"_orig_mod.{m}",
    "compiled within DDP": lambda m: f"module._orig_mod.{m}",
    "DDP": lambda m: f"module.{m}",
    "checkpointed blocks": in_block("_checkpoint_wrapped_module"),
    "FSDP blocks": in_block("_fsdp_wrapped_module"),
    "FSDP and checkpointed": in_block("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "fairscale": lambda m: f"_fsdp_wrapped_module._fpw_module.{m}",
    "compiled linear layers": lambda m: f"{m}._orig_mod",
}
LAYOUTS: dict[str, Callable[[Pairs, Callable[[str], str]], Tensors]] = {
    "diffusers": lambda p, n: without_alphas(p, lambda m: f"transformer.{n(m)}", A_B),
    "no prefix, alphas": lambda p, n: with_alphas(p, n, DOWN_UP),
    "wrapper outside": lambda p, n: with_alphas(p, lambda m: n(f"diffusion_model.{m}"), A_B),
    "PEFT's keys alone": lambda p, n: without_alphas(p, lambda m: f"base_model.model.{n(m)}", A_B),
    "kohya": lambda p, n: with_alphas(p, lambda m: "lora_unet_" + n(m).replace(".", "_"), DOWN_UP),
}


def assert_equal(found: LoraWeights, clean: LoraWeights) -> None:
    """The same factors and scales bit for bit, and so the same deltas."""
    assert found.scale == clean.scale
    assert set(found.tensors) == set(clean.tensors)
    for module, pair in clean.tensors.items():
        assert all(torch.equal(x, y) for x, y in zip(found.tensors[module], pair, strict=True)), module
        assert all(float(half.abs().max()) > 0 for half in pair)


def clean_file(folder: Path, tensors: Tensors, model: DiffusionModel) -> LoraWeights:
    (folder / "clean").mkdir()
    return read_file(folder / "clean", tensors, model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_names(models: Models, tmp_path: Path, wrapper: str, layout: str) -> None:
    for name, modules in ATTENTION.items():
        folder = tmp_path / name
        folder.mkdir()
        pairs = numbers(models[name], modules)
        clean = clean_file(folder, LAYOUTS[layout](pairs, lambda m: m), models[name])
        found = read_file(folder, LAYOUTS[layout](pairs, WRAPPED[wrapper]), models[name])
        assert found.format == clean.format
        assert_equal(found, clean)


@pytest.mark.parametrize(
    "prefix",
    [
        "lycoris_",
        "lora_dit_",
        "lora_transformer_",
        "lora_unet_",
        "model.diffusion_model.",
        "model.diffusion_model.module.",
    ],
)
def test_prefixes(models: Models, tmp_path: Path, prefix: str) -> None:
    for name, modules in ATTENTION.items():
        folder = tmp_path / name
        folder.mkdir()
        pairs = numbers(models[name], modules)
        clean = clean_file(folder, with_alphas(pairs, lambda m: f"transformer.{m}", A_B), models[name])

        def spelt(module: str) -> str:
            return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)

        assert_equal(read_file(folder, with_alphas(pairs, spelt, DOWN_UP), models[name]), clean)


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_dit_", "model.diffusion_model.", "module.diffusion_model."])
def test_prefixes_before_original_names(models: Models, tmp_path: Path, prefix: str) -> None:
    """These need diffusers' converter, which knows fewer prefixes."""
    model = models["flux"]
    pairs = numbers(model, [m for modules in FLUX.values() for m in modules])

    def kohya(module: str) -> str:
        return "lora_unet_" + module.replace(".", "_")

    def spelt(module: str) -> str:
        return prefix + (module.replace(".", "_") if prefix.endswith("_") else module)

    clean = clean_file(tmp_path, as_original(pairs, FLUX, name=kohya), model)
    assert_equal(read_file(tmp_path, as_original(pairs, FLUX, name=spelt), model), clean)


def test_a_peft_folder_of_a_compiled_model(models: Models, tmp_path: Path) -> None:
    """Its configuration's patterns are made of the wrapped names as well."""
    model = models["sd3"]
    pairs = numbers(model, ATTENTION["sd3"])
    pairs["norm_out.linear"] = (torch.ones(1, 32), pairs["norm_out.linear"][1][:, :1].clone())
    folder = tmp_path / "peft"
    save_lora(folder, {m: p for m, p in pairs.items() if len(p[0]) == 2}, rank=2, alpha=ALPHA)
    (folder / DIFFUSERS_WEIGHTS).unlink()
    for names in (lambda m: m, lambda m: f"_orig_mod.{m}"):
        keys = {
            f"base_model.model.{names(m)}.lora_{h}.weight": t
            for m, p in pairs.items()
            for h, t in zip("AB", p, strict=True)
        }
        save_file(keys, folder / PEFT_WEIGHTS)
        config = json.loads((folder / PEFT_CONFIG).read_text())
        config["rank_pattern"] = {names("norm_out.linear"): 1}
        config["alpha_pattern"] = {names("norm_out.linear"): 5.0}
        (folder / PEFT_CONFIG).write_text(json.dumps(config))
        found = read_lora(folder, model)
        assert found.scale == {m: 5.0 if m == "norm_out.linear" else ALPHA / 2 for m in pairs}
        assert all(torch.equal(x, y) for m in pairs for x, y in zip(found.tensors[m], pairs[m], strict=True))
        assert len(match(found, model.transformer)) == 3
        without = read_lora(folder)  # wrappers are none of a model's names
        assert set(without.tensors) == set(pairs)


# --- Z-Image as trainers of its dotted names write it ----------------------------------------------------------------

SPLIT = [f"layers.1.attention.to_{x}" for x in ("q", "k", "v", "out.0")]


def dotted(pairs: Pairs) -> Tensors:
    """Weights under `to.q`, alphas under `to_q`."""
    tensors: Tensors = {}
    for module, (a, b) in pairs.items():
        name = "diffusion_model." + module.replace(".to_q", ".to.q").replace(".to_k", ".to.k").replace(".to_v", ".to.v")
        tensors |= {f"{name}.lora.down.weight": a, f"{name}.lora.up.weight": b}
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(ALPHA)
    return tensors


def fused(pairs: Pairs, *, alpha: float | None = None) -> Tensors:
    """qkv and out once more, as redundant keys."""
    parts = [pairs[module] for module in SPLIT[:3]]
    base = "diffusion_model.layers.1.attention"
    tensors = {
        f"{base}.qkv.lora.down.weight": torch.cat([a for a, _ in parts]),
        f"{base}.qkv.lora.up.weight": torch.block_diag(*(b for _, b in parts)),
        f"{base}.out.lora.down.weight": pairs[SPLIT[3]][0],
        f"{base}.out.lora.up.weight": pairs[SPLIT[3]][1],
    }
    return tensors if alpha is None else tensors | {f"{base}.qkv.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("alpha", [None, 3 * ALPHA])
def test_z_image_with_redundant_keys(models: Models, tmp_path: Path, alpha: float | None) -> None:
    model = models["z_image"]
    pairs = numbers(model, [*SPLIT, "layers.0.attention.to_q"])
    tensors = {**dotted(pairs), **fused(pairs, alpha=alpha)}
    clean = clean_file(tmp_path, with_alphas(pairs, lambda m: f"transformer.{m}", A_B), model)
    found = read_file(tmp_path, tensors, model)
    assert_equal(found, clean)
    repeated = "out in 1 blocks beside its parts; qkv in 1 blocks beside its parts"
    assert found.note == f"left out, as diffusers leaves it out: {repeated}"
    assert found.note in str(WeightsSource.of_lora("file", found, list(found.tensors)))
    assert_as_diffusers(found, tensors)


def assert_as_diffusers(found: LoraWeights, tensors: Tensors) -> None:
    """What diffusers' own converter makes of the same tensors."""
    converted = ZImagePipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()})
    ends = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in converted if "lora_A" in key}
    assert ends == set(found.tensors)
    for module in ends:
        a, b = (converted[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(delta(*found.tensors[module], found.scale[module]), b @ a, rtol=1e-5, atol=1e-5)


def test_redundant_keys_that_say_something_else_are_told(models: Models, tmp_path: Path) -> None:
    model = models["z_image"]
    pairs = numbers(model, SPLIT)
    tensors = {**dotted(pairs), **fused(pairs)}
    tensors["diffusion_model.layers.1.attention.qkv.lora.up.weight"] *= torch.linspace(-1, 1, 6)
    found = read_file(tmp_path, tensors, model)
    assert "qkv in 1 blocks beside its parts, 1 of which differ from them" in found.note
    assert_as_diffusers(found, tensors)


def test_a_part_beside_the_fused_projection_is_refused(models: Models, tmp_path: Path) -> None:
    """diffusers drops the whole of qkv where to_q alone stands beside it; k and v would be lost."""
    model = models["z_image"]
    pairs = numbers(model, SPLIT)
    tensors = {**dotted({SPLIT[0]: pairs[SPLIT[0]]}), **fused(pairs)}
    message = refused(tmp_path, tensors, model)
    assert "converts only a part of it" in message or "twice" in message


# --- what is said ----------------------------------------------------------------------------------------------------


def test_partial_says_what_it_would_leave_out(models: Models, tmp_path: Path) -> None:
    model = models["qwen_image"]
    pairs = numbers(model, ATTENTION["qwen_image"])
    more = {**pairs, **{f"transformer_blocks.{i}.attn.to_q": pairs["transformer_blocks.0.attn.to_q"] for i in (8, 9)}}
    message = refused(tmp_path, with_alphas(more, lambda m: f"transformer.{m}", A_B), model)
    assert "fits 3 of its 5 modules; the transformer has no transformer_blocks.8.attn.to_q" in message
    assert "takes the 3 that fit and leaves out the other 2" in message


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("dora_scale", "of DoRA"),
        ("lora_magnitude_vector", "of DoRA"),
        ("lora_magnitude_vector.weight", "of DoRA"),
        ("lokr_w1", "of LoKr"),
        ("hada_w1_a", "of LoHa"),
        ("oft_blocks", "of OFT"),
        ("diff_b", "of full differences"),
        ("lora_mid.weight", "of a Tucker decomposition"),
        ("bias", "of trained biases"),
    ],
)
def test_other_adapters_are_named(models: Models, tmp_path: Path, leaf: str, kind: str) -> None:
    tensors = with_alphas(numbers(models["sd3"], ATTENTION["sd3"]), lambda m: f"lycoris_{m.replace('.', '_')}", DOWN_UP)
    tensors["lycoris_norm_out_linear." + leaf] = torch.ones(2)
    assert f"not a plain LoRA weight but {kind}" in refused(tmp_path, tensors, models["sd3"])


def test_one_module_wrapped_and_not_is_refused(models: Models, tmp_path: Path) -> None:
    pairs = numbers(models["sd3"], ATTENTION["sd3"])
    clean = with_alphas(pairs, lambda m: f"transformer.{m}", A_B)
    wrapped: dict[str, Any] = with_alphas(pairs, lambda m: f"transformer._orig_mod.{m}", A_B)
    assert "twice under different names" in refused(tmp_path, {**clean, **wrapped}, models["sd3"])
    assert len(load_file(tmp_path / "lora.safetensors")) == 18
