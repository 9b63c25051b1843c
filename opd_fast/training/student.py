"""The student: LoRA adapters on the frozen base, or all of its weights; its average; its export."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from opd_fast.config import StudentConfig
from opd_fast.distributed.world import World, local, release, whole
from opd_fast.engine.float8 import Float8MergedLayers, fits, quantize_frozen
from opd_fast.engine.merged_lora import MergedLayers
from opd_fast.engine.modulation_cache import Remembered, recalled
from opd_fast.files import open_to_umask
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Velocities, predict_velocities
from opd_fast.models.lora.adapters import use_adapter
from opd_fast.models.lora.load import load_transformer
from opd_fast.training.student_init import (
    MERGED,
    MeanTaskVector,
    add_mean,
    passed_over,
    start_from_lora,
    start_from_mean,
)
from opd_fast.training.teachers import TeacherBank

ADAPTER = "student"


class Student:
    """What is trained.

    `transformer` holds the trainable parameters, in float32: PEFT adapters injected into the model's own base (kind
    lora), or a copy of the base (kind full). `ema` is their moving average, in the order of `named_parameters`.
    """

    def __init__(self, model: DiffusionModel, transformer: nn.Module, config: StudentConfig) -> None:
        self.transformer, self.config = transformer, config
        self.guidance = config.guidance
        self.began = "the base" if config.start is None else config.start
        """Where its weights started, in words."""
        self._model, self._kind = model, cast(Any, type(transformer))
        self.world = World()
        self._hold()
        self._merged = MergedLayers(transformer, ADAPTER) if config.kind == "lora" else None
        self._remembered: Remembered | None = None
        # Float32 adapters on a half-precision base compute in the base's type; without autocast PEFT would cast up.
        self._autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)

    @classmethod
    def build(
        cls, model: DiffusionModel, config: StudentConfig, *, seed: int = 0, teachers: TeacherBank | None = None
    ) -> Student:
        """A student on `model`, starting from the base or from `config.start`, `merged` being the mean of `teachers`.

        LoRA is injected into `model.transformer` itself; A is Gaussian with standard deviation 1 / rank and B zero, as
        published, drawn from `seed`. Raises ValueError where `config.start` does not fit.
        """
        mean = None
        if config.start == MERGED:
            if teachers is None:
                raise ValueError(f"student.start {MERGED} is the mean of the teachers, and here are none; give weights")
            mean = MeanTaskVector(model, teachers)
        if config.kind == "full":
            transformer = load_transformer(model, None if mean else config.start, what="student.start").float()
            if mean is not None:
                add_mean(transformer, mean)
            student = cls(model, transformer.requires_grad_(True), config)
            share = 1.0
        else:
            _inject(model, config, seed)
            if mean is not None:
                share = start_from_mean(model.transformer, ADAPTER, config, mean)
            elif config.start is not None:
                start_from_lora(model, ADAPTER, config)
            student = cls(model, model.transformer, config)
        if mean is not None:
            student.began = f"the mean of its teachers{passed_over()}, {share:.2%} of its square in what is trained"
        return student

    def _hold(self) -> None:
        self._named = [(n, p) for n, p in self.transformer.named_parameters() if p.requires_grad]
        self._ema_parameters = [p.detach().clone() for _, p in self._named]
        self._gradients: list[Tensor] = []

    def merge_in_rounds(self, wanted: bool) -> int:
        """Whether `merged_for_round` merges LoRA; returns how many layers it does."""
        if not wanted:
            self._merged = None
        return 0 if self._merged is None else len(self._merged.layers)

    def merge_in_float8(self) -> int:
        """Let `merged_for_round` merge into float8, and put the frozen layers around LoRA's into it too.

        Returns the number of layers; 0, and nothing is changed, for full weights and for LoRA that is not merged.
        """
        if self._merged is None:
            return 0
        frozen = quantize_frozen(self.transformer, transposed=True)
        self._merged = Float8MergedLayers(self.transformer, ADAPTER)
        return frozen + sum(fits(layer.get_base_layer().weight) for layer in self._merged.layers)

    def remember_modulation(self) -> int:
        """Let `remember` keep what depends on step and prompt alone; of how many layers."""
        self._remembered = Remembered.of(self._model, self.transformer)
        return 0 if self._remembered is None else self._remembered.layers

    def remember(self, sigmas: Tensor, condition: Conditioning) -> None:
        """Compute once what `velocities` would at each of the levels (N,) float32 from level and prompt alone."""
        if self._remembered is not None:
            self._remembered.fill(sigmas, condition)

    def distribute(self, world: World) -> None:
        """Take this process's place in `world`: the weights of rank 0, sharded where its strategy shards them.

        Before this the model may lie on the CPU. Under a sharding strategy LoRA is not merged for the rounds: a merged
        copy would be a whole one.
        """
        self.world = world
        world.same_weights(self.parameters())
        if world.sharded:
            self._merged = self._remembered = None
            for transformer in {id(t): t for t in (self.transformer, self._model.transformer)}.values():
                world.shard(transformer, self._model.blocks(transformer), self._model.dtype)
        self._hold()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters, float32, in a fixed order."""
        return list(self._named)

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self._named]

    def velocities(
        self, model: DiffusionModel, x: Tensor, sigma: Tensor, condition: Conditioning, step: Tensor | None = None
    ) -> Velocities:
        """The student's prediction with gradient; x (B, C, H, W) float32, sigma 0-dim float32.

        `step`, a 0-dim int64 tensor on the device: the level's place among those of `remember`, with `condition`.
        """
        with self._autocast, recalled(self._remembered, step):
            return predict_velocities(model, self.transformer, x, sigma, condition)

    @contextlib.contextmanager
    def merged_for_round(self) -> Iterator[nn.Module]:
        """The transformer while its weights stand still, as in a round: LoRA is merged, gradients flow all the same."""
        with self._merged.active() if self._merged is not None else contextlib.nullcontext():
            yield self.transformer
        if self.world.sharded:
            release(self.transformer)

    def gradients_in_place(self) -> list[Tensor]:
        """Every parameter's gradient, in a buffer that stays the same one from round to round, holding what was there.

        Zeroing gradients to None is fine: the buffer comes back, zeroed.
        """
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters()]
        empty = []
        for parameter, buffer in zip(self.parameters(), self._gradients, strict=True):
            if parameter.grad is None:
                empty.append(buffer)
            elif parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if empty:
            torch._foreach_zero_(empty)
        return self._gradients

    def before_backward(self, *, last: bool) -> None:
        """Say whether the coming backward is the round's last: sharded gradients are reduced in that one."""
        if self.world.sharded and self.config.kind == "full":
            self.transformer.set_requires_gradient_sync(last)  # type: ignore[operator]

    def average_gradients(self) -> None:
        """Average a round's gradients over the ranks, where its last backward has not done so."""
        if not (self.world.sharded and self.config.kind == "full"):
            self.world.average_gradients(self.parameters())

    @contextlib.contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The frozen base that student and teachers come from."""
        with use_adapter(self._model.transformer, None) as transformer:
            yield transformer
        if self.world.sharded:
            release(self._model.transformer)

    # --- the average -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self, updates: int, decay: float) -> None:
        """Move the average toward the weights after update number `updates` (from 0).

        The decay warms up (`ema_decay`).
        """
        effective = ema_decay(updates, decay)
        # Element by element, so that each rank moves its own part of what is sharded.
        average, weights = ([local(t.detach()) for t in ts] for ts in (self._ema_parameters, self.parameters()))
        torch._foreach_lerp_(average, weights, 1 - effective)

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """The transformer with the average in place of the trained weights, which come back afterwards."""
        with self.with_weights(self._ema_parameters) as transformer:
            yield transformer

    @contextlib.contextmanager
    def with_weights(self, values: list[Tensor]) -> Iterator[nn.Module]:
        """The transformer with `values` in place of the trained weights, which come back afterwards."""
        held = [p.detach().clone() for p in self.parameters()]
        self._assign(values)
        try:
            with self.merged_for_round() as transformer:
                yield transformer
        finally:
            self._assign(held)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        if self.world.sharded:
            release(self.transformer)  # what is gathered would keep the old values
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    # --- state and export --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Trained weights and their average, by name: the tensors themselves, for a checkpoint to read or fill."""
        weights = {f"student.{name}": p.detach() for name, p in self._named}
        average = {f"ema.{name}": e for (name, _), e in zip(self._named, self._ema_parameters, strict=True)}
        return weights | average

    def export(self, directory: Path) -> None:
        """Write the averaged student: a LoRA in PEFT's and diffusers' layouts, or a transformer folder."""
        self.exporter()(directory)

    def exporter(self) -> Callable[[Path], None]:
        """The averaged student as it is now, copied to the CPU: what is returned writes it to a directory, at any later
        time and in any thread. Collective; rank 0 alone holds the copy and may write.
        """
        average = {}
        for (name, _), e in zip(self._named, self._ema_parameters, strict=True):
            full = whole(e)
            if self.world.first:
                average[name] = full.cpu().clone()
        if self.config.kind == "lora":
            return functools.partial(self._write_lora, average)
        # Now, not when it is written: taking a state dict shards again whatever is gathered.
        rest = {k: v.cpu().clone() for k, v in self.transformer.state_dict().items() if k not in dict(self._named)}
        return functools.partial(self._write_full, {**rest, **average})

    def _write_full(self, state: dict[str, Tensor], directory: Path) -> None:
        with torch.device("meta"):
            outline = self._kind.from_config(self.transformer.config)
        outline.load_state_dict(state, assign=True)
        outline.save_pretrained(directory / "transformer")
        open_to_umask(*(directory / "transformer").iterdir())

    def _write_lora(self, average: dict[str, Tensor], directory: Path) -> None:
        suffix = f".lora_A.{ADAPTER}.weight"
        modules = [name.removesuffix(suffix) for name in average if name.endswith(suffix)]
        self._model.save_lora(
            directory,
            {m: (average[m + suffix], average[m + suffix.replace("lora_A", "lora_B")]) for m in modules},
            rank=self.config.rank,
            alpha=self.config.alpha,
            targets=modules,
        )


def _inject(model: DiffusionModel, config: StudentConfig, seed: int) -> None:
    from peft import LoraConfig

    targets = model.targets(config.targets)
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights=False, lora_dropout=0.0
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # teachers' adapters
            model.transformer.add_adapter(settings, adapter_name=ADAPTER)  # type: ignore[operator]
    except ValueError as error:  # PEFT's message lists what it looked for, not what to do
        raise ValueError(f"student.targets {targets} match no module of the model; choose attention or all") from error
    model.transformer.set_adapter(ADAPTER)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.transformer.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / config.rank)
            else:
                parameter.data.zero_()


def ema_decay(updates: int, most: float) -> float:
    """The average's decay after update number `updates` (from 0): min((1 + n) / (10 + n), most), the warm-up of the
    published code."""
    return min((1 + updates) / (10 + updates), most)
