"""Where and on what a benchmark ran, and what the device can do at most."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Written by the benchmarks themselves: they do not make the measured code another one.
_OWN_OUTPUT = (":!benchmarks/results", ":!benchmarks/README.md")


def default_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def round_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a round's matrix products by default: bfloat16 on CUDA, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.lru_cache(maxsize=4)
def measured_peaks(device: torch.device) -> dict[str, float | str]:
    """Copy bandwidth (GB/s, bytes read plus bytes written) and matrix rate (TFLOP/s, in the round's dtype).

    Measured once per process, the best of many: a limit is what the device can do when nothing disturbs it. The
    tensors are random, and those that are copied larger than the caches.
    """
    dtype = round_dtype(device)
    cuda = device.type == "cuda"
    source = torch.randn((2**30 if cuda else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device, 10)
    size = 8192 if cuda else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _best_seconds(lambda: torch.mm(a, b, out=out), device, 10 if cuda else 40)
    return {
        "copy_gbps": _significant(2 * source.nbytes / copy / 1e9),
        "matmul_tflops": _significant(2 * size**3 / product / 1e12),
        "matmul_dtype": str(dtype).removeprefix("torch."),
    }


def _best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    calls = 10 if device.type == "cuda" else 1
    seconds = []
    for attempt in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        if attempt:  # the first warms up
            seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """The `environment` object of a results file. What cannot be found out is None.

    Where the checkout has no `.git`, the commit is that of OPD_COMMIT, as
    `git describe --always --dirty --abbrev=40 --exclude '*'` prints it.
    """
    smi = _nvidia_smi(device)
    commit, dirty = commit_and_changes()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "dirty": dirty,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "power_limit_w": smi.get("power.limit"),
        "driver": smi.get("driver_version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "peft": _version("peft"),
        "command": command,
        "peaks": measured_peaks(device),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} core{'' if cores == 1 else 's'}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit_and_changes() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether it has local changes; (None, None) where nothing tells."""
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        return commit, bool(_git("status", "--porcelain", "--", ".", *_OWN_OUTPUT))
    told = os.environ.get("OPD_COMMIT")
    return (told.removesuffix("-dirty"), told.endswith("-dirty")) if told else (None, None)


def _nvidia_smi(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    fields = ("power.limit", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={device.index}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    power, driver = (value.strip() for value in done.stdout.split(","))
    try:
        return {"power.limit": float(power), "driver_version": driver}
    except ValueError:  # "[N/A]"
        return {"driver_version": driver}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _significant(value: float) -> float:
    return float(f"{value:.4g}")
