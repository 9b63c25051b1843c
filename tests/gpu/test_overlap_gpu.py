"""Batches judged on a CUDA device while the next are drawn: the same bits, on a stream of the worker's own."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards.runner import RewardRunner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]
NAMES = ["gpu_rewards:spoils", "other_gpu_rewards:spoils"]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stream of each call of two rewards that lie in files of their own."""
    seen: list[int] = []

    def spoils(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(torch.cuda.current_stream(images.device).cuda_stream)
        values = images.double().square().mean((1, 2, 3))
        images.fill_(7)
        return values

    for name in NAMES:
        module = types.ModuleType(name.partition(":")[0])
        module.spoils = spoils  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def drawn(index: int) -> Tensor:
    """Images whose last kernel is queued behind much work, so that reading them too early shows."""
    x = torch.rand(2048, 2048, device="cuda", generator=torch.Generator("cuda").manual_seed(index))
    for _ in range(20):
        x = torch.tanh(x @ x * 0.01)
    return x[:192, :1024].reshape(4, 3, 64, 256)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_values_are_those_of_one_call_after_another(streams: list[int], timeout: float | None) -> None:
    """The run overwrites its images at once, and frees them, while the workers still read their copies."""
    alone = RewardRunner("raise", timeout)
    expected = [{name: alone(name, drawn(i), PROMPTS) for name in NAMES} for i in range(8)]
    streams.clear()
    with RewardRunner("raise", timeout) as runner:
        pending = []
        for i in range(8):
            images = drawn(i)
            pending.append(runner.submit(images, PROMPTS, NAMES))
            images.fill_(3)
            del images
            torch.rand(4, 3, 64, 256, device="cuda").fill_(5)  # takes the memory that was freed
        found = [batch.result() for batch in pending]
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in NAMES)
    current = torch.cuda.current_stream().cuda_stream
    assert streams.count(current) == 2  # the first call of each
    assert len(set(streams)) == 3
