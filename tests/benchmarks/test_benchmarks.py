"""The benchmark suite's own arithmetic: rows, files, the page, and the yardstick it measures against."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks import owed, report
from benchmarks.environment import commit_and_changes, environment, measured_peaks
from benchmarks.models import NANO, SD35M_512, random_model, random_text
from benchmarks.reference import DETERMINISTIC, STOCHASTIC, Reference, WeightsPolicy, solver_step
from benchmarks.rounds import Contest, Recipe, Work, forward_flops, peak_bytes, random_work
from benchmarks.test_round import compare

# Flow-SDE at eta 0.7 with ten steps: a, b and std of DiffusionOPD's sampler, computed apart in float64.
FLOW_SDE = {
    0: (0.75500, -0.03987, 0.70000),
    1: (0.71254, -0.05824, 0.74296),
    5: (0.91201, -0.13088, 0.35280),
    8: (0.90867, -0.33505, 0.22536),
    9: (0.99779, -0.01112, 0.00628),
}


def scheduler(steps: int) -> Any:
    made = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made.set_timesteps(steps)
    return made


def coefficients(made: Any, solver: str, eta: float, j: int) -> tuple[float, float, float]:
    one, nil = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    t = made.timesteps[j : j + 1]
    of_x = solver_step(made, solver, eta, nil, t, one)
    of_v = solver_step(made, solver, eta, one, t, nil)
    return of_x.mean.item(), of_v.mean.item(), of_x.std.item()


@pytest.mark.parametrize("j", FLOW_SDE)
def test_reference_flow_sde_steps_have_the_published_coefficients(j: int) -> None:
    assert coefficients(scheduler(10), "flow_sde", 0.7, j) == pytest.approx(FLOW_SDE[j], abs=6e-6)


@pytest.mark.parametrize("solver", STOCHASTIC + DETERMINISTIC)
def test_reference_step_lands_on_the_marginal_of_a_known_image(solver: str) -> None:
    """With the exact velocity of one image, the next state is (1 - n) x0 + n eps, some of eps replaced by fresh noise.

    Flow-SDE and Dance-SDE keep that marginal only in the limit of small steps; for them the prediction is checked.
    """
    made = scheduler(10)
    torch.manual_seed(0)
    image, eps = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for j in range(1, 10):
        s, n = made.sigmas[j], made.sigmas[j + 1]
        x = (1 - s) * image + s * eps
        step = solver_step(made, solver, 0.7, eps - image, made.timesteps[j : j + 1], x, image)
        torch.testing.assert_close(step.x0, image, rtol=0, atol=1e-5)
        if solver not in ("flow_sde", "dance_sde"):
            fresh = float((n**2 - step.std**2).clamp(min=0).sqrt())
            torch.testing.assert_close(step.mean, (1 - n) * image + fresh * eps, rtol=0, atol=2e-5)


def test_reference_refuses_an_unknown_solver() -> None:
    student = WeightsPolicy(torch.nn.Identity())
    with pytest.raises(ValueError, match="solver 'heun' is unknown"):
        Reference(scheduler(4), student, [], solver="heun", steps=4, eta=0.0)


def fake(name: str, data: list[float], has_error: bool = False, **extra: Any) -> SimpleNamespace:
    info = {"name": name, **extra} if name else extra
    return SimpleNamespace(extra_info=info, stats=SimpleNamespace(data=data), has_error=has_error)


def test_rows_join_the_variants_of_a_name() -> None:
    rows = report.rows_of(
        [
            fake("step/tiny", [3.0, 1.0, 2.0], exact=True, gradient_error=1e-7),
            fake("step/tiny", [30.0], variant="eager"),
            fake("step/tiny", [5.0, 4.0], variant="compiled"),
            fake("round/tiny", [4.0], ratio_vs_reference=1.75, share_of_floor=None),
            fake("", [1.0]),
            fake("step/broken", [1.0], has_error=True),
            fake("step/only-eager", [1.0], variant="eager"),
        ]
    )
    assert [row["name"] for row in rows] == ["round/tiny", "step/tiny"]
    assert rows[0]["ratio_vs_reference"] == 1.75
    assert "share_of_floor" not in rows[0]
    assert rows[1] == {
        "name": "step/tiny",
        "seconds": {"p20": 1.4, "p50": 2.0, "p80": 2.6},
        "ratio_vs_reference": 15.0,
        "ratio_vs_compiled": 2.25,
        "exact": True,
        "gradient_error": 1e-7,
    }


def test_rows_refuse_what_they_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="variant 'fast'"):
        report.rows_of([fake("a", [1.0], variant="fast")])
    with pytest.raises(ValueError, match="two variants 'eager'"):
        report.rows_of([fake("a", [1.0], variant="eager"), fake("a", [1.0], variant="eager")])


ENVIRONMENT: dict[str, Any] = {
    "date": "2030-01-02",
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": "Some CPU @ 2.0GHz, 2 cores",
    "threads": 2,
    "power_limit_w": None,
    "driver": None,
    "python": "3.12.0",
    "torch": "2.11.0",
    "triton": None,
    "diffusers": "0.42.1",
    "peft": "0.21.2",
    "command": "pytest benchmarks --benchmark-only",
    "peaks": {"copy_gbps": 12.5, "matmul_tflops": 0.2, "matmul_dtype": "float32"},
}


def row(name: str, p50: float) -> dict[str, Any]:
    return {"name": name, "seconds": {"p20": p50 / 2, "p50": p50, "p80": p50 * 2}}


def test_results_of_one_commit_are_kept_together(tmp_path: Path) -> None:
    path = report.write_results(ENVIRONMENT, [row("a", 1.0), row("b", 1.0)], tmp_path)
    assert path.name == "some-cpu-2-0ghz-2-cores-2030-01-02.json"
    report.write_results(ENVIRONMENT, [row("b", 2.0)], tmp_path)
    assert json.loads(path.read_text())["rows"] == [row("a", 1.0), row("b", 2.0)]
    report.write_results({**ENVIRONMENT, "commit": "other"}, [row("b", 3.0)], tmp_path)
    assert json.loads(path.read_text())["rows"] == [row("b", 3.0)]
    report.write_results({**ENVIRONMENT, "commit": "other", "dirty": True}, [row("c", 4.0)], tmp_path)
    assert json.loads(path.read_text())["rows"] == [row("c", 4.0)]


def test_results_of_another_machine_are_brought_in(tmp_path: Path) -> None:
    """Rows of one commit become one file, later ones in place of earlier ones; another commit has a file of its own."""
    far, here = tmp_path / "far", tmp_path / "results"
    first = {**ENVIRONMENT, "command": "one"}
    report.write_results(first, [row("a", 1.0), row("b", 1.0)], far / "step")
    report.write_results({**ENVIRONMENT, "command": "two"}, [row("b", 2.0)], far / "zound")
    (path,) = report.take([far], here)
    content = json.loads(path.read_text())
    assert content["rows"] == [row("a", 1.0), row("b", 2.0)]
    assert content["environment"]["command"] == "one; two"
    report.write_results({**ENVIRONMENT, "commit": "f00dfacecafe"}, [row("a", 3.0)], tmp_path / "mended")
    (other,) = report.take([tmp_path / "mended"], here)
    assert other.name == path.name.replace(".json", "-f00dfac.json")
    assert json.loads(path.read_text()) == content
    (tmp_path / "else.json").write_text("[]")
    with pytest.raises(ValueError, match=r"else\.json holds no results"):
        report.take([tmp_path / "else.json"], here)


def test_the_page_names_what_no_gpu_has_measured() -> None:
    def owed_by(row_name: str, **changes: Any) -> str:
        content = {"environment": {**ENVIRONMENT, **changes}, "rows": [row(row_name, 1.0)]}
        return report.render({"a.json": content}).split("## Not measured yet")[1]

    after = owed_by("step/1GB", device="NVIDIA H100", threads=None)
    assert "`step/1GB`," not in after
    for name in ("step/1GB/drawn", "round/sd35m-512/fp8", "ladder/sd35m-512/graphs"):
        assert f"`{name}`" in after
    assert "| `benchmarks/gpu.sh 2` | `ladder/sd35m-512/one-pass`, " in after
    assert "`step/tiny`," in owed_by("step/tiny"), "a CPU's row is not a GPU's"


def test_what_is_owed_are_the_rows_that_a_gpu_would_give() -> None:
    """Every row that the suite and the ladder have on a GPU, and the commands that measure it first."""
    from benchmarks import ladder, test_round, test_step

    sizes = [case.name.removesuffix("/drawn") for case in test_step.CASES]
    steps = {f"{name}{end}" for name in (*sizes, "step/1GB") for end in ("", "/drawn")}
    (cases,) = [mark.args[1] for mark in test_round.test_round_tiny.pytestmark if mark.name == "parametrize"]
    rounds = {line.name for line in test_round.SD35M} | {name for name, _ in cases}
    rungs = {f"ladder/sd35m-512/{name}" for name in (*ladder.RUNGS, "reference")}
    assert {line.name for line in owed.ROWS} == steps | rounds | rungs
    assert len(owed.ROWS) == len({line.name for line in owed.ROWS})


@pytest.mark.parametrize(
    ("told", "expected"), [("0a1b2c", ("0a1b2c", False)), ("0a1b2c-dirty", ("0a1b2c", True)), (None, (None, None))]
)
def test_a_checkout_without_git_takes_the_commit_it_is_told(
    told: str | None, expected: tuple[str | None, bool | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.environment._git", lambda *arguments: None)
    monkeypatch.delenv("OPD_COMMIT", raising=False)
    if told is not None:
        monkeypatch.setenv("OPD_COMMIT", told)
    assert commit_and_changes() == expected


def test_page_shows_newest_first_with_its_figures(tmp_path: Path) -> None:
    full = row("round/tiny", 0.0125) | {
        "ratio_vs_reference": 1.756,
        "share_of_floor": 0.5,
        "peak_bytes": 3 * 2**20,
        "reference_peak_bytes": 2**31,
        "exact": False,
        "gradient_error": 1.5e-6,
    }
    absent = {"name": "ladder/tiny/graphs", "note": "needs a GPU"}
    older = {
        "environment": {**ENVIRONMENT, "date": "2029-12-31", "dirty": True},
        "rows": [absent, row("step/tiny", 2.0)],
    }
    page = report.render({"z.json": older, "a.json": {"environment": ENVIRONMENT, "rows": [full]}})
    line = "| `round/tiny` (not exact) | 12.5 ms | 6.25 ms to 25 ms | 1.76x |  | 50 % floor | 3.0 MiB (2.00 GiB) |"
    assert f"{line} 1.5e-06 |" in page
    assert "| `ladder/tiny/graphs` | needs a GPU |  |" in page
    assert page.index("2030-01-02") < page.index("2029-12-31")
    assert "commit 0123456789 with local changes" in page
    assert "`pytest benchmarks --benchmark-only`, [a.json](results/a.json)" in page
    assert "No results are stored" not in page
    assert "No results are stored" in report.render({})


def test_stored_page_is_rendered_from_the_stored_files() -> None:
    assert report.README.read_text(encoding="utf-8") == report.render(report.load_results()), (
        "benchmarks/README.md is not what the results say; run: python -m benchmarks.report"
    )


def test_stored_files_are_complete() -> None:
    for name, content in report.load_results().items():
        assert content["environment"].keys() >= ENVIRONMENT.keys(), name
        for stored in content["rows"]:
            if "note" in stored:  # a technique that was not at work, and why
                assert "seconds" not in stored, (name, stored["name"])
                continue
            assert stored["seconds"].keys() == {"p20", "p50", "p80"}, name
            assert {"ratio_vs_reference", "exact", "gradient_error"} <= stored.keys(), (name, stored["name"])


def test_environment_says_where_and_how_fast() -> None:
    found = environment(torch.device("cpu"), "pytest benchmarks")
    assert found.keys() == ENVIRONMENT.keys()
    assert found["command"] == "pytest benchmarks"
    assert found["torch"] == torch.__version__
    assert found["peaks"]["copy_gbps"] > 0
    assert found["peaks"]["matmul_tflops"] > 0
    json.dumps(found)


CPU = torch.device("cpu")
GUIDED = Recipe(
    solver="ode", steps=3, samples_per_task=2, guidance=4.5, teacher_guidance=(4.5, 4.5, 1.0), rank=4, resolution=64
)


@pytest.fixture(scope="module")
def contest(tmp_path_factory: pytest.TempPathFactory) -> Contest:
    return Contest(random_work(CPU, NANO, GUIDED, tmp_path_factory.mktemp("teachers")))


class Stopwatch:
    """pytest-benchmark's fixture as far as `compare` uses it, so that this test runs with the plugin off, too."""

    has_error = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(
        self,
        target: Callable[[], object],
        setup: Callable[[], object],
        rounds: int,
        warmup_rounds: int,
        iterations: int,
    ) -> None:
        seconds = []
        for _ in range(warmup_rounds + rounds):
            setup()
            start = time.perf_counter()
            target()
            seconds.append(time.perf_counter() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=seconds[warmup_rounds:]))


