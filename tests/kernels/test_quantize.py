"""Row-wise float8 on a CPU: the twin and the operator around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_kernels import Quantized, quantize_rows, quantize_rows_reference
from tests.kernels.quantize_formula import assert_quantized, hard_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (7, 31), (4, 1536), (6, 8191)])
def test_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = hard_rows(*shape, dtype)
    assert_quantized(quantize_rows(x), x)


def test_every_number_of_the_format_is_kept() -> None:
    """Rows that hold the format's numbers, whatever power of two they are scaled by, come back bit for bit."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    x = numbers * torch.tensor([[1.0], [2.0**-20], [2.0**30]])
    q, scale = quantize_rows(x)
    assert torch.equal(scale, torch.tensor([1.0, 2.0**-20, 2.0**30]))
    assert torch.equal(q.float() * scale[:, None], x)


def test_ties_go_to_even_and_nothing_overflows() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    assert quantize_rows(x).q.float().tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8]]
    # The largest of a row over its own scale may come out as more than 448 by rounding.
    largest = torch.linspace(1, 2, 4001).unsqueeze(1)
    assert bool((quantize_rows(largest).q.float() == 448).all())


def test_rows_of_nothing_have_scale_1() -> None:
    q, scale = quantize_rows(torch.tensor([[0.0, -0.0], [1e-40, 0.0]]))
    assert scale.tolist() == [1.0, 1.0]
    assert not q.float().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.ones(3, 8)
    x[1, 3] = bad
    q = quantize_rows(x).q.float()
    assert q[1].isnan().any()
    assert not q[[0, 2]].isnan().any()


def test_rows_are_read_where_they_lie() -> None:
    wide = torch.randn(6, 40)
    for x in (wide[:, 8:24], wide[::2], wide.T):
        assert torch.equal(quantize_rows(x).q.float(), quantize_rows(x.contiguous()).q.float())


def test_twin_in_float64_is_the_formula() -> None:
    x = hard_rows(9, 33, torch.float32).double()
    twin, single = quantize_rows_reference(x), quantize_rows_reference(x.float())
    assert twin.scale.dtype == torch.float64
    torch.testing.assert_close(single.scale.double(), twin.scale, rtol=2**-23, atol=0)


def test_no_rows() -> None:
    q, scale = quantize_rows(torch.empty(0, 16))
    assert (q.shape, scale.shape) == ((0, 16), (0,))


def test_bad_arguments() -> None:
    for x in (torch.ones(3), torch.ones(2, 3, 4), torch.ones(2, 0), torch.ones(1, 32769)):
        with pytest.raises(ValueError, match="x must be"):
            quantize_rows(x)
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
            quantize_rows(torch.ones(2, 2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.opd_kernels.quantize_rows.default, (hard_rows(5, 32, dtype),))


def test_compiles_without_a_graph_break() -> None:
    def run(x: Tensor) -> Quantized:
        return quantize_rows(x * 2)

    x = hard_rows(6, 48, torch.bfloat16)
    found, wanted = torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
    assert torch.equal(found.q.float(), wanted.q.float())
    assert torch.equal(found.scale, wanted.scale)
