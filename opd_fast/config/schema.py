"""The settings of a run: typed, strict, and complete before anything heavy is imported.

`Config` describes a run. The defaults fill it first, then a recipe or YAML file, then the command line
(`opd_fast.config.command_line`). A setting that is unknown, of the wrong type (`opd_fast.config.options`) or impossible
(`opd_fast.config.validate`) raises `UserError` at once, without an import of torch, so in well under a second.
"""

# ruff: noqa: RUF009 - `option` is `dataclasses.field` with its explanation

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from opd_fast.config.methods import METHODS

Solver = Literal["ode", "flow_sde", "dance_sde", "cps", "ddim", "dpm1", "dpm2"]
Attention = Literal[
    "auto", "native", "flash", "cudnn", "efficient", "math", "products", "xformers", "flash_2", "flash_3"
]
DETERMINISTIC: tuple[str, ...] = ("ode", "dpm1", "dpm2")

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]


def option(
    help: str, default: Any = MISSING, *, least: float | None = None, positive: bool = False, most: int = 2**31 - 1
) -> Any:
    """A setting: a dataclass field with the explanation that `--help` prints, and the range of its value.

    Args:
        help: the explanation.
        default: a list is copied for each instance; without one the setting must be given.
        least: the smallest value, where there is one.
        positive: whether the value is above 0.
        most: the largest value of a whole number.
    """
    metadata = {"help": help, "least": least, "positive": positive, "most": most}
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
        "type of the frozen weights and of every forward; auto: bfloat16 on a GPU that has it, float32 elsewhere; "
        "float16 trains with a gradient scaler",
        "auto",
    )
    resolution: int | None = option(
        "height and width in pixels; null: the pipeline's own (SD3.5 and FLUX.1: 1024, bundled: 32)", None, least=1
    )
    max_sequence_length: int | None = option(
        "tokens in the long text encoder; SD3: 0 leaves T5 out; null: the pipeline's, SD3: 128", None, least=0
    )
    text_cache: str = option(
        "folder that keeps the prompts' embeddings from run to run; off: none; auto: opd_fast/text in the user's cache "
        "directory ($XDG_CACHE_HOME, else ~/.cache) for text encoders above 256 MiB, none for smaller ones",
        "auto",
    )
    text_device: Literal["auto", "cpu"] = option(
        "where the text encoders run; auto: as the model; cpu: slower, without their memory on the GPU", "auto"
    )
    guidance_convention: Literal["pipeline", "linear"] = option(
        "meaning of every guidance; pipeline: the argument of the model's own diffusers pipeline, with its formula "
        "(docs/guidance.md has a table); linear: g of v = u + g (c - u), for models with a negative pass",
        "pipeline",
    )


@dataclass(kw_only=True)
class StudentConfig:
    """What is trained."""

    kind: Literal["lora", "full"] = option("lora: low-rank adapters on the frozen base; full: every weight", "lora")
    rank: int = option("LoRA rank", 32, least=1, most=65_536)
    alpha: float = option("LoRA alpha; the adapter is scaled by alpha / rank", 64.0, positive=True)
    targets: str | list[str] = option(
        "LoRA targets: attention, all, or a list of module name endings such as [attn.to_q]", "attention"
    )
    start: str | None = option(
        "weights to start from, in any form a teacher can have; merged: the teachers' weight differences merged, by "
        "default their mean by teachers[].weight, cut to the rank (a folder of that name is ./merged); null: the base",
        None,
    )
    merge: Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = option(
        "of start merged: how the teachers' weight differences become one, see docs/merging.md", "linear"
    )
    merge_density: float | None = option(
        "of every merge but linear: share of each difference's entries that is kept; TIES published 0.2",
        None,
        positive=True,
    )
    merge_coefficients: float | list[float] | None = option(
        "of start merged: factor on the teachers' differences, a number for all or a list with one for each; null: "
        "their shares of the sum of teachers[].weight",
        None,
    )
    guidance: float | None = option(
        "guidance of the student while it trains, as the model's pipeline takes it: guidance_scale of SD3 (up to 1: no "
        "negative pass), FLUX.1-dev (goes into the transformer; 3.5 is usual) and Z-Image (0: no negative pass), "
        "true_cfg_scale of Qwen-Image (up to 1: no negative pass); null: unguided, FLUX.1-dev: 1",
        None,
        least=0,
    )


