"""Work recorded into CUDA graphs, so that a recording that fails leaves the process as it was.

`torch.cuda.graph` of torch 2.11 does not (2.12 mends it, pytorch#180395). When the work waits for the device, for
example, the capture is invalid, and `CUDAGraph.capture_end` raises before it has restored anything. Then

* the side stream remains the thread's current one, because the context manager leaves it after `capture_end`;
* the device's allocator still records into the graph's memory pool: `torch.cuda.empty_cache` frees nothing any more,
  and that allocator, like that of pinned memory, refuses another graph of that pool ("already recording to
  mempool_id");
* the default generator still believes that a capture is under way: `torch.randn` on the device raises.

`Recorder` restores each of these.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Recorder:
    """Records work into CUDA graphs that share one memory pool, so they must not be replayed side by side.

    Args:
        device: the CUDA device of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device)
        """The stream of all recordings and warm-ups, because libraries keep a workspace for each stream."""
        with torch.cuda.stream(self.stream):
            self._open_pool()

    def warm_up(self, work: Callable[[], object], times: int = 1) -> None:
        """Run `work` on the recording stream, after what the current stream holds and before what it gets next."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(times):
                work()
        current.wait_stream(self.stream)

    def record(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Record one run of `work`.

        Other threads may call CUDA meanwhile. Cached memory that nobody uses is freed first.

        Returns:
            The graph and what `work` returned, whose tensors lie in the graph's memory.

        Raises:
            RuntimeError: `work` does what a capture refuses, such as waiting for the device.
            torch.OutOfMemoryError: the graph's memory does not fit.
            Exception: whatever `work` raises.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                result = work()
                graph.capture_end()
            except BaseException:
                self._put_back(graph)
                raise
        return graph, result

    def _open_pool(self) -> None:
        """Take a new memory pool, on the recording stream.

        A graph of one launch stays in it, because a pool whose graphs have all gone cannot be recorded into again. Its
        recording also tells the default generator that no capture is under way.
        """
        self.pool: Any = torch.cuda.graph_pool_handle()
        value = torch.zeros((), device=self.device)
        self.stream.synchronize()
        self._first = torch.cuda.CUDAGraph()
        self._first.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        value.add_(1)
        self._first.capture_end()

    def _put_back(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the failed recording of `graph`, on the recording stream."""
        try:
            graph.capture_end()
        except RuntimeError:  # the capture is invalid
            pool = self.pool
            with suppress(RuntimeError):  # from torch 2.12 on `capture_end` has done both
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
                torch._C._cuda_releasePool(self.device.index, pool)
            with suppress(RuntimeError):  # the work's error is the one to tell
                self._open_pool()  # the allocator of pinned memory goes on recording into the old one
