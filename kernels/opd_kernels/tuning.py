"""Launch parameters of the kernels: by rule, or measured on the device when a run asks for it.

A program works on `tiles` tiles of `block` elements with `warps` warps. Larger programs share their fixed cost (the
row, the guidance, the noise key: three dependent reads) among more elements; smaller ones fill the chip when the
tensors are small. All candidates give a thread at least 8 elements of a tile, so that every access is 16 bytes wide in
bfloat16 as in float32. Nothing else is worth choosing: `num_stages` has nothing to overlap, because the loads go to
registers, and unrolling the loop over tiles took registers, up to a spill, and bought nothing. (An output may alias an
input, so that no load moves above the stores of the tile before it.)

States and gradients are computed element by element, the same way whatever the tiling. Sums over a sample (loss,
log-probability) follow the order of the tiling: another choice may change their last bits. So a choice, once used,
stays for the whole of a run. Measured choices are kept in `kernels.json` in $OPD_FAST_CACHE, else
$XDG_CACHE_HOME/opd_fast, else ~/.cache/opd_fast, under the device's name, the Triton version and a hash of the kernels:
the next run, or a resumed one, on such a device takes the same. What was measured while something else used the device
counts for an hour and is then measured again.

    with measuring() as chosen:      # before the first step of a run, outside of any CUDA-graph capture
        ...                          # one step, eagerly: each launch of a new kind times its candidates first
    for choice in chosen:
        print(choice)

Elsewhere a launch takes the kept choice, or the rule's. It never measures, so it never waits for the device.
`OPD_FAST_TUNE=0` in the environment leaves everything to the rule.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from opd_kernels.recording import Recorder


class Launch(NamedTuple):
    """Elements of a tile, warps of a program, tiles of a program."""

    block: int
    warps: int
    tiles: int

    def blocks(self, elements: int) -> int:
        """Return the number of programs for a sample of so many elements."""
        return -(-elements // (self.block * self.tiles))

    def __str__(self) -> str:
        return f"{self.block}x{self.tiles}/{self.warps}"


CANDIDATES = (
    Launch(512, 2, 1),  # most programs: small batches, short last waves
    Launch(1024, 4, 1),
    Launch(1024, 4, 2),
    Launch(1024, 4, 4),
    Launch(2048, 8, 1),  # half the partial sums
    Launch(2048, 8, 2),
    Launch(1024, 2, 1),  # 16 elements of a tile a thread: twice the bytes in flight
)
MARGIN = 0.03
"""A candidate replaces the rule's choice if it is faster by more than this share; less is noise."""
CALM = 0.1
"""Share of their median that the quartiles of a candidate's times lie apart at most, where nothing disturbs them."""
DISTURBED = 3600.0
"""Seconds for which a disturbed measurement is kept."""


