"""How the images of a row are drawn: by a family of the engine, or by any diffusers text-to-image pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from opd_fast.config.paths import resolve_source
from opd_fast.data.prompt_files import Prompt
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.data.text_store import TextStore
from opd_fast.distributed.resolve import pick_device, pick_dtype
from opd_fast.errors import UserError, one_line
from opd_fast.evaluation.request import ModelRow, Request
from opd_fast.models import FAMILIES, find_family, load_model, meta_model
from opd_fast.models.lora.load import check_weights, load_transformer
from opd_fast.models.pipeline_folder import read_index, resolve_pipeline
from opd_fast.reporting.progress import progress_of
from opd_fast.solvers import solver_table
from opd_fast.training.evaluation import ImageSampler


class Draw(Protocol):
    """Draws images (B, 3, H, W) in 0..1 of prompts with the noise of `keys` (B,) int64; None: NaN or infinite ones."""

    def __call__(self, prompts: Sequence[Prompt], keys: Tensor) -> Tensor | None: ...


class Sampler(Protocol):
    """The frozen parts that the rows of a request share."""

    def row(self, row: ModelRow) -> Any:
        """Return a context manager that gives the row's `Draw` while its weights are loaded."""


def is_family(request: Request) -> bool:
    """Whether the engine has the family of the request's model; a pipeline that it lacks is drawn by diffusers."""
    source = resolve_source(request.model, "pipeline")
    if request.family != "auto" or (source.path is not None and not (source.path / "model_index.json").is_file()):
        return True  # whatever is wrong with it, the family says
    if source.path is None:
        from opd_fast.models.pipeline_folder import resolve_configs

        found = read_index(resolve_configs(request.model))["_class_name"]
    else:
        found = read_index(source.path)["_class_name"]
    return found in {family.pipeline_class for family in FAMILIES.values()}


def check_request(request: Request) -> None:
    """Raise ValueError for settings that the model's configuration files contradict, before any weight is read."""
    if not is_family(request):
        if request.solver != "ode":
            problem = f"{request.solver} with a pipeline that diffusers draws, which has its own"
            raise UserError("solver", problem, "leave it out")
        return
    dtype = pick_dtype(request.dtype, request.precision, pick_device())
    meta = meta_model(request.model, request.family, dtype=dtype, guidance_convention=request.guidance_convention)
    meta.latent_shape(meta.resolution(request.resolution))
    for row in request.rows:
        if meta.guidance_kind == "none" and row.guidance not in (None, 0, 1):
            raise UserError("guidance", f"{row.guidance:g} with a {meta.name} model that has none", "give 1")
        if row.weights is not None:
            check_weights(meta, row.weights, what="lora" if row.frozen else row.name)


def unguided(request: Request) -> float:
    """Return the number that stands for no guidance with the request's model."""
    if not is_family(request) or request.guidance_convention == "linear":
        return 1.0
    return find_family(request.family, lambda: resolve_pipeline(request.model)).unguided


def open_sampler(request: Request, *, shown: bool = True) -> Sampler:
    """Load what all rows share, and print how far that is where `shown`. Raises ValueError for what is missing."""
    return FamilySampler(request, shown) if is_family(request) else PipelineSampler(request)


