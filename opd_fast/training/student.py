"""The student: LoRA adapters on the frozen base, or all of its weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from opd_fast.config import StudentConfig
from opd_fast.distributed.world import World, reshard
from opd_fast.engine.float8 import fits, quantize_frozen
from opd_fast.engine.merged_lora import MergedLayers
from opd_fast.engine.modulation_cache import ModulationCache, at_step
from opd_fast.models.base import DiffusionModel
from opd_fast.models.guidance import Conditioning, Velocities, predict_velocities
from opd_fast.models.lora.adapters import use_adapter
from opd_fast.models.lora.load import load_transformer
from opd_fast.training.ema import WeightAverage
from opd_fast.training.merging import MergedDifference, merge_in_words
from opd_fast.training.step_graphs import GradientBuffers
from opd_fast.training.student_init import MERGED, add_merged, start_from_lora, start_from_merged
from opd_fast.training.teachers import TeacherBank

ADAPTER = "student"


class Student:
    """What is trained.

    `transformer` holds the trainable parameters, in float32: PEFT adapters injected into the model's own base (kind
    lora), or a copy of the base (kind full). `ema` is their moving average and `gradients` are the buffers that graphs
    accumulate in, both in the order of `named_parameters`.
    """

    def __init__(self, model: DiffusionModel, transformer: nn.Module, config: StudentConfig) -> None:
        self.model, self.transformer, self.config = model, transformer, config
        self.guidance = config.guidance
        self.began = "the base" if config.start is None else config.start
        """Where its weights started, in words."""
        self.transformer_class = type(transformer)
        """Without what sharding makes of it."""
        self.world = World()
        self._hold()
        self._merged = MergedLayers(transformer, ADAPTER) if config.kind == "lora" else None
        self._cache: ModulationCache | None = None
        # Float32 adapters on a half-precision base compute in the base's type; without autocast PEFT would cast up.
        self._autocast = torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)

    @classmethod
    def build(
        cls, model: DiffusionModel, config: StudentConfig, *, seed: int = 0, teachers: TeacherBank | None = None
    ) -> Student:
        """Make a student on `model` that starts from the base or from `config.start`; `merged` there is what
        `config.merge` makes of `teachers`, with random masks drawn from `seed`.

        LoRA is injected into `model.transformer` itself; A is Gaussian with standard deviation 1 / rank and B zero, as
        published, drawn from `seed`. Raises ValueError where `config.start` does not fit.
        """
        merged = None
        if config.start == MERGED:
            if teachers is None:
                raise ValueError(f"student.start {MERGED} is the teachers' mean, and there are none; give weights")
            merged = MergedDifference(model, teachers, config, seed)
        if config.kind == "full":
            transformer = load_transformer(model, None if merged else config.start, what="student.start").float()
            if merged is not None:
                add_merged(transformer, merged)
            student = cls(model, transformer.requires_grad_(True), config)
            share = 1.0
        else:
            _inject(model, config, seed)
            if merged is not None:
                share = start_from_merged(model.transformer, ADAPTER, config, merged)
            elif config.start is not None:
                start_from_lora(model, ADAPTER, config)
            student = cls(model, model.transformer, config)
        if merged is not None:
            unread = f" (the folder {MERGED} is not read; write ./{MERGED} for it)" if Path(MERGED).exists() else ""
            student.began = f"{merge_in_words(config)}{unread}, {share:.2%} of its square in what is trained"
        return student

    def _hold(self) -> None:
        self._named = [(n, p) for n, p in self.transformer.named_parameters() if p.requires_grad]
        self.ema = WeightAverage(self.parameters())
        self.gradients = GradientBuffers(self.parameters())

    def merge_in_rounds(self, wanted: bool) -> int:
        """Set whether `merged_for_round` merges LoRA. Returns the number of layers that it merges."""
        if not wanted:
            self._merged = None
        return 0 if self._merged is None else len(self._merged.layers)

    def merge_in_float8(self) -> int:
        """Let `merged_for_round` merge into float8, and put the frozen layers around LoRA's into it too.

        Returns the number of layers; 0, and nothing is changed, for full weights and for LoRA that is not merged.
        """
        if self._merged is None:
            return 0
        frozen = quantize_frozen(self.transformer, self.model.token_layers(self.transformer), transposed=True)
        self._merged = MergedLayers(self.transformer, ADAPTER, float8=True)
        return frozen + sum(fits(layer.get_base_layer().weight) for layer in self._merged.layers)

    def cache_modulation(self) -> int:
        """Let `fill_cache` keep what depends on step and prompt alone. Returns the number of layers that it keeps."""
        self._cache = ModulationCache.of(self.model, self.transformer)
        return 0 if self._cache is None else self._cache.layers

    def fill_cache(self, sigmas: Tensor, condition: Conditioning) -> None:
        """Compute once what `velocities` would at each of the levels (N,) float32 from level and prompt alone."""
        if self._cache is not None:
            self._cache.fill(sigmas, condition)

    def distribute(self, world: World) -> None:
        """Take this process's place in `world`: take the weights of rank 0, and shard them where its strategy does.

        Before this the model may lie on the CPU. Under a sharding strategy LoRA is not merged for the rounds, because a
        merged copy would be a whole one.
        """
        self.world = world
        world.same_weights(self.parameters())
        if world.sharded:
            self._merged = self._cache = None
            for transformer in {id(t): t for t in (self.transformer, self.model.transformer)}.values():
                world.shard(transformer, self.model.blocks(transformer), self.model.dtype)
        self._hold()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters, float32, in a fixed order."""
        return list(self._named)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of `named_parameters`."""
        return [p for _, p in self._named]

    def velocities(
        self, model: DiffusionModel, x: Tensor, sigma: Tensor, condition: Conditioning, step: Tensor | None = None
    ) -> Velocities:
        """The student's prediction with gradient; x (B, C, H, W) float32, sigma 0-dim float32.

        `step`, a 0-dim int64 tensor on the device, is the level's place among those that `fill_cache` was given with
        `condition`.
        """
        with self._autocast, at_step(self._cache, step):
            return predict_velocities(model, self.transformer, x, sigma, condition)

    @contextlib.contextmanager
    def merged_for_round(self) -> Iterator[nn.Module]:
        """The transformer while its weights stand still, as in a round: LoRA is merged, and gradients flow still."""
        with self._merged.active() if self._merged is not None else contextlib.nullcontext():
            yield self.transformer
        if self.world.sharded:
            reshard(self.transformer)

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
        with use_adapter(self.model.transformer, None) as transformer:
            yield transformer
        if self.world.sharded:
            reshard(self.model.transformer)

    def ema_weights(self) -> AbstractContextManager[nn.Module]:
        """The transformer with the average in place of the trained weights, which come back afterwards."""
        return self.with_weights(self.ema.values)

    @contextlib.contextmanager
    def with_weights(self, values: list[Tensor]) -> Iterator[nn.Module]:
        """The transformer with `values` in place of the trained weights, which come back afterwards."""
        trained = [p.detach().clone() for p in self.parameters()]
        self._assign(values)
        try:
            with self.merged_for_round() as transformer:
                yield transformer
        finally:
            self._assign(trained)

    @torch.no_grad()
    def _assign(self, values: list[Tensor]) -> None:
        if self.world.sharded:
            reshard(self.transformer)  # what is gathered would keep the old values
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Trained weights and their average, by name: the tensors themselves, for a checkpoint to read or fill."""
        weights = {f"student.{name}": p.detach() for name, p in self._named}
        average = {f"ema.{name}": e for (name, _), e in zip(self._named, self.ema.values, strict=True)}
        return weights | average


def _inject(model: DiffusionModel, config: StudentConfig, seed: int) -> None:
    from peft import LoraConfig

    targets = model.targets(config.targets)
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, init_lora_weights=False)
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
