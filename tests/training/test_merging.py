"""The teachers' differences merged: each method against PEFT and the papers, and runs that train nothing."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from opd_fast import evaluate
from opd_fast import train as door
from opd_fast.config import StudentConfig, TeacherConfig
from opd_fast.config.command_line import parse
from opd_fast.config.serialize import to_yaml
from opd_fast.errors import UserError
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import delta, find_lora, read_lora
from opd_fast.training.loop import train
from opd_fast.training.merging import MergedDifference
from opd_fast.training.student import Student
from opd_fast.training.teacher_loading import load_teachers
from opd_fast.training.teachers import TeacherBank
from tests.runs import settings, write_world
from tests.test_docs import block, commands

pytestmark = pytest.mark.usefixtures("one_thread")
PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
PEFT_NAMES = {"linear": "svd", **{name: f"{name}_svd" for name in PRUNING}}


@pytest.fixture(scope="module")
def model(small_world: Path) -> DiffusionModel:
    return load_model(str(small_world.parent / "pipeline"), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def loras(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """LoRAs of ranks 2 and 3 that share to_q, and each has a module of its own."""
    top = tmp_path_factory.mktemp("loras")
    torch.manual_seed(3)
    for name, rank, alpha, own in (("two", 2, 5, "attn.to_k"), ("three", 3, 2, "attn.add_v_proj")):
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["attn.to_q", own], init_lora_weights=False)
        PeftModel(copy.deepcopy(model.transformer), settings).save_pretrained(str(top / name))  # type: ignore[arg-type]
    return [top / "two", top / "three"]


def fresh(model: DiffusionModel) -> DiffusionModel:
    other = copy.copy(model)
    other.transformer = copy.deepcopy(model.transformer)
    return other


def bank(model: DiffusionModel, folders: list[Path], weights: tuple[float, ...] = (1.0, 3.0)) -> TeacherBank:
    configs = [
        TeacherConfig(name=f"t{i}", weights=str(folder), prompts="bundled/text", weight=weight)
        for i, (folder, weight) in enumerate(zip(folders, weights, strict=True))
    ]
    return load_teachers(model, configs, "merged")


def config(**changes: Any) -> StudentConfig:
    return StudentConfig(**({"rank": 4, "alpha": 6.0, "start": "merged"} | changes))


def started(model: DiffusionModel, folders: list[Path], seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """What the student's LoRA adds at its start, by module."""
    mine = fresh(model)
    student = Student.build(mine, config(**changes), teachers=bank(mine, folders), seed=seed)
    layers = {n: m for n, m in student.transformer.named_modules() if hasattr(m, "lora_A") and "student" in m.lora_A}
    return {name: layer.get_delta_weight("student").detach() for name, layer in layers.items()}  # type: ignore[operator]


def merged(model: DiffusionModel, folders: list[Path], seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    """D of every parameter, in full."""
    mine = fresh(model)
    found = MergedDifference(mine, bank(mine, folders), config(**changes), seed)
    return {name: found(name) for name in found.names}


def by_peft(
    model: DiffusionModel, folders: list[Path], kind: str, weights: list[float], rank: int
) -> dict[str, Tensor]:
    """What PEFT's add_weighted_adapter makes of the LoRAs, at density 0.4 where it prunes."""
    base: Any = copy.deepcopy(model.transformer)
    peft: Any = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a")
    peft.load_adapter(str(folders[1]), adapter_name="b")
    density = None if kind == "svd" else 0.4
    peft.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, svd_rank=rank, density=density)
    layers = {n: m for n, m in peft.base_model.model.named_modules() if hasattr(m, "lora_A") and "m" in m.lora_A}
    return {name: layer.get_delta_weight("m").detach() for name, layer in layers.items()}


def one_mask(probabilities: Tensor) -> Tensor:
    """Stands for torch.bernoulli: a mask that follows from the shape alone, so that two callers draw the same."""
    places = torch.arange(probabilities.numel(), dtype=torch.float64).mul(0.6180339887498949).frac()
    return (places.view(probabilities.shape) < probabilities).to(probabilities.dtype)


