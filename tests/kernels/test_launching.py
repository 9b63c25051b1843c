"""Launches bound once: what reaches the kernel, and what a call does besides. The device is a stand-in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from opd_kernels import launching, logprob_triton, step_triton  # noqa: E402
from opd_kernels.launching import BoundLaunch  # noqa: E402
from opd_kernels.tuning import Launch, Problem  # noqa: E402
from tests.kernels import formula, logprob_formula  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="Triton interprets and cannot compile")


class Driver:
    """A device that compiles as an H100 does and records launches instead of running them."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = self

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launches.append(arguments)

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """The stand-in, and kernels of their own that no other test has compiled."""
    driver = Driver()
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", lambda device: 232448)
    kernels = []
    for module, name in (
        (step_triton, "step_kernel"),
        (logprob_triton, "log_prob_kernel"),
        (logprob_triton, "log_prob_backward_kernel"),
    ):
        kernels.append(triton.JITFunction(getattr(module, name).fn, do_not_specialize=["step"]))
        monkeypatch.setattr(module, name, kernels[-1])
    monkeypatch.setattr(launching, "_bound", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    yield driver
    for kernel in kernels:
        for binary in kernel.device_caches[0][0].values():
            binary.module = None  # or it would be unloaded from a real device when it is collected


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype
    return type(first) is type(second) and first == second


def test_a_bound_launch_is_tritons(driver: Driver) -> None:
    """Second and later calls skip Triton's launcher: the same grid, stream, binary and arguments reach the device."""
    o, keys = formula.operands((2, 3, 48, 48), torch.bfloat16, history=True), torch.arange(2)
    for step in (2, torch.tensor(2)):
        driver.launches.clear()
        for _ in range(2):
            step_triton.launch_step(**o, step=step, keys=keys, return_means=True)
        first, second = driver.launches
        assert first[:4] == (14, 1, 1, 77)
        assert len(first) == len(second) == 9 + len(step_triton.step_kernel.arg_names)
        differing = [i for i, pair in enumerate(zip(first, second, strict=True)) if not same(*pair)]
        assert differing in ([], [6])  # the metadata for Triton's hooks, an object that compares by identity
        given = dict(zip(step_triton.step_kernel.arg_names, second[9:], strict=True))
        assert given["x_ptr"] is o["x"]
        assert given["elements"] == 6912
        assert given["blocks"] == 7
        assert given["step"] == (2 if step == 2 and isinstance(step, int) else 0)
    binaries = len(step_triton.step_kernel.device_caches[0][0])
    assert binaries == 2
    assert len(launching._bound) == 2


def test_another_step_another_value(driver: Driver) -> None:
    o = formula.operands((2, 3, 48, 48))
    for step in (0, 1, 2):
        step_triton.launch_step(**o, step=step)
    position = 9 + step_triton.step_kernel.arg_names.index("step")
    assert [launch[position] for launch in driver.launches] == [0, 1, 2]
    assert len(launching._bound) == 1


def test_pointers_off_16_bytes_take_another_binary(driver: Driver) -> None:
    o = formula.operands((2, 3, 48, 48), guided="none")
    for first in (0, 1, 0, 1):
        moved = torch.randn(2 * 6912 + 1)[first:][: 2 * 6912].view(2, 3, 48, 48)
        step_triton.launch_step(**(o | {"cond_t": moved}), step=0)
    assert len(launching._bound) == 1
    assert len(step_triton.step_kernel.device_caches[0][0]) == 2
    assert len(driver.launches) == 4


def test_operands_that_must_be_copied(driver: Driver) -> None:
    """Copied are a state whose samples are not contiguous and an expanded vector; a batch stride is not a reason."""
    o = formula.operands((2, 3, 16, 16), guided="none")
    pairs = torch.randn(2, 2, 3, 16, 16)
    o |= {"x": torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2), "scale": torch.ones(1).expand(2), "cond_t": pairs[:, 1]}
    for _ in range(2):
        step_triton.launch_step(**o, step=0)
        given = dict(zip(step_triton.step_kernel.arg_names, driver.launches[-1][9:], strict=True))
        assert torch.equal(given["x_ptr"], o["x"])
        assert given["x_ptr"].is_contiguous()
        assert given["x_stride"] == 768
        assert given["scale_ptr"].stride() == (1,)
        assert given["cond_t_ptr"] is o["cond_t"]
        assert given["cond_t_stride"] == 1536


