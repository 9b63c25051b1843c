"""The written-down operations of an SD3 forward against PyTorch's counter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.flops import sd3_flops
from benchmarks.models import NANO, SD35M_512, SD35M_1024, Shape, random_model, random_text
from benchmarks.rounds import forward_flops


@pytest.mark.parametrize("shape", [NANO, SD35M_512, SD35M_1024], ids=["nano", "sd35m-512", "sd35m-1024"])
def test_the_formula_is_what_the_counter_counts(shape: Shape) -> None:
    model = random_model(shape, device="meta")
    batch: Any = SimpleNamespace(shape=model.latent_shape(shape.resolution), text=random_text(1, shape, device="meta"))
    assert sum(sd3_flops(shape).values()) == forward_flops(model, batch)
