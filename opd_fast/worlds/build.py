"""Build the bundled pipeline and its teachers from a seed: `python -m opd_fast.worlds.build`.

Each stage leaves its result in the output folder, so that a later one can be run again alone:

1. `prompts`: the prompt files, in the formats of GenEval and OCR.
2. `vae`: a small AutoencoderKL on rendered scenes.
3. `generalist`: tokenizers, two CLIP text encoders and the MMDiT, trained together by flow matching on true captions.
   Half of the scenes are ideal ones (`shapes.scene`): with little else left open, a caption's words are learnt sooner.
4. `base`: the generalist, weakened as web data weaken a model by some more steps with part of the captions swapped and
   without ideal scenes.
5. `teachers`: one LoRA a task on the frozen base, by reinforcement learning with the recipes `teacher-composition`
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

import torch
from torch import Tensor, nn

from opd_fast.config.paths import ASSETS
from opd_fast.files import open_to_umask
from opd_fast.training.ema import WeightAverage
from opd_fast.worlds import shapes
from opd_fast.worlds.networks import TextToVelocity, make_text_encoder, make_tokenizer, make_transformer, make_vae
from opd_fast.worlds.pools import Pool, batches, encode_pool, render_pool, write_prompts

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
    """Options added to the teachers' command lines, to try the stage in less time."""


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


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


def load_vae(out: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(out / "pipeline" / "vae").eval()


def make_pools(recipe: Recipe, out: Path, *, ideal_scenes: float) -> dict[str, Pool]:
    """Return one pool a task, `recipe.pool` scenes in all; colour's are never ideal, since its teacher adds that."""
    vae = load_vae(out)
    pools = {}
    for task, share in SHARES.items():
        total = int(recipe.pool * share)
        ideal = 0 if task == "colour" else int(total * ideal_scenes)
        counts = {False: total - ideal, True: ideal}
        parts = (encode_pool(vae, task, n, recipe.seed + 1, ideal=kind) for kind, n in counts.items() if n)
        latents, texts = zip(*parts, strict=True)
        captions = [prompt.text for prompt in shapes.prompts(task, "train")]
        pools[task] = Pool(torch.cat(latents), list(itertools.chain(*texts)), captions)
    return pools


def train_generator(recipe: Recipe, out: Path, work: Path, *, stage: str) -> None:
    """Train `generalist` from scratch on true captions, or `base` from the generalist on partly swapped ones."""
    torch.manual_seed(recipe.seed + 2)
    tokenizer = make_tokenizer(out / "pipeline" / "tokenizer")
    tokenizer.save_pretrained(out / "pipeline" / "tokenizer_2")
    model = TextToVelocity([make_text_encoder(tokenizer) for _ in range(2)], make_transformer()).train()
    if stage == "generalist":
        decay, steps, lr, ideal, swapped = 0.999, recipe.generalist_steps, 1.0e-3, recipe.ideal_scenes, 0.0
    else:
        decay, steps, lr, ideal, swapped = 0.99, recipe.base_steps, 6e-4, 0.0, recipe.swapped_captions
        model.load_state_dict(torch.load(work / "generalist.pt", weights_only=True))
    names, parameters = zip(*model.named_parameters(), strict=True)
    average = WeightAverage(parameters)
    pools = make_pools(recipe, out, ideal_scenes=ideal)
    data = batches(pools, SHARES, tokenizer, recipe.batch, swapped=swapped)

    def averaged() -> dict[str, Tensor]:
        return model.state_dict() | dict(zip(names, average.values, strict=True))

    def on_step(step: int) -> None:
        average.update(step, decay)
        if (step + 1) % 500 == 0:
            torch.save(averaged(), work / f"{stage}.pt")

    flow_matching(model, data, steps=steps, lr=lr, name=stage, on_step=on_step)
    torch.save(averaged(), work / f"{stage}.pt")
    if stage == "base":
        model.load_state_dict(averaged())
        save_pipeline(model, tokenizer, out)


def flow_matching(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    name: str,
    on_step: Callable[[int], None],
) -> None:
    """Minimise E ||v(x_t, t) - (eps - x0)||^2 over `batches` of (x0, token ids).

    The learning rate warms up to `lr`, then falls as a cosine to a twentieth of it.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, steps // 10 + 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

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
        on_step(step)
        if (step + 1) % 100 == 0:
            log(f"{name} {step + 1}/{steps} loss {total / 100:.4f} {100 / (time.time() - start):.2f} steps/s")
            total, start = 0.0, time.time()


def sample_times(n: int) -> Tensor:
    """Draw n logit-normal times (SD3, arXiv 2403.03206, section 3.1), shifted toward noise as the sampler's steps."""
    u = torch.sigmoid(torch.randn(n))
    return 1.8 * u / (1 + 0.8 * u)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, is_causal: bool = False, **__: Any
) -> Tensor:
    """Compute attention as two products; q, k, v and the result are (B, heads, tokens, width).

    On a CPU, in bfloat16, the backward pass of torch's own attention takes seven times as long.
    """
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2]) * q.shape[-1] ** -0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).to(v.dtype)
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def save_pipeline(model: TextToVelocity, tokenizer: Any, out: Path) -> None:
    """Write the whole pipeline in diffusers' layout, with weights in half precision."""
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


def make_teacher(recipe: Recipe, out: Path, work: Path, task: str) -> None:
    """Train the LoRA of one task by its recipe and keep it. A run that was cut off goes on."""
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
    """Put a finished run's student into `folder`, in PEFT's and in diffusers' layout, with a `training.json`.

    The file holds the run's results, the curve of rewards on held-out prompts, and each round's mean training reward.
    """
    from opd_fast.reporting.telemetry import read_metrics

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        shutil.copyfile(run_dir / "student" / name, folder / name)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = "bundled"
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    lines = read_metrics(run_dir / "metrics.jsonl")
    judged = [line for line in lines if "evaluation" in line]
    curve = [{"round": line["round"], "seconds": line["time"], "rewards": line["evaluation"]} for line in judged]
    drawn = [line[f"reward/{folder.name}"] for line in lines if "loss" in line]
    record = {"recipe": f"teacher-{folder.name}", **results, "curve": curve, "training_rewards": drawn}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS, help="where the bundle goes (default: the package)")
    parser.add_argument("--work", type=Path, default=Path("bundle-work"), help="intermediate weights")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--set", type=json.loads, default={}, help="sizes as JSON, e.g. '{\"generalist_steps\": 100}'")
    arguments = parser.parse_args()
    recipe, out, work = Recipe(**arguments.set), arguments.out, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stages:
        log(f"stage {stage}")
        if stage == "prompts":
            write_prompts(out)
        elif stage == "vae":
            train_vae(recipe, out)
        elif stage in ("generalist", "base"):
            train_generator(recipe, out, work, stage=stage)
        else:
            for task in shapes.TASKS:
                make_teacher(recipe, out, work, task)


if __name__ == "__main__":
    main()
