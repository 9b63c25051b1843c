"""The settings of a run: typed, strict, and complete before anything heavy is imported.

A run is described by `Config`. It is read from the defaults, then a recipe or YAML file, then the command line, later
ones winning. Whatever is unknown, of the wrong type or impossible raises `UserError` at once. Nothing here imports
torch, so a mistake is reported in well under a second.
"""

# ruff: noqa: RUF009 - `option` is `dataclasses.field` with its explanation

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from opd_fast.errors import UserError, did_you_mean

Solver = Literal["ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm1", "dpm2"]
DETERMINISTIC: tuple[str, ...] = ("ode", "dpm1", "dpm2")
# What may change when a run is resumed: how long it goes on, where, and what it writes down, never what it learns from.
RESUMABLE = ("train.rounds", "model.text_cache", "logging.", "evaluation.", "checkpoint.", "parallel.")

# The largest whole numbers, where 2**31 - 1 is too many or too few.
MOST = {"train.seed": 2**63 - 1, "sampler.steps": 10_000, "evaluation.steps": 10_000, "student.rank": 65_536}


def option(help: str, default: Any = MISSING) -> Any:
    """A dataclass field with the explanation that `--help` prints. Lists and tuples are copied per instance."""
    metadata = {"help": help}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class ModelConfig:
    """The frozen pipeline that student and teachers share."""

    path: str = option("diffusers pipeline folder or hub id; bundled: the small pipeline in the package", "bundled")
    family: str = option(
        "sd3, flux, qwen_image, z_image, or package.module:Class of your own; auto reads it from the pipeline", "auto"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "of the frozen weights and of every forward; auto: bfloat16 on a GPU that has it, float32 elsewhere; float16 "
        "trains with a gradient scaler",
        "auto",
    )
    resolution: int = option("height and width of the images, in pixels", 32)
    max_sequence_length: int | None = option(
        "tokens of a prompt in the long text encoder; SD3: 0 leaves T5 out, null: 128; elsewhere null: the pipeline's",
        None,
    )
    text_cache: str = option(
        "folder that keeps the prompts' embeddings from run to run; off: none; auto: opd_fast/text in the user's cache "
        "directory ($XDG_CACHE_HOME, else ~/.cache) for text encoders above 256 MiB, none for smaller ones",
        "auto",
    )
    text_device: Literal["auto", "cpu"] = option(
        "where the text encoders run; auto: as the model; cpu: slower, without their memory on the GPU", "auto"
    )


@dataclass(kw_only=True)
class StudentConfig:
    """What is trained."""

    kind: Literal["lora", "full"] = option("lora: low-rank adapters on the frozen base; full: every weight", "lora")
    rank: int = option("LoRA rank", 32)
    alpha: float = option("LoRA alpha; the adapter is scaled by alpha / rank", 64.0)
    targets: str | list[str] = option(
        "LoRA targets: attention, all, or a list of module name endings such as [attn.to_q]", "attention"
    )
    start: str | None = option(
        "weights to start from, in any form a teacher can have; merged: the mean of the teachers' weight differences "
        "by teachers[].weight, cut to the rank (a folder of that name is ./merged); null: the base",
        None,
    )
    guidance: float = option(
        "guidance of the student while it trains; classifier-free: 1 makes no negative pass; FLUX.1-dev: the value "
        "that goes into the transformer (3.5 is usual)",
        1.0,
    )


@dataclass(kw_only=True)
class TeacherConfig:
    """One frozen teacher and the task it teaches."""

    name: str = option("name in tables, files and logs")
    weights: str = option(
        "PEFT folder, LoRA file (diffusers, kohya, ComfyUI, ...), transformer or pipeline folder, hub id (and a folder "
        "or file in it), or bundled/NAME"
    )
    partial: bool = option("take a LoRA of which only some modules exist in the model; false refuses it", False)
    prompts: str = option(
        "training prompts: a GenEval .jsonl, .txt, .csv, .tsv or .parquet file, a folder with one for each split, or "
        "bundled/NAME"
    )
    guidance: float = option("guidance of the teacher, of the same kind as student.guidance", 1.0)
    weight: float = option("factor on this task's loss", 1.0)
    share: float = option("how often the weighted schedule takes this task, relative to the other tasks", 1.0)
    eval_prompts: str | None = option("held-out prompts that the reward needs; null: those of bundled/NAME", None)
    reward: str | None = option(
        "reward that judges this task in evaluations: composition, text, colour or package.module:function; under grpo "
        "and nft it is learnt from, and may be a sum such as 0.8*text + 0.2*colour, whose first judges; null: none",
        None,
    )


