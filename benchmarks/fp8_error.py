"""What float8 costs on the bundled model, on real activations: layers, velocities, step losses, gradients.

    python -m benchmarks.fp8_error [--samples 8] [--rounds 2] [--out FILE]

On a CPU the products are emulated in float32, which gives the numbers that fp8 matrix units give but for the order of
their sums. Everything is compared on the same states: those that the exact student visits. `docs/fp8-error.json` is
what `--out` wrote.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.environment import environment
from opd_fast.config.command_line import parse
from opd_fast.engine.float8 import float8_linear, frozen_layers, quantize_frozen, quantize_weight
from opd_fast.engine.merged_lora import MergedLayers
from opd_fast.models.guidance import Conditioning
from opd_fast.models.techniques import token_layers
from opd_fast.training.batch import RoundBatch
from opd_fast.training.guided_step import Prediction, guided_step
from opd_fast.training.methods.opd import OPD
from opd_fast.training.setup import Setup, prepare
from opd_fast.training.student import ADAPTER
from opd_fast.training.teachers import MergedTeachers, TeacherBank
from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE

CASES = ("teachers", "student", "student, gradient in the activations' type", "teachers and student")
OUTLIER = 0.1
"""Relative output error from which a layer had better stay as it is: rounding alone gives 0.038 whatever the sizes, so
that 0.1 is seven times its power. Then the operands spread over more than the format's 18 binades, or the output is a
small difference of large sums."""


@dataclass(frozen=True)
class Pass:
    """One round's steps, with the states they began from."""

    states: list[Tensor]
    losses: Tensor
    """(steps, B) float32."""
    velocities: Tensor
    """(steps, B, C, H, W): the teachers', with the prompt."""
    gradient: Tensor
    """Of the student's parameters, in one row."""


def bundled(samples: int) -> OPD:
    """The bundled recipe in float32, uncompiled, with `samples` of each task."""
    plain = ("--engine.fuse_projections", "false", "--engine.cache_modulation", "false", "--engine.attention", "native")
    switches = ("--evaluation.every", "0", "--engine.compile", "off", "--model.dtype", "float32", *plain)
    config = parse(["bundled", "--train.samples_per_task", str(samples), *switches]).config
    return OPD(prepare(config, lambda text: None))


def run(method: OPD, batch: RoundBatch, teachers: TeacherBank, states: list[Tensor] | None = None) -> Pass:
    """The round's losses and gradient at the given states, or at those that the student itself comes to."""
    setup = method.setup
    student, table, given = setup.student, setup.table, states is not None
    rows = table.rows(method.weight, batch.keys.device)
    condition = Conditioning.build(setup.model, batch.text, batch.negative, student.guidance)
    guidance, teacher_condition = torch.full_like(batch.scale, condition.branch_guidance), teachers.condition(batch)
    visited = states or [philox_normal(batch.keys, batch.shape, INITIAL_NOISE)]
    losses, velocities = [], []
    with student.merged_for_round():
        for j in range(table.steps - 1):
            x = visited[j]
            v = student.velocities(setup.model, x, rows[j, -1], condition)
            w = teachers.velocities(x, rows[j, -1], teacher_condition)
            student_side, teacher_side = Prediction(v, guidance).detach(), Prediction(w, teacher_condition.guidance)
            out = guided_step(x, student_side, teacher_side, rows, j, batch.scale, keys=batch.keys)
            torch.autograd.backward(
                [t for t in (v.cond, v.uncond) if t is not None],
                [g for g in (out.grad_cond, out.grad_uncond) if g is not None],
            )
            losses.append(out.loss)
            velocities.append(w.cond)
            if not given:
                visited.append(out.x_next)
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    for parameter in student.parameters():
        parameter.grad = None
    return Pass(visited, torch.stack(losses), torch.stack(velocities), gradient)


def ask(method: OPD, batch: RoundBatch, states: list[Tensor]) -> None:
    """The teachers' forwards at the given states, and no more."""
    teacher_condition = method.setup.teachers.condition(batch)
    for x, sigma in zip(states, method.setup.table.sigmas.float(), strict=False):
        method.setup.teachers.velocities(x, sigma, teacher_condition)


def in_float8(teachers: TeacherBank) -> TeacherBank:
    """A bank of quantised copies."""
    copies = []
    for teacher in teachers.teachers:
        transformer = copy.deepcopy(teacher.transformer)
        assert quantize_frozen(transformer, token_layers(transformer)) > 0
        copies.append(replace(teacher, transformer=transformer))
    return MergedTeachers(teachers.model, copies)


def quantize_student(setup: Setup) -> None:
    """The student's base in float8, for good: merged layers, and the frozen ones beside them."""
    student: Any = setup.student
    student._merged = MergedLayers(student.transformer, ADAPTER, float8=True)
    quantize_frozen(student.transformer, token_layers(student.transformer), transposed=True)


