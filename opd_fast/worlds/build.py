"""Build the bundled pipeline and its teachers from a seed: `python -m opd_fast.worlds.build`.

Stages, each leaving its result in the output folder, so that a later one can be run again alone:

1. `prompts`: the prompt files, in the formats of GenEval and OCR.
2. `vae`: a small AutoencoderKL on rendered scenes.
3. `generalist`: tokenizers, two CLIP text encoders and the MMDiT, trained together by flow matching on true captions.
   Half of the scenes are ideal ones (`shapes.scene`): with little else left open, a caption's words are learnt sooner.
4. `base`: the generalist weakened as web data weaken a model: some more steps with part of the captions swapped, and no
   ideal scene.
5. `teachers`: one LoRA a task on the frozen base, by reinforcement learning: the recipes `teacher-composition`
   (DiffusionNFT), `teacher-text` and `teacher-colour` (GRPO-Guard).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from opd_fast.files import open_to_umask
from opd_fast.worlds import shapes

LATENT_CHANNELS = 4
TEXT_WIDTH = 96
WIDTH = 192
TOKENS = 16
SHARES = {"composition": 0.65, "text": 0.22, "colour": 0.13}
STAGES = ("prompts", "vae", "generalist", "base", "teachers")


@dataclass(frozen=True)
class Recipe:
    """Sizes of each stage; the defaults make the committed bundle."""

    seed: int = 0
    pool: int = 40_000
    vae_steps: int = 1500
    generalist_steps: int = 12_000
    ideal_scenes: float = 0.5
    """Share of composition and text scenes that are ideal in the `generalist` stage."""
    base_steps: int = 1000
    swapped_captions: float = 0.35
    """Share of composition and text captions swapped for another of the same task in the `base` stage."""
    batch: int = 32
    teacher_options: tuple[str, ...] = ()
    """Of the teachers' command lines, to try the stage in less time."""


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Rendered scenes of one task: latents (n, C, h, w), and the text of each."""

    latents: Tensor
    texts: list[str]
    captions: list[str]
    """All distinct training prompts of the task."""


def draw_prompts(task: str, n: int, rng: np.random.Generator) -> list[shapes.ScenePrompt]:
    """n training prompts; every tag of a composition prompt is equally likely."""
    groups: dict[str, list[shapes.ScenePrompt]] = {}
    for p in shapes.prompts(task, "train"):
        groups.setdefault(p.metadata.get("tag", ""), []).append(p)
    pools = list(groups.values())
    return [(pool := pools[rng.integers(len(pools))])[rng.integers(len(pool))] for _ in range(n)]


def render_pool(task: str, n: int, seed: int, *, ideal: bool = False) -> tuple[Tensor, list[str]]:
    """n scenes (n, 3, 32, 32) float32 in 0..1 and their prompts."""
    rng = np.random.default_rng([seed, shapes.TASKS.index(task)])
    chosen = draw_prompts(task, n, rng)
    images = np.empty((n, 3, shapes.SIZE, shapes.SIZE), np.float32)
    for image, prompt in zip(images, chosen, strict=True):
        image[:] = shapes.render(shapes.scene(task, prompt, rng, ideal=ideal))
    return torch.from_numpy(images), [p.text for p in chosen]


@torch.no_grad()
def encode_pool(vae: Any, task: str, n: int, seed: int, *, ideal: bool = False) -> Pool:
    images, texts = render_pool(task, n, seed, ideal=ideal)
    modes = torch.cat([vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in images.split(256)])
    latents = (modes - vae.config.shift_factor) * vae.config.scaling_factor
    return Pool(latents, texts, [p.text for p in shapes.prompts(task, "train")])


def write_prompts(out: Path) -> None:
    from opd_fast.data.prompt_files import write_geneval, write_lines

    for task in shapes.TASKS:
        folder = out / "prompts" / task
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            chosen = shapes.prompts(task, split)
            # Tags alternate, so that the first n prompts of a file hold every kind.
            order = np.random.default_rng(0).permutation(len(chosen))
            if task == "composition":
                groups: dict[str, list[dict[str, Any]]] = {}
                for i in order:
                    groups.setdefault(chosen[i].metadata["tag"], []).append(chosen[i].metadata)
                longest = max(map(len, groups.values()))
                records = [g[i] for i in range(longest) for _, g in sorted(groups.items()) if i < len(g)]
                write_geneval(folder / f"{split}_metadata.jsonl", records)
            else:
                write_lines(folder / f"{split}.txt", [chosen[i].text for i in order])


# --- models ----------------------------------------------------------------------------------------------------------


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=shapes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _merged(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge that applies goes first."""
    while True:
        pairs = list(itertools.pairwise(parts))
        known = [pair for pair in pairs if pair in merges]
        if not known:
            return parts
        i = pairs.index(min(known, key=merges.index))
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