@dataclass(kw_only=True)
class SamplerConfig:
    """The rollout's solver."""

    solver: Solver = option("ode, dpm1 and dpm2 are deterministic, the others add noise", "flow_sde")
    steps: int = option("solver steps in a rollout", 10)
    eta: float = option("noise level of the stochastic solvers; the deterministic ones have none", 0.7)
    train_last: bool = option("also train the last step (sigma to 0), which the published method leaves out", False)


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The loss of a step: w_j * (v_student - v_teacher)^2, or a policy gradient with that as its reward."""

    kind: Literal["kl", "l2", "velocity", "ppo"] = option(
        "kl: closed-form KL of the step (L2 of the means where the solver adds no noise); l2: half the squared gap of "
        "the means; velocity: plain squared gap of the velocities; ppo: the step's KL as dense reward of a PPO "
        "surrogate, at ratio 1 since every rollout trains once",
        "kl",
    )
    variance: Literal["exact", "published"] = option(
        "variance the KL divides by; exact: that of the step's noise; published: the released code's", "exact"
    )
    reduction: Literal["mean", "sum"] = option("over the elements of a sample", "mean")
    steps: Literal["sum", "mean"] = option("over the trained steps; sum: the paper's; mean: the released code's", "sum")
    reward_gradient: Literal["live", "detached", "return_to_go"] = option(
        "of ppo; live: pathwise gradient of the reward plus score function; detached: score function alone, whose mean "
        "is zero (a control); return_to_go: pathwise plus score function of the later steps' rewards, by a second pass",
        "live",
    )
    kl_scale: float = option("of ppo: factor on the KL before the clamp", 1.0)
    clamp: float | None = option("of ppo: largest reward of a step; Flow-OPD: 5; null: none", None)
    anchor: str | None = option(
        "frozen weights that the student is held to by the same loss, in any form a teacher can have; base: the base; "
        "null: none",
        None,
    )
    anchor_weight: float = option("factor on the anchor's loss (Flow-OPD's)", 0.04)
    queries: int | None = option("trained steps drawn for each round; null: all of them; DanceOPD: 1", None)
    query_law: Literal["uniform", "beta"] = option(
        "of the drawn steps' place between noise and image; beta: Beta(query_alpha, query_beta)", "uniform"
    )
    query_alpha: float = option("of query_law beta; above query_beta: nearer the image (DanceOPD's)", 5.0)
    query_beta: float = option("of query_law beta (DanceOPD's)", 2.0)
    query_weights: Literal["unbiased", "law"] = option(
        "unbiased: a drawn step stands for those that were not, so that the mean loss is that of all steps; law: drawn "
        "steps count alike (DanceOPD)",
        "unbiased",
    )


@dataclass(kw_only=True)
class TrainConfig:
    """The optimizer and the length of the run. One round is one optimizer step."""

    method: Literal["opd", "grpo", "nft", "sft"] = option(
        "opd: on-policy distillation; grpo (Flow-GRPO, GRPO-Guard), nft (DiffusionNFT): reinforcement learning, which "
        "makes teachers: each entry of teachers is a task with its reward, its weights being base; sft: flow matching "
        "on images that the teachers draw, a start for opd",
        "opd",
    )
    rounds: int = option("optimizer steps", 80)
    samples_per_task: int = option("rollouts of each task in a round", 8)
    tasks: list[str] | None = option("names of the tasks that are trained; all are judged; null: all", None)
    tasks_per_round: int | None = option("tasks that a round takes; null: as many as are trained", None)
    task_schedule: Literal["round_robin", "weighted"] = option(
        "how tasks come to their rounds; round_robin: in turn; weighted: at random in proportion to teachers[].share, "
        "so that one may come several times in a round and weighs by how often it comes",
        "round_robin",
    )
    micro_batch: int | None = option("samples in one student forward; null: all of the round", None)
    lr: float = option("peak learning rate of AdamW", 1e-3)
    schedule: Literal["constant", "cosine", "linear"] = option("of the learning rate after the warm-up", "constant")
    warmup: int = option("rounds over which the learning rate rises from 0", 0)
    weight_decay: float = option("of AdamW", 1e-4)
    betas: tuple[float, float] = option("of AdamW", (0.9, 0.999))
    eps: float = option("of AdamW", 1e-8)
    clip: float = option("largest gradient norm", 1.0)
    skip_limit: int = option(
        "rounds in a row whose loss or gradient is not finite before the run stops; each is left out", 3
    )
    ema: float = option("decay of the exponential average that is evaluated and exported; 0 follows the weights", 0.9)
    seed: int = option("of prompts, noise and adapters; --seed is short for it", 0)


@dataclass(kw_only=True)
class RLConfig:
    """Reinforcement learning, train.method grpo and nft. Defaults are Flow-GRPO's (arXiv 2505.05470), GRPO-Guard's
    (arXiv 2510.22319) and DiffusionNFT's (arXiv 2509.16117), from their released code."""

    images_per_prompt: int = option("images of one prompt, a group; train.samples_per_task is a multiple of it", 24)
    updates: int = option("optimizer steps, that is rounds, on the images of one rollout; nft publishes 1 or 2", 2)
    std: Literal["global", "group"] = option(
        "standard deviation that an advantage is divided by: of all rewards of the task in a rollout, or of the group",
        "global",
    )
    statistics: Literal["task", "all"] = option(
        "whose rewards std global spans; task: those of each task; all: of all together, whatever their scales", "task"
    )
    advantage_clip: float = option("largest size of an advantage", 5.0)
    kl: float | None = option(
        "factor on the KL to the base; 0: none; null: 0.04 under grpo, 1e-4 under nft (there of the velocities)", None
    )
    guard: bool = option("grpo: GRPO-Guard's normalised ratio and step weights; solver flow_sde", False)
    clip: float | None = option("grpo: range of the ratio around 1; null: 1e-4, with guard 2e-6", None)
    window: int | None = option(
        "grpo: steps that draw noise and are trained, somewhere among the first window_range, all others being ODE "
        "(Flow-GRPO-Fast: 2 or 3); null: all but the last are trained",
        None,
    )
    window_range: int | None = option("grpo: see window; null: half of the steps", None)
    beta: float = option("nft: how far the implied policies lie from the old one; published: 1 or 0.1", 1.0)
    timestep_fraction: float = option(
        "nft: share of the sampler's noise levels that an image is trained at, drawn for each; published: all but one",
        0.99,
    )
    decay: Literal["early", "late"] = option(
        "nft: how the old policy follows; early: min(0.001 k, 0.5) after k updates; late: at once for 75 updates, then "
        "min(0.0075 (k - 75), 0.999)",
        "early",
    )


