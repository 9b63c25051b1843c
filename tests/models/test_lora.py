"""LoRA files against PEFT's and diffusers' own loading: the same files give the same forward."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_fast.models import SD3
from opd_fast.models.lora.files import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraWeights,
    delta,
    find_lora,
    match,
    merge_into,
    read_lora,
    save_lora,
)
from tests.tiny import tiny_pipeline, tiny_transformer

RANK, ALPHA = 4, 12.0
TARGETS = SD3.lora_targets["attention"]


@pytest.fixture(scope="module")
def base():
    return tiny_transformer(0).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": torch.tensor([900.5, 12.25]),
        "encoder_hidden_states": randn(2, 7, 32),
        "pooled_projections": randn(2, 32),
    }


def forward(transformer, inputs) -> Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def random_lora(base, targets=TARGETS, rank: int = RANK, size: float = 0.3) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: (
            torch.randn(rank, m.in_features, generator=generator) * size,
            torch.randn(m.out_features, rank, generator=generator) * size,
        )
        for name, m in base.named_modules()
        if isinstance(m, torch.nn.Linear) and any(name.endswith("." + t) for t in targets)
    }


def merged(base, lora: LoraWeights | Path):
    out = copy.deepcopy(base)
    merge_into(out, lora if isinstance(lora, LoraWeights) else read_lora(lora))
    return out


def by_peft(base, folder: Path):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()


def peft_adapter(base, folder: Path, **options: Any) -> Path:
    """An adapter made and saved by PEFT itself, both halves random."""
    from peft import LoraConfig, get_peft_model

    config: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **options}
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(folder))
    return folder


def same(got: Tensor, want: Tensor, other: Tensor) -> None:
    """``got`` is ``want``, and telling it from ``other`` is easy at this tolerance."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert float((got - other).abs().max()) > 1e-2


# --- written by us, read by others -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "student"
    return save_lora(folder, random_lora(base), rank=RANK, alpha=ALPHA, targets=TARGETS, base_model="some/model")


def test_peft_reads_what_we_save(base, inputs, saved):
    loaded = by_peft(base, saved)
    scales = {m.scaling["default"] for m in loaded.modules() if hasattr(m, "scaling")}
    assert scales == {ALPHA / RANK}
    assert sum("lora_A" in n for n, _ in loaded.named_parameters()) == 15
    same(forward(merged(base, saved), inputs), forward(loaded, inputs), forward(base, inputs))
    assert json.loads((saved / PEFT_CONFIG).read_text())["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("what", ["folder", "file"])
def test_diffusers_reads_what_we_save(base, inputs, saved, what):
    pipe = tiny_pipeline()
    pipe.transformer = copy.deepcopy(base)
    pipe.load_lora_weights(str(saved if what == "folder" else saved / DIFFUSERS_WEIGHTS))
    scales = {s for m in pipe.transformer.modules() if hasattr(m, "scaling") for s in m.scaling.values()}
    assert scales == {ALPHA / RANK}
    want = forward(pipe.transformer, inputs)
    same(forward(merged(base, saved / DIFFUSERS_WEIGHTS), inputs), want, forward(base, inputs))


def test_both_layouts_hold_the_same(base, saved):
    tensors = random_lora(base)
    for lora, kind in ((read_lora(saved), "peft"), (read_lora(saved / DIFFUSERS_WEIGHTS), "diffusers")):
        assert lora.format == kind
        assert set(lora.tensors) == set(tensors)
        assert all(torch.equal(x, y) for m in tensors for x, y in zip(lora.tensors[m], tensors[m], strict=True))
        assert set(lora.scale.values()) == {ALPHA / RANK}
        assert {a.shape[0] for a, _ in lora.tensors.values()} == {RANK}
    with safe_open(saved / DIFFUSERS_WEIGHTS, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == ALPHA
    assert {p.name for p in saved.iterdir()} == {PEFT_CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS}


def test_saving_without_targets_names_the_modules(base, inputs, tmp_path):
    few = dict(list(random_lora(base).items())[3:7])
    folder = save_lora(tmp_path, few, rank=RANK, alpha=2.5)
    loaded = by_peft(base, folder)
    assert sum("lora_A" in n for n, _ in loaded.named_parameters()) == 4
    same(forward(merged(base, folder), inputs), forward(loaded, inputs), forward(base, inputs))
    assert read_lora(folder).scale[next(iter(few))] == 2.5 / RANK


def test_saving_refuses_broken_tensors(base, tmp_path):
    tensors = random_lora(base)
    with pytest.raises(ValueError, match="not of rank 8"):
        save_lora(tmp_path / "a", tensors, rank=8, alpha=8)
    with pytest.raises(ValueError, match="without tensors"):
        save_lora(tmp_path / "a", {}, rank=8, alpha=8)
    first = next(iter(tensors))
    tensors[first][1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"module {first} has NaN"):
        save_lora(tmp_path / "a", tensors, rank=RANK, alpha=8)
    assert not (tmp_path / "a").exists()


# --- written by others, read by us -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.to_q": 2, r"0\.attn\.to_k": 6}, "alpha_pattern": {"attn.to_v": 1, "attn.to_q": 5}},
        {"rank_pattern": {"^transformer_blocks.1.attn.to_q": 3}, "alpha_pattern": {"^attn.to_q": 99}},
        {"target_modules": SD3.lora_targets["all"]},
    ],
    ids=["plain", "rslora", "patterns", "anchored", "all"],
)
def test_we_read_what_peft_saves(base, inputs, tmp_path, options):
    folder = peft_adapter(base, tmp_path, **options)
    theirs = by_peft(base, folder)
    lora = read_lora(folder)
    scaling = {n: m.scaling["default"] for n, m in theirs.base_model.model.named_modules() if hasattr(m, "scaling")}
    assert lora.scale == pytest.approx(scaling)
    same(forward(merged(base, lora), inputs), forward(theirs, inputs), forward(base, inputs))
    assert read_lora(folder / PEFT_WEIGHTS).sha256 == lora.sha256


