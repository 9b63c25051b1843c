"""The published DiffusionOPD round as people run it today: eager, three loops, adapters switched.

This file is the yardstick of the project. It shares no line with the engine: it has its own solver steps (the scheduler
object is asked for every sample's index), its own guidance and its own losses, and stays as plain as the algorithm:

1. rollout: the student samples all N steps without gradient, the states are stored;
2. teachers: each task's teacher is switched on and evaluated at the stored states, its step means are stored;
3. training: the student is evaluated again at each stored state, this time with gradient; one micro-batch is one step
   of one task's samples; the Kullback-Leibler divergence to the teacher's mean is propagated back, gradients add up.

DiffusionOPD, arXiv 2605.15055. Left out, which can only help the reference: text encoding, image decoding, reward
models and the log-probabilities that the released rollout computes and never uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

STOCHASTIC = ("flow_sde", "dance_sde", "cps", "ddim")
DETERMINISTIC = ("ode", "dpm1", "dpm2")
VARIANCE_FLOOR = 1e-8  # the released code never divides by a smaller variance


class Embeds(Protocol):
    """Text embeddings, one row per prompt."""

    @property
    def sequence(self) -> Tensor:
        """(B, L, D)."""

    @property
    def pooled(self) -> Any:
        """(B, P); None for a family without a pooled vector."""

    @property
    def mask(self) -> Any:
        """(B, L) bool; None for a family without text masks."""


class Batch(Protocol):
    """One round's samples, task after task. The engine's own batch has these fields."""

    @property
    def text(self) -> Embeds:
        """(B, ...) one row per sample."""

    @property
    def negative(self) -> Embeds | None:
        """One row; needed by any guidance above 1."""

    @property
    def tasks(self) -> Sequence[tuple[int, slice]]:
        """(teacher index, rows of the batch)."""

    @property
    def scale(self) -> Tensor:
        """(B,) float32: the round's loss is sum_i scale_i * sum_j KL_ij."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent (C, H, W)."""

    @property
    def x(self) -> Tensor | None:
        """(B, C, H, W) initial states; None: drawn here."""

    @property
    def noise(self) -> Tensor | None:
        """(N, B, C, H, W) step noise; None: drawn here."""


class Policy(Protocol):
    """A network and its guidance scale; `activate` makes it ready for forward calls and returns it."""

    @property
    def guidance(self) -> float:
        """At most 1 means one conditional pass."""

    def activate(self) -> nn.Module:
        """Switch to this policy's weights."""


