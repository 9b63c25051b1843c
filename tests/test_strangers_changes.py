"""The changes that docs/architecture.md shows, applied to a copy of the package, which then trains with them.

The page says which files a change touches, and its blocks are what is applied, so that a change that needs one file
more, or a page that the source has left behind, fails here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

ETA = 0.6

DRIVER = """
import json, sys
from pathlib import Path
import torch
import opd_fast
from opd_fast import evaluate, train
from opd_fast.solvers import solver_table

world, eta, weights = json.loads(sys.argv[1])
assert Path(opd_fast.__file__).is_relative_to(Path.cwd())
torch.set_num_threads(1)

def losses(name, *options):
    small = ["--sampler.steps=3", "--train.rounds=1", "--evaluation.every=0"]
    assert train.main([world, *small, *options, "--run-dir", name]) == 0
    metrics = json.loads((Path(name) / "metrics.jsonl").read_text().splitlines()[0])
    return [metrics["loss/step_00"], metrics["loss/step_01"]]

ancestral = ["--sampler.solver=ancestral", f"--sampler.eta={eta}"]
table = solver_table("ancestral", weights["sigmas"], eta)
velocity = losses("velocity", *ancestral, "--objective.kind=velocity")
x0 = losses("x0", *ancestral, "--objective.kind=x0")
cps = losses("cps", "--sampler.solver=cps", f"--sampler.eta={weights['cps_eta']}", "--objective.kind=velocity")
ode = losses("ode", "--sampler.solver=ode", "--objective.kind=velocity")
code = evaluate.main(
    ["--model", weights["pipeline"], "--prompts", weights["prompts"], "--rewards", "brightness+elsewhere:mean"]
    + ["--resolution=32", "--steps=2", "--out", "judged"]
)
assert code == 0
rows = {name: getattr(table, name).tolist() for name in ("a", "b", "h", "std")}
judged = json.loads(Path("judged/results.json").read_text())["rewards"]
print("\\n" + json.dumps({"rows": rows, "velocity": velocity, "x0": x0, "cps": cps, "ode": ode, "judged": judged}))
"""


def section(page: str, title: str) -> str:
    """The text beneath a heading that begins so, up to the next heading."""
    (found,) = re.findall(rf"^### {title}\b[^\n]*\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE)
    return str(found)


def hunks(page: str, title: str) -> dict[str, list[tuple[str, str]]]:
    """File to the replacements, old lines and new ones, of the block beneath a heading."""
    (block,) = re.findall(r"^```diff\n(.*?)^```$", section(page, title), re.DOTALL | re.MULTILINE)
    changes: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        head, *found = re.split(r"^@@\n", part, flags=re.MULTILINE)
        before, after = re.fullmatch(r"(\S+)\n\+\+\+ (\S+)\n", head).groups()  # type: ignore[union-attr]
        assert before in (after, "/dev/null")
        changes[after] = []
        for hunk in found:
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-\n" for line in lines)
            old, new = ("".join(line[1:] or "\n" for line in lines if line[0] not in skip) for skip in ("+", "-"))
            assert bool(old) == (before != "/dev/null")
            changes[after].append((old, new))
    return changes


def apply(folder: Path, changes: dict[str, list[tuple[str, str]]]) -> None:
    """Make the replacements in `folder`; the old lines must stand in their file once, and a new file must be new."""
    for name, replacements in changes.items():
        path = folder / name
        if not replacements[0][0]:
            ((_, text),) = replacements
            assert not path.exists()
            path.write_text(text)
            continue
        text = path.read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"{name} does not have these lines once:\n{old}"
            text = text.replace(old, new)
        path.write_text(text)


def ancestral_row(s: float, n: float) -> tuple[float, float, float]:
    """Coefficients of x and v and the standard deviation: an Euler step to the level below, rescaled, plus noise.

    x' = (1 - n)/(1 - m) * (x + (m - s) v) + std * eps with m = n * (1 + (n/s - 1) * eta), where std makes the noise in
    x' as large as n.
    """
    m = n * (1 + (n / s - 1) * ETA)
    scale = (1 - n) / (1 - m)
    return scale, scale * (m - s), math.sqrt(n**2 - (scale * m) ** 2)


@pytest.fixture(scope="module")
def results(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the changed package says, in a process of its own."""
    folder = tmp_path_factory.mktemp("changed")
    package = ROOT / "opd_fast"
    shutil.copytree(package, folder / "opd_fast", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (folder / "opd_fast" / "assets").symlink_to(package / "assets")
    page = PAGE.read_text()
    for title in ("A solver", "An objective", "A reward"):
        apply(folder, hunks(page, title))
    (folder / "elsewhere.py").write_text("def mean(images, prompts):\n    return images.flatten(1).mean(1)\n")
    (folder / "driver.py").write_text(DRIVER)
    first = first_level()
    eps = ancestral_row(1.0, first)[2]
    given = {
        "sigmas": [1.0, 0.8, 0.3, 0.0],
        "cps_eta": math.asin(eps / first) * 2 / math.pi,  # the same first row: n*sin(eta*pi/2) is its noise
        "pipeline": str(small_world.parent / "pipeline"),
        "prompts": str(small_world.parent / "plain.txt"),
    }
    command = [sys.executable, "driver.py", json.dumps([str(small_world), ETA, given])]
    path = os.pathsep.join([str(folder), str(ROOT / "kernels")])
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def first_level() -> float:
    """The second noise level of the small pipeline's three steps."""
    from opd_fast.solvers import sd3_sigmas

    return float(sd3_sigmas(3)[1])


def test_a_solver(results: dict) -> None:
    """Its rows are the formula's, and a rollout reaches the state that CPS with the same first row reaches."""
    assert list(hunks(PAGE.read_text(), "A solver")) == ["opd_fast/solvers.py", "opd_fast/config/schema.py"]
    levels = [1.0, 0.8, 0.3, 0.0]
    expected = torch.tensor([ancestral_row(s, n) for s, n in pairwise(levels)]).T
    rows = torch.tensor([results["rows"][name] for name in ("a", "b", "std")])
    assert_close(rows, expected, rtol=1e-6, atol=1e-6)
    assert results["rows"]["h"] == [0, 0, 0]
    assert results["velocity"] == pytest.approx(results["cps"], rel=1e-5)
    assert results["velocity"][1] != pytest.approx(results["ode"][1], rel=1e-2)


def test_an_objective(results: dict) -> None:
    """The first round's rollout is the base's under either objective; its losses differ by sigma squared."""
    assert list(hunks(PAGE.read_text(), "An objective")) == ["opd_fast/objectives.py", "opd_fast/config/schema.py"]
    ratios = [x0 / velocity for x0, velocity in zip(results["x0"], results["velocity"], strict=True)]
    assert ratios == pytest.approx([1.0, first_level() ** 2], rel=1e-5)


def test_a_reward(results: dict) -> None:
    """It judges as the same formula from elsewhere does, and one line besides its file names it."""
    assert list(hunks(PAGE.read_text(), "A reward")) == [
        "opd_fast/rewards/brightness.py",
        "opd_fast/rewards/__init__.py",
    ]
    ((old, new),) = hunks(PAGE.read_text(), "A reward")["opd_fast/rewards/__init__.py"]
    assert len(new.splitlines()) == len(old.splitlines()) + 1
    (means,) = results["judged"].values()
    assert means["brightness"] == pytest.approx(means["elsewhere:mean"], rel=1e-5)
    assert 0 < means["brightness"] < 1


@pytest.mark.parametrize(("title", "registry"), [("A model family", "FAMILIES"), ("A method", "METHODS")])
def test_a_registry_is_where_the_page_says(title: str, registry: str) -> None:
    text = section(PAGE.read_text(), title)
    (file,) = re.findall(rf"line of `{registry}` in `([\w/.]+)`", " ".join(text.split()))
    assert re.search(rf"^{registry}\b.* = ", (ROOT / file).read_text(), re.MULTILINE)
