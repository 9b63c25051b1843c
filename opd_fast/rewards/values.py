"""Reads what a reward returns: B real numbers in whatever form, or an error that names what it is instead."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterator, Mapping, Sequence, Set
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from opd_fast.errors import short

LONGEST = 60
"""Characters of a value that a message shows."""


class UnreadableValues(ValueError):
    """A reward returned something other than one real number for each image; the message says what it returned."""

    def __init__(self, kind: Literal["not numbers", "wrong shape"], returned: str) -> None:
        super().__init__(f"returned {returned}")
        self.kind: Literal["not numbers", "wrong shape"] = kind


class MissingValues(Exception):
    """Raised by a reward that has values for some images only, in the place of returning them.

    Attributes:
        values: as a reward returns them, NaN where one is missing.
    """

    def __init__(self, values: Any, why: str) -> None:
        super().__init__(why)
        self.values = values


class _NotNumbers(Exception):
    """A value, perhaps inside another one, is not a real number; `what` names it in words."""

    def __init__(self, value: Any, what: str) -> None:
        super().__init__(what)
        self.value, self.what = value, what


def read_values(returned: Any, count: int) -> Tensor:
    """Return the values of `count` images, in the images' order.

    A tensor on any device, a NumPy array or an object that converts to one, and a list or another sequence are read.
    They may hold any type of real number; True is 1 and False is 0. A column (count, 1) is accepted for (count,), and
    the bare number for a single image. NaN and infinite values pass; a masked value of a NumPy array is NaN.

    Args:
        returned: what the reward returned.
        count: how many images it was given.

    Returns:
        (count,) float64 on the CPU, which shares no memory with `returned` and has no gradient.

    Raises:
        UnreadableValues: `returned` holds something other than real numbers (complex numbers, text, None, mappings,
            sets, generators, coroutines), or has another shape.
    """
    try:
        values = _real(returned)
    except _NotNumbers as error:
        within = "" if error.value is returned else f"{_named(returned)} that holds "
        raise UnreadableValues("not numbers", within + error.what) from error
    shape = tuple(values.shape)
    if shape not in ((count,), (count, 1)) and (shape, count) != ((), 1):
        raise UnreadableValues("wrong shape", f"shape {shape} for {image_count(count)}, not ({count},)")
    return values.reshape(count)


def image_count(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _real(value: Any) -> Tensor:
    """Return any number of values as float64 on the CPU, in their own shape. Raises _NotNumbers."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, (numbers.Real, Decimal)) and not hasattr(value, "__array__"):
        return torch.tensor(float(value), dtype=torch.float64)
    if isinstance(value, numbers.Complex) and not hasattr(value, "__array__"):
        raise _NotNumbers(
            value, f"complex numbers ({short(repr(value), LONGEST)}); return real ones, such as their absolute values"
        )
    if hasattr(value, "__array__") and not isinstance(value, type):
        return _of_array(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return _of_sequence(value)
    raise _NotNumbers(value, _refused(value))


def _of_tensor(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        raise _NotNumbers(tensor, f"complex numbers ({tensor.dtype}); return real ones, such as their absolute values")
    if tensor.is_meta:
        raise _NotNumbers(tensor, "a tensor on the device meta, which holds no numbers")
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    # Some devices have no float64, so the tensor moves first.
    return tensor.cpu().to(torch.float64, copy=True)


def _of_array(value: Any) -> Tensor:
    if isinstance(value, np.ma.MaskedArray):
        return _of_array(np.where(np.ma.getmaskarray(value), np.nan, np.ma.getdata(value)))
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise _NotNumbers(value, f"complex numbers ({array.dtype}); return real ones, such as their absolute values")
    if array.dtype.kind == "O":
        return _of_sequence(array.tolist()) if array.ndim else _real(array.item())
    if array.dtype.kind not in "biuf":
        raise _NotNumbers(value, f"{_named(value)} of {array.dtype}, not of numbers")
    return torch.from_numpy(np.array(array, dtype=np.float64, order="C", copy=True))


def _of_sequence(values: Sequence[Any]) -> Tensor:
    parts = [_real(value) for value in values]
    if len({part.shape for part in parts}) > 1:
        raise _NotNumbers(values, f"{_named(values)} whose items differ in shape")
    return torch.stack(parts) if parts else torch.empty(0, dtype=torch.float64)


def _refused(value: Any) -> str:
    """Say what a value is that does not hold numbers in order, and what to return in its place."""
    if value is None:
        return "None"
    if inspect.iscoroutine(value):
        value.close()  # Python would warn that it was never awaited
        return "a coroutine; a reward is a plain function, not an async one"
    if isinstance(value, Iterator):
        return f"{_named(value)}, which is read only once; return a list of its values"
    if isinstance(value, Mapping):
        return f"{_named(value)}; return a list of its values in the order of the images"
    if isinstance(value, Set):
        return f"{_named(value)}, which has no order; return a list"
    return f"{_named(value)} ({short(repr(value), LONGEST)}), not a number"


def _named(value: Any) -> str:
    """Return the name of a value's type with its article."""
    if isinstance(value, np.ndarray):
        return "a NumPy array"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