# --- against PEFT and the papers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", [[0.7, -1.3], 1.5, None], ids=["list", "number", "shares"])
@pytest.mark.parametrize("method", PEFT_NAMES)
def test_a_merge_is_that_of_peft(
    model: DiffusionModel, loras: list[Path], method: str, coefficients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random masks, cut to the same rank."""
    monkeypatch.setattr(torch, "bernoulli", one_mask)
    numbers = coefficients if isinstance(coefficients, list) else [coefficients] * 2
    weights = [0.25, 0.75] if coefficients is None else numbers
    want = by_peft(model, loras, PEFT_NAMES[method], weights, rank=4)
    density = None if method == "linear" else 0.4
    found = started(model, loras, merge=method, merge_density=density, merge_coefficients=coefficients)
    assert set(want) <= set(found)
    for name, value in found.items():
        expected = want.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max() + 1))
    assert min(float(value.abs().max()) for value in want.values()) > 0.05
    assert any(int(torch.linalg.matrix_rank(value, rtol=1e-4)) == 4 for value in want.values())


def test_the_default_is_to_the_bit_the_mean_by_weight(model: DiffusionModel, loras: list[Path]) -> None:
    found = merged(model, loras)
    parts = [read_lora(folder) for folder in loras]
    for name, value in found.items():
        module = name.removesuffix(".weight")
        want = torch.zeros_like(value)
        for lora, share in zip(parts, (0.25, 0.75), strict=True):
            if module in lora.tensors:
                a, b = lora.tensors[module]
                want += delta(a.float(), b.float(), lora.scale[module] * share)
        assert torch.equal(value, want), name
    for name, value in merged(model, loras, merge_coefficients=[0.25, 0.75]).items():
        assert torch.equal(value, found[name])


def test_ties_is_the_papers(model: DiffusionModel, loras: list[Path]) -> None:
    """Trim, elect and merge, written out entry by entry (arXiv 2306.01708, section 4)."""
    found = merged(model, loras, merge="ties", merge_density=0.3, merge_coefficients=1.0)
    name = "transformer_blocks.0.attn.to_q.weight"
    trimmed = []
    for lora in map(read_lora, loras):
        value = delta(*lora.tensors[name.removesuffix(".weight")], lora.scale[name.removesuffix(".weight")]).flatten()
        least = value.abs().sort(descending=True).values[int(0.3 * value.numel()) - 1]
        trimmed.append([float(v) if abs(v) >= least else 0.0 for v in value])
    want = []
    for entries in zip(*trimmed, strict=True):
        elected = 1 if sum(entries) >= 0 else -1
        agreeing = [v for v in entries if v * elected > 0]
        want.append(sum(agreeing) / max(len(agreeing), 1))
    torch.testing.assert_close(found[name].flatten(), torch.tensor(want), rtol=1e-5, atol=1e-7)
    assert any(a * b < 0 for a, b in zip(*trimmed, strict=True))  # signs are contested


@pytest.mark.parametrize("method", ["dare_linear", "magnitude_prune"])
def test_nothing_pruned_is_linear(model: DiffusionModel, loras: list[Path], method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(model, loras, merge=method, merge_density=1.0, merge_coefficients=[2.0, -0.5])
    for name, want in merged(model, loras, merge_coefficients=[2.0, -0.5]).items():
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)


def test_whole_transformers_beside_loras(model: DiffusionModel, loras: list[Path], tmp_path: Path) -> None:
    """A full student takes what TIES makes of all parameters, a LoRA student the best of its rank and says so."""
    torch.manual_seed(0)
    whole: Any = copy.deepcopy(model.transformer)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path / "whole")
    folders = [loras[0], tmp_path / "whole"]
    options: dict[str, Any] = {"merge": "ties", "merge_density": 0.5, "merge_coefficients": [1.0, 2.0]}
    base, lora = dict(model.transformer.named_parameters()), read_lora(loras[0])
    want = {}
    for name, changed in whole.named_parameters():
        module, parts = name.removesuffix(".weight"), []
        if module in lora.tensors:
            parts.append((1.0, delta(*lora.tensors[module], lora.scale[module])))
        parts.append((2.0, changed.detach() - base[name].detach()))
        kept = []
        for _, part in parts:
            largest = part.flatten().abs().topk(int(0.5 * part.numel())).indices
            kept.append(torch.zeros(part.numel()).index_copy(0, largest, part.flatten()[largest]).view(part.shape))
        sign = torch.where(sum(kept) >= 0, 1.0, -1.0)  # type: ignore[operator]
        agree = [(part.sign() == sign).float() for part in kept]
        total = sum(c * part * mask for (c, _), part, mask in zip(parts, kept, agree, strict=True))
        want[name] = (total / sum(agree).clamp(min=1)).detach()  # type: ignore[union-attr]

    mine = fresh(model)
    student = Student.build(mine, config(kind="full", **options), teachers=bank(mine, folders))
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), base[name].detach() + want[name], rtol=1e-5, atol=1e-6)
    assert student.began.startswith("its teachers merged (ties, density 0.5, coefficients 1, 2), 100.00%")

    mine = fresh(model)
    student = Student.build(mine, config(**options), teachers=bank(mine, folders))
    found = started(model, folders, **options)
    inside = sum(float(torch.linalg.svdvals(want[f"{n}.weight"].double())[:4].square().sum()) for n in found)
    share = inside / sum(float(value.double().square().sum()) for value in want.values())
    assert 0.01 < share < 0.95
    assert f"{share:.2%} of its square" in student.began


# --- the masks of DARE -----------------------------------------------------------------------------------------------


def test_masks_follow_from_the_seed(model: DiffusionModel, loras: list[Path]) -> None:
    options: dict[str, Any] = {"merge": "dare_linear", "merge_density": 0.25, "merge_coefficients": 1.0}
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = merged(model, loras, **options)
    assert torch.equal(torch.random.get_rng_state(), before)  # no other draw moves
    torch.manual_seed(12)
    again, other = merged(model, loras, **options), merged(model, loras, seed=1, **options)
    plain = merged(model, loras, merge_coefficients=1.0)
    masks = []
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value != 0, other[name] != 0)
        if ".attn.to_k." in name:  # of one teacher, so that what is kept is its entry divided by the density
            kept = value != 0
            torch.testing.assert_close(value[kept], 4 * plain[name][kept], rtol=1e-5, atol=1e-7)
            assert abs(float(kept.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
            masks.append(kept)
    assert len(masks) > 1
    assert not torch.equal(masks[0], masks[1])


def test_the_masks_of_a_seed_stay(model: DiffusionModel, loras: list[Path]) -> None:
    """The places that seed 0 keeps, which a resumed run of a later version has to find again."""
    found = merged(model, loras, merge="dare_linear", merge_density=0.25, merge_coefficients=1.0)
    row = found["transformer_blocks.0.attn.to_k.weight"][0]
    assert torch.nonzero(row).flatten()[:6].tolist() == [0, 1, 10, 11, 15, 17]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": None, "merge": "ties"}, "student.merge: is read with student.start merged alone"),
        ({"start": None, "merge_density": 0.5}, "student.merge_density: is read with student.start merged alone"),
        ({"start": None, "merge_coefficients": 1.0}, "student.merge_coefficients: is read with student.start merged"),
        ({"start": None, "merge_coefficients": [1.0, 1.0]}, "student.merge_coefficients: is read with student.start"),
        ({"merge_density": 0.5}, "student.merge_density: 0.5 is not read by merge linear"),
        ({"merge": "ties"}, "student.merge_density: is missing, and merge ties prunes"),
        ({"merge": "ties", "merge_density": 1.5}, "student.merge_density: 1.5 is above 1"),
        ({"merge": "dare_ties", "merge_density": 0.0}, "student.merge_density: 0.0 is not above 0"),
        ({"merge_coefficients": [1.0]}, "student.merge_coefficients: are 1 for 2 teachers"),
        ({"merge_coefficients": []}, "student.merge_coefficients: are 0 for 2 teachers"),
        ({"merge_coefficients": [1.0, float("nan")]}, r"student.merge_coefficients\[1\]: nan is not a finite number"),
        ({"merge_coefficients": float("inf")}, "student.merge_coefficients: inf is not a finite number"),
    ],
)
def test_refused_settings(small_world: Path, changes: dict[str, Any], message: str) -> None:
    given = {f"student__{key}": value for key, value in ({"start": "merged"} | changes).items()}
    with pytest.raises(UserError, match=message):
        settings(small_world, **given)


@pytest.mark.parametrize(
    ("words", "value"), [(["1"], 1.0), (["[1, -0.5]"], [1.0, -0.5]), (["null"], None)], ids=["number", "list", "null"]
)
def test_coefficients_on_the_command_line(small_world: Path, tmp_path: Path, words: list[str], value: Any) -> None:
    argv = [str(small_world), "--student.start", "merged", "--student.merge_coefficients", *words]
    config = parse(argv).config
    assert config.student.merge_coefficients == value
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert parse([str(tmp_path / "again.yaml")]).config == config


@pytest.mark.parametrize("words", ["many", "[1, many]", "true", "{words: 1}"])
def test_coefficients_that_are_no_numbers(small_world: Path, words: str) -> None:
    argv = [str(small_world), "--student.start", "merged", "--student.merge_coefficients", words]
    with pytest.raises(UserError, match=r"student.merge_coefficients: .* is not a number or a list of numbers or null"):
        parse(argv)


# --- runs without rounds ---------------------------------------------------------------------------------------------


MERGE: dict[str, Any] = {
    "student__start": "merged",
    "student__merge": "ties",
    "student__merge_density": 0.4,
    "student__merge_coefficients": [4.0, 1.0],
}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_without_rounds(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merge is judged once, exported, and found finished; it then trains on where it is told to."""
    config = settings(write_world(tmp_path), train__rounds=0, student__kind=kind, **MERGE)
    run = tmp_path / "run"
    results = train(config, run)
    assert results["rounds"] == 0
    assert set(results["recovered"]) == {"words", "plain"}
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert list(rows) == ["base", "teacher:words", "teacher:plain", "student"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], "evaluation" in line) for line in lines] == [(0, True)]
    means = {task: {reward: rows["student"][reward]} for task, reward in (("words", "text"), ("plain", "colour"))}
    assert lines[0]["evaluation"] == means
    assert "its teachers merged (ties, density 0.4, coefficients 4, 1)" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "Loss over rounds" not in page
    assert "its square" not in page
    assert (find_lora(str(run / "student")) is not None) == (kind == "lora")

    # The export draws what the run judged.
    assert evaluate.main([str(run), "--steps", "3", "--out", str(tmp_path / "judged")]) == 0
    judged = json.loads((tmp_path / "judged" / "results.json").read_text())["rows"]["student"]
    for reward, value in rows["student"].items():
        assert judged[reward] == pytest.approx(value, abs=5e-6)
    assert abs(rows["student"]["colour"] - rows["base"]["colour"]) > 3e-5

    capsys.readouterr()
    assert door.main(["--resume", str(run)]) == 0
    assert "all of its 0 rounds are done" in capsys.readouterr().out
    assert door.main(["--resume", str(run), "--train.rounds", "2"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], "evaluation" in line) for line in lines] == [(0, True), (0, False), (1, False), (2, True)]


