"""DiffusionNFT's mathematics in float64: the loss written out, its gradient at theta = old, the old policy's decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_fast.training.methods.nft import SCALE, move_old_policy, nft_loss, old_policy_decay, optimality

B, SHAPE = 5, (3, 4, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(B, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X0, NOISE, OLD, OTHER, BASE = (draw(seed) for seed in range(5))
SIGMA = torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
X = (1 - SIGMA.view(-1, 1, 1, 1)) * X0 + SIGMA.view(-1, 1, 1, 1) * NOISE
R = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)


def test_optimality_of_an_advantage() -> None:
    advantage = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0])
    assert optimality(advantage).tolist() == pytest.approx([0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_loss_is_the_definition(beta: float) -> None:
    """Sample by sample and element by element."""
    v = OLD + 0.3 * OTHER
    found = nft_loss(v, OLD, BASE, X, SIGMA, X0, R, beta=beta, kl_weight=1e-4)
    for i in range(B):
        t, r = float(SIGMA[i]), float(R[i])
        losses = []
        for implied in (beta * v[i] + (1 - beta) * OLD[i], (1 + beta) * OLD[i] - beta * v[i]):
            error = X[i] - t * implied - X0[i]
            losses.append(float((error**2 / error.abs().mean()).mean()))
        kl = float(((v[i] - BASE[i]) ** 2).mean())
        wanted = 5 * (r * losses[0] + (1 - r) * losses[1]) / beta + 1e-4 * kl
        assert float(found[i]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_gradient_at_the_old_policy(beta: float) -> None:
    """-10 t (2 r - 1) (x0_hat - x0) / (D w): toward the sample where it is good, away where it is bad."""
    v = OLD.clone().requires_grad_()
    nft_loss(v, OLD, None, X, SIGMA, X0, R, beta=beta, kl_weight=0.0).sum().backward()
    t = SIGMA.view(-1, 1, 1, 1)
    error = X - t * OLD - X0
    width = error.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    wanted = -2 * SCALE * t * (2 * R - 1).view(-1, 1, 1, 1) * error / (48 * width)
    assert v.grad is not None
    torch.testing.assert_close(v.grad, wanted, rtol=1e-11, atol=1e-15)
    assert float(v.grad[2].abs().max()) < 1e-15  # r = 1/2 teaches nothing


def test_gradient_away_from_the_old_policy() -> None:
    """Finite differences of the weighed errors with their weights held, as the loss holds them."""
    v = (OLD + 0.3 * OTHER).requires_grad_()
    nft_loss(v, OLD, BASE, X, SIGMA, X0, R, beta=0.5, kl_weight=0.2).sum().backward()
    assert v.grad is not None
    at, t = v.detach(), SIGMA.view(-1, 1, 1, 1)
    signs = (0.5, -0.5)
    widths = [(X - t * (OLD + s * (at - OLD)) - X0).abs().flatten(1).mean(1) for s in signs]

    def held(v: Tensor) -> Tensor:
        errors = [(X - t * (OLD + s * (v - OLD)) - X0).square().flatten(1).mean(1) for s in signs]
        policy = 5 * (R * errors[0] / widths[0] + (1 - R) * errors[1] / widths[1]) / 0.5
        return (policy + 0.2 * (v - BASE).square().flatten(1).mean(1)).sum()

    direction = draw(9)
    slope = float((held(at + 1e-5 * direction) - held(at - 1e-5 * direction)) / 2e-5)
    assert float((v.grad * direction).sum()) == pytest.approx(slope, rel=1e-8)


def test_exact_images_have_no_infinite_weight() -> None:
    """x0_hat = x0: the error's floor is 1e-5."""
    v = (NOISE - X0).requires_grad_()
    loss = nft_loss(v, v.detach(), None, X, SIGMA, X0, R, beta=1.0, kl_weight=0.0)
    loss.sum().backward()
    assert v.grad is not None
    assert bool(loss.isfinite().all())
    assert bool(v.grad.isfinite().all())


def test_kl_needs_the_base() -> None:
    with pytest.raises(ValueError, match="v_base"):
        nft_loss(OLD, OLD, None, X, SIGMA, X0, R, beta=1.0, kl_weight=1e-4)


def test_half_precision_velocities_are_computed_in_float64() -> None:
    v = OLD.bfloat16().requires_grad_()
    loss = nft_loss(v, OLD, BASE, X.float(), SIGMA.float(), X0.float(), R.float(), beta=1.0, kl_weight=1e-4)
    assert loss.dtype == torch.float64
    loss.sum().backward()
    assert v.grad is not None
    assert v.grad.dtype == torch.bfloat16


def test_decay_of_the_old_policy() -> None:
    assert [old_policy_decay("early", k) for k in (0, 1, 100, 500, 900)] == pytest.approx([0, 0.001, 0.1, 0.5, 0.5])
    late = [old_policy_decay("late", k) for k in (0, 74, 75, 76, 175, 208, 209, 900)]
    assert late == pytest.approx([0, 0, 0, 0.0075, 0.75, 0.9975, 0.999, 0.999])


def test_moving_the_old_policy() -> None:
    old, new = [torch.ones(3), torch.zeros(2)], [torch.full((3,), 3.0), torch.ones(2)]
    move_old_policy(old, new, 0.75)
    assert [t.tolist() for t in old] == [[1.5] * 3, [0.25] * 2]
    move_old_policy(old, new, 0.0)
    assert all(torch.equal(o, n) for o, n in zip(old, new, strict=True))
    assert all(o is not n for o, n in zip(old, new, strict=True))
