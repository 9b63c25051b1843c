"""Seconds of training until a student has recovered 90 % of every teacher's gain: the engine and the published loop.

python -m benchmarks.time_to_quality [--share 0.9] [--budget 3600] [--sides NAME ...] [--seed 0] [--out FILE] [SETTING]

All sides learn from the three bundled teachers, start from the same base, and are judged alike: the averaged student,
on the held-out prompts and noise of `evaluation`. Judging, loading and text encoding stand outside the clock.

    engine              the `bundled` recipe through `opd_fast.training.loop.train`, as a user runs it
    published           the loop of `benchmarks/reference.py` with the published settings (`PUBLISHED`)
    published, tuned    the same loop with the recipe's settings: what is left between it and the engine is speed

A side is judged every five rounds, later whenever its rounds have grown by a tenth, and has arrived at the first of
these judgements where no task has recovered less than the share. A published side stops there, or when its budget of
seconds is spent. SETTINGs are those of `python -m opd_fast.train`; the published side takes them where `PUBLISHED` says
nothing. FILE takes the figures; the curves are drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from benchmarks.environment import default_device, environment, round_dtype, synchronize
from benchmarks.reference import AdapterPolicy, Reference, adapters_on
from opd_fast.config import Config
from opd_fast.config.command_line import parse
from opd_fast.config.serialize import to_dict
from opd_fast.errors import main_guard
from opd_fast.models import load_model
from opd_fast.models.base import ASSETS
from opd_fast.reporting.results import gain_recovered
from opd_fast.reporting.reward_keys import reward_key
from opd_fast.reporting.telemetry import quiet_libraries, read_metrics
from opd_fast.training.ema import ema_decay
from opd_fast.training.evaluation import ImageSampler, evaluate
from opd_fast.training.loop import train
from opd_fast.training.methods.opd import OPD
from opd_fast.training.optimizer import learning_rate
from opd_fast.training.setup import prepare

SIDES = ("published, tuned", "published")
"""Beside the engine."""
EVERY = 5
PUBLISHED = [
    *("--train.samples_per_task", "3", "--train.lr", "3e-4", "--train.schedule", "constant", "--train.clip", "1.0"),
    *("--train.weight_decay", "1e-4", "--train.ema", "0.9", "--sampler.solver", "ode", "--sampler.steps", "10"),
    *("--objective.kind", "kl", "--objective.steps", "mean"),
    *("--train.rounds", "4000"),  # it knows no end; so many rounds' prompts are encoded
]
"""The released `mopd` configuration: what a device of its eight takes (3 prompts of each task), no weights of tasks."""


@dataclass(frozen=True)
class Judged:
    """A student at one moment of its training."""

    round: int
    seconds: float
    """Of training so far."""
    rewards: dict[str, float]
    """The reward of each task, by task."""


@dataclass(frozen=True)
class Goal:
    """What a student is to reach: by task, the reward that the base has, and the one of the task's teacher."""

    base: dict[str, float]
    teachers: dict[str, float]
    share: float

    def recovered(self, judged: Judged) -> dict[str, float]:
        """By task, the share of the teacher's gain; 1 where the teacher gains nothing."""
        shares = {
            name: gain_recovered(self.base[name], self.teachers[name], judged.rewards[name]) for name in self.base
        }
        return {name: 1.0 if share is None else share for name, share in shares.items()}

    def reached(self, judged: Judged) -> bool:
        return min(self.recovered(judged).values()) >= self.share