def test_a_contest_becomes_a_row(contest: Contest) -> None:
    watch = Stopwatch()
    config: Any = SimpleNamespace(getoption={"pairs": 2}.get)
    before = {name: parameter.detach().clone() for name, parameter in contest.engine.parameters.items()}
    compare(watch, "round/nano", contest, config)
    assert any(not torch.equal(p, before[name]) for name, p in contest.engine.parameters.items()), "nothing was trained"

    measured = SimpleNamespace(extra_info=watch.extra_info, stats=watch.stats.stats, has_error=False)
    (found,) = report.rows_of([measured])
    assert found["pairs"] == 2
    assert found["samples"] == 6
    assert found["exact"] is True
    assert 0 < found["gradient_error"] <= 1e-5
    assert 0 <= found["loss_error"] <= 1e-5
    assert 0 < found["ratio_vs_reference"] < 100
    assert found["reference_seconds"]["p50"] > 0
    assert "ratio_vs_compiled" not in found
    weights = contest.engine.held_bytes()
    assert weights < found["peak_bytes"] < 100 * weights
    json.dumps(found)


def test_floor_counts_branches_steps_and_samples(contest: Contest) -> None:
    rate = float(measured_peaks(CPU)["matmul_tflops"]) * 1e12
    student, teachers = 6 * 2, 2 * (2 + 2 + 1)  # sample-branches in a forward
    forwards = 2 * (2 * student + teachers)  # two trained steps of three; forward and backward of the student
    assert contest.work.floor_seconds() == pytest.approx(forwards * contest.work.per_sample / rate)


