"""Teachers of any source: the released layout, mixed ranks and targets, their accounts, students of their mean."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.models import NANO, Shape, random_model, random_text
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.models.lora.files import PEFT_CONFIG, PEFT_WEIGHTS, delta, read_lora, save_lora
from opd_fast.models.lora.load import load_transformer
from opd_fast.models.sd3 import SD3
from opd_fast.training import setup
from opd_fast.training.problems import problems
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import check_teachers, load_teachers
from opd_fast.training.teachers import TeacherBank
from tests.runs import settings, write_world

PLACEMENTS = ["merged", "shared"]
# Stable Diffusion 3.5 Medium but for its width: 24 blocks, dual attention in the first 13, the last context_pre_only.
NARROW = Shape(24, 2, 8, tuple(range(13)), 24, 16, 4, 8, 8, 64, 5)
PROJECTIONS = ["add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v"]
RELEASED = [f"transformer_blocks.{i}.attn.{m}" for i in range(24) for m in PROJECTIONS if (i, m) != (23, "to_add_out")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to share
    yield
    torch.set_num_threads(threads)


def fresh(model: SD3) -> SD3:
    """The model on a base of its own."""
    other = copy.copy(model)
    other.transformer = copy.deepcopy(model.transformer)
    return other


def load_bank(model: SD3, folders: list[Path], placement: str = "merged", **options: Any) -> TeacherBank:
    configs = [
        TeacherConfig(name=f"t{i}", weights=str(folder), prompts="bundled/composition", **options)
        for i, folder in enumerate(folders)
    ]
    return load_teachers(model, configs, placement)  # type: ignore[arg-type]


def merged_by_peft(model: SD3, folder: Path) -> nn.Module:
    merged: nn.Module = PeftModel.from_pretrained(copy.deepcopy(model.transformer), str(folder)).merge_and_unload()
    return merged


def velocity(model: SD3, transformer: nn.Module, seed: int = 0) -> Tensor:
    shape = NARROW if model.transformer.config.num_layers == NARROW.layers else NANO  # type: ignore[union-attr]
    torch.manual_seed(seed)
    x, text = torch.randn(2, *model.latent_shape(shape.resolution)), random_text(2, shape)
    with torch.no_grad():
        return model.velocity(transformer, x, torch.tensor(0.7), text)


def assert_teaches(model: SD3, bank: TeacherBank, index: int, want: nn.Module) -> None:
    """Teacher `index` is `want`, and told from the base easily at this tolerance."""
    truth = velocity(model, want)
    with bank.active(index) as transformer:
        found = velocity(model, transformer)
    scale = float(truth.abs().max())
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5 * scale)
    base = velocity(model, model.transformer if bank.teachers[index].adapter is None else fresh_base(model))
    assert float((base - truth).abs().max()) > 1e-2 * scale


def fresh_base(model: SD3) -> nn.Module:
    from opd_fast.models.lora.adapters import plain_copy

    return plain_copy(model.transformer)


# --- the released layout ---------------------------------------------------------------------------------------------


def write_released(folder: Path, model: SD3, seed: int) -> Path:
    """A DiffusionOPD teacher by its names and shapes: r 32, alpha 64, 382 tensors with the adapter's name stripped."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in RELEASED:
        linear: Any = model.transformer.get_submodule(name)
        halves = {"A": (32, linear.in_features), "B": (linear.out_features, 32)}
        for half, shape in halves.items():
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = torch.randn(shape, generator=generator) * 0.1
    assert len(tensors) == 382
    folder.mkdir()
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "stabilityai/stable-diffusion-3.5-medium",
        "inference_mode": True,
        "r": 32,
        "lora_alpha": 64,
        "target_modules": [f"attn.{m}" for m in PROJECTIONS],
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "revision": None,
        "auto_mapping": None,
    }
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def narrow() -> SD3:
    torch.manual_seed(0)
    return random_model(NARROW)


