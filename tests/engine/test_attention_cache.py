"""How long a measurement of attention counts: for good, or an hour where something disturbed it, by a fake clock."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_fast.engine import attention_choice as attention
from opd_fast.engine.attention_choice import Case, choose
from opd_kernels import tuning

CASE = Case(torch.device("cpu"), torch.float32, rows=2, heads=2, head_dim=8, tokens=24, needs_grad=True, products=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention.json"


class Clock:
    """Time that passes while a backend computes alone: so many milliseconds a call, each in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **milliseconds: list[float]) -> None:
        self.now, self.calls = 1000.0, 0
        self.milliseconds = {name: itertools.cycle(times) for name, times in milliseconds.items()}
        for module in (attention, tuning):
            monkeypatch.setattr(module, "time", self)
        honest = attention._Trial.__init__

        def named(trial: Any, name: str, case: Case) -> None:
            honest(trial, name, case)
            trial.name = name

        def run(trial: Any) -> None:
            self.calls += 1
            self.now += next(self.milliseconds[trial.name]) / 1e3

        monkeypatch.setattr(attention._Trial, "__init__", named)
        monkeypatch.setattr(attention, "_try", attention._Trial)
        monkeypatch.setattr(attention._Trial, "run", run)

    def perf_counter(self) -> float:
        return self.now

    time = perf_counter


def test_a_disturbed_measurement_counts_for_an_hour(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Another process took the core in every third call of one backend: its median is right, its scatter tells."""
    busy = Clock(monkeypatch, native=[2.0], math=[9.0], products=[3.0, 3.0, 8.0])
    assert choose("auto", CASE).milliseconds == pytest.approx({"native": 2.0, "math": 9.0, "products": 3.0})
    (entry,) = json.loads(cache.read_text())["measured"].values()
    assert entry["until"] == pytest.approx(busy.now + 3600)
    before = busy.calls
    busy.now += 3599
    assert "measured earlier" in choose("auto", CASE).line
    assert busy.calls == before

    calm = Clock(monkeypatch, native=[2.0, 2.1, 1.9, 20.0, 2.0], math=[9.0], products=[1.0, 1.1, 1.0])
    calm.now = busy.now + 2
    assert choose("auto", CASE).backend == "products"
    assert calm.calls > 0
    (entry,) = json.loads(cache.read_text())["measured"].values()
    assert entry["until"] is None  # one call in five that took ten times as long is none of a backend's scatter
    before = calm.calls
    calm.now += 10 * 365 * 86400
    assert choose("auto", CASE).backend == "products"
    assert calm.calls == before


def test_a_clock_that_was_set_back_keeps_nothing_for_longer(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    clock = Clock(monkeypatch, native=[1.0, 9.0], math=[9.0], products=[3.0])
    choose("auto", CASE)
    clock.now -= 10_000
    before = clock.calls
    choose("auto", CASE)
    assert clock.calls > before