@pytest.mark.parametrize("metadata", [True, False])
def test_we_read_what_diffusers_saves(base, inputs, tmp_path, metadata):
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    source = copy.deepcopy(base)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, rank_pattern={"attn.to_q": 2})
    source.add_adapter(config)
    torch.manual_seed(4)
    for name, parameter in source.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(source),
        transformer_lora_adapter_metadata=config.to_dict() if metadata else None,
    )
    pipe = tiny_pipeline()
    pipe.transformer = copy.deepcopy(base)
    pipe.load_lora_weights(str(tmp_path))
    lora = read_lora(tmp_path)
    assert lora.format == "diffusers"
    # Without metadata the alpha is lost, and diffusers takes alpha = r.
    assert set(lora.scale.values()) == ({ALPHA / RANK, ALPHA / 2} if metadata else {1.0})
    same(forward(merged(base, lora), inputs), forward(pipe.transformer, inputs), forward(base, inputs))
    if metadata:
        same(forward(merged(base, lora), inputs), forward(source, inputs), forward(base, inputs))


def test_alpha_tensors_and_old_names(base, tmp_path):
    tensors = random_lora(base)
    flat: dict[str, Tensor] = {}
    for i, (module, (a, b)) in enumerate(tensors.items()):
        flat[f"transformer.{module}.lora.down.weight"] = a
        flat[f"transformer.{module}.lora.up.weight"] = b
        if i:
            flat[f"transformer.{module}.alpha"] = torch.tensor(float(i))
    save_file(flat, tmp_path / "some_name.safetensors")
    lora = read_lora(tmp_path / "some_name.safetensors")
    assert lora.scale == {m: (i or RANK) / RANK for i, m in enumerate(tensors)}
    assert all(torch.equal(lora.tensors[m][0], tensors[m][0]) for m in tensors)


# --- matching and merging --------------------------------------------------------------------------------------------