def run_all(shape: tuple[int, ...]) -> None:
    o, step = formula.operands(shape, torch.bfloat16, history=True), torch.tensor(formula.STOCHASTIC)
    p = logprob_formula.operands(shape)
    given = [p[name] for name in ("x", "sample", "cond", "uncond", "guidance", "table")]
    keys, upstream = torch.arange(shape[0]), torch.ones(shape[0])

    def run() -> None:
        step_triton.launch_step(**o, step=step, keys=keys, return_means=True)
        logprob_triton.launch_log_prob(*given, step, mean_old=p["mean_old"], return_mean=True)
        logprob_triton.launch_log_prob_backward(upstream, upstream, *given, step, mean_old=p["mean_old"])

    class Recorded(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    run()
    with Recorded() as recorded:
        run()
    # Of the forward kernels' counters, which a CUDA device keeps (see tests/gpu): nothing else is filled or copied.
    assert recorded.names.count("zeros") == 2
    assert set(recorded.names) == {"empty", "zeros"}


def test_only_memory_is_allocated_beside_the_kernel(driver: Driver) -> None:
    """Any other operation of a call would be one more launch on a GPU."""
    run_all((2, 3, 48, 48))
    assert len(driver.launches) == 6


class Streams:
    """CUDA's streams and captures, as far as `Scratch` asks about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing, self.stream, self.filled = False, 1, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(launching.torch, name, self.on_cpu(name, getattr(torch, name)))

    @property
    def cuda_stream(self) -> int:
        return self.stream

    def on_cpu(self, name: str, make: Any) -> Any:
        def run(*size: Any, device: Any = None, **rest: Any) -> Tensor:
            self.filled += name == "zeros"
            return make(*size, **rest)

        return run


def test_scratch_is_filled_once_and_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, scratch, device = Streams(monkeypatch), launching.Scratch(), torch.device("cuda", 0)
    assert scratch.take(device, 9, 9, False) == (None, None)
    first = scratch.take(device, 9, 90, True)
    filled = streams.filled
    assert all(a is b for a, b in zip(first, scratch.take(device, 24, 100, True), strict=True))
    assert streams.filled == filled  # one stream runs its launches in order: they share
    streams.stream = 2
    other = scratch.take(device, 9, 90, True)
    streams.capturing = True
    filled = streams.filled
    captured = [scratch.take(device, 9, 90, True) for _ in range(3)]
    assert streams.filled == filled  # from the reserve: no fill becomes a node of the graph
    taken = [first, other, *captured]
    for which in (0, 1):
        spans = sorted((t[which].data_ptr(), t[which].data_ptr() + t[which].nbytes) for t in taken)  # type: ignore[union-attr]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(not t[1].any() for t in taken)  # type: ignore[union-attr]
    assert len({t[1].data_ptr() % 128 for t in captured}) == 1  # type: ignore[union-attr]


def test_the_reserve_is_topped_up_outside_of_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, scratch, device = Streams(monkeypatch), launching.Scratch(), torch.device("cuda", 0)
    scratch.take(device, 9, 90, True)
    most = scratch.RESERVE // 4
    for _ in range(3):
        streams.capturing = True
        filled = streams.filled
        for _ in range(3):
            scratch.take(device, most, most, True)
        assert streams.filled == filled
        streams.capturing = False
        scratch.take(device, 9, 90, True)
        assert streams.filled == filled + 1
    streams.capturing = True
    counters = scratch.take(device, most, most, True)[1]
    assert counters is not None
    counting = StorageWeakRef(counters.untyped_storage())
    del counters  # the graph knows the address alone
    scratch.take(device, 2 * most, 1, True)
    streams.capturing = False
    scratch.take(device, 9, 90, True)
    assert not counting.expired(), "a replay would count in memory that was freed"
    streams.capturing = True
    large = scratch.take(device, 2 * scratch.RESERVE, 1, True)[1]  # more than the reserve holds: filled in the graph
    assert large is not None
    assert large.numel() == 2 * scratch.RESERVE


def test_bound_launches_are_forgotten_at_some_point(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_BOUND", 4)
    for batch in range(1, 12):
        step_triton.launch_step(**formula.operands((batch, 3, 4, 4)), step=0)
        assert 1 <= len(launching._bound) <= 4
    assert len(driver.launches) == 11


def test_a_bound_launch_costs_less_than_tritons(driver: Driver) -> None:
    """Host time, the better of several runs of each."""
    o, keys = formula.operands((9, 4, 16, 16), torch.bfloat16), torch.arange(9)
    step_triton.launch_step(**o, step=0, keys=keys)
    (bound,) = launching._bound.values()
    launched = driver.launches[-1][9:]
    tensors, step = launched[:22], launched[22]

    def seconds(run: Any) -> float:
        best = float("inf")
        for _ in range(30):
            start = time.perf_counter()
            for _ in range(20):
                run()
            best = min(best, (time.perf_counter() - start) / 20)
        return best

    through_triton = step_triton.step_kernel[(9,)]
    plain = seconds(lambda: through_triton(*launched, num_warps=4))
    assert isinstance(bound, BoundLaunch)
    assert seconds(lambda: bound(tensors, step)) < 0.7 * plain


class TriesAll:
    """A tuner that launches every candidate, as measuring does, and takes the last."""

    epoch = 0

    def __init__(self) -> None:
        self.tried: list[tuple[Problem, Launch]] = []

    def choose(self, problem: Problem, device: torch.device, attempt: Any) -> Launch:
        for launch in problem.candidates():
            attempt(launch)()
            self.tried.append((problem, launch))
        return self.tried[-1][1]


def test_candidates_are_tried_as_they_will_be_launched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = TriesAll()
    monkeypatch.setattr(launching, "tuner", tuner)
    o, p = formula.operands((2, 3, 48, 48), torch.bfloat16), logprob_formula.operands((2, 3, 48, 48))
    given = [p[name] for name in ("x", "sample", "cond", "uncond", "guidance", "table")]
    upstream = torch.ones(2)
    for kernel, run in (
        ("step", lambda: step_triton.launch_step(**o, step=0, keys=torch.arange(2))),
        ("log_prob", lambda: logprob_triton.launch_log_prob(*given, 0, mean_old=p["mean_old"])),
        (
            "log_prob_backward",
            lambda: logprob_triton.launch_log_prob_backward(upstream, upstream, *given, 0, mean_old=p["mean_old"]),
        ),
    ):
        driver.launches.clear()
        tuner.tried.clear()
        run()
        grids = [launch[0] for launch in driver.launches]
        tried = [launch for _, launch in tuner.tried]
        assert grids == [2 * launch.blocks(6912) for launch in (*tried, tried[-1])]
        assert len(set(grids)) > 2
        assert {problem.kernel for problem, _ in tuner.tried} == {kernel}
        last, final = driver.launches[-2:]
        assert [i for i, pair in enumerate(zip(last[9:], final[9:], strict=True)) if not same(*pair)] == []
        outputs = [t.data_ptr() for t in last[9:] if isinstance(t, Tensor)]
        assert outputs[:-2] == [t.data_ptr() for t in final[9:] if isinstance(t, Tensor)][:-2]  # but for the scratch
        run()
        assert len(driver.launches) == len(tried) + 2
        assert driver.launches[-1][0] == grids[-1]


def test_problems_tell_apart_what_differs_in_speed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = TriesAll()
    monkeypatch.setattr(launching, "tuner", tuner)
    o = formula.operands((2, 3, 16, 16), torch.bfloat16, guided="student", history=True)
    step_triton.launch_step(**o, step=0, keys=torch.arange(2), return_means=True)
    step_triton.launch_step(**(o | {"history": None}), step=0, noise=torch.randn(2, 3, 16, 16))
    assert list(dict.fromkeys(problem.operands for problem, _ in tuner.tried)) == [
        "cond_s=bfloat16 uncond_s=bfloat16 cond_t=bfloat16 keys history x0 means",
        "cond_s=bfloat16 uncond_s=bfloat16 cond_t=bfloat16 noise",
    ]
