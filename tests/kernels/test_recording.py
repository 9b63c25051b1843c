"""A recording that fails leaves the process as it was: on a stand-in for CUDA that fails as torch 2.11 and 2.12 do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from opd_fast.engine.cuda_graphs import CudaBackend, Graphs
from opd_kernels.recording import Recorder

DEVICE = torch.device("cuda", 0)


class FakeStream:
    def __init__(self, *of: object) -> None:
        self.waited = 0

    def wait_stream(self, other: object) -> None:
        self.waited += 1

    def synchronize(self) -> None:
        pass


class FakeCuda:
    """The state that a capture touches, as torch of that version keeps it.

    Observed on the real allocator and generator of torch 2.11 under a CUDA runtime that refuses what a capture refuses.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self.default = self.current = FakeStream()
        self.pools = 0
        self.recording: set[int] = set()
        """Pools that the device's allocator records into; it frees no cached memory meanwhile."""
        self.recording_host: set[int] = set()
        self.uses: dict[int, int] = {}
        self.generator_captures = False
        self.valid = True

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Graph:
            def capture_begin(self, pool: int = 0, **options: object) -> None:
                fake.begin(pool)
                self.pool = pool

            def capture_end(self) -> None:
                fake.end(self.pool)

            def replay(self) -> None:
                pass

        replaced: dict[str, Any] = {
            "CUDAGraph": Graph,
            "Stream": FakeStream,
            "stream": self.on,
            "current_stream": lambda *of: fake.current,
            "graph_pool_handle": self.handle,
            "synchronize": lambda *of: None,
            "empty_cache": lambda: None,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **rest: zeros(*size, **rest))

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def handle(self) -> int:
        self.pools += 1
        return self.pools

    def begin(self, pool: int) -> None:
        if pool in self.recording or pool in self.recording_host:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.recording.add(pool)
        self.recording_host.add(pool)
        self.uses[pool] = self.uses.get(pool, 0) + 1
        self.valid = self.generator_captures = True

    def end(self, pool: int) -> None:
        if not self.valid:
            if self.version == "2.12":
                self.end_allocate(0, pool)
                self.release(0, pool)
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.recording.discard(pool)
        self.recording_host.discard(pool)
        self.generator_captures = False

    def end_allocate(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool: int) -> None:
        self.uses[pool] -= 1

    def reads_back(self) -> float:
        """What `tensor.item()` does inside a capture."""
        if self.recording:
            self.valid = False
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return 1.0

    def assert_as_before(self) -> None:
        assert self.current is self.default
        assert not self.recording, "empty_cache frees nothing any more"
        assert not self.generator_captures, "torch.randn on the device raises"


@pytest.fixture(params=["2.11", "2.12"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(request.param)
    fake.install(monkeypatch)
    return fake


def failing(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def test_a_refused_recording_leaves_the_process_whole(cuda: FakeCuda) -> None:
    recorder = Recorder(DEVICE)
    assert recorder.record(lambda: "kept")[1] == "kept"
    pool = recorder.pool
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            recorder.record(cuda.reads_back)
        cuda.assert_as_before()
        assert recorder.record(lambda: "next")[1] == "next"
    assert recorder.pool != pool
    assert cuda.uses[pool] == 2, "the pool's own graph and the kept one, not the refused one"


@pytest.mark.parametrize("error", [TypeError("mine"), KeyboardInterrupt(), torch.OutOfMemoryError("full")])
def test_work_that_raises_of_itself_ends_the_recording(cuda: FakeCuda, error: BaseException) -> None:
    recorder = Recorder(DEVICE)
    with pytest.raises(type(error)):
        recorder.record(failing(error))
    cuda.assert_as_before()
    assert recorder.record(lambda: 3)[1] == 3


def test_warm_ups_are_ordered_with_the_current_stream(cuda: FakeCuda) -> None:
    recorder, streams = Recorder(DEVICE), []
    recorder.warm_up(lambda: streams.append(cuda.current), 2)
    assert streams == [recorder.stream] * 2
    assert recorder.stream.waited == 1  # type: ignore[attr-defined]
    assert cuda.default.waited == 1


def test_a_run_captures_on_after_a_refusal(cuda: FakeCuda) -> None:
    said: list[str] = []
    graphs = Graphs(CudaBackend(DEVICE, said.append), said.append)
    assert graphs.capture("the reader", cuda.reads_back)() == 1.0
    cuda.assert_as_before()
    assert graphs.capture("the rest", lambda: 2.0)() == 2.0
    assert (graphs.captured, graphs.refused) == (1, ["the reader"])
    assert "the reader cannot be captured and runs without" in said[0]


def test_a_graph_that_does_not_fit_is_an_error_of_memory(cuda: FakeCuda) -> None:
    said: list[str] = []
    graphs = Graphs(CudaBackend(DEVICE, said.append), said.append)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture("the step", failing(torch.OutOfMemoryError("CUDA out of memory")))
    assert (graphs.refused, said) == ([], [])
