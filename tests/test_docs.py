"""Every fenced block of the pages is run by a test, or stands in a list with the reason why none runs it.

A page's command is run as it stands but for the replacements that stand beside it here: real weights by small ones,
folders by those of the test, and sizes by smaller ones. A block that a page gains is in neither list, and fails.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import report
from opd_fast import train
from opd_fast.data.prompt_files import write_geneval, write_lines
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.models import load_model
from opd_fast.models.base import ASSETS
from opd_fast.models.lora.files import merge_into, read_lora
from opd_fast.rewards.text import read
from opd_fast.solvers import solver_table
from opd_fast.training.sampling import sample
from tests.benchmarks.test_benchmarks import ENVIRONMENT, row
from tests.runs import PROMPTS

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README", "CONTRIBUTING", "CHANGELOG")
PAGES = [*(ROOT / f"{name}.md" for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]

SCALE = "distributed.test_scale:test_the_page_shows_what_the_commands_print"
RUN: dict[str, str] = {
    "README.md: python -m venv .venv && . .venv/bin/activate && pip install -e . &&": "test_the_first_command",
    "README.md: # mine.yaml": "test_a_model_and_teachers_of_ones_own",
    "README.md: python -m opd_fast.train mine.yaml --dry-run": "test_a_model_and_teachers_of_ones_own",
    "README.md: import torch": "test_diffusers_draws_what_the_teacher_draws",
    "families.md: python -m opd_fast.train --model.family my_package.my_module:MyFamily": "test_a_family",
    "families.md: import zlib": "test_a_family",
    "launch.md: torchrun --standalone --nproc-per-node 8 -m opd_fast.train sd35-mopd": "test_launches",
    "launch.md: torchrun --standalone --nproc-per-node 8 -m opd_fast.train --resume": "test_launches",
    "launch.md: torchrun --standalone --nproc-per-node 4 -m opd_fast.train --resume": "test_launches",
    "launch.md: stopping after round 7: saving what was learnt": "test_launches",
    "gpu.md: python -m benchmarks.report --take /tmp/out": "test_results_of_a_gpu_are_taken",
    "rewards.md: # my_rewards.py": "test_a_reward_is_learnt_from",
    "rewards.md: prompt,colour": "test_a_reward_is_learnt_from",
    "rewards.md: # tint.yaml": "test_a_reward_is_learnt_from",
    "rewards.md: python -m opd_fast.evaluate --prompts tint.csv": "training.test_evaluate:test_the_documented_reward",
    "evaluation.md: python -m opd_fast.evaluate\n": "evaluation.test_page:test_the_bundled_world",
    "evaluation.md: python -m opd_fast.evaluate runs/mine\n": "evaluation.test_page:test_a_run",
    "evaluation.md: python -m opd_fast.evaluate --model": "evaluation.test_page:test_any_pipeline",
    "merging.md: python -m opd_fast.train bundled --student.start merged": "training.test_merging:test_the_page",
    "judges.md: # hpsv3_server.py": "rewards.test_documented_judges:test_the_server_of_hpsv3",
    "judges.md: # judged.yaml": "rewards.test_documented_judges:test_the_settings_of_a_run",
    "judges.md: # my_judges.py": "rewards.test_documented_judges:test_a_judge_of_ones_own",
    "table.md: python -m opd_fast.evaluate --model": "evaluation.test_page:test_the_table",
    "CONTRIBUTING.md: make test": "test_make_runs_what_continuous_integration_runs",
    "architecture.md: --- opd_fast/solvers.py": "test_strangers_changes:test_a_solver",
    "architecture.md: --- opd_fast/objectives.py": "test_strangers_changes:test_an_objective",
    "architecture.md: --- /dev/null\n+++ opd_fast/rewards/brightness.py": "test_strangers_changes:test_a_reward",
    "scaling.md: python -m opd_fast.train sd35-mopd --dry-run --devices 8": "test_plans",
    "scaling.md: $ python -m opd_fast.scale --reshard block": SCALE,
    "scaling.md: $ python -m opd_fast.scale\n": SCALE,
}
"""Beginning of a block to the test that runs it, here or in another file."""

NODES = "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500"
NOT_RUN: dict[str, str] = {
    "table.md: python -m opd_fast.train sd35-teacher-ocr": "SD3.5-Medium; tests/rewards train with these rewards, and "
    "test_recipes reads the recipe",
    "evaluation.md: OUT/results.json": "a list of files, which the page's commands leave",
    'README.md: python -m venv .venv && . .venv/bin/activate && pip install -e ".[test]"': "it runs these very tests; "
    ".ci/run takes it from the page, word for word",
    "README.md: flowchart LR": "a picture",
    'CONTRIBUTING.md: python -m venv .venv && . .venv/bin/activate && pip install -e ".[dev]"': "a fresh environment; "
    ".ci/run installs the same",
    "CONTRIBUTING.md: pip install pre-commit": "it writes into the checkout; test_hooks holds what the hooks run",
    "judges.md: pip install": "a GPU, and weights of 16 GB; test_servers stands in for the server",
    "gpu.md: benchmarks/gpu.sh 1": "a GPU; test_gpu_script rehearses it",
    "gpu.md: OPD_COMMIT=$(git describe": "a GPU; test_gpu_script rehearses it, test_benchmarks reads OPD_COMMIT",
    "gpu.md: python3.12 -m venv .venv312": "another Python, and 800 MB",
    "engine.md: attention of the student": "lines of one GPU, times among them; a CPU says others",
    f"launch.md: {NODES} --rdzv-id sd35": "four machines; test_launch has torchrun and the engine parse it",
    f"launch.md: {NODES} --rdzv-id full": "four machines; test_launch has torchrun and the engine parse it",
    "launch.md: torchrun --standalone --nproc-per-node 8 --max-restarts 3": "minutes, as a process has to die for it; "
    "test_parallel launches the same and kills one, test_launch has torchrun and the engine parse it",
    "launch.md: sbatch docs/slurm.sh": "SLURM; test_launch runs the script with stand-ins for its commands",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page's name, the language after the fence, and the text."""

    page: str
    language: str
    text: str

    def begins(self, key: str) -> bool:
        return f"{self.page}: {self.text}".startswith(key)


