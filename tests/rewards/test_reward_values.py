"""The forms in which a reward may return its values, and those that are refused by name."""

from __future__ import annotations

import array
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_fast.data.prompt_files import Prompt
from opd_fast.rewards.runner import RewardFailure, call_reward

V = [0.5, -1.0, 2.25]
"""Exact in half precision."""


def values_of(returned: Any, count: int = 3) -> Tensor:
    return call_reward(lambda images, prompts: returned, torch.zeros(count, 3, 2, 2), [Prompt("p")] * count)


@pytest.mark.parametrize(
    "returned",
    [
        *(torch.tensor(V, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
        torch.tensor(V).to(torch.float8_e4m3fn),
        torch.tensor(V, requires_grad=True),
        torch.tensor(V)[:, None],
        torch.tensor([V, V]).T[:, 0],
        torch.tensor(V).to_sparse(),
        V,
        tuple(V),
        [[v] for v in V],
        [torch.tensor(v, requires_grad=True) for v in V],
        [torch.tensor([v]) for v in V],
        [np.float32(v) for v in V],
        [Fraction(1, 2), Decimal(-1), 2.25],
        array.array("d", V),
        *(np.array(V, dtype=t) for t in ("f2", "f4", "f8", ">f4")),
        np.array(V[::-1])[::-1],
        np.array(V)[:, None],
        np.array(V, dtype=object),
        np.array(V, dtype=np.longdouble),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}-{len(value)}",
)
def test_numbers_in_any_form(returned: Any) -> None:
    found = values_of(returned)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert found.tolist() == V


@pytest.mark.parametrize(
    "returned",
    [torch.tensor([True, False, True]), np.array([True, False, True]), [True, False, True], [1, 0, 1], range(3)],
    ids=lambda value: f"{type(value).__name__}",
)
def test_booleans_and_whole_numbers(returned: Any) -> None:
    assert values_of(returned).tolist() == ([0, 1, 2] if isinstance(returned, range) else [1, 0, 1])


@pytest.mark.parametrize(
    "returned",
    [0.5, np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]]), [0.5]],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'shape', '')}",
)
def test_the_number_of_one_image(returned: Any) -> None:
    assert values_of(returned, 1).tolist() == [0.5]


async def coroutine() -> list[float]:
    return V


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: torch.tensor(V) + 1j, r"returned complex numbers \(torch.complex64\); return real ones"),
    (lambda: torch.tensor(V) + 0j, r"returned complex numbers \(torch.complex64\); return real ones"),
    (lambda: np.array(V) + 1j, r"returned complex numbers \(complex128\); return real ones"),
    (lambda: [0.5, 1j, 0.5], r"returned a list that holds complex numbers \(1j\); return real ones"),
    (lambda: [0.5, np.complex64(1j), 0.5], r"returned a list that holds complex numbers \(complex64\)"),
    (lambda: np.array([0.5, 1j, 0.5], dtype=object), r"returned a NumPy array that holds complex numbers \(1j\)"),
    (lambda: "0.5", r"returned a str \('0.5'\), not a number"),
    (lambda: b"abc", r"returned a bytes \(b'abc'\), not a number"),
    (lambda: ["0.5"] * 3, r"returned a list that holds a str \('0.5'\), not a number"),
    (lambda: np.array(["0.5"] * 3), r"returned a NumPy array of <U3, not of numbers"),
    (lambda: np.array(["2026-01-01"] * 3, dtype="datetime64[D]"), r"returned a NumPy array of datetime64\[D\], not of"),
    (lambda: None, "returned None"),
    (lambda: [0.5, None, 0.5], "returned a list that holds None"),
    (lambda: dict(zip("abc", V, strict=True)), "returned a dict; return a list of its values in the order"),
    (lambda: (V, {"strict": V}), "returned a tuple that holds a dict"),
    (lambda: {0.5, 1.0, 2.0}, "returned a set, which has no order; return a list"),
    (lambda: (v for v in V), "returned a generator, which is read only once; return a list"),
    (lambda: map(float, V), "returned a map, which is read only once; return a list"),
    (coroutine, "returned a coroutine; a reward is a plain function"),
    (object, r"returned an object \(<object object at .*\), not a number"),
    (lambda: torch.empty(3, device="meta"), "returned a tensor on the device meta, which holds no numbers"),
    (lambda: [[0.5], [0.5, 1.0], [0.5]], "returned a list whose items differ in shape"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize(("returned", "message"), REFUSED, ids=[message[9:40] for _, message in REFUSED])
def test_what_is_not_real_numbers_is_refused(returned: Callable[[], Any], message: str, timeout: float | None) -> None:
    with pytest.raises(RewardFailure, match=f"^reward 'mine' {message}") as error:
        call_reward(lambda i, p: returned(), torch.zeros(3, 3, 2, 2), [Prompt("p")] * 3, timeout, name="mine")
    assert error.value.kind == "not numbers"
    assert error.value.values.isnan().tolist() == [True] * 3


@pytest.mark.parametrize(
    ("returned", "count", "shape"),
    [
        (torch.zeros(2), 3, r"\(2,\) for 3 images, not \(3,\)"),
        (torch.zeros(4), 3, r"\(4,\) for 3 images, not \(3,\)"),
        (torch.zeros(1, 3), 3, r"\(1, 3\) for 3 images, not \(3,\)"),
        (torch.zeros(3, 2), 3, r"\(3, 2\) for 3 images, not \(3,\)"),
        (torch.zeros(3, 1, 1), 3, r"\(3, 1, 1\) for 3 images, not \(3,\)"),
        (0.5, 3, r"\(\) for 3 images, not \(3,\)"),
        (torch.zeros(()), 3, r"\(\) for 3 images, not \(3,\)"),
        (torch.zeros(1), 3, r"\(1,\) for 3 images, not \(3,\)"),
        ([], 3, r"\(0,\) for 3 images, not \(3,\)"),
        (torch.zeros(2), 1, r"\(2,\) for 1 image, not \(1,\)"),
        (torch.zeros(2, 2).max(1), 2, r"\(2, 2\) for 2 images, not \(2,\)"),  # values and indices
    ],
)
def test_other_numbers_of_values_are_refused(returned: Any, count: int, shape: str) -> None:
    with pytest.raises(RewardFailure, match=f"returned shape {shape}$") as error:
        values_of(returned, count)
    assert error.value.kind == "wrong shape"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0.5, float("nan"), float("inf")], "returned 2 of 3 values NaN or infinite, first for 'p'"),
        (torch.tensor([0.5, 7e4, -7e4]).half(), "returned 2 of 3 values NaN or infinite, first for 'p'"),
        ([0.5, 1e39, -1e39], "returned 2 of 3 values NaN or infinite in float32, first for 'p'"),
        (np.ma.array([0.5, 1.0, 2.0], mask=[False, True, True]), "returned 2 of 3 values NaN or infinite, first"),
    ],
)
def test_values_that_are_not_finite_are_missing(returned: Any, message: str) -> None:
    with pytest.raises(RewardFailure, match=message) as error:
        values_of(returned)
    assert error.value.kind == "not finite"
    assert error.value.values[0] == 0.5
    assert error.value.values.isnan().tolist() == [False, True, True]
