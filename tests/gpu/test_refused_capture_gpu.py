"""A capture that the GPU refuses: the run goes on without it, and the process is whole.

In a file of its own: were it not so, the tests after these would fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opd_fast.engine.cuda_graphs import CudaBackend, Graphs
from opd_kernels.recording import Recorder
from tests.gpu.test_graphs_gpu import DEVICE, Team, _assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIB = 2**20


def test_a_model_that_reads_numbers_back_runs_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(tmp_path, torch.float32)
    truth, plain = team.rounds(None), type(team.model).velocity

    def reading(self: object, transformer: object, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert float(x.abs().max()) > 0
        return plain(self, transformer, x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(team.model), "velocity", reading)
    said: list[str] = []
    graphs = Graphs(CudaBackend(DEVICE), said.append)
    _assert_same(team.rounds(graphs), truth, 1e-5)
    assert graphs.captured == 0
    assert any("cannot be captured" in line for line in said)


def test_the_process_is_whole_after_a_refusal() -> None:
    recorder, x = Recorder(DEVICE), torch.randn(64, 64, device=DEVICE)
    recorder.warm_up(lambda: x @ x)
    kept, product = recorder.record(lambda: x @ x)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            recorder.record(lambda: float((x @ x).sum()))
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(3, device=DEVICE)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        large = torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE)
        del large
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before, "cached memory is not given back any more"
        again, shifted = recorder.record(lambda: x @ x + 1)
        x.normal_()
        again.replay()
        kept.replay()
        torch.testing.assert_close(shifted, x @ x + 1, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(product, x @ x, rtol=1e-5, atol=1e-4)