def test_delta_is_the_scaled_product():
    a, b = torch.randn(3, 5).to(torch.bfloat16), torch.randn(7, 3).to(torch.bfloat16)
    want = 2.5 * b.double() @ a.double()
    got = delta(a, b, 2.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_merging_rounds_once(base, saved):
    low = copy.deepcopy(base).to(torch.bfloat16)
    lora = read_lora(saved)
    want = {
        n: low.get_submodule(n).weight.double() + lora.scale[n] * (b.double() @ a.double())
        for n, (a, b) in lora.tensors.items()
    }
    untouched = {n: p.clone() for n, p in low.named_parameters() if n.removesuffix(".weight") not in lora.tensors}
    names = merge_into(low, lora)
    assert set(names) == set(lora.tensors)
    for name, exact in want.items():
        weight = low.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        # Half a unit in the last place of bfloat16 (8 bits), and no second rounding on top.
        half_unit = torch.exp2(exact.frexp().exponent.double() - 1 - 8)
        assert bool(((weight.double() - exact).abs() <= half_unit * 1.001).all())
    assert all(torch.equal(p, untouched[n]) for n, p in low.named_parameters() if n in untouched)


def with_tensors(lora: LoraWeights, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> LoraWeights:
    return LoraWeights(lora.path, lora.format, dict(tensors), dict.fromkeys(tensors, 1.0), lora.sha256)


def test_what_does_not_fit_is_refused_and_changes_nothing(base, saved):
    lora = read_lora(saved)
    target = copy.deepcopy(base)
    before = copy.deepcopy(target.state_dict())
    nowhere = with_tensors(lora, {f"unet.{m}": t for m, t in lora.tensors.items()})
    with pytest.raises(ValueError, match=r"fits no module of the transformer .*unet\.transformer_blocks"):
        merge_into(target, nowhere)
    first, pair = next(iter(lora.tensors.items()))
    partly = with_tensors(lora, {**lora.tensors, "transformer_blocks.9.attn.to_q": pair})
    with pytest.raises(ValueError, match=r"fits 15 of its 16 modules; .* no transformer_blocks\.9\.attn\.to_q"):
        merge_into(target, partly)
    assert len(match(partly, target, allow_partial=True)) == 15
    wide = with_tensors(lora, {**lora.tensors, first: (torch.zeros(4, 48), torch.zeros(32, 4))})
    with pytest.raises(ValueError, match=rf"{first} by \(32, 48\), the transformer's weight is \(32, 32\)"):
        merge_into(target, wide)
    conv = with_tensors(lora, {"pos_embed.proj": pair})
    with pytest.raises(ValueError, match=r"pos_embed\.proj, a Conv2d; only linear"):
        merge_into(target, conv)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


# --- damaged and foreign files ---------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / PEFT_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / PEFT_WEIGHTS)


FIRST = "base_model.model.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / PEFT_WEIGHTS).write_bytes((f / PEFT_WEIGHTS).read_bytes()[:-100]), "damaged or cut short"),
        (lambda f: (f / PEFT_WEIGHTS).write_bytes(b""), "damaged or cut short"),
        (lambda f: save_file({}, f / PEFT_WEIGHTS), "holds no tensors"),
        (lambda f: (f / PEFT_WEIGHTS).unlink(), "lacks adapter_model.safetensors"),
        (lambda f: (f / PEFT_CONFIG).unlink(), "lacks adapter_config.json"),
        (lambda f: (f / PEFT_CONFIG).write_text("{"), "adapter_config.json is damaged"),
        (lambda f: (f / PEFT_CONFIG).write_text("{}"), "no rank r and lora_alpha"),
        (lambda f: edit_config(f, peft_type="LOKR"), "a LOKR adapter"),
        (lambda f: edit_config(f, use_dora=True), "use_dora is set"),
        (lambda f: edit_config(f, modules_to_save=["proj_out"]), "modules_to_save is set"),
        (lambda f: edit_config(f, bias="all"), "bias is 'all'"),
        (lambda f: edit_config(f, r=8), "rank 8, its lora_A has 4 rows"),
        (
            lambda f: edit_tensors(f, lambda t: t[FIRST + ".lora_A.weight"].fill_(torch.nan)),
            f"{FIRST}.lora_A.weight has NaN",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t[FIRST + ".lora_B.weight"].fill_(torch.inf)),
            f"{FIRST}.lora_B.weight has NaN",
        ),
        (lambda f: edit_tensors(f, lambda t: t.pop(FIRST + ".lora_B.weight")), "attn.to_q has only lora_A"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({FIRST + ".lora_magnitude_vector": torch.ones(32)})),
            "not a plain LoRA weight",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({"text_encoder.q.lora_A.weight": torch.ones(4, 4)})),
            "changes the text encoders",
        ),
        (lambda f: edit_tensors(f, lambda t: t.update({FIRST + ".alpha": torch.ones(())})), ".alpha tensors"),
        (
            lambda f: edit_tensors(f, lambda t: t.update({FIRST + ".alpha": torch.ones(2)})),
            "alpha is not a single number",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({FIRST + ".lora_A.other.weight": torch.ones(4, 32)})),
            "attn.to_q has lora_A twice",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t.update({FIRST + ".lora_A.weight": torch.ones(4, 32).to(torch.int8)})),
            "lora_A.weight is torch.int8, not a floating-point number; quantized",
        ),
        (
            lambda f: edit_tensors(
                f,
                lambda t: t.update(
                    {FIRST + ".lora_A.weight": torch.ones(0, 32), FIRST + ".lora_B.weight": torch.ones(32, 0)}
                ),
            ),
            r"A \(0, 32\) and B \(32, 0\)",
        ),
    ],
)
def test_damaged_adapters_are_named_in_one_line(saved, tmp_path, damage, said):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / DIFFUSERS_WEIGHTS).unlink()
    damage(folder)
    with pytest.raises(ValueError, match=said) as caught:
        read_lora(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_beside_which_the_base_changed_is_refused(base, inputs, tmp_path, kind):
    """PEFT takes such an adapter's first values off the base when it loads it; converted, it is a plain LoRA."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=kind)
    )
    wrapped.save_pretrained(str(tmp_path / "first"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    want = forward(wrapped, inputs)
    wrapped.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{kind}', which also changes the base's"):
        read_lora(tmp_path / "plain")
    # The first values under a name that PEFT will initialise otherwise.
    edit_config(tmp_path / "first", init_lora_weights=True)
    wrapped.save_pretrained(
        str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "first")
    )
    torch.testing.assert_close(forward(merged(base, tmp_path / "converted"), inputs), want, rtol=1e-4, atol=1e-4)


def test_foreign_paths_are_named(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_lora(tmp_path / "absent")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match="the file holds no LoRA weights"):
        read_lora(tmp_path / "adapter_model.bin")
    (tmp_path / "checkpoint").mkdir()
    shutil.copytree(saved, tmp_path / "checkpoint" / "lora")
    with pytest.raises(ValueError, match="checkpoint/lora is one; name that folder"):
        read_lora(tmp_path / "checkpoint")
    save_file({"proj_out.weight": torch.ones(2)}, tmp_path / "full.safetensors")
    assert find_lora(tmp_path / "full.safetensors") is None
    assert find_lora(saved) == saved
    (tmp_path / "named").mkdir()
    shutil.copy(saved / DIFFUSERS_WEIGHTS, tmp_path / "named" / "by_hand.safetensors")
    with pytest.raises(ValueError, match=r"named/by_hand\.safetensors is one; name that file"):
        read_lora(tmp_path / "named")
    monkeypatch.setattr("opd_fast.config.paths.ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"bundled/text is not a LoRA: build them: python -m opd_fast\.worlds\.build"):
        read_lora("bundled/text")
    shutil.copytree(saved, tmp_path / "teachers" / "text")
    assert read_lora("bundled/text").sha256 == read_lora(saved).sha256
    with pytest.raises(ValueError, match="choose one of bundled/text"):
        read_lora("bundled/colour")


def test_header_with_two_alphas_is_refused(saved, tmp_path):
    with safe_open(saved / DIFFUSERS_WEIGHTS, "pt") as file:
        header = file.metadata()
    tensors = load_file(saved / DIFFUSERS_WEIGHTS)
    name = next(iter(read_lora(saved).tensors))
    save_file({**tensors, f"transformer.{name}.alpha": torch.ones(())}, tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(ValueError, match="gives alpha twice"):
        read_lora(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", metadata={**header, "lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="damaged lora_adapter_metadata"):
        read_lora(tmp_path / "b.safetensors")
