"""Results files and the page made from them.

`rows_of` turns a pytest-benchmark session into the rows of a results file; `python -m benchmarks.report` renders
`benchmarks/README.md` from every file in `benchmarks/results`. Nothing on that page comes from anywhere else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.owed import FILES, Owed, unmeasured
from opd_fast.files import replacing

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"

# Keys of `extra_info` that say what a benchmark is; the others are copied into its row.
_IDENTITY = ("name", "variant")
_VARIANTS = ("engine", "eager", "compiled")
_ORDER = (
    "name",
    "seconds",
    "ratio_vs_reference",
    "ratio_vs_compiled",
    "share_of_floor",
    "share_of_bandwidth",
    "peak_bytes",
    "exact",
    "gradient_error",
)

_INTRODUCTION = """# Benchmarks

Every figure on this page is rendered from a file in `benchmarks/results`, which the suite wrote itself.

- **Round**: one optimizer step of on-policy distillation over all tasks, engine against the published loop
  (`reference.py`: eager, three passes, adapters unmerged and switched), measured in one process in turn, one round of
  each, so that a drift of the machine meets both; the ratio is the median over those pairs. Same prompts, steps,
  guidance and samples; no text encoding, image decoding or reward in either. *Compiled* is the same three passes with
  compiled blocks and bfloat16 weights (float32 on a CPU).
- **Step**: the fused step (on a CPU its torch twin) against the eager step of the published loop, and against
  `torch.compile` of the same maths.
- **Share of the limit**: of the floor for a round (the forwards and backwards that the algorithm cannot do without, at
  the matrix rate measured in the same run), of the measured copy bandwidth for a step.
- **Gradient error**: relative, over all parameters, against the reference in float32 on the same prompts and noise;
  where a round is cut into micro-batches, of its first one.
- **Ladder** (`ladder.py`): the engine's techniques switched on one after the other, each row on top of the one before.
  A technique that was asked for and is not at work gives a row with the reason in place of a time.
- **Peak**: bytes at a round's peak, weights included; in brackets the published loop's. The engine keeps a merged copy
  of the weights for each teacher and, where no micro-batch is set, takes all samples of the round in one forward; the
  published loop takes one task's at a time.

Beside these, with files of their own: seconds until a student has recovered its teachers' gains (`time_to_quality.py`,
`docs/time-to-quality.json`), what `ddp` costs a process alone (`world_of_one.py`, `docs/world-of-one.json`), rounds on
several processes (`weak_scaling.py`), the engine's techniques on and off to a run's end (`same_rewards.py`), errors of
float8 (`fp8_error.py`), gains of the methods that learn from rewards (`reinforcement.py`), rounds beside
another process by how OpenMP's threads wait (`waiting.py`, `docs/waiting.json`).

- **At once**: all samples of the round in one forward. The published loop does not fit beside it, so it is timed first
  and then freed; every other ratio is of rounds in turn.

Run: `pytest benchmarks --benchmark-only` and `python -m benchmarks.ladder`; with `--save-results` each also writes the
results file and this page, row by row. `benchmarks/gpu.sh 1`, `2` and `3` do the same on a GPU, the most valuable rows
first; `python -m benchmarks.report --take FOLDER` brings in the files of another machine.
"""


def rows_of(benchmarks: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows of a results file from the benchmarks of one pytest-benchmark session.

    A benchmark's `extra_info` names its row (`name`) and its `variant`: "engine" (the default) is the row itself,
    "eager" and "compiled" only enter its ratios, as medians over medians. An engine benchmark that measured its own
    ratios in pairs gives them in `extra_info`, and they stand. Benchmarks without a name are left out.
    Raises ValueError for an unknown variant or a variant measured twice.
    """
    variants: dict[str, dict[str, Any]] = {}
    for benchmark in benchmarks:
        name = benchmark.extra_info.get("name")
        if not name or benchmark.has_error or not benchmark.stats.data:
            continue
        variant = benchmark.extra_info.get("variant", "engine")
        if variant not in _VARIANTS:
            raise ValueError(f"benchmark {name} has variant {variant!r}; known are {', '.join(_VARIANTS)}")
        if variant in variants.setdefault(name, {}):
            raise ValueError(f"benchmark {name} has two variants {variant!r}; name the rows apart")
        variants[name][variant] = benchmark

    rows = []
    for name, found in variants.items():
        if "engine" not in found:
            continue
        engine = found["engine"]
        seconds = quantiles(engine.stats.data)
        row: dict[str, Any] = {"name": name, "seconds": seconds}
        for variant, key in (("eager", "ratio_vs_reference"), ("compiled", "ratio_vs_compiled")):
            if variant in found:
                row[key] = quantiles(found[variant].stats.data)["p50"] / seconds["p50"]
        row |= {key: value for key, value in engine.extra_info.items() if key not in _IDENTITY and value is not None}
        rows.append(rounded(row))
    return sorted((ordered(row) for row in rows), key=lambda row: row["name"])


