"""Supervised fine-tuning on images that the teachers draw: flow matching, the cold start that Flow-OPD gives a student
before it distils on-policy (the project's page and released code).

At x_t = (1 - t) x0 + t eps, fresh noise eps on an image x0 of the teacher, the velocity is to be eps - x0 (rectified
flow, arXiv 2209.03003, equation 1). The loss of an image is

    mean((v - (eps - x0))^2) + base_weight mean((v - v_base)^2),        t logit-normal(0, 1)

with the density of t of SD3 (arXiv 2403.03206, section 3.1), not shifted as the sampler's levels are. Of several images
of one prompt the released script keeps the one of the highest reward.

It is the conditional branch that is trained; classifier-free guidance is the sampler's. Guidance that is an input of
the transformer (FLUX.1-dev) is the student's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_fast.prompts import Prompt
from opd_fast.rewards.judge import Jury, judged
from opd_fast.rollout import sample
from opd_fast.seeds import noise_keys
from opd_fast.teachers import TeacherBank
from opd_fast.trainers.reinforce import ORDER_STREAM, ROLLOUT_STREAM, generator
from opd_fast.trainers.setup import Setup
from opd_fast.velocity import Conditioning, velocities
from opd_kernels import philox_normal

NOISE_STREAM = 7
"""Sets what an image is noised with apart from any other noise drawn from the same seed."""
NOISE, LEVEL = 0, 1
"""Draws of a key of that stream: eps and t."""


def squared_gap(a: Tensor, b: Tensor) -> Tensor:
    """mean((a - b)^2) over the elements of each sample, (B,) float32; a, b (B, C, H, W) of any floating type."""
    return (a.float() - b.float()).flatten(1).square().mean(1)


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean((v - (eps - x0))^2) of each sample, (B,) float32; v, x0 and noise = eps (B, C, H, W)."""
    return squared_gap(v, noise.float() - x0.float())


