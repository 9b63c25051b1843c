"""The choice of an attention's backend: a short measurement when a run starts, kept for later runs."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_fast.engine.attention import AUTO, BACKENDS, HEADS_FIRST, PACKAGES, PRODUCTS, attention_fn, available, products
from opd_fast.errors import UserError, one_line
from opd_fast.models.techniques import Attend, AttentionSite
from opd_kernels import tuning

SCORES_BYTES = 32 * 2**20
"""The matrix of scores, rows x heads x tokens x tokens, above which nothing that keeps it in memory is offered."""

_MASKED = ("native", "efficient", "math")  # xformers' path reads a boolean mask as numbers to add
_MARGIN = 1.05  # native stays unless another is faster by this much: noise must not change a run's rounding
_WORK = {"cpu": 2e9, "cuda": 2e12}  # multiplications and additions of one measured forward, at most
# Relative error against float32, in the 2-norm, of the result and of each gradient.
_ERROR = {torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}
_TF32_ERROR = 4e-3
_RESULTS = ("result", "gradient of q", "gradient of k", "gradient of v")
_FULL = "runs out of memory"
_FORMAT = 2
_CALM = 0.2  # of its median: how far a backend's quartiles lie apart at most where nothing disturbs the measurement


@dataclass(frozen=True)
class Case:
    """One kind of call: its shape, and what is asked of it."""

    device: torch.device
    dtype: torch.dtype
    """What the product is computed in: under autocast, autocast's."""
    rows: int
    heads: int
    head_dim: int
    tokens: int
    """Of image and text together."""
    mask: bool = False
    """Whether padded text is masked out, by a boolean mask over the keys."""
    needs_grad: bool = False
    products: bool = False
    """Whether the attentions take any function, and so plain products too."""
    mixed: bool = False
    """Whether autocast leaves queries and keys in float32 beside values that are not, as some norms do."""

    @classmethod
    def of(cls, sites: Sequence[AttentionSite], *, dtype: torch.dtype, **given: Any) -> Case:
        """Make the case of a transformer's first attention; `given` are the fields that its sites do not tell.

        Raises ValueError where the family names no attention.
        """
        if not sites:
            raise ValueError("the transformer has no attention whose backend can be set")
        products = all(site.takes_functions for site in sites)
        mixed = dtype != torch.float32 and any(site.mixed_dtypes for site in sites)
        given |= {"heads": sites[0].heads, "head_dim": sites[0].head_dim}
        return cls(dtype=dtype, products=products, mixed=mixed, **given)


@dataclass(frozen=True)
class Choice:
    backend: str
    line: str
    """What was chosen and why, in words."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Of each backend measured: forward, with the backward where the case needs one. Empty where one was named."""
    dropped: dict[str, str] = field(default_factory=dict)
    """What was not taken though it is installed, and why: an error, or a result that is wrong."""


# --- what fits a case ------------------------------------------------------------------------------------------------


def unfit(name: str, case: Case) -> str | None:
    """Return None where backend `name` can do what `case` asks; else why not, with what to do about it."""
    reason = available(name, case.device, case.dtype)
    if reason is not None:
        return reason
    if case.mask and name not in _MASKED:
        return "is not used with a mask over padded text, as this model has; take native or efficient"
    if case.mixed and name in PACKAGES:
        return "needs queries, keys and values of one dtype, and autocast gives this model's two; take cudnn or flash"
    if name == "flash_3" and case.needs_grad:
        return "has no gradient in diffusers; take flash or flash_2"
    if name == PRODUCTS:
        if not case.products:
            return "is not offered for this model's attention; take native"
        if _scores_bytes(case) > SCORES_BYTES:
            size, most = _scores_bytes(case) / 2**20, SCORES_BYTES / 2**20
            return f"would keep {size:.0f} MiB of scores a layer, more than {most:.0f}; take native"
    return None


def _candidates(case: Case) -> list[str]:
    passed_over = set()
    if case.device.type == "cpu":
        passed_over.add("flash")  # what native takes there
    if _scores_bytes(case) > SCORES_BYTES:
        passed_over.add("math")  # never the fastest at that size, and it needs the room
    return [name for name in BACKENDS if name not in passed_over and unfit(name, case) is None]


def _scores_bytes(case: Case) -> int:
    return case.rows * case.heads * case.tokens**2 * case.dtype.itemsize


# --- the choice ------------------------------------------------------------------------------------------------------