def judgements(rounds: int) -> Iterator[int]:
    """After which rounds a student is judged, `rounds` at last: every five, later at steps of a tenth."""
    at = 0
    while (at := max(at + EVERY, at * 11 // 10)) < rounds:
        yield at
    yield rounds


# --- the engine ------------------------------------------------------------------------------------------------------


def run_engine(config: Config, run_dir: Path, share: float) -> tuple[Goal, list[Judged]]:
    """Train as `python -m opd_fast.train` does, and read the curve from what the run wrote."""
    run_dir.mkdir(parents=True, exist_ok=True)
    train(config, run_dir)
    rows = json.loads((run_dir / "results.json").read_text())["rows"]
    own = {teacher.name: str(teacher.reward) for teacher in config.teachers}

    def of(task: str, row: str) -> float:
        return float(rows[row][reward_key(rows[row], task, own[task])])

    goal = Goal({task: of(task, "base") for task in own}, {task: of(task, f"teacher:{task}") for task in own}, share)
    curve, seconds = [], 0.0
    for line in read_metrics(run_dir / "metrics.jsonl"):
        if "evaluation" in line and line["round"] > 0:
            rewards = {task: line["evaluation"][task][reward] for task, reward in own.items()}
            curve.append(Judged(line["round"], seconds, rewards))
        seconds += line.get("seconds", 0.0)  # an evaluation's line has none
    return goal, curve


# --- the published loop ----------------------------------------------------------------------------------------------


class PublishedRun:
    """The published loop with its optimizer and average, on the prompts of `config`.

    The loop itself is `benchmarks.reference.Reference`: float32 weights, adapters switched, three passes, autocast on
    a GPU. `published_average` averages as the released code does, else the engine's way.
    """

    def __init__(self, config: Config, published_average: bool) -> None:
        from peft import LoraConfig

        self.config, self.published_average = config, published_average
        self.setup = prepare(config, lambda text: None)
        self.method = OPD(self.setup)
        model, student = self.setup.model, config.student
        transformer = load_model(config.model.path, device=model.device, dtype=torch.float32).transformer
        lora = LoraConfig(
            r=student.rank,
            lora_alpha=student.alpha,
            target_modules=model.targets("attention"),
            init_lora_weights="gaussian",
        )
        torch.manual_seed(config.train.seed)
        folders = [(teacher.name, ASSETS / "teachers" / teacher.name) for teacher in config.teachers]
        self.adapters = adapters_on(transformer, lora, folders)
        self.loop = Reference(
            FlowMatchEulerDiscreteScheduler.from_pretrained(ASSETS / "pipeline" / "scheduler"),
            AdapterPolicy(self.adapters, "student", model.strength(student.guidance)),
            [AdapterPolicy(self.adapters, t.name, model.strength(t.guidance)) for t in config.teachers],
            solver=config.sampler.solver,
            steps=config.sampler.steps,
            eta=config.sampler.eta,
            objective=config.objective.kind,
            variance=config.objective.variance,
            reduction=config.objective.reduction,
            train_last=config.sampler.train_last,
            autocast=round_dtype(model.device) if model.device.type == "cuda" else None,
        )
        t = config.train
        self.parameters = list(self.loop.parameters().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=t.lr, betas=t.betas, eps=t.eps, weight_decay=t.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.rounds, self.seconds = 0, 0.0

    def round(self) -> None:
        """One optimizer step, its time added to `seconds`."""
        batch = self.method.batch(self.rounds)
        synchronize(self.setup.model.device)
        begun = time.perf_counter()
        self.loop.round(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.rounds)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        own = [ema_decay(self.rounds, self.config.train.ema)]
        for decay in published_decays(self.rounds, self.config) if self.published_average else own:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        synchronize(self.setup.model.device)
        self.seconds += time.perf_counter() - begun
        self.rounds += 1

    def judge(self) -> Judged:
        """The averaged student on the held-out prompts."""
        setup, config = self.setup, self.config
        with self._averaged() as transformer:
            sampler = ImageSampler(
                setup.model,
                setup.evaluation_table,
                setup.shape,
                config.student.guidance,
                config.train.seed,
                setup.text,
                config.evaluation.batch,
            )
            found = evaluate(sampler, transformer, setup.tasks)
        rewards = {t.name: found.rewards[t.name][str(t.reward)] for t in config.teachers}
        return Judged(self.rounds, self.seconds, rewards)

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        held = [p.detach().clone() for p in self.parameters]
        _copy(self.average, self.parameters)
        try:
            yield self.loop.student.activate()
        finally:
            _copy(held, self.parameters)


def published_decays(index: int, config: Config) -> list[float]:
    """The decays of the averages that the released code takes after round `index` (from 0).

    It averages every eighth step, then once for each task's batch, all with the same weights.
    """
    if (index + 1) % 8:
        return []
    return [ema_decay(index, config.train.ema)] * len(config.teachers)


@torch.no_grad()
def _copy(values: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> None:
    torch._foreach_copy_(list(into), list(values))


def run_published(run: PublishedRun, goal: Goal, budget: float) -> list[Judged]:
    """Train until the goal is reached, the rounds are at their end or `budget` seconds are spent."""
    curve: list[Judged] = []
    for at in judgements(run.config.train.rounds):
        while run.rounds < at and run.seconds < budget:
            run.round()
        curve.append(run.judge())
        shares = ", ".join(f"{name} {share:.0%}" for name, share in goal.recovered(curve[-1]).items())
        print(f"round {run.rounds}, {run.seconds:.0f} s: {shares}", flush=True)
        if goal.reached(curve[-1]) or run.seconds >= budget:
            break
    return curve


# --- the outcome -----------------------------------------------------------------------------------------------------


def told(curve: Sequence[Judged], goal: Goal) -> dict[str, Any]:
    """When a side arrived (null: it did not), the last judgement before, its mean round, and the whole curve."""
    arrived = next((i for i, judged in enumerate(curve) if goal.reached(judged)), None)
    return {
        "reached_seconds": None if arrived is None else curve[arrived].seconds,
        "reached_round": None if arrived is None else curve[arrived].round,
        "not_yet_seconds": curve[-1].seconds if arrived is None else curve[arrived - 1].seconds if arrived else 0.0,
        "round_seconds": curve[-1].seconds / curve[-1].round,
        "curve": [
            {"round": j.round, "seconds": j.seconds, "rewards": j.rewards, "recovered": goal.recovered(j)}
            for j in curve
        ],
    }


def lines(sides: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Two lines for each side; the engine's speed-up over it is a lower limit where it did not arrive."""
    engine = sides.get("engine", {}).get("reached_seconds")
    for name, side in sides.items():
        seconds, last = side["reached_seconds"], side["curve"][-1]
        arrived = f"{seconds:8.0f} s, round {side['reached_round']}" if seconds else "not reached"
        ratio = f"{'' if seconds else '> '}{(seconds or last['seconds']) / engine:.1f}x" if engine else ""
        shares = ", ".join(f"{task} {share:.0%}" for task, share in last["recovered"].items())
        yield f"{name:18} {arrived:24} {ratio:>8}   {side['round_seconds']:.2f} s a round"
        yield f"{'':18} at {last['seconds']:.0f} s {shares}"


def draw(sides: dict[str, dict[str, Any]], share: float, path: Path) -> None:
    """A panel for each task: the share recovered over seconds of training."""
    from matplotlib.figure import Figure

    tasks = list(next(iter(sides.values()))["curve"][0]["recovered"])
    figure = Figure(figsize=(3.4 * len(tasks), 2.9), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        for (name, side), colour in zip(sides.items(), ("#0072b2", "#b8500a", "#5a9c6e"), strict=False):
            seconds = [point["seconds"] for point in side["curve"]]
            panel.plot(seconds, [point["recovered"][task] for point in side["curve"]], color=colour, label=name)
        panel.axhline(share, color="#6b7178", linewidth=0.8, linestyle=":")
        panel.set(title=task, xscale="log", xlabel="seconds of training", ylim=(-0.1, 1.1))
    panels[0].set_ylabel("gain recovered")
    panels[-1].legend(frameon=False, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=110)


@main_guard
def main(argv: list[str]) -> int:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--share", type=float, default=0.9, help="of every teacher's gain")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds of training for a published side")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES), help="beside the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="where the engine's run goes (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file, a picture beside it")
    options, settings = parser.parse_known_args(argv)
    common = ["bundled", "--seed", str(options.seed), "--checkpoint.every", "0", *settings]
    recipe = parse([*common, "--evaluation.every", str(EVERY)]).config
    tuned = parse(common).config
    published = parse([*common, *PUBLISHED]).config
    if tuned.objective.kind == "ppo":
        parser.error("the published loop has no objective ppo")
    published = replace(published, teachers=[replace(teacher, weight=1.0) for teacher in published.teachers])

    quiet_libraries()
    command = " ".join(["python -m benchmarks.time_to_quality", *argv])
    measured_on = environment(default_device(), command)
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        goal, curve = run_engine(recipe, (options.runs or Path(temporary)) / f"engine-{options.seed}", options.share)

    def keep(name: str, curve: Sequence[Judged]) -> None:
        """Take in a side's outcome; an interrupted comparison leaves the sides before."""
        sides[name] = told(curve, goal)
        if options.out is None:
            return
        content = {
            "environment": measured_on,
            "share": options.share,
            "base": goal.base,
            "teachers": goal.teachers,
            "settings": {"recipe": to_dict(recipe), "published": to_dict(published)},
            "sides": sides,
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(sides, options.share, options.out.with_suffix(".png"))

    keep("engine", curve)
    for name, config in (("published, tuned", tuned), ("published", published)):
        if name in options.sides:
            print(f"{name}:", flush=True)
            run = PublishedRun(config, published_average=config is published)
            keep(name, run_published(run, goal, options.budget))
    print("\n".join(lines(sides)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