@dataclass(kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on the teachers' images, train.method sft (Flow-OPD's cold start)."""

    updates: int = option("optimizer steps, that is rounds, on the images that the teachers draw at once", 1)
    images_per_prompt: int = option(
        "images that a teacher draws for each sample; the one that the task's reward likes best is learnt from", 1
    )
    base_weight: float = option("factor on mean((v - v_base)^2), which holds on to the base; released: 100", 0.0)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What --resume starts from."""

    every: int = option("rounds between checkpoints; one is written at the end too; 0: only at the end", 20)
    keep: int = option("newest checkpoints that are kept", 3)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Rewards on held-out prompts, with the averaged weights."""

    every: int = option("rounds between evaluations; base, teachers and student are judged at both ends; 0: never", 20)
    prompts: int = option("held-out prompts of each task", 64)
    steps: int = option("ODE steps of an evaluation's images", 20)
    guidance: float | None = option("guidance of base and student when judged; null: student.guidance", None)
    batch: int = option("images drawn at once", 64)
    reward_timeout: float | None = option(
        "seconds that a reward may take for a batch; one that fails or takes longer is passed over; null: any",
        300.0,
    )
    vae_tiling: bool = option("decode in overlapping tiles: less memory at high resolutions, faint seams", False)


@dataclass(kw_only=True)
class ParallelConfig:
    """Several devices, one process on each: torchrun --nproc-per-node N -m opd_fast.train ..."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "hsdp"] = option(
        "ddp: all weights on every device; fsdp2: sharded over all devices; hsdp: sharded within groups, replicated "
        "between them; single: one device; auto: ddp for LoRA where it fits, else fsdp2, single for one process",
        "auto",
    )
    shard_size: int | None = option("devices of an hsdp group; null: those of one machine", None)
    reshard: Literal["round", "block"] = option(
        "how long sharded weights stay gathered; round: as long as they stand still, gathered once; block: only while "
        "their block computes, gathered twice a step, where there is no room for all",
        "round",
    )
    offload_teachers: bool = option("keep merged teachers in CPU memory, on the GPU only while asked", False)
    timeout: float = option("minutes that a process waits for another before it gives up", 30.0)