def test_flops_are_those_of_the_matrix_products() -> None:
    """Linear layers by hooks, two operations a weight and row; attention 4 T^2 width; the patch embedding by hand."""
    model = random_model(NANO)
    transformer: Any = model.transformer
    counted = 0

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal counted
        assert isinstance(module, torch.nn.Linear)
        counted += 2 * module.in_features * output.numel()

    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    patches, tokens = 16, NANO.text_tokens
    batch: Any = SimpleNamespace(shape=(NANO.channels, 8, 8), text=random_text(2, NANO))
    found = forward_flops(model, batch)
    attention = 4 * NANO.width * (NANO.layers * (patches + tokens) ** 2 + len(NANO.dual_layers) * patches**2)
    embedding = 2 * patches * (NANO.channels * 2 * 2) * NANO.width
    assert found == counted + attention + embedding


def test_large_shape_is_stable_diffusion_3_5_medium() -> None:
    """The published LoRA on it: 191 modules, 18,776,064 parameters (rank 32)."""
    model = random_model(SD35M_512, device="meta")
    layers = {
        name: module
        for name, module in model.transformer.named_modules()
        if any(name.endswith(f".{target}") for target in model.targets("attention"))
    }
    assert len(layers) == 191
    assert sum(32 * (m.in_features + m.out_features) for m in layers.values()) == 18_776_064
    assert model.latent_shape(512) == (16, 64, 64)


def test_peak_is_what_is_alive_at_one_time() -> None:
    size = 2**20

    def work() -> None:
        a = torch.ones(size)
        b = a + 1
        del a
        b.add_(1)
        c = b * 2
        del b, c

    assert peak_bytes(work, CPU) == pytest.approx(2 * 4 * size, rel=0.01)


def test_a_contest_needs_as_many_prompts_as_samples(contest: Contest) -> None:
    with pytest.raises(ValueError, match="6 prompts for 2 tasks of 2 samples"):
        Work(
            contest.work.model,
            scheduler(3),
            [("a", Path("a")), ("b", Path("b"))],
            contest.batch.text,
            contest.batch.text.index(slice(0, 1)),
            GUIDED,
        )