def rule(batch: int, elements: int) -> Launch:
    """Return the choice without measuring: one tile a program while all fit on the chip at once, more when a program's
    fixed cost would show."""
    tiles = batch * -(-elements // 1024)
    return Launch(1024, 4, 1 if tiles < 8192 else 2 if tiles < 32768 else 4)


class Problem(NamedTuple):
    """What the speed of a launch depends on."""

    kernel: str
    batch: int
    elements: int
    """Of a sample."""
    operands: str
    """What is present and in which dtype."""
    tiled: bool = True
    """Whether a program may take several tiles."""

    @property
    def key(self) -> str:
        """Name the problem by sizes in powers of two, and ragged samples apart, since their accesses are narrow."""
        batch, elements = (1 << (size - 1).bit_length() for size in (self.batch, self.elements))
        ragged = "" if self.elements % 16 == 0 else " ragged"
        return f"{self.kernel} batch<={batch} elements<={elements}{ragged} {self.operands}"

    def candidates(self) -> list[Launch]:
        """Return the rule's choice, then the launches that leave at most half of a program idle."""
        first = rule(self.batch, self.elements)
        first = first if self.tiled else first._replace(tiles=1)
        fitting = [c for c in CANDIDATES if c.block * c.tiles < 2 * self.elements and (self.tiled or c.tiles == 1)]
        return [first, *(c for c in fitting if c != first)]


@dataclass(frozen=True)
class Choice:
    """The launch of one kind of problem; `str()` is a line for the log."""

    problem: str
    launch: Launch
    source: str
    """ "measured", "kept" (measured by an earlier run) or "rule"."""
    microseconds: dict[str, float] = field(default_factory=dict)
    """Device time of a launch by candidate, the chosen one among them; empty for the rule's."""

    def __str__(self) -> str:
        times = dict(self.microseconds)
        own = times.pop(str(self.launch), None)
        line = f"kernel {self.problem}: {self.launch}, {self.source}"
        if own is None:
            return line
        rest = ", ".join(f"{name} {time:.3g}" for name, time in sorted(times.items(), key=lambda item: item[1]))
        return f"{line} ({own:.3g} us{'; ' if rest else ''}{rest})"


class Tuner:
    """The choices of this process. `epoch` counts the events that make earlier ones void; launchers have it in keys."""

    def __init__(self) -> None:
        self.epoch = 0
        self._forced: Launch | None = None
        self._measured: list[Choice] | None = None
        self._settled: dict[tuple[str, str], Choice] = {}

    def choose(
        self, problem: Problem, device: torch.device, attempt: Callable[[Launch], Callable[[], object]]
    ) -> Launch:
        """Return the launch for `problem`; `attempt(launch)` returns a function that launches the kernel so."""
        if self._forced is not None:
            return self._forced if problem.tiled else self._forced._replace(tiles=1)
        place = identity(device)
        choice = self._settled.get((place, problem.key))
        if choice is None:
            choice = _kept(problem.key, place) if enabled() else None
            if choice is None:
                may_measure = enabled() and self._measured is not None and device.type == "cuda"
                if may_measure and not torch.cuda.is_current_stream_capturing():
                    choice = _fastest(problem, place, attempt)
                else:
                    choice = Choice(problem.key, problem.candidates()[0], "rule")
            self._settled[place, problem.key] = choice
            if self._measured is not None:
                self._measured.append(choice)
        return choice.launch

    @contextmanager
    def measuring(self) -> Iterator[list[Choice]]:
        """Measure launches inside, as the header says. Yields the choices as they come, those of the rule before too.

        Raises:
            ValueError: OPD_FAST_TUNE is neither 0 nor 1; or one is inside another.
        """
        enabled()
        if self._measured is not None:
            raise ValueError("measuring() is already active; enter it once, before the first step")
        self._settled = {key: choice for key, choice in self._settled.items() if choice.source != "rule"}
        self.epoch += 1
        self._measured = []
        try:
            yield self._measured
        finally:
            self._measured = None

    @contextmanager
    def using(self, launch: Launch) -> Iterator[None]:
        """Make every launch inside take `launch`, for tests and comparisons.

        Raises:
            ValueError: `launch` is not one of `CANDIDATES`.
        """
        if launch not in CANDIDATES:
            raise ValueError(f"{launch} is no candidate; take one of {', '.join(map(str, CANDIDATES))}")
        before, self._forced = self._forced, launch
        self.epoch += 1
        try:
            yield
        finally:
            self._forced = before
            self.epoch += 1

    def choices(self) -> list[Choice]:
        """Return every choice that launches of this process use, measured or not."""
        return list(self._settled.values())


def enabled() -> bool:
    """Return whether kept and measured choices are used at all; with OPD_FAST_TUNE=0 they are not."""
    value = os.environ.get("OPD_FAST_TUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"OPD_FAST_TUNE must be 0 or 1, got {value!r}; unset it to measure when a run asks for it")
    return value == "1"


def device_times(runs: Sequence[Callable[[], object]], launches: int = 20, replays: int = 10) -> list[list[float]]:
    """Return the seconds of one call of each, for each of several replays of a graph of `launches` calls. The
    candidates take turns, so that a drifting clock meets all of them. Waits for the device."""

    def repeat(run: Callable[[], object]) -> Callable[[], object]:
        return lambda: [run() for _ in range(launches)]

    recorder, graphs = Recorder(torch.device("cuda")), []
    for run in runs:
        run()  # compiles
        graphs.append(recorder.record(repeat(run))[0])
    taken: list[list[float]] = [[] for _ in graphs]
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(replays + 1):
        for i, graph in enumerate(graphs):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:  # the first warms up
                taken[i].append(begin.elapsed_time(end) / 1e3 / launches)
    return taken


def _fastest(problem: Problem, place: str, attempt: Callable[[Launch], Callable[[], object]]) -> Choice:
    """Measure the candidates and keep the fastest, or the rule's where none is faster by more than `MARGIN`."""
    candidates = problem.candidates()
    taken = device_times([attempt(candidate) for candidate in candidates])
    seconds = [min(times) for times in taken]
    best = min(range(len(candidates)), key=seconds.__getitem__)
    if seconds[best] > (1 - MARGIN) * seconds[0]:
        best = 0
    times = {str(c): round(s * 1e6, 3) for c, s in zip(candidates, seconds, strict=True)}
    choice = Choice(problem.key, candidates[best], "measured", times)
    _keep(place, choice, keep_until(taken, CALM))
    return choice


def keep_until(taken: Iterable[Sequence[float]], most: float) -> float | None:
    """Return until when measurements count: None, for good, where they look undisturbed; else seconds of `time.time()`.

    Undisturbed: the quartiles of each one's times lie no further apart than the share `most` of its median.
    """
    for times in taken:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (*times,) * 3
        if high - low > most * middle:
            return time.time() + DISTURBED
    return None


def still_counts(until: object) -> bool:
    """Return whether what was kept until then counts now. After a clock was set back nothing counts for longer."""
    return until is None or (isinstance(until, float) and time.time() < until <= time.time() + DISTURBED)


# --- what is kept between runs ----------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Return the file in which measured choices are kept."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "opd_fast"
    return Path(os.environ.get("OPD_FAST_CACHE") or users).expanduser() / "kernels.json"


@cache
def identity(device: torch.device) -> str:
    """Return what a measured time belongs to: device, Triton, and the kernels' sources."""
    name = "cpu"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    sources = sorted(Path(__file__).parent.glob("*_triton.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return f"{name}, triton {triton.__version__}, kernels {digest[:12]}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the file's content, empty if it cannot be read, because all of it can be measured again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _kept(key: str, place: str) -> Choice | None:
    """Return the kept choice if it could be measured today, and was not measured at an earlier busy moment."""
    entries = read_json(cache_file()).get(place)
    entry = entries.get(key) if isinstance(entries, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("microseconds"), dict):
        return None
    if not still_counts(entry.get("until", 0.0)):  # earlier versions kept what was disturbed too, and did not say so
        return None
    launch = {str(c): c for c in CANDIDATES}.get(str(entry.get("launch")))
    return None if launch is None else Choice(key, launch, "kept", entry["microseconds"])


def _keep(place: str, choice: Choice, until: float | None) -> None:
    """Add a choice, which counts until then, to the file, which is replaced as a whole. Of two processes that write at
    once one may lose its entry, which is then measured again; a folder that cannot be written costs the same."""
    content = read_json(cache_file())
    if not isinstance(content.get(place), dict):
        content[place] = {}
    timed = {"launch": str(choice.launch), "microseconds": choice.microseconds}
    content[place][choice.problem] = timed | {"until": until}
    replace_json(cache_file(), content)


def replace_json(path: Path, content: object) -> None:
    """Write a file beside its place and rename it into it; what cannot be written is not kept. Its permissions are
    those of any new file: others may share the folder."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)


tuner = Tuner()
measuring, using, choices = tuner.measuring, tuner.using, tuner.choices