@dataclass(kw_only=True)
class TeacherConfig:
    """One frozen teacher and the task it teaches."""

    name: str = option("name in tables, files and logs")
    weights: str = option(
        "PEFT folder, LoRA file (diffusers, kohya, ComfyUI, ...), transformer or pipeline folder, .safetensors file of "
        "all weights, hub id (and a folder or file in it), or bundled/NAME"
    )
    partial: bool = option("take a LoRA of which only some modules exist in the model; false refuses it", False)
    prompts: str = option(
        "training prompts: a GenEval .jsonl, .txt, .csv, .tsv or .parquet file, a folder with one for each split, or "
        "bundled/NAME"
    )
    guidance: float | None = option("guidance of the teacher, of the same kind as student.guidance", None, least=0)
    weight: float = option("factor on this task's loss", 1.0)
    share: float = option("how often the weighted schedule takes this task, relative to the other tasks", 1.0)
    eval_prompts: str | None = option(
        "held-out prompts for the reward; null: the test split beside the training prompts, if there is one", None
    )
    reward: str | None = option(
        "reward that judges this task in evaluations: composition, text, colour or package.module:function; under grpo "
        "and nft it is learnt from, and may be a sum such as 0.8*text + 0.2*colour, whose first judges; null: none",
        None,
    )


@dataclass(kw_only=True)
class SamplerConfig:
    """The solver of the rollout."""

    solver: Solver = option("ode, dpm1 and dpm2 are deterministic, the others add noise", "flow_sde")
    steps: int = option("solver steps in a rollout", 10, most=10_000)
    eta: float = option("noise level of the stochastic solvers; the deterministic ones have none", 0.7, least=0)
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
    reduction: Literal["mean", "sum"] = option("how the elements of a sample are reduced", "mean")
    steps: Literal["sum", "mean"] = option(
        "how trained steps are reduced; sum: the paper's; mean: the released code's", "sum"
    )
    reward_gradient: Literal["live", "detached", "return_to_go"] = option(
        "of ppo; live: pathwise gradient of the reward plus score function; detached: score function alone, whose mean "
        "is zero (a control); return_to_go: pathwise plus score function of the later steps' rewards, by a second pass",
        "live",
    )
    log_prob: Literal["exact", "published"] = option(
        "of ppo with solver cps: log-probability of the score function, as rl.log_prob", "exact"
    )
    kl_scale: float = option("of ppo: factor on the KL before the clamp", 1.0, positive=True)
    clamp: float | None = option("of ppo: largest reward of a step; Flow-OPD: 5; null: none", None, positive=True)
    anchor: str | None = option(
        "frozen weights that the same loss holds the student to, of a teacher's form or base; null: none", None
    )
    anchor_weight: float = option("factor on the anchor's loss (Flow-OPD's)", 0.04, positive=True)
    queries: int | None = option("trained steps drawn for each round; null: all of them; DanceOPD: 1", None)
    query_law: Literal["uniform", "beta"] = option(
        "distribution of the drawn steps between noise and image; beta: Beta(query_alpha, query_beta)", "uniform"
    )
    query_alpha: float = option("of query_law beta; above query_beta: nearer the image (DanceOPD)", 5.0, positive=True)
    query_beta: float = option("of query_law beta (DanceOPD)", 2.0, positive=True)
    query_weights: Literal["unbiased", "law"] = option(
        "unbiased: a drawn step stands for those that were not, so that the mean loss is that of all steps; law: drawn "
        "steps count alike (DanceOPD)",
        "unbiased",
    )