class FamilySampler:
    """Draws with the engine's own families; text is encoded once for all rows."""

    def __init__(self, request: Request, shown: bool) -> None:
        self.request = request
        device = pick_device()
        self.model = load_model(
            request.model,
            request.family,
            device=device,
            dtype=pick_dtype(request.dtype, request.precision, device),
            max_sequence_length=request.max_sequence_length,
            guidance_convention=request.guidance_convention,
        )
        if request.vae_tiling:
            self.model.vae.enable_tiling()
        store = TextStore.open(request.text_cache, self.model, "text-cache")
        prompts = [prompt.text for task in request.tasks for prompt in task.prompts]
        with progress_of("encoded", "prompts", shown=shown) as encoded:
            self.text = EmbeddingCache.build(self.model, prompts, progress=encoded, store=store)
        self.model.release_text_encoders()
        resolution = self.model.resolution(request.resolution)
        self.table = solver_table(request.solver, self.model.sigmas(request.steps, resolution), request.eta)
        self.shape = self.model.latent_shape(resolution)

    @contextmanager
    def row(self, row: ModelRow) -> Iterator[Draw]:
        """Give the `Draw` of a row."""
        what = "lora" if row.frozen else row.name
        transformer = (
            self.model.transformer if row.weights is None else load_transformer(self.model, row.weights, what=what)
        )
        request = self.request
        sampler = ImageSampler(self.model, self.table, self.shape, row.guidance, request.seed, self.text, request.batch)
        yield lambda prompts, keys: sampler.draw(transformer, prompts, keys)


class PipelineSampler:
    """Draws with a diffusers pipeline as its users would, with its own scheduler and its own guidance."""

    def __init__(self, request: Request) -> None:
        from diffusers import DiffusionPipeline

        self.request = request
        self.device = pick_device()
        source = resolve_source(request.model, "pipeline")
        dtype = pick_dtype(request.dtype, request.precision, self.device)
        try:
            loaded = DiffusionPipeline.from_pretrained(source.path or source.repo, torch_dtype=dtype)
        except Exception as error:  # diffusers raises what its libraries raise
            problem = f"{request.model} cannot be loaded by diffusers ({one_line(error)})"
            raise UserError("model", problem, "give a text-to-image pipeline") from error
        self.pipeline: Any = loaded.to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.takes = set(inspect.signature(self.pipeline.__call__).parameters)
        if not {"prompt", "num_inference_steps", "generator"} <= self.takes:
            problem = f"a {type(loaded).__name__} draws no images of prompts"
            raise UserError("model", problem, "give a text-to-image pipeline")
        if request.vae_tiling and hasattr(self.pipeline, "vae"):
            self.pipeline.vae.enable_tiling()

    @contextmanager
    def row(self, row: ModelRow) -> Iterator[Draw]:
        """Give the `Draw` of a row; its LoRA is loaded by the pipeline and taken out afterwards."""
        if row.weights is not None:
            source = resolve_source(row.weights, "teachers")
            name = str(source.path) if source.path is not None else source.repo
            options = {"weight_name": source.inside} if source.inside else {}
            try:
                self.pipeline.load_lora_weights(name, **options)
            except Exception as error:  # diffusers raises what its libraries raise
                problem = f"{row.weights} cannot be loaded as a LoRA ({one_line(error)})"
                raise UserError("lora", problem, "give a LoRA of this pipeline") from error
        try:
            yield lambda prompts, keys: self._draw(row, prompts, keys)
        finally:
            if row.weights is not None:
                self.pipeline.unload_lora_weights()

    def _draw(self, row: ModelRow, prompts: Sequence[Prompt], keys: Tensor) -> Tensor | None:
        options: dict[str, Any] = {"num_inference_steps": self.request.steps, "output_type": "pt"}
        if self.request.resolution is not None:
            options |= {"height": self.request.resolution, "width": self.request.resolution}
        if "guidance_scale" in self.takes:
            options["guidance_scale"] = 1.0 if row.guidance is None else row.guidance
        elif row.guidance is not None:
            raise UserError("guidance", f"{row.guidance:g} with a pipeline that takes none", "leave it out")
        if self.request.max_sequence_length is not None and "max_sequence_length" in self.takes:
            options["max_sequence_length"] = self.request.max_sequence_length
        # Each image has a generator of its own, so that it does not depend on its batch.
        options["generator"] = [torch.Generator("cpu").manual_seed(int(key) & (2**63 - 1)) for key in keys]
        with torch.no_grad():
            images: Tensor = self.pipeline(prompt=[prompt.text for prompt in prompts], **options).images
        return images.float() if bool(images.isfinite().all()) else None