def choose(setting: str, case: Case) -> Choice:
    """Choose the backend for `case`: the one that `setting` names, or for auto the fastest of those that are right.

    auto times each candidate on random tensors of the case's shape (fewer rows where they are too many to be quick) and
    compares results and gradients with float32; what is wrong, or not finite, is dropped and named. A backend that is
    named is tried once; where it cannot run, auto's choice takes its place.

    What was measured is kept in `cache_file()`: a later run on the same kind of device takes the same. A measurement
    that something disturbed, so that the times of a backend scatter, counts for an hour and is then made again. Two
    measurements need not agree, so of several ranks one should choose for all, and a resumed run should name what it
    had.
    Raises UserError for a setting that is none of auto and BACKENDS, and where no backend computes the case.
    """
    with torch.inference_mode(False), torch.autocast(case.device.type, enabled=False):
        return _fastest(case) if setting == AUTO else _named(setting, case)


def _named(name: str, case: Case) -> Choice:
    problem: str | _Trial = unfit(name, case) or _try(name, case)
    if not isinstance(problem, str):
        return Choice(name, f"attention: {name} (as set)")
    instead = _fastest(case)
    line = f"attention: {name} {problem}; instead {instead.line.removeprefix('attention: ')}"
    return Choice(instead.backend, line, instead.milliseconds, instead.dropped)


def _fastest(case: Case) -> Choice:
    key = _key(case)
    kept = _read(key)
    if kept is not None:
        milliseconds, dropped = kept
    else:
        taken, dropped = _measure(_candidates(case), case)
        milliseconds = {name: statistics.median(times) for name, times in taken.items()}
        if case.device.type == "cuda":
            torch.cuda.empty_cache()  # of the trials' operands
        _write(key, milliseconds, dropped, until=tuning.keep_until(taken.values(), _CALM))
    if not milliseconds:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        problem = f"no backend computes this attention ({reasons})"
        raise UserError("engine.attention", problem, "report it with this line")
    best = min(milliseconds, key=lambda name: milliseconds[name] / (_MARGIN if name == "native" else 1))
    others = sorted((t, name) for name, t in milliseconds.items() if name != best)
    rest = "; " + ", ".join(f"{name} {t:.3g}" for t, name in others) if others else ""
    line = f"attention: {best} ({milliseconds[best]:.3g} ms{rest}{'; measured earlier' if kept else ''})"
    line += "".join(f"; {name} dropped: {reason}" for name, reason in dropped.items())
    return Choice(best, line, milliseconds, dropped)