@dataclass(kw_only=True)
class TrainConfig:
    """The optimizer and the length of the run. One round is one optimizer step."""

    method: Method = option(
        "opd: on-policy distillation; grpo (Flow-GRPO, GRPO-Guard) and nft (DiffusionNFT): reinforcement learning, "
        "which makes teachers: an entry of teachers is a task with its reward and the weights base; sft: flow matching "
        "on images that the teachers draw, a start for opd",
        "opd",
    )
    rounds: int = option("optimizer steps; 0: the student is judged and exported as it starts", 80, least=0)
    samples_per_task: int = option("rollouts of each task in a round", 8, least=1)
    tasks: list[str] | None = option("names of the tasks that are trained; all are judged; null: all", None)
    tasks_per_round: int | None = option("tasks that a round takes; null: as many as are trained", None, least=1)
    task_schedule: Literal["round_robin", "weighted"] = option(
        "order of the tasks; round_robin: in turn; weighted: at random in proportion to teachers[].share, so that a "
        "task may come several times in a round and weighs as often",
        "round_robin",
    )
    micro_batch: int | None = option("samples in one student forward; null: all of the round", None, least=1)
    lr: float = option("peak learning rate of AdamW", 1e-3, positive=True)
    schedule: Literal["constant", "cosine", "linear"] = option("learning rate after the warm-up", "constant")
    warmup: int = option("rounds over which the learning rate rises from 0", 0, least=0)
    weight_decay: float = option("weight decay of AdamW", 1e-4, least=0)
    betas: tuple[float, float] = option("betas of AdamW", (0.9, 0.999))
    eps: float = option("epsilon of AdamW", 1e-8, positive=True)
    clip: float = option("largest gradient norm", 1.0, positive=True)
    skip_limit: int = option(
        "rounds in a row without a finite loss or gradient before the run stops; each is left out", 3, least=1
    )
    ema: float = option(
        "decay of the average of the weights that is evaluated and exported; 0 follows the weights", 0.9, least=0
    )
    seed: int = option("seed of prompts, noise and adapters; --seed is short for it", 0, least=0, most=2**63 - 1)


@dataclass(kw_only=True)
class RLConfig:
    """Reinforcement learning, train.method grpo and nft. Defaults are Flow-GRPO's (arXiv 2505.05470), GRPO-Guard's
    (arXiv 2510.22319) and DiffusionNFT's (arXiv 2509.16117), from their released code."""

    images_per_prompt: int = option("images of one prompt, a group; it divides train.samples_per_task", 24, least=2)
    updates: int = option(
        "optimizer steps, that is rounds, on the images of a rollout; nft publishes 1 or 2", 2, least=1
    )
    std: Literal["global", "group"] = option(
        "standard deviation that divides advantages; global: of a task's rewards in a rollout; group: of a group's",
        "global",
    )
    statistics: Literal["task", "all"] = option(
        "whose rewards std global spans; task: those of each task; all: of all together, whatever their scales", "task"
    )
    advantage_clip: float = option("largest size of an advantage", 5.0, positive=True)
    kl: float | None = option(
        "factor on the KL to the base; null: 0.04 under grpo, 1e-4 under nft (of the velocities)", None, least=0
    )
    guard: bool = option("grpo: GRPO-Guard's normalised ratio and step weights; solver flow_sde", False)
    clip: float | None = option("grpo: range of the ratio around 1; null: 1e-4, with guard 2e-6", None, positive=True)
    log_prob: Literal["exact", "published"] = option(
        "grpo with solver cps: log-probability of a step, mean over the elements; exact: the normal law's; published: "
        "-mean((x - mu)^2), without 1 / (2 std^2), as in Flow-GRPO's code, whose clip ranges are meant for it",
        "exact",
    )
    window: int | None = option(
        "grpo: steps that draw noise and are trained, somewhere among the first window_range, all others being ODE "
        "(Flow-GRPO-Fast: 2 or 3); null: all but the last are trained",
        None,
    )
    window_range: int | None = option("grpo: see window; null: half of the steps", None)
    beta: float = option(
        "nft: distance of the implied policies from the old one; published: 1 or 0.1", 1.0, positive=True
    )
    timestep_fraction: float = option(
        "nft: share of the noise levels that an image is trained at, drawn for each; published: all but one", 0.99
    )
    decay: Literal["early", "late"] = option(
        "nft: how the old policy follows; early: min(0.001 k, 0.5) after k updates; late: at once for 75 updates, then "
        "min(0.0075 (k - 75), 0.999)",
        "early",
    )


