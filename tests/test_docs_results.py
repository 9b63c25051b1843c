"""Results that README.md and docs/*.md name, held against the files that they come from."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import reinforcement
from opd_fast.models import meta_model
from opd_fast.objectives import step_weights
from opd_fast.reporting.results import gain_recovered
from opd_fast.solvers import solver_table
from tests.architecture import Module, modules

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP = ("README", "CONTRIBUTING", "CHANGELOG")
PACKAGES = ("kernels", "opd_fast", "benchmarks", "tests")
TASKS = ("composition", "text", "colour")


def page(name: str) -> str:
    """A page with every run of blanks as one space."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def result(name: str) -> Any:
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def states(text: str, *sentences: str) -> None:
    missing = [sentence for sentence in sentences if " ".join(sentence.split()) not in text]
    assert not missing, missing


def percents(recovered: dict[str, float]) -> str:
    first, second, third = (f"{100 * recovered[task]:.0f}" for task in TASKS)
    return f"{first}, {second} and {third} %"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def test_the_bundled_run() -> None:
    text, found = page("README.md"), result("bundled-ode")
    names = ("composition", "composition_strict", "text", "colour")
    for row, means in found["rows"].items():
        own = row.removeprefix("teacher:")
        cells = [f"**{means[name]:.3f}**" if name == own else f"{means[name]:.3f}" for name in names]
        share = f" {100 * found['recovered'][own]:.0f} % |" if row.startswith("teacher:") else " |"
        states(text, f"| {row.replace(':', ' ')} | {' | '.join(cells)} |{share}")
    base, student = found["rows"]["base"], found["rows"]["student"]
    for task in TASKS:
        teacher = found["rows"][f"teacher:{task}"][task]
        assert found["recovered"][task] == pytest.approx(gain_recovered(base[task], teacher, student[task]))
    states(text, f"{duration(found['seconds']['total'])} in all, {duration(found['seconds']['train'])} of it training")
    states(text, f"mean reward of 128 images a task, of its 226, 69 and 17 held-out prompts, seed {found['seed']}")


def test_its_other_seeds_solvers_and_objectives() -> None:
    text, runs = page("README.md"), result("same-rewards")["runs"]
    seeds = {run["seed"]: run["recovered"] for run in runs if run["techniques"] == "on"}
    first, second = (percents(seeds[seed]) for seed in (1, 2))
    states(text, f"Seeds 1 and 2 recovered {first}, and {second}")
    states(text, f"`--sampler.solver flow_sde` a run recovers {percents(result('bundled-flow_sde')['recovered'])}")
    kl = result("bundled-ode-kl")
    states(text, f"it took {kl['rounds']} rounds for {percents(kl['recovered'])} under the ODE")
    states(text, f"stood still at {percents(result('bundled-flow_sde-kl')['recovered'])} under Flow-SDE")


def test_on_and_off_end_alike() -> None:
    on, off = (
        next(run for run in result("same-rewards")["runs"] if run["seed"] == 0 and run["techniques"] == word)
        for word in ("on", "off")
    )
    assert all(abs(on["student"][name] - off["student"][name]) <= 1e-7 for name in on["student"])
    states(page("docs/engine.md"), "all on and all off, ended at the same rewards to 1e-7")


def test_weights_of_the_kl() -> None:
    model = meta_model("bundled", dtype=torch.float32)
    ratios = []
    for solver in ("ode", "flow_sde"):
        weight = step_weights(solver_table(solver, model.sigmas(10, 32), 0.7), "kl")
        ratios.append(float(weight[-2] / weight[0]))
    assert 44.5 <= ratios[0] <= 46  # the page says 45
    assert 650 <= ratios[1] < 750  # the page says 700
    states(
        page("README.md"), "under the ODE 45 times as much at the last trained step as at the first, under Flow-SDE 700"
    )


ROUNDS = {
    "the bundled model's round, 4 samples a task, Flow-SDE": "round/bundled",
    "the same, ODE": "round/bundled/ode",
    "3 samples a task, guided": "round/tiny/guided",
    "8 samples a task, Flow-SDE": "round/tiny",
    "8 samples a task, ODE": "round/tiny/ode",
}
STEPS = {
    "step, (24, 4, 16, 16)": ("step/tiny", 1e6, "µs", ".0f"),
    "step, (9, 16, 64, 64)": ("step/sd35m-512", 1e3, "ms", ".3g"),
}


def test_speed() -> None:
    text = page("README.md")
    newest = sorted((ROOT / "benchmarks" / "results").glob("*.json"))[-1]
    rows = {row["name"]: row for row in json.loads(newest.read_text())["rows"]}
    for words, name in ROUNDS.items():
        row = rows[name]
        states(text, f"| {words} | {row['seconds']['p50']:.2f} s | {row['ratio_vs_reference']:.2f}x |")
    for words, (name, unit, symbol, form) in STEPS.items():
        row = rows[name]
        states(text, f"| {words} | {row['seconds']['p50'] * unit:{form}} {symbol} | {row['ratio_vs_reference']:.2g}x |")