@dataclass(frozen=True)
class AdapterPolicy:
    """One of several LoRA adapters on a shared base (a `peft.PeftModel`), switched on before use, never merged."""

    model: Any
    adapter: str
    guidance: float = 1.0

    def activate(self) -> nn.Module:
        self.model.set_adapter(self.adapter)
        return self.model

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters by name, whether it is active or not."""
        for name, parameter in self.model.named_parameters():
            if f".{self.adapter}." in name:
                yield name, parameter


@dataclass(frozen=True)
class WeightsPolicy:
    """A transformer of its own: a fully trained student, or a teacher that is a separate copy."""

    model: nn.Module
    guidance: float = 1.0

    def activate(self) -> nn.Module:
        return self.model

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()


Predict = Callable[[nn.Module, Tensor, Tensor, Batch, slice, float], Tensor]
"""Velocity (B, C, H, W) of (network, x, timestep (B,), batch, its rows, guidance)."""


@dataclass(frozen=True)
class Step:
    """One solver step of a batch."""

    mean: Tensor  # (B, C, H, W) float32
    std: Tensor  # (B, 1, 1, 1) standard deviation of the sampled noise; 0 for a deterministic step
    published_std: Tensor  # (B, 1, 1, 1) what the released code divides by: without sqrt(dt) for flow_sde
    x0: Tensor  # (B, C, H, W) float32, the prediction of the clean latent


def solver_step(
    scheduler: Any,
    solver: str,
    eta: float,
    v: Tensor,
    timestep: Tensor,
    x: Tensor,
    x0_prev: Tensor | None = None,
) -> Step:
    """Step mean and standard deviation, each sample's index looked up in the scheduler.

    v, x (B, C, H, W); timestep (B,) of `scheduler.timesteps`; x0_prev (B, C, H, W) is the previous step's prediction,
    read by dpm2 alone. Formulas: Flow-SDE from Flow-GRPO (arXiv 2505.05470, eq. 9), Dance-SDE from DanceGRPO
    (arXiv 2505.07818), CPS from arXiv 2509.05952, DDIM-eta from arXiv 2010.02502 eq. 16 in x = (1 - s) x0 + s eps,
    DPM-Solver++ from arXiv 2211.01095 (algorithms 1 and 2).
    """
    v, x = v.float(), x.float()
    index = [scheduler.index_for_timestep(t) for t in timestep]
    last = len(scheduler.timesteps) - 1
    s = scheduler.sigmas[index].view(-1, 1, 1, 1).to(x)
    n = scheduler.sigmas[[i + 1 for i in index]].view(-1, 1, 1, 1).to(x)
    dt = n - s  # negative
    zero = torch.zeros_like(s)
    x0 = x - s * v
    eps = x + (1 - s) * v

    if solver == "ode":
        return Step(x + dt * v, zero, zero, x0)
    if solver == "flow_sde":
        sigma_max = scheduler.sigmas[1].item()
        diffusion = eta * torch.sqrt(s / (1 - torch.where(s == 1, sigma_max, s)))
        drift = diffusion**2 / (2 * s)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - s)) * dt
        return Step(mean, diffusion * torch.sqrt(-dt), diffusion, x0)
    if solver == "dance_sde":
        score = -(x - (1 - s) * x0) / s**2
        mean = x + v * dt - 0.5 * eta**2 * score * dt
        std = eta * torch.sqrt(-dt)
        return Step(mean, std, std, x0)
    if solver == "cps":
        std = n * math.sin(eta * math.pi / 2)
        return Step((1 - n) * x0 + n * math.cos(eta * math.pi / 2) * eps, std, std, x0)
    if solver == "ddim":
        # With alpha = 1 - sigma, DDIM's eta * sqrt(n^2/s^2) * sqrt(1 - alpha_s^2/alpha_n^2) in rectified-flow form.
        shrink = (n * (1 - s)) ** 2 / (s * (1 - n)) ** 2
        std = eta * n * torch.sqrt(1 - shrink)
        return Step((1 - n) * x0 + torch.sqrt(n**2 - std**2) * eps, std, std, x0)
    if solver in ("dpm1", "dpm2"):
        mean = x.clone()
        for row, i in enumerate(index):
            previous = None if x0_prev is None or solver == "dpm1" or i in (0, last) else x0_prev[row]
            mean[row] = _dpm_mean(scheduler, i, x[row], x0[row], previous)
        return Step(mean, zero, zero, x0)
    raise ValueError(f"solver {solver!r} is unknown; use one of {STOCHASTIC + DETERMINISTIC}")


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _dpm_mean(scheduler: Any, i: int, x: Tensor, x0: Tensor, x0_prev: Tensor | None) -> Tensor:
    """DPM-Solver++ in the data prediction; second order with the previous prediction (2M), first order without."""
    s, n = scheduler.sigmas[i].item(), scheduler.sigmas[i + 1].item()
    h = _log_snr(n) - _log_snr(s)
    data = x0
    if x0_prev is not None:
        h_prev = _log_snr(s) - _log_snr(scheduler.sigmas[i - 1].item())
        r = h_prev / h  # infinite after a start at sigma = 1, where the step is then of first order
        data = x0 + (x0 - x0_prev) / (2 * r)
    return (n / s) * x - (1 - n) * math.expm1(-h) * data


def adapters_on(transformer: nn.Module, student: Any, teachers: Sequence[tuple[str, str | Path]] = ()) -> Any:
    """A `peft.PeftModel` around `transformer` (changed in place) with the student's and the teachers' adapters.

    student: a `peft.LoraConfig` or an adapter folder, named "student"; teachers: (name, adapter folder).
    """
    from peft import PeftModel, get_peft_model

    if isinstance(student, str | Path):
        model = PeftModel.from_pretrained(transformer, str(student), adapter_name="student", is_trainable=True)
    else:
        model = get_peft_model(transformer, student, adapter_name="student")
    for name, folder in teachers:
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    model.set_adapter("student")
    return model


class Reference:
    """The published round over a student and its teachers; gradients accumulate in the student's parameters.

    scheduler: a diffusers `FlowMatchEulerDiscreteScheduler`; `set_timesteps` is called here, with the number of steps
    or with `schedule` (families whose pipeline hands over sigmas and a shift).
    predict: calls the network as its family wants it and guides; None: as SD3 does.
    autocast: dtype of the forwards, over weights that stay as they are (float32 as released); None: no autocast.
    objective: "kl" (closed form under an SDE, half the squared distance of the means under an ODE), "l2" (the latter
    always) or "velocity" (the squared distance of the velocities). variance: "exact" divides by the variance of the
    sampled noise, "published" by what the released code takes for it. reduction: over a sample's elements.

    Under dpm2 the means of the training pass use the history stored by the rollout, for student and teacher alike. The
    released code drops the history there, which makes the rolled-out and the trained transition two different ones.
    """

    def __init__(
        self,
        scheduler: Any,
        student: AdapterPolicy | WeightsPolicy,
        teachers: Sequence[Policy],
        *,
        solver: str,
        steps: int,
        eta: float,
        objective: Literal["kl", "l2", "velocity"] = "kl",
        variance: Literal["exact", "published"] = "exact",
        reduction: Literal["mean", "sum"] = "mean",
        train_last: bool = False,
        autocast: torch.dtype | None = None,
        schedule: Mapping[str, Any] | None = None,
        predict: Predict | None = None,
    ) -> None:
        if solver not in STOCHASTIC + DETERMINISTIC:
            raise ValueError(f"solver {solver!r} is unknown; use one of {STOCHASTIC + DETERMINISTIC}")
        self.scheduler = scheduler
        self.student = student
        self.teachers = list(teachers)
        self.solver, self.steps, self.eta = solver, steps, eta
        self.objective, self.variance, self.reduction = objective, variance, reduction
        self.train_last = train_last
        self.autocast = autocast
        self.schedule = {"num_inference_steps": steps} if schedule is None else schedule
        self.predict = guided_velocity if predict is None else predict

    def parameters(self) -> dict[str, nn.Parameter]:
        """The student's trained parameters by name."""
        return dict(self.student.parameters())

    def round(self, batch: Batch) -> Tensor:
        """One round: returns the losses (steps trained, B) float32, times `batch.scale`, and accumulates gradients."""
        device = batch.text.sequence.device
        self.scheduler.set_timesteps(**self.schedule, device=device)
        trained = range(self.steps if self.train_last else self.steps - 1)

        # 1. Rollout of every task's samples, all N steps, no gradient.
        trajectories: list[Trajectory] = []
        for _, rows in batch.tasks:
            trajectories.append(self._rollout(batch, rows))

        # 2. Teachers at the stored states.
        targets: list[list[Tensor]] = []
        for (teacher, rows), trajectory in zip(batch.tasks, trajectories, strict=True):
            targets.append(self._teach(self.teachers[teacher], batch, rows, trajectory))

        # 3. Student again, with gradient: one micro-batch per task and step.
        losses = torch.zeros(len(trained), len(batch.scale), device=device)
        network = self.student.activate()
        for (_, rows), trajectory, target in zip(batch.tasks, trajectories, targets, strict=True):
            for j in trained:
                x = trajectory.states[j]
                timestep = self.scheduler.timesteps[j].expand(len(x))
                with self._forward_context():
                    v = self.predict(network, x, timestep, batch, rows, self.student.guidance)
                step = solver_step(self.scheduler, self.solver, self.eta, v, timestep, x, trajectory.history(j))
                loss = batch.scale[rows] * self._divergence(v, step, target[j])
                loss.sum().backward()
                losses[j, rows] = loss.detach()
        return losses

    @torch.no_grad()
    def _rollout(self, batch: Batch, rows: slice) -> Trajectory:
        count = len(batch.scale[rows])
        device = batch.text.sequence.device
        x = torch.randn(count, *batch.shape, device=device) if batch.x is None else batch.x[rows]
        states: list[Tensor] = [x]
        predictions: list[Tensor] = []
        network = self.student.activate()
        for j, t in enumerate(self.scheduler.timesteps):
            timestep = t.expand(count)
            with self._forward_context():
                v = self.predict(network, x, timestep, batch, rows, self.student.guidance)
            history = predictions[-1] if predictions else None
            step = solver_step(self.scheduler, self.solver, self.eta, v, timestep, x, history)
            noise = torch.randn_like(step.mean) if batch.noise is None else batch.noise[j, rows]
            x = step.mean + step.std * noise
            states.append(x)
            predictions.append(step.x0)
        return Trajectory(states, predictions)

    @torch.no_grad()
    def _teach(self, teacher: Policy, batch: Batch, rows: slice, trajectory: Trajectory) -> list[Tensor]:
        network = teacher.activate()
        targets = []
        for j, t in enumerate(self.scheduler.timesteps):
            x = trajectory.states[j]
            timestep = t.expand(len(x))
            with self._forward_context():
                v = self.predict(network, x, timestep, batch, rows, teacher.guidance)
            step = solver_step(self.scheduler, self.solver, self.eta, v, timestep, x, trajectory.history(j))
            targets.append(v.float() if self.objective == "velocity" else step.mean)
        return targets

    def _divergence(self, v: Tensor, step: Step, target: Tensor) -> Tensor:
        """(B,): divergence of each sample's transition from its teacher's."""
        if self.objective == "velocity":
            distance = (v.float() - target) ** 2
        else:
            distance = (step.mean - target) ** 2 / 2
            std = step.published_std if self.variance == "published" else step.std
            if self.objective == "kl" and self.solver in STOCHASTIC and bool((std > 0).all()):
                variance = (std**2).clamp(min=VARIANCE_FLOOR) if self.variance == "published" else std**2
                distance = distance / variance
        flat = distance.flatten(1)
        return flat.mean(1) if self.reduction == "mean" else flat.sum(1)

    def _forward_context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.student.model.parameters()).device.type, dtype=self.autocast)