class SFT:
    """The method `sft` of the training loop: the teachers draw once in `sft.updates` rounds, which share the images."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config = setup.config
        self.sft = config.sft
        self.images = config.train.samples_per_task * setup.schedule.per_round
        """Images that are learnt from until the teachers draw again, on all devices."""
        mine, own = setup.world.rows(self.images)
        self.mine = torch.tensor(mine[:own], dtype=torch.int64)
        """Which of them this process draws and learns from."""
        self.samples = self.images / self.sft.updates
        """Images that a round learns from, on average."""
        self.guidance = setup.student.guidance if setup.model.guidance_kind == "embedded" else 1.0
        self.jury = Jury("raise", config.evaluation.reward_timeout)
        self._base = TeacherBank.of_base(setup.model, self.guidance)
        self._drawn: dict[str, Tensor] = {}
        """This process's images in hand, in the order of `mine`: x0 (own, C, H, W) float32 and, where a reward chose
        them, reward (own,) float32."""
        self._counts: dict[str, Tensor] = {}
        """What the last round has for its metrics beside the loss, each 0-dim."""

    # --- the loop's side ---------------------------------------------------------------------------------------------

    def accumulate(self, index: int, scaler: torch.amp.GradScaler) -> Tensor:
        """Add the gradient of round `index`, times the scaler's factor, to the student's parameters.

        Returns the weighed loss of every image in hand (1, images) float32, unscaled, 0 for images that the round does
        not learn from.
        """
        config = self.setup.config
        epoch, part = divmod(index, self.sft.updates)
        if part == 0:
            self._drawn = self._draw(epoch)
        order = torch.randperm(self.images, generator=generator(config.train.seed, ORDER_STREAM, epoch))
        rows, world = order[part :: self.sft.updates], self.setup.world
        owners = torch.tensor(self.owners(epoch))
        weights = torch.tensor([teacher.weight for teacher in config.teachers])[owners]
        shares = weights / weights[rows].sum() * world.size  # gradients are averaged
        own = rows[rows % world.size == world.rank]
        losses, counts = self.learn(epoch, own, shares[own], scaler)
        self.setup.student.average_gradients()
        self._counts = {name: world.mean(value) for name, value in counts.items()}
        if "reward" in self._drawn:
            rewards = world.collect(self._drawn["reward"], self.images).cpu()
            for task in owners.unique().tolist():
                self._counts[f"reward/{config.teachers[task].name}"] = rewards[owners == task].mean()
        if part == self.sft.updates - 1:
            self._drawn = {}
        return world.mean(losses)

    def fault(self, index: int, losses: Tensor) -> str | None:
        """Of which task a round's loss is not finite, in words; None where all are."""
        bad = torch.nonzero(~torch.isfinite(losses[0]))
        if not len(bad):
            return None
        task = self.owners(index // self.sft.updates)[int(bad[0])]
        return f"the loss of task {self.setup.config.teachers[task].name!r} is not finite"

    def metrics(self, index: int, losses: Tensor) -> dict[str, float]:
        """The loss of the round just accumulated, whole and by task; the rewards of the images in hand, where they were
        chosen by them; `base_gap`, mean((v - v_base)^2), where it is in the loss."""
        owners = torch.tensor(self.owners(index // self.sft.updates))
        found = {"loss": float(losses.sum())}
        for task in owners.unique().tolist():
            found[f"loss/task_{self.setup.config.teachers[task].name}"] = float(losses[0, owners == task].sum())
        return found | {name: float(value) for name, value in self._counts.items()}

    def state(self) -> dict[str, Tensor]:
        """The images in hand, whole, where a checkpoint falls between two of their updates."""
        return {name: self.setup.world.collect(tensor, self.images) for name, tensor in self._drawn.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave, on however many processes."""
        self._drawn = {name: tensor[self.mine].to(self.setup.model.device) for name, tensor in tensors.items()}

    # --- images ------------------------------------------------------------------------------------------------------

    def tasks(self, epoch: int) -> list[tuple[int, list[Prompt]]]:
        """(task, the prompts of the images that are kept) of draw `epoch`."""
        setup, found = self.setup, []
        for task, turns in setup.schedule.round(epoch):
            count = setup.config.train.samples_per_task
            indices = [i for turn in turns for i in setup.sources[task].batch(turn, count)]
            found.append((task, [setup.prompts[task][i] for i in indices]))
        return found

    def owners(self, epoch: int) -> list[int]:
        """The task of each image of draw `epoch`."""
        return [task for task, prompts in self.tasks(epoch) for _ in prompts]

    def keys(self, epoch: int) -> Tensor:
        """(B,) int64 keys of the images' noise and levels."""
        seed = self.setup.config.train.seed
        parts = [noise_keys(seed, NOISE_STREAM, epoch, task, samples=len(p)) for task, p in self.tasks(epoch)]
        return torch.cat(parts).to(self.setup.model.device)

    def _draw(self, epoch: int) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        first = 0
        for task, prompts in self.tasks(epoch):
            here = self.mine[(self.mine >= first) & (self.mine < first + len(prompts))] - first
            if len(here):
                for name, tensor in self._draw_task(epoch, task, prompts, here).items():
                    found.setdefault(name, []).append(tensor)
            first += len(prompts)
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def _draw_task(self, epoch: int, task: int, prompts: list[Prompt], here: Tensor) -> dict[str, Tensor]:
        """What a task has for `_drawn`: of each prompt in `here` the best image that its teacher draws."""
        setup, several = self.setup, self.sft.images_per_prompt
        train, model = setup.config.train, setup.model
        every = [prompts[i] for i in here.tolist() for _ in range(several)]
        keys = noise_keys(train.seed, ROLLOUT_STREAM, epoch, task, samples=len(prompts) * several)
        keys = keys.view(-1, several)[here].flatten().to(model.device)
        at_once = train.micro_batch or train.samples_per_task
        latents = []
        with setup.teachers.active(task) as transformer:
            for start in range(0, len(every), at_once):
                part = slice(start, start + at_once)
                latents.append(
                    sample(
                        model,
                        transformer,
                        setup.text.rows([prompt.text for prompt in every[part]]),
                        setup.text.negative,
                        setup.teachers.teachers[task].guidance,
                        setup.table,
                        shape=setup.shape,
                        keys=keys[part],
                    )
                )
        x0 = torch.cat(latents)
        if several == 1:
            return {"x0": x0}
        images = torch.cat([model.decode(part) for part in latents])
        rewards = judged(self.jury, setup.config.teachers[task], images, every)
        best, of_prompt = rewards.view(-1, several).max(1)
        rows = of_prompt + several * torch.arange(len(here))
        return {"x0": x0[rows.to(x0.device)], "reward": best.to(x0.device)}

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(
        self, epoch: int, rows: Tensor, shares: Tensor, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradient of the loss of the images `rows` (n,), some of `mine`, weighed by `shares` (n,); both on the
        CPU.

        Returns the weighed losses (1, images) float32, 0 for images that are not in `rows`, and counts for the metrics.
        """
        setup, weight = self.setup, self.sft.base_weight
        model, device = setup.model, setup.model.device
        prompts = [prompt.text for _, prompts in self.tasks(epoch) for prompt in prompts]
        keys = self.keys(epoch)
        losses, gap = torch.zeros(1, self.images, device=device), torch.zeros((), device=device)
        at_once = setup.config.train.micro_batch or max(1, len(rows))
        with setup.student.at_rest():
            for part, share in zip(rows.split(at_once), shares.to(device).split(at_once), strict=True):
                if not len(part):  # a process may have none
                    continue
                mine = part.to(device)
                x0, noise = self._drawn["x0"][mine // setup.world.size], philox_normal(keys[mine], setup.shape, NOISE)
                t = philox_normal(keys[mine], (1, 1, 1), LEVEL).sigmoid()
                x, level = torch.lerp(x0, noise, t), t.flatten()
                text = setup.text.rows([prompts[i] for i in part.tolist()])
                condition = Conditioning.build(model, text, None, self.guidance)
                v = setup.student.velocities(model, x, level, condition).cond
                loss = flow_matching_loss(v, x0, noise)
                if weight > 0:
                    with torch.no_grad(), self._base.active(0) as transformer:
                        base = velocities(model, transformer, x, level, condition).cond
                    away = squared_gap(v, base)
                    loss = loss + weight * away
                    gap += (share * away.detach()).sum()
                weighed = share * loss
                scaler.scale(weighed.sum()).backward()
                losses[0, mine] = weighed.detach()
        return losses, {"base_gap": gap} if weight > 0 else {}