def test_time_to_quality() -> None:
    text, sides = page("README.md"), result("time-to-quality")["sides"]
    engine = sides["engine"]["reached_seconds"]
    for words, name in (
        ("engine, the bundled recipe", "engine"),
        ("published loop, the same settings", "published, tuned"),
        ("published loop, published settings", "published"),
    ):
        seconds, rounds = sides[name]["reached_seconds"], sides[name]["reached_round"]
        times = "" if name == "engine" else f"{seconds / engine:.2g}x "
        states(text, f"| {words} | {rounds} | {seconds / rounds:.2f} s | {seconds:.0f} | {times}|")
    engine_round, published_round = (
        sides[name]["reached_seconds"] / sides[name]["reached_round"] for name in ("engine", "published, tuned")
    )
    states(text, f"A round is {published_round / engine_round:.1f} times as fast as the published loop's")
    assert result("time-to-quality")["share"] == 0.9  # nine tenths


def test_errors_of_float8() -> None:
    found = result("fp8-error")["changes"]["teachers and student"]
    sizes = [abs(change) for change in found["step_loss_change"]]
    above = {3: "three"}[sum(size > 0.01 for size in sizes)]
    many = {9: "nine"}[len(sizes)]
    states(
        page("docs/engine.md"),
        f"the steps' losses move by {100 * min(sizes):.1f} to {100 * max(sizes):.1f} %, "
        f"{above} of {many} by more than 1 %, the round's by {100 * abs(found['round_loss_change']):.1f} %",
    )


def test_gains_of_reinforcement_learning() -> None:
    text, runs = (DOCS / "reinforcement.md").read_text(encoding="utf-8"), result("reinforcement")["runs"]
    assert f"<!-- gains: begin -->\n{reinforcement.table(runs)}\n<!-- gains: end -->" in text
    student = result("bundled-ode")["rows"]["student"]
    first, second, third = (f"{student[task]:.3f}" for task in TASKS)
    (cascade,) = (run["stages"] for run in runs if run["run"] == "cascade-nft")
    fallen = f"{cascade['text']['composition']:.3f} to {cascade['colour']['composition']:.3f}"
    states(
        page("docs/reinforcement.md"),
        f"ends at {first}, {second} and {third}",
        f"In the cascade composition went from {fallen} while colour was learnt",
    )