@dataclass(frozen=True)
class Trajectory:
    """A rollout: N + 1 states and N predictions of the clean latent, each (B, C, H, W)."""

    states: list[Tensor]
    predictions: list[Tensor]

    def history(self, j: int) -> Tensor | None:
        """The prediction of the step before step j."""
        return self.predictions[j - 1] if j > 0 else None


def guided_velocity(
    network: nn.Module, x: Tensor, timestep: Tensor, batch: Batch, rows: slice, guidance: float
) -> Tensor:
    """Velocity (B, C, H, W), both branches of classifier-free guidance in one forward; one branch up to guidance 1."""
    sequence, pooled = batch.text.sequence[rows], batch.text.pooled[rows]
    if guidance > 1:
        if batch.negative is None:
            raise ValueError(f"guidance {guidance} needs the embeddings of a negative prompt in the batch")
        sequence = torch.cat([batch.negative.sequence.expand_as(sequence), sequence])
        pooled = torch.cat([batch.negative.pooled.expand_as(pooled), pooled])
        x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
    dtype = next(network.parameters()).dtype
    v = network(
        hidden_states=x.to(dtype),
        timestep=timestep,
        encoder_hidden_states=sequence.to(dtype),
        pooled_projections=pooled.to(dtype),
        return_dict=False,
    )[0]
    if guidance > 1:
        uncond, cond = v.chunk(2)
        v = uncond + guidance * (cond - uncond)
    return v