def drop_transposed(setup: Setup) -> None:
    """From here on the data gradient multiplies with the dequantised weights."""
    student: Any = setup.student
    student._merged._quantized = [
        w if isinstance(w, Tensor) else w._replace(columns=None, column_scale=None) for w in student._merged._quantized
    ]
    for module in student.transformer.modules():
        if hasattr(module, "column_scale"):
            module.columns = module.column_scale = None


def relative(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def layer_errors(layers: Mapping[str, nn.Linear], run: Callable[[], object]) -> dict[str, float]:
    """Return ||y8 - y|| / ||y|| of each of the `frozen_layers` of `layers`, over the activations of `run()`.

    `run` calls the unquantised transformer, uncompiled, as often as it likes; every layer sees exact inputs. A layer
    that is never called has 0. Waits for the device at the end.
    """
    layers = frozen_layers(layers)
    sums = {name: torch.zeros(2, device=layer.weight.device) for name, layer in layers.items()}

    def watch(name: str, layer: nn.Linear) -> Any:
        weight = quantize_weight(layer.weight)

        @torch.no_grad()
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], y: Tensor) -> None:
            found = float8_linear(arguments[0], weight, layer.bias, y.dtype).float()
            truth = y.float()
            sums[name] += torch.stack([(found - truth).square().sum(), truth.square().sum()])

        return layer.register_forward_hook(hook)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float((s[0] / s[1].clamp_min(1e-30)).sqrt()) for name, s in sums.items()}


def outliers(errors: dict[str, float], threshold: float = OUTLIER) -> tuple[list[str], str]:
    """Return the layers whose error is above `threshold`, and a line for the log."""
    worst = sorted(errors, key=lambda name: -errors[name])
    above = [name for name in worst if not errors[name] <= threshold]  # a NaN as well
    if not errors:
        return above, "fp8: no layer to quantise"
    line = f"fp8: layers off by {sum(errors.values()) / len(errors):.1%} on average, {errors[worst[0]]:.1%} at most"
    if above:
        named = ", ".join(f"{name} {errors[name]:.0%}" for name in above)
        line += f"; {len(above)} of {len(errors)} stay as they are, being off by more than {threshold:.0%}: {named}"
    return above, line


def measure(samples: int, rounds: int) -> dict[str, Any]:
    """All the figures; losses and gradients are summed over `rounds` rounds of the recipe's first prompts."""
    method = bundled(samples)
    setup = method.setup
    batches = [method.batch(i) for i in range(rounds)]
    exact = [run(method, batch, setup.teachers) for batch in batches]
    layers: dict[str, Any] = {}
    for teacher in setup.teachers.teachers:
        errors = layer_errors(token_layers(teacher.transformer), lambda: ask(method, batches[0], exact[0].states[:-1]))
        above, line = outliers(errors)
        print(f"{teacher.name}: {line}", flush=True)
        layers[teacher.name] = {
            "mean": _rounded(sum(errors.values()) / len(errors)),
            "outliers": above,
            "errors": {name: _rounded(error) for name, error in sorted(errors.items(), key=lambda pair: -pair[1])},
        }

    def compare(teachers: TeacherBank) -> dict[str, Any]:
        found = [run(method, b, teachers, e.states) for b, e in zip(batches, exact, strict=True)]
        after, before = (torch.cat([p.losses for p in passes], 1).double().sum(1) for passes in (found, exact))
        gradients = (torch.stack([p.gradient for p in passes]).sum(0) for passes in (found, exact))
        return {
            "step_loss_change": [_rounded(float(c)) for c in (after - before) / before],
            "round_loss_change": _rounded(float((after.sum() - before.sum()) / before.sum())),
            "gradient_error": _rounded(relative(*gradients)),
            "velocity_error": [
                _rounded(relative(*(torch.cat([p.velocities[j] for p in passes]) for passes in (found, exact))))
                for j in range(len(before))
            ],
        }

    quantized, changes = in_float8(setup.teachers), {}
    changes[CASES[0]] = compare(quantized)
    quantize_student(setup)
    changes[CASES[1]] = compare(setup.teachers)
    changes[CASES[3]] = compare(quantized)
    drop_transposed(setup)
    changes[CASES[2]] = compare(setup.teachers)
    for name in CASES:
        if name.startswith("student"):
            changes[name].pop("velocity_error")  # the teachers' are exact here
        print(name, json.dumps(changes[name]), flush=True)
    return {"samples": samples * len(setup.teachers), "rounds": rounds, "layers": layers, "changes": changes}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_error", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=8, help="of each task in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds that losses are summed over")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    given = parser.parse_args()
    found = measure(given.samples, given.rounds)
    if given.out:
        command = " ".join(["python -m benchmarks.fp8_error", *sys.argv[1:]])
        content = {"environment": environment(torch.device("cpu"), command), **found}
        given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