def blocks() -> list[Block]:
    return [
        Block(path.name, language, text)
        for path in PAGES
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    ]


def block(key: str) -> str:
    """The text of the one block that begins so; `key` is in `RUN`."""
    assert key in RUN
    (found,) = [b for b in blocks() if b.begins(key)]
    return found.text


def replaced(text: str, changes: Mapping[str, object]) -> str:
    for old, new in changes.items():
        assert old in text, f"the page no longer says {old!r}"
        text = text.replace(old, str(new))
    return text


def commands(text: str) -> list[list[str]]:
    """The words of each command, whose lines a backslash joins."""
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]


def run(words: list[str], status: int = 0) -> None:
    """A command `python -m MODULE ...` in this process."""
    assert words[:2] == ["python", "-m"], words
    assert importlib.import_module(words[2]).main(words[3:]) == status


def test_every_block_is_run_or_listed() -> None:
    keys = [*RUN, *NOT_RUN]
    for found in blocks():
        first = found.text.splitlines()[0]
        assert [key for key in keys if found.begins(key)], f"{found.page}: {first!r} is neither run nor listed"
    for key in keys:
        assert len([b for b in blocks() if b.begins(key)]) == 1, f"{key!r} begins no block, or several"
    assert len(blocks()) == len(keys)
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", path.read_text("utf-8"), re.MULTILINE)) for path in PAGES)
    assert fences == 2 * len(blocks()), "a fence is indented, or of another form"


@pytest.mark.parametrize("key", RUN)
def test_what_runs_a_block_takes_it_from_the_page(key: str) -> None:
    file, _, name = RUN[key].rpartition(":")
    module = importlib.import_module(f"tests.{file}") if file else sys.modules[__name__]
    source = inspect.getsource(getattr(module, name))
    assert json.dumps(key) in source or (file and "PAGE.read_text()" in source)


