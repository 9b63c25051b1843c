"""One denoising step of the published DiffusionOPD loop, eager: the yardstick of the fused step.

As released (DiffusionOPD, arXiv 2605.15055; the step is Flow-GRPO's, arXiv 2505.05470): the scheduler is asked for the
index of a time step, once for the rollout and once for every sample in the teacher's and in the training pass; the
student's mean is formed in the rollout and again in training; the divergence is computed in float32 and propagated back
to the velocities. The log-probabilities of the teacher's and the training pass, which the released code computes and
never uses, are left out. Shares no line with the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Guidance = Sequence[tuple[slice, float]]
"""(samples of a task, scale) for each task; a scale of 1 or less takes the conditional velocity alone."""

Levels = tuple[Tensor, Tensor, Tensor | float]
"""sigma and the next sigma, (B or 1, 1, 1, 1), and what replaces sigma = 1 inside 1 - sigma."""


class Schedule:
    """The scheduler's tables on the device, asked by time step as diffusers' `FlowMatchEulerDiscreteScheduler` is."""

    def __init__(self, steps: int, device: torch.device, shift: float = 3.0) -> None:
        def shifted(u: Tensor) -> Tensor:
            return shift * u / (1 + (shift - 1) * u)

        last = float(shifted(torch.tensor(1e-3, dtype=torch.float64)))
        sigmas = shifted(torch.linspace(1.0, last, steps, dtype=torch.float64)).float()
        self.sigmas = torch.cat([sigmas, torch.zeros(1)]).to(device)
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep: Tensor) -> int:
        """Position of a time step, found on the device and read back."""
        found = (self.timesteps == timestep).nonzero()
        return int(found[1 if len(found) > 1 else 0].item())

    def levels(self, timesteps: Tensor) -> Levels:
        """Noise levels of every time step in `timesteps` (B,)."""
        index = [self.index_for_timestep(t) for t in timesteps]
        after = [i + 1 for i in index]
        return self.sigmas[index].view(-1, 1, 1, 1), self.sigmas[after].view(-1, 1, 1, 1), self.sigmas[1].item()


@dataclass
class Prepared:
    """Noise levels looked up beforehand, since a CUDA graph cannot contain a read-back. This favours the eager step."""

    sigma: Tensor
    sigma_next: Tensor
    sigma_max: float

    def levels(self, timesteps: Tensor) -> Levels:
        return self.sigma, self.sigma_next, self.sigma_max


def guided(cond: Tensor, uncond: Tensor | None, guidance: Guidance) -> Tensor:
    """Classifier-free guidance, task by task."""
    if uncond is None:
        return cond
    parts = []
    for samples, scale in guidance:
        c, u = cond[samples], uncond[samples]
        parts.append(u + scale * (c - u) if scale > 1 else c)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sde_mean(x: Tensor, v: Tensor, levels: Levels, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the Flow-SDE step, its diffusion coefficient, and dt < 0; everything in float32."""
    sigma, sigma_next, sigma_max = levels
    x, v = x.float(), v.float()
    dt = sigma_next - sigma
    std_dev = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta
    drift = std_dev**2 / (2 * sigma)
    return x * (1 + drift * dt) + v * (1 + drift * (1 - sigma)) * dt, std_dev, dt


def log_probability(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) mean over the elements of the Gaussian's log-density."""
    density = -((sample.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.mean(dim=tuple(range(1, density.dim())))


def published_step(
    schedule: Schedule | Prepared,
    x: Tensor,
    cond_s: Tensor,
    uncond_s: Tensor | None,
    cond_t: Tensor,
    uncond_t: Tensor | None,
    guidance_s: Guidance,
    guidance_t: Guidance,
    timesteps: Tensor,
    eta: float,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Next state (B, C, H, W), loss (B,), and the gradient of the losses' sum with respect to cond_s (and uncond_s).

    `timesteps` (B,) are all the same step; `noise` is drawn when it is not given. The KL is divided by the squared
    diffusion coefficient, without the step's length, as released.
    """
    with torch.no_grad():  # rollout
        mean, std_dev, dt = sde_mean(x, guided(cond_s, uncond_s, guidance_s), schedule.levels(timesteps[:1]), eta)
        std = std_dev * torch.sqrt(-dt)
        drawn = torch.randn(x.shape, device=x.device, dtype=torch.float32) if noise is None else noise
        x_next = mean + std * drawn
        log_probability(x_next, mean, std)

        levels = schedule.levels(timesteps)  # teacher
        mean_t, _, _ = sde_mean(x, guided(cond_t, uncond_t, guidance_t), levels, eta)

    leaves = [t.detach().requires_grad_() for t in (cond_s, uncond_s) if t is not None]  # training
    velocity = guided(leaves[0], leaves[1] if len(leaves) > 1 else None, guidance_s)
    mean_s, std_dev, _ = sde_mean(x, velocity, schedule.levels(timesteps), eta)
    variance = torch.clamp(std_dev**2, min=1e-8)
    loss = ((mean_s - mean_t) ** 2 / (2 * variance)).mean(dim=(1, 2, 3))
    return x_next, loss.detach(), torch.autograd.grad(loss.sum(), leaves)