@dataclass(kw_only=True)
class EngineConfig:
    """How the same numbers are reached faster."""

    placement: Literal["merged", "shared"] = option(
        "merged: each teacher is a merged copy of the transformer; shared: teachers are adapters on one base", "merged"
    )
    group_teachers: bool = option("placement shared: all teachers in one forward, each row with its own adapter", True)
    merge_student: bool = option("merge the student's LoRA into the base for the length of a round", True)
    fuse_projections: bool = option("one product for q, k and v in merged teachers", True)
    cache_modulation: bool = option("compute once a round what depends on step and prompt alone", True)
    attention: Literal[
        "auto",
        "native",
        "flash",
        "cudnn",
        "efficient",
        "math",
        "products",
        "xformers",
        "flash_2",
        "flash_3",
    ] = option("implementation of attention; auto: the fastest of a short measurement at the start", "auto")
    recompute: int | None = option(
        "blocks of the student whose activations are computed again in the backward; null: on a GPU as few as make a "
        "round fit, else none",
        None,
    )
    compile: Literal["auto", "on", "off"] = option("torch.compile of the blocks; auto: on a GPU", "auto")
    graphs: Literal["auto", "on", "off"] = option(
        "CUDA graphs: of the whole step, or of the teachers alone where the student is sharded; auto: on a GPU", "auto"
    )
    precision: Literal["auto", "float32", "tf32", "fp8"] = option(
        "auto: as model.dtype says; float32: everything in float32; tf32: float32 weights, TF32 products (GPU); fp8: "
        "frozen weights in float8 with a scale a row (GPU of capability 8.9 or more; lossy)",
        "auto",
    )
    fp8_tolerance: float = option("precision fp8: largest relative change of a step's loss that is accepted", 0.01)


@dataclass(kw_only=True)
class LoggingConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = option("write TensorBoard events to RUN_DIR/tensorboard", True)
    wandb: bool = option("log to Weights & Biases (offline or online as its own settings say)", False)