def merges(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row for the base, for each task's own teacher together, and for each merge."""
    rows = runs[0]["rows"]
    lines = ["| student | composition | text | colour |", "|---|---|---|---|"]
    base, teachers = ([rows[row.format(task)][task] for task in TASKS] for row in ("base", "teacher:{}"))
    for name, means in (("base", base), ("each task's teacher", teachers)):
        lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    for run in runs:
        cells = [f"{run['rows']['student'][task]:.3f} ({100 * run['recovered'][task]:.0f} %)" for task in TASKS]
        lines.append(f"| {run['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_gains_of_merging() -> None:
    """The page's table, and each run's shares follow from its rows."""
    text, runs = (DOCS / "merging.md").read_text(encoding="utf-8"), result("merging")["runs"]
    assert f"<!-- merges: begin -->\n{merges(runs)}\n<!-- merges: end -->" in text
    for run in runs:
        rows = run["rows"]
        for task, share in run["recovered"].items():
            found = gain_recovered(rows["base"][task], rows[f"teacher:{task}"][task], rows["student"][task])
            assert found == pytest.approx(share)
    named = {run["name"].partition(", density")[0]: run for run in runs}
    kept = {name: f"{100 * run['kept']:.2f} %" for name, run in named.items() if "kept" in run}
    assert kept["mean, coefficient 1/3"] == kept["sum, coefficient 2/3"]  # a factor changes no share
    states(
        page("docs/merging.md"),
        f"recovers {percents(named['sum, coefficient 1']['recovered'])} of the teachers' gains",
        f"the cut to rank 32 keeps {kept['sum, coefficient 2/3']} of the square of the sum, "
        f"{kept['ties']} of that of TIES, and {kept['dare_linear']} of that of `dare_linear`",
    )


def test_two_processes_and_a_world_of_one() -> None:
    text = page("docs/scaling.md")
    rows = {row["name"]: row for row in result("weak-scaling")["rows"]}
    for name in ("lora-ddp", "full-ddp", "full-fsdp2", "full-fsdp2-block"):
        one, two = rows[f"{name}/1"], rows[f"{name}/2"]
        seconds = " | ".join(f"{s:.2f} s" for s in (one["seconds"], two["seconds"], two["predicted_seconds"]))
        states(text, f"| {name} | {seconds} | {two['efficiency']:.0%} | {two['predicted_efficiency']:.0%} |")
    full = sorted(rows[f"{name}/1"]["seconds"] for name in ("full-ddp", "full-fsdp2", "full-fsdp2-block"))
    states(text, f"the three full-weight settings took {full[0]:.2f} s to {full[-1]:.2f} s")
    alone = result("world-of-one")
    low, high = alone["interval"]
    states(text, f"{alone['ratio']:.3f} of a process alone, {low:.3f} to {high:.3f}, {alone['pairs']} pairs")


def test_the_files_of_a_step() -> None:
    """README and the map list the same files, as many as README says, each reached from those before it.

    One of them calls the step's kernel, so that no file between two of them is left out.
    """
    spine = (ROOT / "README.md").read_text(encoding="utf-8").partition("A training step passes through ")[2]
    number, _, rest = spine.partition(" files, in this order:\n\n")
    files = re.findall(r"\d\. \[`([\w/]+\.py)`\]", rest.split("\n\n")[0])
    assert len(files) == {"six": 6, "seven": 7}[number]
    way = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## The way of one step\n")[2]
    assert re.findall(r"\d\. \[`([\w/]+\.py)`\]", way.split("\n## ")[0]) == files

    found = {module.file: module for module in modules().values()}
    names = {module.name for module in found.values()}
    assert any(calls(found[file], "fused_step") for file in files if file.startswith("opd_fast"))
    for i, file in enumerate(files[1:], 1):
        if file.startswith("opd_fast/training/methods/"):
            continue  # a run finds its method by the name
        name = found[file].name.removesuffix(".step")  # the operator is imported from its package
        assert any(name in {target.module for target in found[f].imports(names)} for f in files[:i]), file


def calls(module: Module, function: str) -> bool:
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
        for node in ast.walk(module.tree)
    )


def test_every_file_is_named_as_it_is() -> None:
    """Every Python file and module in backquotes, on a page or in the source, is one of the project.

    A file may be named by the end of its path, and a module with what is in it.
    """
    every = [path.relative_to(ROOT).as_posix() for top in PACKAGES for path in (ROOT / top).rglob("*.py")]
    pages = [ROOT / f"{name}.md" for name in TOP] + sorted(DOCS.glob("*.md"))
    gone = []
    for path in [*pages, *(ROOT / name for name in every if not name.startswith("tests/"))]:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"`([\w/]+\.py)`", text):
            if not any(f"/{file}".endswith(f"/{name}") for file in every):
                gone.append(f"{path.name}: {name}")
        for name in re.findall(r"`(opd_fast\.[a-z_0-9.]+)", text):
            parts = name.rstrip(".").split(".")
            ways = ("/".join(parts[:length]) for length in (len(parts), len(parts) - 1) if length > 1)
            if not any({f"{way}.py", f"{way}/__init__.py"} & set(every) for way in ways):
                gone.append(f"{path.name}: {name}")
    assert not gone


def test_the_bundled_evaluation() -> None:
    text, found, run = page("docs/evaluation.md"), result("evaluate-bundled"), result("bundled-ode")
    states(text, f"this took {found['seconds']:.0f} s on two CPU cores, for {found['drawn']} images")
    for row, means in run["rows"].items():
        assert found["rows"][row] == pytest.approx(means, abs=1e-6), row


def test_the_ways_to_wait() -> None:
    text, ways = page("docs/engine.md"), result("waiting")["ways"]
    default = "libgomp's default"
    named = {default: default, "opd_fast's": "the bound of 1000 turns", "passive": "without spinning"}
    for way, name in named.items():
        idle, busy = (ways[way][state]["seconds"] for state in ("idle", "busy"))
        states(text, f"| {name} | {idle:.2f} s | {busy:.2f} s |")
    usual = ways[default]["idle"]["seconds"]
    bound, none = (100 * (ways[way]["idle"]["seconds"] / usual - 1) for way in ("opd_fast's", "passive"))
    states(text, f"The bound costs {bound:.0f} % of an idle round, and no spinning {none:.0f} %.")


def test_pages_name_files_that_exist() -> None:
    """Every relative link of a page, and every file of the package or the tests that it names."""
    for name in [*(f"{name}.md" for name in TOP), *(f"docs/{path.name}" for path in DOCS.glob("*.md"))]:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert all((path.parent / link).exists() for link in links), name
        named = re.findall(r"`((?:opd_fast|opd_kernels|tests|benchmarks|docs|kernels)/[\w/.-]+)`", text)
        gone = [file for file in named if not (ROOT / file).exists() and file != "benchmarks/results/"]
        assert not gone, (name, gone)