@dataclass(kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on the teachers' images, train.method sft (Flow-OPD's cold start)."""

    updates: int = option("optimizer steps, that is rounds, on the images that the teachers draw at once", 1, least=1)
    images_per_prompt: int = option(
        "images that a teacher draws for each sample; the one with the highest reward is learnt from", 1, least=1
    )
    base_weight: float = option("factor on mean((v - v_base)^2), which holds to the base; released: 100", 0.0, least=0)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What --resume starts from."""

    every: int = option("rounds between checkpoints; one is written at the end too; 0: only at the end", 20, least=0)
    keep: int = option("newest checkpoints that are kept", 3, least=1)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Rewards on held-out prompts, with the averaged weights."""

    every: int = option("rounds between evaluations; one at each end has base and teachers too; 0: never", 20, least=0)
    prompts: int = option("held-out prompts of each task, the first in its file; all where it has fewer", 64, least=1)
    images_per_prompt: int | None = option(
        "images of each held-out prompt, with different noise, whose rewards are averaged; null: one, but those of a "
        "file with too few prompts are drawn again and again until there are evaluation.prompts images",
        1,
        least=1,
    )
    steps: int = option("ODE steps of an evaluation's images", 20, least=1, most=10_000)
    guidance: float | None = option("guidance of base and student when judged; null: student.guidance", None, least=0)
    batch: int = option("images drawn at once", 64, least=1)
    reward_timeout: float | None = option(
        "seconds for a batch; a reward that takes longer or fails is passed over; null: any", 300.0, positive=True
    )
    reward_failure: Literal["stop", "continue"] = option(
        "when a reward gives a task no value at all for the base, before training; stop: the run ends with an error; "
        "continue: it trains, and the reward's values are missing",
        "stop",
    )
    vae_tiling: bool = option("decode in overlapping tiles: less memory at high resolutions, faint seams", False)
    rewards: list[str] = option("rewards reported of every task beside its own, such as pickscore", [])

    def images(self, held_out: int) -> int:
        """Return how many images an evaluation draws of a task that has `held_out` prompts in its file."""
        each = self.images_per_prompt
        return self.prompts if each is None else min(self.prompts, held_out) * each


@dataclass(kw_only=True)
class RewardModelsConfig:
    """The models and servers of the rewards that have one. A path that exists comes before a hub id of that form."""

    clip: str = option(
        "CLIP ViT-L/14 of clipscore, aesthetic and GenEval's colours, and the tokenizer of hps: transformers folder or "
        "hub id",
        "openai/clip-vit-large-patch14",
    )
    pickscore: str = option("PickScore: transformers folder or hub id", "yuvalkirstain/PickScore_v1")
    hps: str = option("HPSv2.1: open_clip checkpoint, or that file on the hub", "xswu/HPSv2/HPS_v2.1_compressed.pt")
    aesthetic: str = option(
        "linear head of the aesthetic predictor: sac+logos+ava1-l14-linearMSE.pth, or its copy on the hub",
        "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    )
    image_reward: str = option(
        "ImageReward: ImageReward.pt, or that file on the hub", "zai-org/ImageReward/ImageReward.pt"
    )
    bert: str = option("tokenizer of ImageReward: transformers folder or hub id", "google-bert/bert-base-uncased")
    detector: str = option(
        "GenEval's detector, a Mask2Former for COCO instances: transformers folder or hub id, or mmdet's .pth file, "
        "the published one",
        "facebook/mask2former-swin-small-coco-instance",
    )
    geneval_server: str | None = option(
        "address of a GenEval server, such as http://127.0.0.1:18085; null: the detector in this process", None
    )
    ocr: Literal["rapidocr", "paddleocr"] = option("engine of ocr; paddleocr is the published one", "rapidocr")
    judge_server: str | None = option(
        "address of an OpenAI-compatible server (vLLM, SGLang) for unified_reward, such as http://127.0.0.1:17140/v1",
        None,
    )
    judge: str = option("model that the server serves for unified_reward", "CodeGoat24/UnifiedReward-7b-v1.5")
    hps3_server: str | None = option(
        "address of an HPSv3 server, such as http://127.0.0.1:18087; docs/judges.md has one", None
    )
    batch: int = option("images that a reward's model takes at once", 16, least=1)
    requests: int = option("requests that a server gets at once", 8, least=1)
    retries: int = option("times that a request is sent again after it failed", 2, least=0)
    request_timeout: float = option("seconds that a server may take for a request", 120.0, positive=True)
    device: Literal["auto", "cpu"] = option("of the rewards' models; auto: that of the images", "auto")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "of the rewards' models; auto: float16 on a GPU, float32 on a CPU", "auto"
    )


@dataclass(kw_only=True)
class ParallelConfig:
    """Several devices, one process on each: torchrun --nproc-per-node N -m opd_fast.train ..."""

    strategy: Literal["auto", "single", "ddp", "fsdp2", "hsdp"] = option(
        "ddp: all weights on every device; fsdp2: sharded over all devices; hsdp: sharded within groups, replicated "
        "between them; single: one device; auto: ddp for LoRA where it fits, else fsdp2, single for one process",
        "auto",
    )
    shard_size: int | None = option("devices of an hsdp group; null: those of one machine", None, least=1)
    reshard: Literal["round", "block"] = option(
        "how long sharded weights stay gathered; round: until they change, gathered once; block: only while their "
        "block computes, gathered twice a step, where there is no room for all",
        "round",
    )
    offload_teachers: bool = option("keep merged teachers in CPU memory, on the GPU only while asked", False)
    timeout: float = option("minutes that a process waits for another before it gives up", 30.0, positive=True)


@dataclass(kw_only=True)
class EngineConfig:
    """Techniques that reach the same numbers faster."""

    placement: Literal["merged", "shared"] = option(
        "merged: each teacher is a merged copy of the transformer; shared: teachers are adapters on one base", "merged"
    )
    group_teachers: bool = option("placement shared: all teachers in one forward, each row with its own adapter", True)
    merge_student: bool = option("merge the student's LoRA into the base for the length of a round", True)
    fuse_projections: bool = option("one product for q, k and v in merged teachers", True)
    cache_modulation: bool = option("compute once a round what depends on step and prompt alone", True)
    attention: Attention = option(
        "implementation of attention; auto: the fastest of a short measurement at the start", "auto"
    )
    recompute: int | None = option(
        "student blocks that recompute activations in the backward; null: as few as a GPU needs, else 0", None, least=0
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
    fp8_tolerance: float = option(
        "precision fp8: largest accepted relative change of a step's loss", 0.01, positive=True
    )


@dataclass(kw_only=True)
class LoggingConfig:
    """Loggers besides metrics.jsonl."""

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
    reward_models: RewardModelsConfig = field(default_factory=RewardModelsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def trained(self) -> list[int]:
        """The indices in `teachers` of the tasks that are trained."""
        chosen = self.train.tasks
        return [i for i, teacher in enumerate(self.teachers) if chosen is None or teacher.name in chosen]

    def evaluates(self, teacher: TeacherConfig) -> bool:
        """Whether evaluations draw images of the task."""
        return self.evaluation.every > 0 and (teacher.reward is not None or bool(self.evaluation.rewards))
