"""docs/evaluation.md: its commands on small files."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from opd_fast import evaluate
from opd_fast.data.prompt_files import write_geneval
from opd_fast.training.loop import train
from tests.runs import PROMPTS, settings, write_world
from tests.test_docs import block, replaced


def run(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        python, _, module, *argv = shlex.split(line)
        assert (python, module) == ("python", "opd_fast.evaluate")
        assert evaluate.main(argv) == 0


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_the_bundled_world(tmp_path: Path) -> None:
    text = block("evaluation.md: python -m opd_fast.evaluate\n")
    run(replaced(text, {"opd_fast.evaluate": "opd_fast.evaluate --limit 2 --steps 2"}))
    found = json.loads((tmp_path / "runs" / "evaluate-bundled" / "results.json").read_text())
    assert list(found["rows"]) == ["base", "teacher:composition", "teacher:text", "teacher:colour"]
    assert set(found["rows"]["base"]) == {"composition", "composition_strict", "text", "colour"}


def test_a_run(tmp_path: Path) -> None:
    config = settings(write_world(tmp_path), train__rounds=1, train__ema=0.0)
    train(config, tmp_path / "runs" / "mine")
    shutil.copytree(tmp_path / "runs" / "mine", tmp_path / "runs" / "other")
    run(
        replaced(
            block("evaluation.md: python -m opd_fast.evaluate runs/mine\n"),
            {"--steps 28": "--steps 2", "pickscore+clipscore": "colour"},
        )
    )
    (compared,) = (tmp_path / "runs").glob("compare-*")
    found = json.loads((compared / "results.json").read_text())
    assert list(found["rows"]) == ["base", "teacher:words", "teacher:plain", "student"]
    assert (tmp_path / "runs" / "mine" / "evaluation" / "report.html").is_file()


def test_any_pipeline(tmp_path: Path) -> None:
    write_world(tmp_path)
    data = tmp_path / "data"
    (data / "geneval").mkdir(parents=True)
    record = {"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "two circles"}
    write_geneval(data / "geneval" / "test_metadata.jsonl", [record])
    (data / "ocr").mkdir()
    (data / "ocr" / "test.txt").write_text(PROMPTS["words"][0] + "\n")
    (data / "drawbench.tsv").write_text("Prompts\tCategory\na red circle\tColors\n")
    text = block("evaluation.md: python -m opd_fast.evaluate --model")
    small = {
        "/models/stable-diffusion-3.5-medium": f"{tmp_path / 'pipeline'} --resolution 32 --steps 2",
        "/loras/geneval": tmp_path / "words",
        "/loras/ocr": tmp_path / "plain",
        "geneval,ocr,pickscore+clipscore+aesthetic+hps": "composition,text,colour",
    }
    run(replaced(text, small))
    found = json.loads((tmp_path / "runs" / "table" / "results.json").read_text())
    rows = [f"{name}, guidance {guidance}" for name in ("base", "words", "plain") for guidance in ("none", "4.5")]
    assert list(found["rows"]) == rows
    assert set(found["rows"][rows[0]]) == {"composition", "text", "colour"}
    assert found["by_tag"][rows[0]]["composition"].keys() == {"counting", "mean of tags"}
    image = (
        tmp_path / "runs" / "table" / "images" / "words, guidance 4.5" / "geneval" / "00000" / "samples" / "0000.png"
    )
    assert image.is_file()


def test_the_table(tmp_path: Path) -> None:
    """docs/table.md: the paper's table, of small weights and the bundled rewards."""
    write_world(tmp_path)
    for name, lines in (("geneval", PROMPTS["plain"]), ("ocr", PROMPTS["words"])):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "data" / "drawbench.tsv").write_text("Prompts\tCategory\na red circle\tColors\n")
    shutil.copytree(tmp_path / "words", tmp_path / "runs" / "mine" / "student")
    small = {
        "stabilityai/stable-diffusion-3.5-medium": tmp_path / "pipeline",
        "--resolution 512 --steps 40": "--resolution 32 --steps 2",
        "quanhaol/DiffusionOPD/GenEvalTeacher/lora": tmp_path / "words",
        "quanhaol/DiffusionOPD/OCRTeacher/lora": tmp_path / "plain",
        "geneval_accuracy,ocr,": "colour,text,",
        "pickscore+clipscore+hps+aesthetic+image_reward+unified_reward": "colour --out out",
    }
    run(replaced(block("table.md: python -m opd_fast.evaluate --model"), small))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    names = [f"{name}, guidance {g}" for name in ("base", "words", "plain", "student") for g in ("none", "4.5")]
    assert list(rows) == names
    assert set(rows[names[0]]) == {"geneval/colour", "text", "drawbench/colour"}