class _Trial:
    """Random operands of a case, and one backend at work on them."""

    def __init__(self, name: str, case: Case) -> None:
        generator = torch.Generator(case.device).manual_seed(0)
        work = 4.0 * case.heads * case.head_dim * case.tokens**2
        self.rows = max(1, min(case.rows, int(_WORK[case.device.type] / work)))
        shape = (self.rows, case.tokens, case.heads, case.head_dim)
        make: dict[str, Any] = {"device": case.device, "dtype": case.dtype, "generator": generator}
        self.operands = [torch.randn(shape, **make) for _ in range(3)]
        if name in HEADS_FIRST:  # as a family lays them out for such a backend, and as a compiler does for the others
            self.operands = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in self.operands]
        self.slope = torch.randn((*shape[:2], case.heads * case.head_dim), **make) if case.needs_grad else None
        for tensor in self.operands:
            tensor.requires_grad_(case.needs_grad)
        self.mask = None
        if case.mask:  # each row's last tokens, from one to half of them
            lengths = case.tokens - 1 - torch.arange(self.rows, device=case.device) % max(1, case.tokens // 2)
            self.mask = (torch.arange(case.tokens, device=case.device) < lengths[:, None])[:, None, None]
        self.attend = attention_fn(name, self.mask)

    def run(self) -> list[Tensor]:
        """Return the result (rows, tokens, heads * head_dim), and the three gradients where there are any."""
        return _computed(self.attend, self.operands, self.slope)

    def reference(self, heads: int) -> list[Tensor]:
        """Return the same of the first row's first heads, in float32 by plain products."""
        own = [t.detach()[:1, :, :heads].float().requires_grad_(self.slope is not None) for t in self.operands]
        mask = None if self.mask is None else self.mask[:1]
        slope = None if self.slope is None else self.slope[:1, :, : heads * own[0].shape[3]].float()
        return _computed(lambda q, k, v: products(q, k, v, mask), own, slope)


def _computed(attend: Attend, operands: list[Tensor], slope: Tensor | None) -> list[Tensor]:
    with torch.set_grad_enabled(slope is not None):
        out = attend(*operands).flatten(2, 3)
        return [out] if slope is None else [out, *torch.autograd.grad(out, operands, slope)]


def _try(name: str, case: Case) -> _Trial | str:
    """Return a trial of the backend on the case, or a phrase that says how it fails."""
    try:
        trial = _Trial(name, case)
        found = trial.run()
        wanted = trial.reference(heads=max(1, min(case.heads, SCORES_BYTES // case.tokens**2)))
    except torch.OutOfMemoryError:
        return _FULL
    except Exception as error:  # whatever a library raises here, its kernel cannot be used
        return f"fails ({one_line(error)[:200]})"
    limit = _ERROR.get(case.dtype, _ERROR[torch.float32])
    if case.dtype == torch.float32 and case.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        limit = _TF32_ERROR
    for what, got, right in zip(_RESULTS, found, wanted, strict=False):
        got = got[:1].flatten(2) if got.ndim == 4 else got[:1]
        right = right.flatten(2)
        off = ((got[..., : right.shape[-1]].float() - right).norm() / right.norm()).item()
        if not bool(got.isfinite().all()):
            return f"gives a {what} that is not finite"
        if not off <= limit:
            return f"gives a {what} off by {off:.1e}"
    return trial


def _measure(names: list[str], case: Case) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the milliseconds of each run of every correct backend, and why the others are dropped."""
    milliseconds: dict[str, list[float]] = {}
    dropped: dict[str, str] = {}
    waiting: dict[str, _Trial] = {}
    for name in names:
        trial = _try(name, case)
        if isinstance(trial, str):
            dropped[name] = trial
        elif case.device.type == "cuda":
            milliseconds[name] = _time_cuda(trial, case.device)
        else:
            waiting[name] = trial
    return milliseconds | _time_cpu(waiting), dropped


def _time_cuda(trial: _Trial, device: torch.device) -> list[float]:
    from triton.testing import do_bench

    with torch.cuda.device(device):
        return [float(t) for t in do_bench(trial.run, warmup=5, rep=25, return_mode="all")]


def _time_cpu(trials: dict[str, _Trial], seconds: float = 0.15, at_least: int = 5) -> dict[str, list[float]]:
    """Time the trials in turn, so that other work on the machine slows all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in trials}
    for name in trials:
        trials[name].run()
    end, turns = time.perf_counter() + seconds * len(trials), 0
    while trials and (turns < at_least or time.perf_counter() < end):
        turns += 1
        for name, trial in trials.items():
            start = time.perf_counter()
            trial.run()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


# --- what was measured earlier ---------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Return the file in which measurements are kept, beside that of the kernels."""
    return tuning.cache_file().with_name("attention.json")


def _key(case: Case) -> str:
    """Return the cache's key: everything that a measurement depends on, in words."""
    if case.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(case.device)}, cudnn {torch.backends.cudnn.version()}"
    else:
        device = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    shape = f"{case.rows}x{case.tokens}x{case.heads}x{case.head_dim}"
    asked = ("masked " if case.mask else "") + ("forward and backward" if case.needs_grad else "forward")
    dtype = f"{str(case.dtype).removeprefix('torch.')} {torch.get_float32_matmul_precision()}"
    return f"{device}; torch {torch.__version__}; {dtype} {shape}; {asked}; {' '.join(_candidates(case))}"


def _entries() -> dict[str, Any]:
    """Return the file's measurements; none where the file is missing, damaged or of another format."""
    content = tuning.read_json(cache_file())
    measured = content.get("measured") if content.get("format") == _FORMAT else None
    return measured if isinstance(measured, dict) else {}


def _read(key: str) -> tuple[dict[str, float], dict[str, str]] | None:
    entry: Any = _entries().get(key)
    try:
        milliseconds = {str(name): float(t) for name, t in entry["milliseconds"].items()}
        dropped = {str(name): str(reason) for name, reason in entry["dropped"].items()}
        sound = milliseconds.keys() <= set(BACKENDS) and all(0 < t < float("inf") for t in milliseconds.values())
        return (milliseconds, dropped) if milliseconds and sound and tuning.still_counts(entry["until"]) else None
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _write(key: str, milliseconds: dict[str, float], dropped: dict[str, str], *, until: float | None) -> None:
    """Add a measurement that counts until then (see `tuning.keep_until`). A folder that cannot be written costs the
    next run its milliseconds, nothing else."""
    if not milliseconds or _FULL in dropped.values():  # another time there may be room
        return
    entries = _entries() | {key: {"milliseconds": milliseconds, "dropped": dropped, "until": until}}
    tuning.replace_json(cache_file(), {"format": _FORMAT, "measured": entries})