def quantiles(data: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, linearly interpolated."""
    values = sorted(data)
    if len(values) == 1:
        return {"p20": values[0], "p50": values[0], "p80": values[0]}
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def results_path(environment: dict[str, Any], folder: Path = RESULTS) -> Path:
    """`DEVICE-DATE.json` in `folder`."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return folder / f"{device}-{environment['date']}.json"


def write_results(environment: dict[str, Any], rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Write one results file and return its path; a reader sees the file before or the file after, never a part.

    Rows of a file of the same device, date and commit are kept unless measured again, so that a suite may be run in
    parts.
    """
    path = results_path(environment, folder)
    kept: list[dict[str, Any]] = []
    if path.exists() and _same_code(path, environment) and not environment.get("dirty"):
        before = json.loads(path.read_text(encoding="utf-8"))
        measured = {row["name"] for row in rows}
        kept = [row for row in before["rows"] if row["name"] not in measured]
    everything = {"environment": environment, "rows": sorted([*kept, *rows], key=lambda row: row["name"])}
    folder.mkdir(parents=True, exist_ok=True)
    return _replace(path, everything)


def _replace(path: Path, content: dict[str, Any]) -> Path:
    with replacing(path, shared=True) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def save_rows(environment: dict[str, Any], rows: list[dict[str, Any]], folder: Path) -> Path:
    """`write_results`, and the page where `folder` is that of this project."""
    path = write_results(environment, rows, folder)
    if folder.resolve() == RESULTS:
        README.write_text(render(load_results()), encoding="utf-8")
    return path


def take(sources: Iterable[Path], folder: Path = RESULTS) -> list[Path]:
    """Bring the results files under `sources` into `folder`; the files written.

    Files of one device, date and commit become one, a row of a later source in place of an earlier one's. A file of
    another commit stays: the new one then has its commit in its name. Raises ValueError for a JSON file that holds no
    results.
    """
    written = []
    for source in sources:
        found = sorted(source.rglob("*.json")) if source.is_dir() else [source]
        for file in found:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not {"environment", "rows"} <= content.keys():
                raise ValueError(f"{file} holds no results: the keys environment and rows are missing")
            written.append(_take(content, folder))
    return list(dict.fromkeys(written))


def _take(content: dict[str, Any], folder: Path) -> Path:
    environment = content["environment"]
    path = results_path(environment, folder)
    if path.exists() and not _same_code(path, environment):
        path = path.with_name(f"{path.stem}-{(environment['commit'] or 'unknown')[:7]}.json")
    rows = {row["name"]: row for row in content["rows"]}
    if path.exists() and _same_code(path, environment):
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in before["rows"]} | rows
        commands = dict.fromkeys([*before["environment"]["command"].split("; "), environment["command"]])
        environment = environment | {"command": "; ".join(commands)}
    folder.mkdir(parents=True, exist_ok=True)
    return _replace(path, {"environment": environment, "rows": [rows[name] for name in sorted(rows)]})


def _same_code(path: Path, environment: dict[str, Any]) -> bool:
    before = json.loads(path.read_text(encoding="utf-8"))["environment"]
    return all(before.get(key) == environment.get(key) for key in ("commit", "dirty", "torch"))


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every results file of a folder and of the folders in it, by its name from there."""
    return {
        str(path.relative_to(folder)): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def render(results: dict[str, dict[str, Any]]) -> str:
    """The page, newest results first. The same files give the same bytes."""
    parts = [_INTRODUCTION]
    if not results:
        parts.append("No results are stored yet.\n")
    newest_first = sorted(results.items(), key=lambda item: (item[1]["environment"]["date"], item[0]), reverse=True)
    parts += [_section(name, content) for name, content in newest_first]
    parts.append(_not_measured(unmeasured(results.values())))
    return "\n".join(parts)


def _not_measured(rows: Sequence[Owed]) -> str:
    """What no GPU has measured yet, and the commands that will."""
    by_command: dict[str, list[str]] = {}
    for owed in rows:
        by_command.setdefault(owed.command, []).append(f"`{owed.name}`" + (f" ({owed.what})" if owed.what else ""))
    table = [
        "No results file of a GPU has these rows, so this project claims nothing of them:",
        "",
        "| command | rows |",
        "|---|---|",
        *(f"| `{command}` | {', '.join(names)} |" for command, names in by_command.items()),
        "",
        "Nor has a GPU seen, beside the rows:",
        "",
    ]
    files = [f"- {owed.name}{f' ({owed.what})' if owed.what else ''}: `{owed.command}`" for owed in FILES]
    return "\n".join(["## Not measured yet", "", *(table if rows else []), *files, ""])


def _section(name: str, content: dict[str, Any]) -> str:
    env = content["environment"]
    peaks = env["peaks"]
    commit = (env["commit"] or "unknown")[:10] + (" with local changes" if env["dirty"] else "")
    facts = [
        f"commit {commit}",
        f"{env['threads']} threads" if env.get("threads") else None,
        f"power limit {env['power_limit_w']:.0f} W" if env.get("power_limit_w") else None,
        f"driver {env['driver']}" if env.get("driver") else None,
        *(f"{package} {env[package]}" for package in ("torch", "triton", "diffusers", "peft") if env.get(package)),
        f"copy {peaks['copy_gbps']:.4g} GB/s",
        f"matrix product {peaks['matmul_tflops']:.3g} TFLOP/s in {peaks['matmul_dtype']}",
    ]
    table = [
        "| row | median | 20 % to 80 % | vs published | vs compiled | of the limit | peak | gradient error |",
        "|---|---|---|---|---|---|---|---|",
        *(_table_row(row) for row in content["rows"]),
    ]
    return "\n".join(
        [
            f"## {env['device']}, {env['date']}",
            "",
            "; ".join(fact for fact in facts if fact) + ".",
            "",
            *table,
            "",
            f"`{env['command']}`, [{name}](results/{name})",
            "",
        ]
    )


def _table_row(row: dict[str, Any]) -> str:
    if "note" in row:
        return f"| `{row['name']}` | {row['note'].replace('|', '/')} |  |  |  |  |  |  |"
    seconds = row["seconds"]
    limit = row.get("share_of_floor", row.get("share_of_bandwidth"))
    kind = " floor" if "share_of_floor" in row else " bandwidth" if "share_of_bandwidth" in row else ""
    exact = "" if row.get("exact", True) else " (not exact)"
    cells = [
        f"`{row['name']}`{exact}",
        time_text(seconds["p50"]),
        f"{time_text(seconds['p20'])} to {time_text(seconds['p80'])}",
        ratio_text(row.get("ratio_vs_reference")),
        ratio_text(row.get("ratio_vs_compiled")),
        "" if limit is None else f"{100 * limit:.0f} %{kind}",
        _peak(row),
        "" if row.get("gradient_error") is None else f"{row['gradient_error']:.1e}",
    ]
    return "| " + " | ".join(cells) + " |"


def _peak(row: dict[str, Any]) -> str:
    if row.get("peak_bytes") is None:
        return ""
    published = row.get("reference_peak_bytes")
    return size_text(row["peak_bytes"]) + ("" if published is None else f" ({size_text(published)})")


def ratio_text(value: float | None) -> str:
    """1.75x; nothing for none."""
    return "" if value is None else f"{value:.2f}x"


def time_text(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def size_text(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def ordered(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its keys in the order of a results file."""
    first = {key: row[key] for key in _ORDER if key in row}
    return first | {key: row[key] for key in sorted(row) if key not in first}


def rounded(value: Any) -> Any:
    """Six significant digits are more than a timing carries, and keep the files readable."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


def lines_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """One short line a row, for a terminal."""
    lines = []
    for content in results.values():
        for row in content["rows"]:
            if "note" in row:
                lines.append(f"{row['name']:<34} {row['note'][:80]}")
                continue
            share = row.get("share_of_floor", row.get("share_of_bandwidth"))
            figures = [
                time_text(row["seconds"]["p50"]),
                ratio_text(row.get("ratio_vs_reference")),
                ratio_text(row.get("ratio_vs_compiled")),
                "" if share is None else f"{100 * share:.0f} %",
                "" if row.get("peak_bytes") is None else size_text(row["peak_bytes"]),
            ]
            error = row.get("gradient_error")
            lines.append(
                f"{row['name']:<34}"
                + "".join(f"{figure:>11}" for figure in figures)
                + ("" if error is None else f"{error:>11.1e}")
                + ("" if row.get("exact", True) else "  lossy")
            )
    return lines


def main(argv: Sequence[str]) -> int:
    """Render the page; --show prints the rows of folders, --take first brings results files of another machine in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("--show", nargs="*", type=Path, metavar="FOLDER", help="print the rows of these, and no more")
    parser.add_argument("--take", nargs="+", type=Path, metavar="PATH", help="results files, or folders that hold some")
    options = parser.parse_args(argv)
    if options.show is not None:
        columns = ("median", "published", "compiled", "limit", "peak", "error")
        print(f"{'row':<34}" + "".join(f"{column:>11}" for column in columns))
        for folder in options.show:
            print("\n".join(lines_of(load_results(folder))))
        return 0
    if options.take:
        try:
            for path in take(options.take):
                print(f"{path} written")
        except (OSError, ValueError) as error:
            parser.error(str(error))
    README.write_text(render(load_results()), encoding="utf-8")
    print(f"{README} rendered from {len(load_results())} results files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