def make_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose merges spell the grammar's words; words in quotes stay letters."""
    from transformers import CLIPTokenizer

    texts = [p.text for task in shapes.TASKS for p in shapes.prompts(task, "train")]
    words = sorted({w for text in texts for w in text.split() if '"' not in w})
    characters = [chr(c) for c in range(33, 127)]
    tokens = characters + [c + "</w>" for c in characters]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # left to right, so that no merge joins the two letters of a word to draw
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=shapes.SIZE // 2,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=shapes.SIZE // 4,
        qk_norm="rms_norm",
    )


class TextToVelocity(nn.Module):
    """Text encoders and MMDiT as one module, to train together. Embeds text as the diffusers pipeline does."""

    def __init__(self, encoders: list[nn.Module], transformer: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        sequence = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        pooled = torch.cat([o.text_embeds for o in outputs], -1)
        velocity: Tensor = self.transformer(x, sequence, pooled, t * 1000, return_dict=False)[0]
        return velocity


# --- training --------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, out: Path) -> None:
    torch.manual_seed(recipe.seed)
    vae = make_vae()
    images = torch.cat([render_pool(task, 4000, recipe.seed)[0] for task in shapes.TASKS]) * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, recipe.vae_steps)
    for step in range(recipe.vae_steps):
        x = images[torch.randint(len(images), (32,))]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss = (y - x).abs().mean() + (y - x).square().mean() + 1e-4 * posterior.kl().mean() / x[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.vae_steps - 1:
            log(f"vae {step} loss {loss.item():.4f} mse {(y - x).square().mean().item():.5f}")
    with torch.no_grad():
        latents = torch.cat([vae.encode(c).latent_dist.mode() for c in images[:: len(images) // 2000].split(256)])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    vae.save_pretrained(out / "pipeline" / "vae")


def sample_times(n: int) -> Tensor:
    """Logit-normal times (SD3, arXiv 2403.03206, section 3.1), shifted toward noise as the sampler's steps are."""
    u = torch.sigmoid(torch.randn(n))
    return 1.8 * u / (1 + 0.8 * u)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, is_causal: bool = False, **__: Any
) -> Tensor:
    """Attention as two products of (B, heads, tokens, width). On a CPU, in bfloat16, the backward of torch's own takes
    seven times as long.
    """
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2]) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).to(v.dtype)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def flow_matching(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    parameters: list[nn.Parameter],
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    name: str,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Minimise E ||v(x_t, t) - (eps - x0)||^2 over `batches` of (x0, token ids); warmup, then cosine to a twentieth."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        progress = step / steps
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    total, start = 0.0, time.time()
    compiled = torch.compile(model)
    for step in range(steps):
        x0, ids = next(batches)
        noise, t = torch.randn_like(x0), sample_times(len(x0))
        x = torch.lerp(x0, noise, t[:, None, None, None])
        attention = mock.patch.object(nn.functional, "scaled_dot_product_attention", plain_attention)
        with attention, torch.autocast("cpu", dtype=torch.bfloat16):
            v = compiled(x, t, ids)
        loss = (v.float() - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if on_step is not None:
            on_step(step)
        if (step + 1) % 100 == 0:
            log(f"{name} {step + 1}/{steps} loss {total / 100:.4f} {100 / (time.time() - start):.2f} steps/s")
            total, start = 0.0, time.time()


def batches(
    pools: dict[str, Pool], shares: dict[str, float], tokenizer: Any, batch: int, *, swapped: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (latents, ids). A tenth of the captions is dropped, for guidance; `swapped` of composition's and text's
    lie.
    """
    texts = ["", *(c for pool in pools.values() for c in pool.captions)]
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    row = {text: i for i, text in enumerate(texts)}
    tasks = list(shares)
    p = torch.tensor([shares[t] for t in tasks])
    while True:
        latents, rows = [], []
        for index in torch.multinomial(p, batch, replacement=True).tolist():
            pool = pools[tasks[index]]
            i = int(torch.randint(len(pool.texts), ()))
            latents.append(pool.latents[i])
            text = pool.texts[i]
            if tasks[index] != "colour" and float(torch.rand(())) < swapped:
                text = pool.captions[int(torch.randint(len(pool.captions), ()))]
            rows.append(0 if float(torch.rand(())) < 0.1 else row[text])
        yield torch.stack(latents), ids[rows]


class Average:
    """Exponential moving average of the trained parameters, decay warmed up; `shadow` is a whole state dict."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self.shadow[name].lerp_(parameter, 1 - decay)


def load_vae(out: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(out / "pipeline" / "vae").eval()


def make_pools(recipe: Recipe, out: Path, *, ideal_scenes: float) -> dict[str, Pool]:
    """One pool a task, `recipe.pool` scenes in all; colour's are never ideal, which is what its teacher adds."""
    vae = load_vae(out)
    pools = {}
    for task, share in SHARES.items():
        total = int(recipe.pool * share)
        ideal = 0 if task == "colour" else int(total * ideal_scenes)
        parts = [
            encode_pool(vae, task, n, recipe.seed + 1, ideal=kind)
            for n, kind in ((total - ideal, False), (ideal, True))
            if n
        ]
        pools[task] = Pool(
            torch.cat([p.latents for p in parts]), [t for p in parts for t in p.texts], parts[0].captions
        )
    return pools


def build_generator(out: Path) -> tuple[TextToVelocity, Any]:
    tokenizer = make_tokenizer(out / "pipeline" / "tokenizer")
    tokenizer.save_pretrained(out / "pipeline" / "tokenizer_2")
    return TextToVelocity([make_text_encoder(tokenizer) for _ in range(2)], make_transformer()), tokenizer


def train_generator(recipe: Recipe, out: Path, work: Path, *, stage: str) -> None:
    """Stage `generalist` from scratch on true captions, or stage `base` from the generalist on partly swapped ones."""
    torch.manual_seed(recipe.seed + 2)
    model, tokenizer = build_generator(out)
    model.train()
    from_scratch = stage == "generalist"
    if not from_scratch:
        model.load_state_dict(torch.load(work / "generalist.pt", weights_only=True))
    average = Average(model, 0.999 if from_scratch else 0.99)

    def on_step(step: int) -> None:
        average.update(step)
        if (step + 1) % 500 == 0:
            torch.save(average.shadow, work / f"{stage}.pt")

    flow_matching(
        model,
        list(model.parameters()),
        batches(
            make_pools(recipe, out, ideal_scenes=recipe.ideal_scenes if from_scratch else 0.0),
            SHARES,
            tokenizer,
            recipe.batch,
            swapped=0 if from_scratch else recipe.swapped_captions,
        ),
        steps=recipe.generalist_steps if from_scratch else recipe.base_steps,
        lr=1.0e-3 if from_scratch else 6e-4,
        name=stage,
        on_step=on_step,
    )
    torch.save(average.shadow, work / f"{stage}.pt")
    if not from_scratch:
        model.load_state_dict(average.shadow)
        save_pipeline(model, tokenizer, out)


def make_teacher(recipe: Recipe, out: Path, work: Path, task: str) -> None:
    """The LoRA of one task: what its recipe's run ends with. One that was cut off goes on."""
    from opd_fast.config.command_line import parse
    from opd_fast.config.run_dir import prepare_run_dir
    from opd_fast.training.loop import train

    run_dir = work / f"teacher-{task}"
    if not (run_dir / "results.json").is_file():
        options = [f"teacher-{task}", "--model.path", str(out / "pipeline"), "--seed", str(recipe.seed)]
        options += recipe.teacher_options
        begun = (run_dir / "config.yaml").is_file()
        command = parse(["--resume", str(run_dir)] if begun else [*options, "--run-dir", str(run_dir)])
        train(command.config, prepare_run_dir(command), resume=begun)
    keep_teacher(run_dir, out / "teachers" / task)


def keep_teacher(run_dir: Path, folder: Path) -> None:
    """Put a finished run's student into `folder` in PEFT's and in diffusers' layout, with its settings and a
    `training.json` that tells seed, seconds, rewards on held-out prompts and their curve, and each round's mean reward
    in training."""
    from opd_fast.reporting.telemetry import read_metrics

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        shutil.copyfile(run_dir / "student" / name, folder / name)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = "bundled"
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    lines = read_metrics(run_dir / "metrics.jsonl")
    curve = [
        {"round": line["round"], "seconds": line["time"], "rewards": line["evaluation"]}
        for line in lines
        if "evaluation" in line
    ]
    drawn = [line[f"reward/{folder.name}"] for line in lines if "loss" in line]
    told = {"recipe": f"teacher-{folder.name}", **results, "curve": curve, "training_rewards": drawn}
    (folder / "training.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def save_pipeline(model: TextToVelocity, tokenizer: Any, out: Path) -> None:
    """The whole pipeline in diffusers' layout, weights in half precision."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer.half().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=load_vae(out),
        text_encoder=model.encoders[0].half().eval(),
        tokenizer=tokenizer,
        text_encoder_2=model.encoders[1].half().eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(out / "pipeline")
    open_to_umask(*(file for file in (out / "pipeline").rglob("*") if file.is_file()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).resolve().parents[1] / "assets"
    parser.add_argument("--out", type=Path, default=default_out, help="where the bundle goes (default: the package)")
    parser.add_argument("--work", type=Path, default=Path("bundle-work"), help="intermediate weights")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--set", type=json.loads, default={}, help="sizes as JSON, e.g. '{\"generalist_steps\": 100}'")
    arguments = parser.parse_args()
    recipe = Recipe(**arguments.set)
    arguments.work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        log(f"stage {stage}")
        if stage == "prompts":
            write_prompts(arguments.out)
        elif stage == "vae":
            train_vae(recipe, arguments.out)
        elif stage in ("generalist", "base"):
            train_generator(recipe, arguments.out, arguments.work, stage=stage)
        else:
            for task in shapes.TASKS:
                make_teacher(recipe, arguments.out, arguments.work, task)


if __name__ == "__main__":
    main()
