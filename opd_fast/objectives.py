"""What a step's loss weighs: every objective of on-policy distillation here is w_j * (v_student - v_teacher)^2.

Student and teacher share the solver's row, so mu_S - mu_T = b (v_S - v_T) and (arXiv 2605.15055):

* kl: KL(N(mu_S, std^2) || N(mu_T, std^2)) = |mu_S - mu_T|^2 / (2 std^2), hence w = b^2 / (2 std^2); on a row without
  noise the L2 of the means, 1/2 |mu_S - mu_T|^2. The table holds these weights, in its `exact` or `published` variance.
* l2: w = b^2 / 2 on every row, whatever the noise.
* velocity: w = 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_fast.solvers import SolverTable


def step_weights(table: SolverTable, kind: Literal["kl", "l2", "velocity"]) -> Tensor:
    """The weight w_j of each step, (N,) float64 on the CPU. Raises ValueError for an unknown objective."""
    if kind == "kl":
        return table.weight
    if kind == "l2":
        return table.b.square() / 2
    if kind == "velocity":
        return torch.ones_like(table.b)
    raise ValueError(f"unknown objective {kind!r}: choose kl, l2 or velocity")