@pytest.fixture(scope="module")
def released(narrow: SD3, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    top = tmp_path_factory.mktemp("released")
    return [write_released(top / name, narrow, seed) for seed, name in enumerate(("ocr", "geneval", "pickscore"))]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_released_teachers_are_pefts_own(narrow: SD3, released: list[Path], placement: str) -> None:
    model = fresh(narrow)
    bank = load_bank(model, released, placement)
    for i, folder in enumerate(released):
        want = merged_by_peft(narrow, folder)
        base = narrow.transformer.state_dict()
        differ = {name for name, value in want.state_dict().items() if not torch.equal(value, base[name])}
        assert differ == {f"{name}.weight" for name in RELEASED}
        for name in RELEASED:
            layer: Any = bank.teachers[i].transformer.get_submodule(name)
            found = layer.weight
            if placement == "shared":
                found = layer.get_base_layer().weight + layer.get_delta_weight(bank.teachers[i].adapter)
            torch.testing.assert_close(found, want.get_submodule(name).weight, rtol=1e-6, atol=1e-6)
        assert_teaches(model, bank, i, want)
    assert [(t.source.modules, t.source.tensors, t.source.ranks) for t in bank.teachers] == [(191, 382, (32,))] * 3
    assert len({t.source.sha256 for t in bank.teachers}) == 3


# --- ranks, targets, parts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> SD3:
    torch.manual_seed(1)
    return random_model(NANO)


def write_peft(model: SD3, folder: Path, **options: Any) -> Path:
    """An adapter that PEFT itself makes and saves, both halves random."""
    torch.manual_seed(len(folder.name))
    wrapped = get_peft_model(copy.deepcopy(model.transformer), LoraConfig(**options))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def mixed(model: SD3, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    top = tmp_path_factory.mktemp("mixed")
    return [
        write_peft(model, top / "q", r=2, lora_alpha=5, target_modules=["attn.to_q"]),
        write_peft(model, top / "feed", r=40, lora_alpha=8, target_modules=["attn2.to_v", "ff.net.0.proj", "ff.net.2"]),
        write_peft(
            model,
            top / "patterns",
            r=3,
            lora_alpha=4,
            target_modules=["proj_out", "context_embedder", "norm1.linear", "attn.to_k", "attn.to_q"],
            rank_pattern={"proj_out": 1, "0.attn.to_k": 7},
            alpha_pattern={"norm1.linear": 9},
            use_rslora=True,
        ),
    ]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_teachers_of_any_rank_and_targets(model: SD3, mixed: list[Path], placement: str) -> None:
    mine = fresh(model)
    bank = load_bank(mine, mixed, placement)
    # A student of yet another rank and other targets does not disturb them.
    Student.build(mine, StudentConfig(rank=4, alpha=8.0, targets=["attn.to_q", "ff_context.net.2"]))
    for i, folder in enumerate(mixed):
        assert_teaches(mine, bank, i, merged_by_peft(model, folder))
    assert [t.source.ranks for t in bank.teachers] == [(2,), (40,), (1, 3, 7)]
    if placement == "shared":
        wrapped = {name for name, m in mine.transformer.named_modules() if isinstance(m, LoraLinear)}
        student = {f"transformer_blocks.{i}.attn.to_q" for i in range(2)} | {"transformer_blocks.0.ff_context.net.2"}
        assert wrapped == student.union(*(read_lora(folder).tensors for folder in mixed))


@pytest.fixture(scope="module")
def longer(mixed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed[0]` with a module that the model does not have."""
    lora = read_lora(mixed[0])
    a, b = next(iter(lora.tensors.values()))
    tensors = {**lora.tensors, "transformer_blocks.7.attn.to_q": (a.clone(), b.clone())}
    return save_lora(tmp_path_factory.mktemp("longer"), tensors, rank=2, alpha=5)


def test_offloaded_teachers_teach_the_same(model: SD3, mixed: list[Path]) -> None:
    """Block by block through diffusers' hooks; here from the CPU to the CPU."""
    model = fresh(model)
    configs = [TeacherConfig(name=p.name, weights=str(p), prompts="bundled/composition") for p in mixed]
    there, here = (load_teachers(model, configs, offload=offload) for offload in (True, False))
    for a, b in zip(there.teachers, here.teachers, strict=True):
        assert torch.equal(velocity(model, a.transformer), velocity(model, b.transformer))
        assert any(hasattr(m, "_diffusers_hook") for m in model.blocks(a.transformer))
        assert not any(hasattr(m, "_diffusers_hook") for m in model.blocks(b.transformer))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_part_is_refused_unless_asked_for(model: SD3, mixed: list[Path], longer: Path, placement: str) -> None:
    said = r"teacher 't0': .* fits 2 of its 3 modules; .*transformer_blocks\.7\.attn\.to_q.*teachers\[\]\.partial"
    with pytest.raises(ValueError, match=said):
        load_bank(fresh(model), [longer], placement)
    mine = fresh(model)
    bank = load_bank(mine, [longer], placement, partial=True)
    assert_teaches(mine, bank, 0, merged_by_peft(model, mixed[0]))
    assert (bank.teachers[0].source.modules, bank.teachers[0].source.held) == (2, 3)
    assert "2 of its 3 modules (4 tensors)" in str(bank.teachers[0].source)


@pytest.mark.parametrize("partial", [False, True])
def test_nothing_that_fits_is_no_part(model: SD3, tmp_path: Path, partial: bool) -> None:
    save_lora(tmp_path, {"blocks.0.q": (torch.ones(1, 2), torch.ones(2, 1))}, rank=1, alpha=1)
    for placement in PLACEMENTS:
        with pytest.raises(ValueError, match="fits no module"):
            load_bank(fresh(model), [tmp_path], placement, partial=partial)


# --- sources ---------------------------------------------------------------------------------------------------------


def write_full(model: SD3, folder: Path, seed: int) -> Path:
    """A whole transformer, every weight of which differs from the base's."""
    torch.manual_seed(seed)
    full: Any = copy.deepcopy(model.transformer)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    full.save_pretrained(folder)
    return folder


def test_an_origin_tells_its_files_apart(model: SD3, mixed: list[Path], tmp_path: Path) -> None:
    full = write_full(model, tmp_path / "full", 0)
    bank = load_bank(model, [mixed[2], full])
    lora, whole = (teacher.source for teacher in bank.teachers)
    files = [(mixed[2] / name).read_bytes() for name in (PEFT_WEIGHTS, PEFT_CONFIG)]
    assert lora.sha256 == hashlib.sha256(b"".join(files)).hexdigest()
    expected = f"PEFT LoRA, {lora.modules} modules ({2 * lora.modules} tensors), rank 1, 3, 7, sha256 "
    assert str(lora) == expected + lora.sha256[:12]
    (file,) = full.glob("*.safetensors")
    assert whole.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (whole.format, whole.ranks, whole.tensors) == ("transformer", (), len(model.transformer.state_dict()))
    torch.testing.assert_close(
        velocity(model, bank.teachers[1].transformer),
        velocity(model, type(model.transformer).from_pretrained(full)),  # type: ignore[attr-defined]
    )


def test_a_run_says_what_its_teachers_are(tmp_path: Path) -> None:
    config = settings(write_world(tmp_path), student__start="merged")
    assert not list(problems(config))
    said: list[str] = []
    prepared = setup.prepare(config, said.append)
    for name, teacher in zip(("words", "plain"), prepared.teachers.teachers, strict=True):
        digest = read_lora(tmp_path / name).sha256[:12]
        assert f"teacher {name}: PEFT LoRA, 6 modules (12 tensors), rank 3, sha256 {digest}" in said
        assert teacher.source.name == str(tmp_path / name)
    (line,) = [line for line in said if line.startswith("student starts from")]
    assert "the mean of its teachers" in line


# --- refused before anything heavy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer_blocks.0.attn.to_q": (torch.ones(3, 48), torch.ones(48, 3))}, "take the LoRA of this model"),
        ({"single_transformer_blocks.0.proj_mlp": (torch.ones(3, 32), torch.ones(32, 3))}, "another model family"),
    ],
    ids=["width", "family"],
)
@pytest.mark.parametrize("name", ["plain", "start"])
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, tuple[Tensor, Tensor]], says: str, name: str
) -> None:
    def load_model(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(setup, "load_model", load_model)
    config = settings(write_world(tmp_path))
    folder = tmp_path / name  # plain: one of the teachers
    if name == "start":
        config.student.start = str(folder)
    save_lora(folder, tensors, rank=3, alpha=3)
    with pytest.raises(ValueError, match=says) as caught:
        setup.prepare(config, print)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_whole_transformers_are_held_against_the_meta_model(model: SD3, tmp_path: Path) -> None:
    meta = copy.copy(model)
    meta.transformer = copy.deepcopy(model.transformer).to("meta")

    def check(folder: Path, placement: str = "merged") -> None:
        config = TeacherConfig(name="t", weights=str(folder), prompts="p.txt")
        check_teachers(meta, [config], placement)  # type: ignore[arg-type]

    folder = write_full(model, tmp_path / "full", 0)
    check(folder)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"teacher 't': .* has no weights in safetensors"):
        check(folder)
    with pytest.raises(ValueError, match=r"teacher 't': .* is not a LoRA, and engine\.placement shared"):
        check(folder, "shared")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_attention_heads": 3}))
    with pytest.raises(ValueError, match=r"teacher 't': .* of shape .* must share the model's architecture"):
        check(folder)
    file.write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="holds a FluxTransformer2DModel, the base is a SD3Transformer2DModel"):
        check(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check(folder)


# --- the student that starts from the mean ---------------------------------------------------------------------------


def deltas(model: SD3, student: Student) -> dict[str, Tensor]:
    """What a LoRA student adds to each of its modules."""
    layers = {
        n: m for n, m in student.transformer.named_modules() if isinstance(m, LoraLinear) and "student" in m.lora_A
    }
    return {name: layer.get_delta_weight("student").detach() for name, layer in layers.items()}


def mean_of_loras(folders: list[Path], shares: list[float]) -> dict[str, Tensor]:
    mean: dict[str, Tensor] = {}
    for folder, share in zip(folders, shares, strict=True):
        lora = read_lora(folder)
        for name, (a, b) in lora.tensors.items():
            mean[name] = mean.get(name, torch.zeros(())) + share * delta(a, b, lora.scale[name])
    return mean


@pytest.fixture(scope="module")
def overlapping(model: SD3, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of ranks 2 and 3 that share to_q, and each has a module of its own."""
    top = tmp_path_factory.mktemp("overlapping")
    return [
        write_peft(model, top / "two", r=2, lora_alpha=5, target_modules=["attn.to_q", "attn.to_k"]),
        write_peft(model, top / "three", r=3, lora_alpha=2, target_modules=["attn.to_q", "attn.add_v_proj"]),
    ]


def weighted(model: SD3, folders: list[Path], weights: tuple[float, ...], placement: str = "merged") -> TeacherBank:
    configs = [
        TeacherConfig(name=f"t{i}", weights=str(folder), prompts="bundled/composition", weight=weight)
        for i, (folder, weight) in enumerate(zip(folders, weights, strict=True))
    ]
    return load_teachers(model, configs, placement)  # type: ignore[arg-type]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("alpha", [10.0, 3.0])
def test_the_mean_is_exact_where_the_rank_suffices(
    model: SD3, overlapping: list[Path], placement: str, alpha: float
) -> None:
    mine = fresh(model)
    bank = weighted(mine, overlapping, (1.0, 3.0), placement)
    student = Student.build(mine, StudentConfig(rank=5, alpha=alpha, start="merged"), teachers=bank)
    found, want = deltas(mine, student), mean_of_loras(overlapping, [0.25, 0.75])
    assert set(want) < set(found)
    for name, value in found.items():
        truth = want.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    assert max(float(value.abs().max()) for value in want.values()) > 0.1
    assert "100.00% of its square" in student.began
    # Directions that the mean leaves free must still be able to learn: A random, B zero.
    halves = dict(student.named_parameters())
    a, b = (halves[f"transformer_blocks.0.attn.to_k.lora_{half}.student.weight"] for half in "AB")
    assert bool((a[2:].abs().amax(1) > 0).all())
    assert not b[:, 2:].any()


def test_the_mean_is_the_best_of_its_rank_otherwise(model: SD3, overlapping: list[Path]) -> None:
    mine = fresh(model)
    bank = weighted(mine, overlapping, (1.0, 1.0))
    student = Student.build(mine, StudentConfig(rank=2, alpha=6.0, start="merged"), teachers=bank)
    found, want = deltas(mine, student), mean_of_loras(overlapping, [0.5, 0.5])
    kept = total = 0.0
    cut = 0
    for name, value in want.items():
        sizes = torch.linalg.svdvals(value.double())
        # Eckart and Young: no matrix of rank 2 comes closer.
        lost = float((value - found[name]).double().square().sum())
        assert lost == pytest.approx(float(sizes[2:].square().sum()), rel=1e-4, abs=1e-8)
        assert int(torch.linalg.matrix_rank(found[name], rtol=1e-5)) == 2
        kept, total = kept + float(sizes[:2].square().sum()), total + float(sizes.square().sum())
        cut += lost > 1e-3
    assert cut >= 4  # both to_q, and add_v_proj
    assert f"{kept / total:.2%} of its square" in student.began


def test_whole_transformers_count_by_their_difference(model: SD3, overlapping: list[Path], tmp_path: Path) -> None:
    folders = [write_full(model, tmp_path / "full", 0), overlapping[1]]
    whole = dict(load_transformer(model, str(folders[0]), what="weights").named_parameters())
    lora = mean_of_loras(overlapping[1:], [0.5])
    base = dict(model.transformer.named_parameters())
    want = {
        name: 0.5 * (whole[name] - value) + lora.get(name.removesuffix(".weight"), torch.zeros(()))
        for name, value in base.items()
    }

    mine = fresh(model)
    student = Student.build(
        mine, StudentConfig(kind="full", start="merged"), teachers=weighted(mine, folders, (2.0, 2.0))
    )
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), base[name] + want[name], rtol=1e-6, atol=1e-6)

    # A LoRA of full rank holds its own modules' part, and says how much of the rest is lost.
    mine = fresh(model)
    config = StudentConfig(rank=32, alpha=16.0, start="merged")
    student = Student.build(mine, config, teachers=weighted(mine, folders, (2.0, 2.0)))
    found = deltas(mine, student)
    for name, value in found.items():
        torch.testing.assert_close(value, want[f"{name}.weight"], rtol=1e-4, atol=1e-5)
    inside, everything = (
        sum(float(want[name].double().square().sum()) for name in names)
        for names in ([f"{name}.weight" for name in found], want)
    )
    assert 0.05 < inside / everything < 0.95
    assert f"{inside / everything:.2%} of its square" in student.began


def test_only_what_a_partial_teacher_teaches_counts(model: SD3, mixed: list[Path], longer: Path) -> None:
    mine = fresh(model)
    bank = load_bank(mine, [longer], partial=True)
    student = Student.build(mine, StudentConfig(rank=4, alpha=4.0, start="merged"), teachers=bank)
    want = mean_of_loras(mixed[:1], [1.0])
    for name, value in deltas(mine, student).items():
        torch.testing.assert_close(value, want.get(name, torch.zeros_like(value)), rtol=1e-5, atol=1e-6)


def test_merged_means_the_teachers_and_says_so(
    model: SD3, overlapping: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StudentConfig(rank=5, alpha=5.0, start="merged")
    with pytest.raises(ValueError, match=r"student\.start merged is the teachers' mean, and there are none"):
        Student.build(fresh(model), config)
    monkeypatch.chdir(tmp_path)
    mine = fresh(model)
    assert "folder" not in Student.build(mine, config, teachers=weighted(mine, overlapping, (1.0, 1.0))).began
    save_lora(tmp_path / "merged", read_lora(overlapping[0]).tensors, rank=2, alpha=4)
    mine = fresh(model)
    student = Student.build(mine, config, teachers=weighted(mine, overlapping, (1.0, 1.0)))
    assert "the folder merged is not read; write ./merged for it" in student.began
    mine = fresh(model)
    student = Student.build(mine, StudentConfig(rank=5, alpha=5.0, start="./merged"))
    want = mean_of_loras([tmp_path / "merged"], [1.0])
    found = deltas(mine, student)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_mean_outside_the_targets_is_refused(model: SD3, overlapping: list[Path]) -> None:
    mine = fresh(model)
    config = StudentConfig(rank=4, alpha=4.0, start="merged", targets=["ff.net.2"])
    with pytest.raises(ValueError, match=r"student\.start merged: the teachers change nothing in student\.targets"):
        Student.build(mine, config, teachers=weighted(mine, overlapping, (1.0, 1.0)))


# --- hub ids ---------------------------------------------------------------------------------------------------------


def into_cache(cache: Path, repo: str, source: Path, inside: str = "") -> None:
    """Put a folder's files where the hub's cache keeps those of a repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    target = place / "snapshots" / commit / inside
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hub_ids_are_found_in_the_cache(model: SD3, mixed: list[Path], offline: Path, tmp_path: Path) -> None:
    into_cache(offline, "org/lora", mixed[0])
    into_cache(offline, "org/many", mixed[1], "checkpoints/lora")
    (tmp_path / "single").mkdir()
    tensors = {
        f"transformer.{m}.lora_{h}.weight": t.contiguous()
        for m, p in read_lora(mixed[0]).tensors.items()
        for h, t in zip("AB", p, strict=True)
    }
    save_file(tensors, tmp_path / "single" / "by_hand.safetensors")
    into_cache(offline, "org/file", tmp_path / "single")
    into_cache(offline, "org/pipeline", write_full(model, tmp_path / "full", 0), "transformer")
    names = ["org/lora", "org/many/checkpoints/lora", "org/file/by_hand.safetensors", "org/pipeline"]
    sources = [teacher.source for teacher in load_bank(fresh(model), [Path(name) for name in names]).teachers]
    assert [source.name for source in sources] == names
    assert [source.format for source in sources] == ["peft", "peft", "diffusers", "transformer"]
    assert sources[1].sha256 == read_lora(mixed[1]).sha256
    with pytest.raises(ValueError, match=r"org/file is neither a LoRA nor .*owner/name/FILE\.safetensors"):
        load_bank(model, [Path("org/file")])


def test_offline_is_what_the_environment_says(mixed: list[Path], tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads HF_HUB_OFFLINE once."""
    into_cache(tmp_path, "org/lora", mixed[0])
    script = (
        "from opd_fast.models.lora.files import read_lora\n"
        "print(read_lora('org/lora').sha256)\n"
        "try:\n    read_lora('org/absent')\nexcept ValueError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=120, check=True)
    found, refused = done.stdout.splitlines()
    assert found == read_lora(mixed[0]).sha256
    assert refused.startswith("org/absent is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE forbids")


def test_gated_and_absent_ids_are_one_line(model: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    response: Any = SimpleNamespace(headers={}, request=None)
    for kind, words in ((GatedRepoError, "403 Client Error."), (RepositoryNotFoundError, "404 Client Error.")):
        error = kind(f"{words}\n\nmore\n", response=response)
        monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
        with pytest.raises(ValueError, match=r"teacher 't0': org/x is not a folder .*hf auth login") as caught:
            load_bank(model, [Path("org/x")])
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_of_the_tensors_alone_has_the_rank_for_alpha(model: SD3, mixed: list[Path], tmp_path: Path) -> None:
    """PEFT's weights file without its configuration, under another name: nothing tells its alpha, so it is the rank."""
    save_file(load_file(mixed[0] / PEFT_WEIGHTS), tmp_path / "alone.safetensors")
    found, want = read_lora(tmp_path / "alone.safetensors", model), read_lora(mixed[0])
    assert set(found.tensors) == set(want.tensors)
    assert set(found.scale.values()) == {1.0}
    assert set(want.scale.values()) == {2.5}