@dataclass(kw_only=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def reinforces(self) -> bool:
        """Whether the run learns from rewards instead of teachers."""
        return self.train.method in ("grpo", "nft")

    @property
    def base_weight(self) -> float:
        """Factor on what holds a student that learns from rewards or images to the base; 0: nothing does."""
        if self.train.method == "sft":
            return self.sft.base_weight
        published = {"grpo": 0.04, "nft": 1e-4}.get(self.train.method, 0.0)
        return published if self.rl.kl is None else self.rl.kl

    @property
    def trained(self) -> list[int]:
        """The tasks that are trained, as places in `teachers`."""
        chosen = self.train.tasks
        return [i for i, teacher in enumerate(self.teachers) if chosen is None or teacher.name in chosen]

    def validate(self) -> None:
        """Raise `UserError` for a value out of range or a combination that cannot work. Looks at no file."""
        for key, value in flatten(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(key, f"{value} is not a finite number", "give a finite one")
            if isinstance(value, str):
                check_text(key, value)
            most = MOST.get(key, 2**31 - 1)
            if isinstance(value, int) and value > most:
                raise UserError(key, f"{value} is above {most}", f"give {most} or less")
        _check_ranges(self)
        _check_sampler(self)
        _check_objective(self)
        _check_teachers(self)
        _check_reinforcement(self)
        _check_finetuning(self)
        _check_engine(self)


def check_text(key: str, text: str) -> None:
    """Raise `UserError` for text that no file can have as its name, whatever it is meant as."""
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise UserError(key, f"{text!r} has characters that cannot be printed", "take them out")
    if any(len(part.encode()) > 255 for part in text.split("/")) or len(text) > 4000:
        raise UserError(key, f"{text!r} is longer than a file's name can be", "give a shorter one")
    if text.startswith("~") and len(text) > 1 and os.path.expanduser(text) == text:
        raise UserError(key, f"{text!r} names a user who has no home here", "write the path in full")


def _check_ranges(config: Config) -> None:
    t = config.train
    at_least: list[tuple[str, float | None, float]] = [
        ("model.resolution", config.model.resolution, 1),
        ("model.max_sequence_length", config.model.max_sequence_length, 0),
        ("student.rank", config.student.rank, 1),
        ("student.guidance", config.student.guidance, 0),
        ("sampler.eta", config.sampler.eta, 0),
        ("train.rounds", t.rounds, 1),
        ("train.samples_per_task", t.samples_per_task, 1),
        ("train.tasks_per_round", t.tasks_per_round, 1),
        ("train.micro_batch", t.micro_batch, 1),
        ("train.warmup", t.warmup, 0),
        ("train.skip_limit", t.skip_limit, 1),
        ("train.weight_decay", t.weight_decay, 0),
        ("train.ema", t.ema, 0),
        ("train.seed", t.seed, 0),
        ("checkpoint.every", config.checkpoint.every, 0),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("evaluation.every", config.evaluation.every, 0),
        ("evaluation.prompts", config.evaluation.prompts, 1),
        ("evaluation.steps", config.evaluation.steps, 1),
        ("evaluation.guidance", config.evaluation.guidance, 0),
        ("evaluation.batch", config.evaluation.batch, 1),
        ("parallel.shard_size", config.parallel.shard_size, 1),
        ("engine.recompute", config.engine.recompute, 0),
    ]
    for key, value, least in at_least:
        if value is not None and value < least:
            raise UserError(key, f"{value} is below {least:g}", f"give {least:g} or more")
    for key, positive in (
        ("student.alpha", config.student.alpha),
        ("train.lr", t.lr),
        ("train.clip", t.clip),
        ("train.eps", t.eps),
        ("engine.fp8_tolerance", config.engine.fp8_tolerance),
        ("evaluation.reward_timeout", config.evaluation.reward_timeout),
    ):
        if positive is not None and positive <= 0:
            raise UserError(key, f"{positive} is not above 0", "give a positive number")
    for key, share in (("train.ema", t.ema), ("train.betas[0]", t.betas[0]), ("train.betas[1]", t.betas[1])):
        if not 0 <= share < 1:
            raise UserError(key, f"{share} is not in [0, 1)", "give a decay below 1")
    if t.warmup >= t.rounds:
        raise UserError("train.warmup", f"{t.warmup} is not below train.rounds = {t.rounds}", "shorten the warm-up")
    if not config.model.text_cache:
        raise UserError("model.text_cache", "is empty", "name a folder, or give auto or off")


def _check_sampler(config: Config) -> None:
    s = config.sampler
    if s.solver not in DETERMINISTIC and s.eta == 0:
        raise UserError(
            "sampler.eta", f"{s.solver} with eta 0 adds no noise, so its KL is undefined", "give eta > 0 or solver ode"
        )
    # DDIM draws sqrt of 1 - (...) and CPS turns by eta * pi / 2: both end at eta = 1.
    if s.solver in ("ddim", "cps") and s.eta > 1:
        raise UserError("sampler.eta", f"{s.eta} is above 1, the most {s.solver} can add", "give eta in (0, 1]")
    least = 1 if s.train_last else 2
    if s.steps < least:
        why = "" if s.train_last else " while the last step is not trained"
        raise UserError("sampler.steps", f"{s.steps} is below {least}{why}", f"give {least} or more")


def _check_objective(config: Config) -> None:
    o, s = config.objective, config.sampler
    default = ObjectiveConfig()
    readers: list[tuple[tuple[str, ...], bool, str]] = [
        (("reward_gradient", "kl_scale", "clamp"), o.kind == "ppo", "objective.kind ppo"),
        (("anchor_weight",), o.anchor is not None, "objective.anchor"),
        (("query_law", "query_weights"), o.queries is not None, "objective.queries"),
        (("query_alpha", "query_beta"), o.query_law == "beta", "objective.query_law beta"),
    ]
    for names, read, reader in readers:
        for name in names:
            if not read and getattr(o, name) != getattr(default, name):
                raise UserError(f"objective.{name}", "has no reader", f"set {reader}, or leave it out")
    for name in ("kl_scale", "clamp", "anchor_weight", "query_alpha", "query_beta"):
        value = getattr(o, name)
        if value is not None and value <= 0:
            raise UserError(f"objective.{name}", f"{value} is not above 0", "give a positive number")
    if o.kind == "ppo" and s.solver in DETERMINISTIC:
        raise UserError(
            "objective.kind", f"ppo needs log-probabilities, and {s.solver} draws nothing", "use solver flow_sde, or kl"
        )
    if o.kind == "ppo" and s.train_last and s.solver in ("cps", "ddim"):
        raise UserError(
            "sampler.train_last", f"the last step of {s.solver} adds no noise, so ppo cannot train it", "set it false"
        )
    trained = s.steps if s.train_last else s.steps - 1
    if o.queries is not None and not 1 <= o.queries <= trained:
        raise UserError("objective.queries", f"{o.queries} of {trained} trained steps", f"give 1 to {trained}, or null")
    if o.queries is not None and o.kind == "ppo":
        raise UserError("objective.queries", "are not for ppo, whose rewards are those of all steps", "use kl or null")


def _check_reinforcement(config: Config) -> None:
    rl, method, s = config.rl, config.train.method, config.sampler
    unread = [f"rl.{f.name}" for f in fields(RLConfig)] if not config.reinforces else []
    if config.reinforces:
        unread = [f"objective.{f.name}" for f in fields(ObjectiveConfig)] + ["sampler.train_last"]
        unread += ["parallel.offload_teachers"]
        unread += [f"teachers[{i}].{name}" for i in range(len(config.teachers)) for name in ("guidance", "partial")]
    unread += ["rl.beta", "rl.decay", "rl.timestep_fraction"] if method == "grpo" else []
    unread += ["rl.guard", "rl.clip", "rl.window"] if method == "nft" else []
    unread += ["rl.window_range"] if rl.window is None else []
    unread += ["rl.statistics"] if rl.std == "group" else []
    flat, defaults = flatten(config), {key: default for key, (_, default, _) in leaves().items()}
    for key in unread:
        if flat[key] != defaults.get(key, {"guidance": 1.0, "partial": False}.get(key.split(".")[-1])):
            what = {"rl.window_range": "rl.window null", "rl.statistics": "rl.std group"}.get(key)
            what = what if what is not None and config.reinforces else f"train.method {method}"
            raise UserError(key, f"is not read under {what}", "leave it out")
    if not config.reinforces:
        return
    _check_replicated(config)
    positive = [("rl.advantage_clip", rl.advantage_clip), ("rl.beta", rl.beta), ("rl.clip", rl.clip)]
    for key, value in positive:
        if value is not None and value <= 0:
            raise UserError(key, f"{value} is not above 0", "give a positive number")
    if rl.kl is not None and rl.kl < 0:
        raise UserError("rl.kl", f"{rl.kl} is below 0", "give 0 or more")
    if rl.updates < 1:
        raise UserError("rl.updates", f"{rl.updates} is below 1", "give 1 or more")
    if rl.images_per_prompt < 2:
        raise UserError("rl.images_per_prompt", f"{rl.images_per_prompt} is no group", "give 2 or more")
    if config.train.samples_per_task % rl.images_per_prompt:
        raise UserError(
            "train.samples_per_task",
            f"{config.train.samples_per_task} is no multiple of rl.images_per_prompt = {rl.images_per_prompt}",
            f"give {rl.images_per_prompt * max(1, config.train.samples_per_task // rl.images_per_prompt)}",
        )
    for i, task in enumerate(config.teachers):
        if task.weights != "base":
            raise UserError(f"teachers[{i}].weights", f"{task.weights} teaches nothing under {method}", "write base")
        if task.reward is None:
            raise UserError(f"teachers[{i}].reward", f"is missing, which {method} learns from", "name a reward")
    if config.student.start == "merged":
        raise UserError("student.start", f"merged is the mean of teachers, of which {method} has none", "name weights")
    if method == "nft":
        if config.student.guidance != 1:
            raise UserError("student.guidance", f"{config.student.guidance} under nft, which has none", "give 1")
        if not 1 <= s.steps * rl.timestep_fraction <= s.steps:
            raise UserError(
                "rl.timestep_fraction",
                f"{rl.timestep_fraction} of {s.steps} steps trains no step, or more than there are",
                f"give {1 / s.steps:.3g} to 1",
            )
        return
    if s.solver in DETERMINISTIC:
        raise UserError("sampler.solver", f"{s.solver} draws nothing that grpo could judge", "use flow_sde")
    if rl.guard and s.solver != "flow_sde":
        raise UserError("rl.guard", f"is made for flow_sde, not {s.solver}", "use flow_sde, or set it false")
    if rl.window is not None:
        most = s.steps // 2 if rl.window_range is None else rl.window_range
        if not 1 <= most < s.steps:
            raise UserError("rl.window_range", f"{most} of {s.steps} steps", f"give 1 to {s.steps - 1}")
        if not 1 <= rl.window <= most:
            raise UserError("rl.window", f"{rl.window} of the first {most} steps", f"give 1 to {most}")


def _check_replicated(config: Config) -> None:
    """Raise for a strategy that shards weights."""
    strategy, method = config.parallel.strategy, config.train.method
    if strategy not in ("auto", "single", "ddp"):
        raise UserError("parallel.strategy", f"{strategy} under {method}, which shards no weights", "give auto or ddp")


def _check_finetuning(config: Config) -> None:
    sft, t = config.sft, config.train
    unread = [f"sft.{f.name}" for f in fields(SFTConfig)]
    if t.method == "sft":
        unread = [f"objective.{f.name}" for f in fields(ObjectiveConfig)] + ["sampler.train_last"]
    flat, known = flatten(config), leaves()
    for key in unread:
        if flat[key] != known[key][1]:
            raise UserError(key, f"is not read under train.method {t.method}", "leave it out")
    if t.method != "sft":
        return
    _check_replicated(config)
    for key, count in (("sft.updates", sft.updates), ("sft.images_per_prompt", sft.images_per_prompt)):
        if count < 1:
            raise UserError(key, f"{count} is below 1", "give 1 or more")
    if sft.base_weight < 0:
        raise UserError("sft.base_weight", f"{sft.base_weight} is below 0", "give 0 or more")
    images = t.samples_per_task * (t.tasks_per_round or len(config.trained))
    if sft.updates > images:
        raise UserError(
            "sft.updates", f"{sft.updates} of {images} images, which leaves a round without any", f"give 1 to {images}"
        )
    for i in config.trained:
        if config.teachers[i].reward is None and sft.images_per_prompt > 1:
            why = f"is missing, which chooses among sft.images_per_prompt = {sft.images_per_prompt}"
            raise UserError(f"teachers[{i}].reward", why, "name a reward, or draw one image of each prompt")


def _check_teachers(config: Config) -> None:
    if not config.teachers:
        raise UserError(
            "teachers", "none is given", "list at least one as {name, weights, prompts}, or start from a recipe"
        )
    names = [teacher.name for teacher in config.teachers]
    if config.train.tasks is not None:
        for name in config.train.tasks:
            if name not in names:
                raise UserError("train.tasks", f"{name!r} is no task", did_you_mean(name, names))
        if not config.train.tasks:
            raise UserError("train.tasks", "is empty, so that nothing is trained", "name one, or give null")
    most = len(config.trained)
    if (config.train.tasks_per_round or 1) > most:
        raise UserError(
            "train.tasks_per_round", f"{config.train.tasks_per_round} of {most} tasks", f"give {most} or less, or null"
        )
    seen: set[str] = set()
    for i, teacher in enumerate(config.teachers):
        if not teacher.name or not all(c.isalnum() or c in "-_." for c in teacher.name):
            raise UserError(f"teachers[{i}].name", f"{teacher.name!r} is no name", "use letters, digits, - _ .")
        if teacher.name in seen:
            raise UserError(f"teachers[{i}].name", f"{teacher.name!r} is used twice", "give each teacher its own name")
        seen.add(teacher.name)
        if teacher.guidance < 0:
            raise UserError(f"teachers[{i}].guidance", f"{teacher.guidance} is below 0", "give 0 or more")
        held_out = teacher.eval_prompts is not None or teacher.prompts.startswith("bundled/")
        if teacher.reward is not None and config.evaluation.every > 0 and not held_out:
            raise UserError(f"teachers[{i}].eval_prompts", "is missing while a reward is set", "name held-out prompts")
        if teacher.weight <= 0:
            raise UserError(
                f"teachers[{i}].weight", f"{teacher.weight} is not above 0", "give a positive one or drop the teacher"
            )
        if teacher.share <= 0:
            raise UserError(
                f"teachers[{i}].share", f"{teacher.share} is not above 0", "give a positive one or drop the teacher"
            )
        if teacher.share != 1 and config.train.task_schedule != "weighted":
            raise UserError(
                f"teachers[{i}].share",
                f"{teacher.share} is read by the weighted schedule alone",
                "set train.task_schedule weighted, or give weight instead",
            )


def _check_engine(config: Config) -> None:
    precision, dtype = config.engine.precision, config.model.dtype
    if precision in ("float32", "tf32") and dtype not in ("auto", "float32"):
        raise UserError(
            "engine.precision", f"{precision} contradicts model.dtype = {dtype}", "set model.dtype to auto or float32"
        )
    parallel = config.parallel
    if parallel.timeout <= 0:
        raise UserError("parallel.timeout", f"{parallel.timeout} is not above 0", "give minutes, such as 30")
    if parallel.shard_size is not None and parallel.strategy != "hsdp":
        raise UserError(
            "parallel.shard_size", f"{parallel.shard_size} is read by hsdp alone", "set parallel.strategy hsdp, or null"
        )
    if parallel.offload_teachers and config.engine.placement != "merged":
        raise UserError(
            "parallel.offload_teachers", "teachers share the base", "set engine.placement merged, or offload nothing"
        )
    for name, wanted, extra in (
        ("wandb", config.logging.wandb, "opd_fast[wandb]"),
        ("tensorboard", config.logging.tensorboard, "tensorboard"),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.{name}", f"{name} is not installed", f"pip install '{extra}' or --logging.{name} false"
            )


# --- dictionaries, YAML, hashes ---------------------------------------------------------------------------------------


def sections() -> dict[str, type]:
    """Section name to dataclass, without `teachers`, in the order of `Config`."""
    hints = get_type_hints(Config)
    return {f.name: hints[f.name] for f in fields(Config) if f.name != "teachers"}


def leaves() -> dict[str, tuple[Any, Any, str]]:
    """Dotted key to (type, default, help) for everything outside `teachers`."""
    found: dict[str, tuple[Any, Any, str]] = {}
    for section, kind in sections().items():
        for name, hint, default, help in _fields(kind):
            found[f"{section}.{name}"] = (hint, default, help)
    return found


def teacher_leaves() -> dict[str, tuple[Any, Any, str]]:
    """Field to (type, default, help) of one teacher; the default of a required one is `dataclasses.MISSING`."""
    return {name: (hint, default, help) for name, hint, default, help in _fields(TeacherConfig)}


def _fields(kind: type) -> Iterator[tuple[str, Any, Any, str]]:
    hints = get_type_hints(kind)
    for f in fields(kind):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        yield f.name, hints[f.name], default, f.metadata["help"]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain data that JSON and YAML can hold; `from_dict` is the inverse."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples become lists
    return data


def from_dict(data: dict[str, Any]) -> Config:
    """`Config` from checked plain data; keys that are absent keep their defaults."""
    made: dict[str, Any] = {}
    for name, kind in sections().items():
        values = dict(data.get(name) or {})
        for key, hint in get_type_hints(kind).items():
            if getattr(hint, "__origin__", None) is tuple and key in values:
                values[key] = tuple(values[key])
        made[name] = kind(**values)
    made["teachers"] = [TeacherConfig(**teacher) for teacher in data.get("teachers") or []]
    return Config(**made)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key to value: `train.lr`, `teachers[0].name`, `train.betas[0]`."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(f"{prefix}[{i}]", inner)
        else:
            flat[prefix] = value

    walk("", asdict(config))
    return flat


def to_yaml(config: Config) -> str:
    """The configuration as YAML; parsing it again gives an equal `Config`."""
    return dump(to_dict(config))


def dump(data: dict[str, Any]) -> str:
    """Plain data as YAML, numbers written so that YAML 1.1 reads numbers."""
    import yaml

    text: str = yaml.dump(data, Dumper=_dumper(), sort_keys=False, allow_unicode=True)
    return text


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def number(dumper: Any, value: float) -> Any:
        # YAML 1.1 reads 1e-05 as a string: a mantissa needs its point.
        text = repr(value)
        if "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        return dumper.represent_scalar("tag:yaml.org,2002:float", text)

    Dumper.add_representer(float, number)
    return Dumper


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits over everything but what changes no number of a run: `logging`, `checkpoint` and
    `model.text_cache`."""
    data = {key: value for key, value in to_dict(config).items() if key not in ("logging", "checkpoint")}
    del data["model"]["text_cache"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def changed(before: Config, after: Config) -> list[str]:
    """Dotted keys whose values differ."""
    old, new = flatten(before), flatten(after)
    return [key for key in {**old, **new} if old.get(key, MISSING) != new.get(key, MISSING)]


def refuse_unsafe_changes(before: Config, after: Config, *, staged: bool = False) -> None:
    """Raise unless `after` continues the run that `before` describes (see `RESUMABLE`).

    A stage keeps its rounds as well: the next one may have begun from where they ended.
    """
    may_change = [key for key in RESUMABLE if not (staged and key == "train.rounds")]
    for key in changed(before, after):
        if not key.startswith(tuple(may_change)):
            raise UserError(
                key,
                f"a resumed run keeps its value ({flatten(before).get(key, 'unset')})",
                "drop the option, or start a new run; " + ", ".join(k.rstrip(".") for k in may_change) + " may change",
            )


def describe(hint: Any) -> str:
    """A type in words: "a whole number or null"."""
    if getattr(hint, "__origin__", None) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, args = getattr(hint, "__origin__", None), get_args(hint)
    if origin is tuple:
        return f"a list of {len(args)} numbers"
    if origin is list:
        return "a list of " + {"text": "texts"}.get(describe(args[0]), describe(args[0]))
    return " or ".join(describe(arg) for arg in args)


def check_known(data: dict[str, Any], source: str = "") -> None:
    """Raise for keys of nested plain data that name no setting. `source` (a file name) goes into the message."""
    where = f" in {source}" if source else ""
    known = [*sections(), "teachers"]
    for section, values in data.items():
        if section not in known:
            raise UserError(str(section), f"unknown key{where}", did_you_mean(str(section), known))
        if section == "teachers":
            _check_teacher_list(values, where)
            continue
        names = [f.name for f in fields(sections()[section])]
        if not isinstance(values, dict):
            raise UserError(section, f"holds settings{where}, got {values!r}", f"write {section}: {{{names[0]}: ...}}")
        for key in values:
            if key not in names:
                near = did_you_mean(str(key), names)
                raise UserError(f"{section}.{key}", f"unknown key{where}", near)


def _check_teacher_list(values: Any, where: str) -> None:
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise UserError("teachers", f"is a list of teachers{where}, got {values!r}", "write [{name, weights, prompts}]")
    names = [f.name for f in fields(TeacherConfig)]
    for i, teacher in enumerate(values):
        for key in teacher:
            if key not in names:
                raise UserError(f"teachers[{i}].{key}", f"unknown key{where}", did_you_mean(str(key), names))
        for f in fields(TeacherConfig):
            if f.default is MISSING and f.name not in teacher:
                raise UserError(f"teachers[{i}].{f.name}", f"is missing{where}", f"add it: {f.metadata['help']}")


def package_file(*parts: str) -> Path:
    """A path inside the installed package."""
    return Path(__file__).resolve().parent.joinpath(*parts)
