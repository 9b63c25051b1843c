"""A whole round without one question to the device: the CPU's stand-in for CUDA's sync debug mode.

On a GPU an operation whose result Python must know makes the processor wait for the device. Here every tensor lies on
the CPU, where nothing waits; so a dispatch mode refuses the operations that would. Two kinds of tensors are the host's
on a GPU too and may be read: float64 ones (solver tables; a round computes nothing else in float64) with the flags that
follow from them, and the optimizer's step counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.models import NANO
from benchmarks.rounds import Recipe, random_work
from opd_fast.config import EngineConfig
from opd_kernels import fused_step_reference

aten = torch.ops.aten
# Their result, or its shape, is known only when the device has computed it.
ASKING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
MOVING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# Python's own ways to a number, which never reach the dispatcher on a CPU.
READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class HostSyncError(AssertionError):
    """An operation of a round that would wait for a GPU."""


class _Host:
    """Which tensors lie in the processor's memory even when there is a GPU: those in float64, the known ones, and what
    follows from them alone in whole numbers or truth values. Float32 that follows from them may have been moved."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known: Any = WeakTensorKeyDictionary()
        for tensor in known:
            self.known[tensor] = True
        self.owns_all = False

    def holds(self, tensor: Tensor) -> bool:
        return self.owns_all or tensor.dtype == torch.float64 or tensor in self.known

    def follows(self, args: Any, result: Any) -> None:
        """Take note of the results of an operation."""
        if self.owns_all:
            return
        read = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        if not read or not all(self.holds(tensor) for tensor in read):
            return
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                self.known[tensor] = True


class NoSync(TorchDispatchMode):
    """Raises `HostSyncError` for an operation that would make the processor wait for a GPU.

    host: tensors that are the host's, beside those in float64.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.host = _Host(host)
        self.python = _NoReading(self.host)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets everything pass, for what another program does on a GPU."""
        self.host.owns_all = True
        try:
            yield
        finally:
            self.host.owns_all = False

    def __enter__(self) -> NoSync:
        super().__enter__()
        self.python.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.python.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation in ASKING and not self.host.holds(args[0]):
            raise HostSyncError(f"{operation} waits for the device")
        if operation in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise HostSyncError(f"{operation} by a mask waits for the device")
        result = operation(*args, **kwargs)
        if operation in MOVING and isinstance(args[0], Tensor):
            source = args[1] if operation is aten.copy_.default else args[0]
            if isinstance(source, Tensor) and source.device != result.device and not kwargs.get("non_blocking"):
                raise HostSyncError(f"{operation} from {source.device} to {result.device} waits for the device")
        self.host.follows((args, kwargs), result)
        return result


class _NoReading(TorchFunctionMode):
    def __init__(self, host: _Host) -> None:
        super().__init__()
        self.host = host

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READING and not self.host.holds(args[0]):
            raise HostSyncError(f"{function.__name__} waits for the device")
        return function(*args, **(kwargs or {}))


RECIPES = {
    "flow_sde": Recipe(steps=3, samples_per_task=2, rank=4, resolution=64),
    "guided": Recipe(
        steps=3, samples_per_task=2, guidance=4.5, teacher_guidance=(4.5, 4.5, 1.0), rank=4, resolution=64
    ),
    "micro-batches": Recipe(steps=3, samples_per_task=2, rank=4, resolution=64, micro_batch=3),
    "history": Recipe(solver="dpm2", steps=4, samples_per_task=1, rank=4, resolution=64),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_round_asks_the_device_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, clipping and optimizer step of a second round, the first being the warm-up.

    The step's twin reads its row on the CPU, where a kernel takes its place on a GPU; `tests/gpu` has that one.
    """
    work = random_work(torch.device("cpu"), NANO, RECIPES[name], tmp_path)
    engine = work.engine(EngineConfig())
    engine.round(work.batch)
    before = [p.detach().clone() for p in engine.parameters.values()]
    counters = [state["step"] for state in engine.optimizer.state.values()]
    watch = NoSync(counters)

    def twin(*args: Any, **kwargs: Any) -> Any:
        with watch.paused():
            return fused_step_reference(*args, **kwargs)

    monkeypatch.setattr("opd_kernels.step.fused_step_reference", twin)
    with watch:
        engine.round(work.batch)
    assert any(not torch.equal(p, b) for p, b in zip(engine.parameters.values(), before, strict=True))


def test_the_published_round_does(tmp_path: Path) -> None:
    """Else this test could not tell: the scheduler looks its steps up, sample by sample."""
    work = random_work(torch.device("cpu"), NANO, RECIPES["flow_sde"], tmp_path)
    _, reference = work.published()
    with pytest.raises(HostSyncError), NoSync():
        reference.round(work.batch)


X = torch.arange(4.0)
PLANTED: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X.sum()),
    "bool": lambda: bool((X > 1).any()),
    "if": lambda: 1 if X[0] > 0 else 2,
    "nonzero": lambda: (X > 1).nonzero(),
    "mask": lambda: X[X > 1],
    "set by a mask": lambda: X.clone().__setitem__(X > 1, X[2:]),
    "where of one": lambda: torch.where(X > 1),
    "unique": lambda: X.unique(),
    "tolist": lambda: X.tolist(),
    "a table that was moved": lambda: torch.linspace(0, 1, 4, dtype=torch.float64).to(torch.float32).tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "to another device": lambda: X.to("meta"),
    "isfinite": lambda: torch.isfinite(X).all().item(),
    "in a backward": lambda: _Asks.apply(torch.ones(2, requires_grad=True)).sum().backward(),
}


class _Asks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * gradients[0][0].item()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_question_is_caught(name: str) -> None:
    with pytest.raises(HostSyncError), NoSync():
        PLANTED[name]()


def test_what_needs_no_answer_passes() -> None:
    table = torch.linspace(0, 1, 4, dtype=torch.float64)
    counter = torch.tensor(3.0)
    with NoSync([counter]):
        X[1:3] = X[1:3] * 2 / 2
        X[torch.tensor([0, 1])]
        torch.where(X > 1, X, 0.0)
        table.tolist()
        assert (table != 0).tolist() == [False, True, True, True]
        assert counter.item() == 3.0
        assert float(table[3]) == 1.0