def test_a_longer_run_begins_where_one_without_rounds_ends(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    results = train(settings(path, train__rounds=0, **MERGE), tmp_path / "none")
    train(settings(path, train__rounds=1, **MERGE), tmp_path / "one")
    first = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["evaluation"]["plain"]["colour"] == pytest.approx(results["rows"]["student"]["colour"], abs=1e-6)
    assert first["evaluation"]["plain"]["colour"] != pytest.approx(results["rows"]["base"]["colour"], abs=1e-5)


def test_the_base_and_a_lora_without_rounds(tmp_path: Path) -> None:
    path = write_world(tmp_path)
    alone = train(settings(path, train__rounds=0), tmp_path / "base")["rows"]
    assert alone["student"] == pytest.approx(alone["base"], abs=1e-6)
    lora = train(settings(path, train__rounds=0, student__start=str(tmp_path / "words")), tmp_path / "lora")["rows"]
    assert lora["student"] == pytest.approx(lora["teacher:words"], abs=5e-6)
    assert abs(lora["student"]["colour"] - lora["base"]["colour"]) > 1e-5
    assert evaluate.main([str(tmp_path / "base"), "--steps", "1", "--out", str(tmp_path / "judged")]) == 0


def test_without_rounds_or_rewards(tmp_path: Path) -> None:
    results = train(settings(write_world(tmp_path), train__rounds=0, evaluation__every=0, **MERGE), tmp_path / "run")
    assert results["rows"] == {"base": {}, "student": {}}
    assert (tmp_path / "run" / "student").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_no_warm_up_without_rounds(small_world: Path) -> None:
    with pytest.raises(UserError, match=r"train.warmup: 3 is not below train.rounds = 0"):
        settings(small_world, train__rounds=0, train__warmup=3)


def test_the_plan_without_rounds(small_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(small_world), "--student.start", "merged", "--train.rounds", "0", "--dry-run"]
    assert door.main(argv) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "evaluations 1 times" in text
    assert "rows of the run 0" in text


def test_the_first_stage_merges_and_the_next_goes_on(tmp_path: Path) -> None:
    text = write_world(tmp_path).read_text()
    student = "student: {rank: 4, alpha: 8, start: merged, merge: magnitude_prune, merge_density: 0.5}\n"
    text = text.replace("student: {rank: 4, alpha: 8}\n", student)
    text += "stages:\n  - {name: merge, train: {rounds: 0}}\n  - {name: tune, train: {rounds: 1}}\n"
    (tmp_path / "staged.yaml").write_text(text)
    assert door.main([str(tmp_path / "staged.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rounds"] == 1
    assert list(results["rows"])[-3:] == ["stage:merge", "stage:tune", "student"]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands on fewer images."""
    monkeypatch.chdir(tmp_path)
    less = ["--evaluation.prompts=1", "--evaluation.steps=1"]
    text = block("merging.md: python -m opd_fast.train bundled --student.start merged")
    for words in commands(text):
        assert words[:3] == ["python", "-m", "opd_fast.train"]
        assert door.main([*words[3:], *less]) == 0
    rows = [json.loads((tmp_path / "runs" / name / "results.json").read_text())["rows"] for name in ("sum", "ties")]
    assert rows[0]["base"] == rows[1]["base"]
    assert rows[0]["student"] != rows[1]["student"]
    assert all(row["student"] != row["base"] for row in rows)