def test_the_first_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Less of everything; what it ends with in full is held by test_docs_results and test_bundle."""
    monkeypatch.chdir(tmp_path)
    text = block("README.md: python -m venv .venv && . .venv/bin/activate && pip install -e . &&")
    installing = "python -m venv .venv && . .venv/bin/activate && pip install -e . && "
    (words,) = commands(replaced(text, {installing: ""}))
    less = {"train.rounds": 1, "train.samples_per_task": 1, "sampler.steps": 2, "evaluation.prompts": 1}
    run([*words, *(f"--{key}={value}" for key, value in less.items()), "--evaluation.steps=1"])
    (folder,) = (tmp_path / "runs").glob("bundled-*")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert list(rows) == ["base", "teacher:composition", "teacher:text", "teacher:colour", "student"]
    assert "teacher composition" in capsys.readouterr().out


def test_a_model_and_teachers_of_ones_own(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards.py").write_text("def ocr(images, prompts):\n    return images.mean((1, 2, 3))\n")
    for name in ("geneval", "ocr"):
        (tmp_path / "data" / name).mkdir(parents=True)
    write_geneval(tmp_path / "data/geneval/train_metadata.jsonl", [{"prompt": text} for text in PROMPTS["plain"]])
    for split in ("train", "test"):
        write_lines(tmp_path / f"data/ocr/{split}.txt", PROMPTS["words"])
    world = small_world.parent
    pipeline = {"/models/stable-diffusion-3.5-medium": world / "pipeline"}
    settings = {
        **pipeline,
        "/loras/geneval": world / "words",
        "/loras/ocr/": f"{world}/plain/",
        "resolution: 512": "resolution: 32",
        "steps: 10": "steps: 2",
        "rounds: 400": "rounds: 2",
    }
    (tmp_path / "mine.yaml").write_text(replaced(block("README.md: # mine.yaml"), settings))
    page = commands(block("README.md: python -m opd_fast.train mine.yaml --dry-run"))
    dry, begin, resume, judge = page
    run(dry)
    assert "resolution 32 pixels" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()
    run(begin)
    (folder,) = (tmp_path / "runs").glob("mine-*")
    assert "lr: 0.0001" in (folder / "config.yaml").read_text()
    written = {"runs/mine-20260101-120000": f"runs/{folder.name}"}
    run([replaced(word, written) if "mine-" in word else word for word in resume])
    here = {**written, **pipeline}
    judge = [replaced(word, {k: v for k, v in here.items() if k in word}) for word in judge]
    run([*judge, "--rewards", "rewards:ocr", "--out", "judged"])
    results = json.loads((tmp_path / "judged" / "results.json").read_text())
    assert results["prompts"] == {"test": 3}
    assert 0 < results["rewards"]["test"]["rewards:ocr"] < 1


def test_diffusers_draws_what_the_teacher_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's last line, from noise that both draw: the engine's image of the teacher's, not the base's."""
    text = replaced(block("README.md: import torch"), {'"opd_fast/assets': f'"{ASSETS}'})
    code = ast.parse(text)
    last = code.body.pop()
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    names["pipe"].set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    image = np.asarray(eval(compile(ast.Expression(last.value), "README.md", "eval"), names)) / 255

    prompt = 'a sign that says "HK"'
    assert prompt in text
    model = load_model("bundled", device="cpu", dtype=torch.float32)
    rows = EmbeddingCache.build(model, [prompt]).rows([prompt])
    table = solver_table("ode", model.sigmas(28, 32), 0.0)  # 28 steps are the pipeline's default
    torch.manual_seed(5)
    x = torch.randn(1, *model.latent_shape(32))

    def drawn() -> torch.Tensor:
        return model.decode(sample(model, model.transformer, rows, None, 1.0, table, x=x))

    base = drawn()
    merge_into(model.transformer, read_lora("bundled/text"))
    teacher = drawn()
    assert np.abs(teacher[0].permute(1, 2, 0).numpy() - image).max() <= 2 / 255
    assert np.abs(base[0].permute(1, 2, 0).numpy() - image).max() > 0.1
    assert read(teacher) == ["HK"]


def test_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan for it; test_families trains a student of it."""
    (tmp_path / "toy_family.py").write_text(block("families.md: import zlib"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_family", raising=False)
    importlib.import_module("toy_family").ToyNet().save_pretrained(tmp_path / "model" / "transformer")
    write_lines(tmp_path / "p.txt", ["a red circle"])
    teachers = "[{name: a, weights: model, prompts: p.txt}]"
    text = block("families.md: python -m opd_fast.train --model.family my_package.my_module:MyFamily")
    names = {"my_package.my_module:MyFamily": "toy_family:Toy", "PATH ...": f"model --teachers '{teachers}' --dry-run"}
    (words,) = commands(replaced(text, names))
    run(words)
    text = " ".join(capsys.readouterr().out.split())
    assert "resolution 8 pixels (the pipeline's own), latents (3,8,8)" in text
    assert "missing" not in text
    monkeypatch.delitem(sys.modules, "toy_family")


def test_a_reward_is_learnt_from(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's reward, prompts and task, for a round; test_evaluate has its command judge with them."""
    (tmp_path / "my_rewards.py").write_text(block("rewards.md: # my_rewards.py"))
    (tmp_path / "tint.csv").write_text(block("rewards.md: prompt,colour"))
    task = replaced(
        block("rewards.md: # tint.yaml"), {"rounds: 40, samples_per_task: 48": "rounds: 1, samples_per_task: 2"}
    )
    smaller = f"model: {{path: {small_world.parent / 'pipeline'}, resolution: 32}}\nsampler: {{steps: 2}}\n"
    smaller += "rl: {images_per_prompt: 2, updates: 1}\nevaluation: {every: 1, prompts: 2, steps: 1}\n"
    (tmp_path / "tint.yaml").write_text(smaller + task)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert train.main(["tint.yaml", "--run-dir", "run"]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert -1 < rows["student"]["my_rewards:tinted"] < 1
    sys.modules.pop("my_rewards")


def test_results_of_a_gpu_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "benchmarks"
    monkeypatch.setattr(report.take, "__defaults__", (here / "results",))
    monkeypatch.setattr(report, "README", here / "README.md")
    monkeypatch.setattr(report.load_results, "__defaults__", (here / "results",))
    report.write_results(ENVIRONMENT, [row("step/1GB", 1.0)], tmp_path / "out" / "step")
    run(
        shlex.split(
            replaced(block("gpu.md: python -m benchmarks.report --take /tmp/out"), {"/tmp/out": tmp_path / "out"})
        )
    )
    assert "| `step/1GB` | 1 s |" in (here / "README.md").read_text()


def test_make_runs_what_continuous_integration_runs() -> None:
    """Each target's commands, as make prints them, are those of .ci/run and of the pages."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    expected = {
        "test": ["pytest -n 2"],
        "slow": ["pytest -n 2 -m slow"],
        "lint": ["ruff check .", "ruff format --check ."],
        "types": ["mypy"],
        "bench": ["pytest benchmarks --benchmark-only"],
        "map": ["python -m tests.architecture"],
    }
    assert commands(block("CONTRIBUTING.md: make test")) == [["make", target] for target in expected]
    named = (".ci/run", "README.md", "docs/architecture.md", "benchmarks/README.md")
    known = re.split(r"[\n`\"]", "\n".join((ROOT / name).read_text() for name in named))
    for target, lines in expected.items():
        printed = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert printed.splitlines() == lines
        assert all(line in known or any(words.endswith(f" && {line}") for words in known) for line in lines), lines


def test_hooks() -> None:
    """A commit is held to what `make lint` holds the checkout to."""
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == ["ruff check --force-exclude", "ruff format --force-exclude"]
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == tuple(
        project[key] for key in ("name", "version", "license")
    )
    versions = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", project["version"]]


def test_plans(capsys: pytest.CaptureFixture[str]) -> None:
    """Of models that are not here, from the configurations in the package."""
    first, second = commands(block("scaling.md: python -m opd_fast.train sd35-mopd --dry-run --devices 8"))
    run(first, status=2)  # as the page says: the recipe's prompts are not there
    assert "ddp on 8 device(s) of 80 GiB" in " ".join(capsys.readouterr().out.split())
    run(second, status=2)
    text = " ".join(capsys.readouterr().out.split())
    assert "fsdp2 on 64 device(s) of 80 GiB" in text
    assert "reshard: block" in text


@pytest.mark.slow
def test_launches(small_world: Path, tmp_path: Path) -> None:
    """One machine's launches, on two processes of it; then the run goes on with one, is told to stop, and ends."""

    def launch(text: str) -> subprocess.Popen[str]:
        (words,) = commands(text)
        start = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
        command = [sys.executable, *start, *words[1:]]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finished(text: str) -> str:
        process = launch(text)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        return out

    two = {"--nproc-per-node 8": "--nproc-per-node 2"}
    begin = block("launch.md: torchrun --standalone --nproc-per-node 8 -m opd_fast.train sd35-mopd")
    said = finished(replaced(begin, {**two, "sd35-mopd": small_world}))
    for once in ("encoded 7 distinct prompts", "teacher words: ", "student starts from ", "student trains "):
        assert said.count(once) == 1, said
    again = block("launch.md: torchrun --standalone --nproc-per-node 8 -m opd_fast.train --resume")
    assert commands(again)[0][-2:] == ["--resume", "runs/x"]
    finished(replaced(again, two))
    elsewhere = block("launch.md: torchrun --standalone --nproc-per-node 4 -m opd_fast.train --resume")
    four, longer = elsewhere.splitlines()
    finished(replaced(four, {"--nproc-per-node 4": "--nproc-per-node 1"}))
    process = launch(replaced(longer, {"--train.rounds 600": "--train.rounds 5000"}))
    metrics, before = tmp_path / "runs/x/metrics.jsonl", len((tmp_path / "runs/x/metrics.jsonl").read_text())
    deadline = time.monotonic() + 120
    while len(metrics.read_text()) == before and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    for line in block("launch.md: stopping after round 7: saving what was learnt").splitlines():
        assert re.search(re.escape(line).replace("7", r"\d+"), out), out
