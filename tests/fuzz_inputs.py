"""Random weights under other names, rewards, and evaluations; `python -m tests.fuzz` runs them beside its own.

- `weights`: LoRA files and transformers under other names (wrappers' prefixes, variants, shards, quantised tensors).
- `rewards`: rewards that return anything.
- `draws`: evaluations with any guidance, and with fewer prompts than are asked for.

Of each case the same is asked: it is refused in one clean line, or what is taken is wholly right.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from opd_fast import evaluate
from opd_fast.data.prompt_files import Prompt
from opd_fast.models.lora.files import DIFFUSERS_WEIGHTS, match, read_lora
from opd_fast.models.lora.load import load_with_source
from opd_fast.rewards.runner import RewardFailure, call_reward
from tests.fuzz import Tally, World, outcome_of

# --- weights ----------------------------------------------------------------------------------------------------------

PREFIXES = (
    *("", "transformer.", "diffusion_model.", "base_model.model.", "_orig_mod.", "module.", "model.diffusion_model."),
    *("module._orig_mod.", "transformer._orig_mod.", "base_model.model._orig_mod.", "unet.", "model."),
)
HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))


def named_lora(rng: random.Random, tensors: dict[str, Any], file: Path) -> str:
    """A LoRA file under other names; the kind. Each module stands in it once, or twice where that is the kind."""
    kind = rng.choice(["one prefix", "mixed prefixes", "kohya", "dots", "wrapped inside", "twice", "spaces"])
    prefix, half = rng.choice(PREFIXES), rng.choice(HALVES)
    again = rng.choice([other for other in PREFIXES if other != prefix])
    state: dict[str, torch.Tensor] = {}
    for index, (module, pair) in enumerate(tensors.items()):
        name = module
        if kind == "mixed prefixes":
            prefix = rng.choice(PREFIXES)
        elif kind == "kohya":
            prefix, name = "lora_unet_", module.replace(".", "_")
            half = HALVES[1]
        elif kind == "dots" and index % 2:
            name = module.replace("to_q", "to.q").replace("to_v", "to.v")
        elif kind == "wrapped inside":
            name = module.replace(".attn", rng.choice(["._orig_mod.attn", ".module.attn", ".attn._orig_mod"]))
        elif kind == "spaces":
            name = rng.choice([f" {module}", f"{module} ", module.upper()])
        for letter, tensor in zip(half, pair, strict=True):
            state[f"{prefix}{name}.{letter}.weight"] = tensor.contiguous()
            if kind == "twice" and index == 0:
                state[f"{again}{name}.{letter}.weight"] = tensor * 2
    save_file(state, file, metadata={"format": "pt"})
    return f"{kind} {prefix!r} {half[0]}"


def check_named_lora(world: World, file: Path) -> str:
    """What is taken must be every module, with its own numbers, at the scale 1 of a file that states no alpha."""
    lora = read_lora(file, world.model)
    modules = match(lora, world.model.transformer)
    if set(modules) != set(world.tensors):
        return f"a partial load: {len(modules)} of {len(world.tensors)} modules"
    for module, pair in world.tensors.items():
        if not all(torch.equal(read, was) for read, was in zip(lora.tensors[module], pair, strict=True)):
            return f"{module} is not what the file holds"
        if lora.scale[module] != 1:
            return f"{module} has scale {lora.scale[module]}"
    return "taken"


def renamed_transformer(rng: random.Random, folder: Path) -> str:
    """A whole transformer's folder in another form; the kind."""
    file = next(folder.glob("*.safetensors"))
    kind = rng.choice(
        ["variant", "both", "ema", "shards", "a shard gone", "pickle", "quantised", "int8", "prefix", "half"]
    )
    state, config = load_file(file), json.loads((folder / "config.json").read_text())
    plain = {key: tensor.contiguous() for key, tensor in state.items()}
    if kind in ("variant", "ema"):
        file.rename(
            file.with_name(
                file.name.replace(".safe", f".{rng.choice(['fp16', 'bf16']) if kind == 'variant' else kind}.safe")
            )
        )
    elif kind == "both":
        noise = {key: tensor + 1 for key, tensor in plain.items()}
        save_file(noise, file.with_name(file.name.replace(".safe", ".fp16.safe")), metadata={"format": "pt"})
    elif kind in ("shards", "a shard gone"):
        keys = sorted(plain)
        names = [
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00002-of-00002.safetensors",
        ]
        places = {key: names[index % 2] for index, key in enumerate(keys)}
        for name in names:
            save_file({k: plain[k] for k in keys if places[k] == name}, folder / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        file.unlink()
        if kind == "a shard gone":
            (folder / rng.choice(names)).unlink()
    elif kind == "pickle":
        torch.save(plain, folder / "diffusion_pytorch_model.bin")
        file.unlink()
    elif kind == "quantised":
        method = rng.choice(["bitsandbytes", "gguf", "torchao", "quanto", "nonsense"])
        config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(config))
    elif kind in ("int8", "half"):
        dtype = torch.int8 if kind == "int8" else rng.choice([torch.float16, torch.bfloat16, torch.float8_e4m3fn])
        key = rng.choice(sorted(plain))
        plain = {k: t.to(dtype) if kind == "half" or k == key else t for k, t in plain.items()}
        save_file(plain, file, metadata={"format": "pt"})
    elif kind == "prefix":
        prefix = rng.choice(PREFIXES[1:])
        some = rng.random() < 0.3
        plain = {(key if some and i % 2 else prefix + key): t for i, (key, t) in enumerate(plain.items())}
        save_file(plain, file, metadata={"format": "pt"})
    return kind


def check_renamed(world: World, folder: Path, kind: str) -> str:
    """What is taken must be the transformer's own numbers, to the rounding of a file in half precision."""
    transformer, _ = load_with_source(world.model, str(folder), what="weights")
    own = load_file(next((world.folder / "whole").glob("*.safetensors")))
    allowed = 0.07 if kind == "half" else 0.0  # of float8: three bits of mantissa
    for name, tensor in transformer.state_dict().items():
        if not torch.allclose(tensor.float(), own[name].float(), rtol=allowed, atol=allowed * 0.05):
            return f"{name} is not what the file holds"
    return "taken"


def fuzz_weights(count: int, seed: int) -> Tally:
    """`count` LoRA files and whole transformers under other names, in turn."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        world = World.make(Path(place))
        for index in range(count):
            rng = random.Random(f"weights {seed} {index}")
            case = world.folder / "case"
            shutil.rmtree(case, ignore_errors=True)
            if index % 2:
                shutil.copytree(world.folder / "whole", case)
                kind = renamed_transformer(rng, case)

                def run(case: Path = case, kind: str = kind) -> str:
                    return check_renamed(world, case, kind)
            else:
                case.mkdir()
                kind = named_lora(rng, world.tensors, case / DIFFUSERS_WEIGHTS)

                def run(case: Path = case, kind: str = kind) -> str:
                    return check_named_lora(world, case / DIFFUSERS_WEIGHTS)

            outcome, detail = outcome_of(run)
            tally.add(
                "names of a " + ("transformer" if index % 2 else "LoRA"),
                outcome,
                f"seed {seed} index {index} {kind}",
                detail,
            )
    return tally


# --- rewards ----------------------------------------------------------------------------------------------------------


def returned(rng: random.Random, count: int) -> tuple[Any, list[float] | None, bool, str]:
    """What a reward returns for `count` images, the numbers that it means (None: none), whether they must be taken
    (else they may be refused), and its kind."""
    values = [round(rng.uniform(-2, 2), 3) for _ in range(count)]
    wide = np.array([*values, 9.0])
    good: list[tuple[str, Any]] = [
        ("list", values),
        ("tuple", tuple(values)),
        ("array", np.array(values)),
        ("array32", np.array(values, np.float32)),
        ("tensor", torch.tensor(values)),
        ("float64", torch.tensor(values, dtype=torch.float64)),
        ("with gradient", torch.tensor(values, requires_grad=True)),
        ("strided", torch.tensor(wide)[:-1]),
        ("numbers of numpy", [np.float64(v) for v in values]),
        ("tensors", [torch.tensor(v) for v in values]),
    ]
    open_: list[tuple[str, Any]] = [
        ("column", torch.tensor(values)[:, None]),
        ("sparse", torch.tensor(values).to_sparse()),
        ("generator", (v for v in values)),
        *([("one", values[0])] if count == 1 else []),
    ]
    bad: list[tuple[str, Any]] = [
        ("None", None),
        ("text", "1" * count),
        ("texts", [str(v) for v in values]),
        *([("one", 1.0)] if count > 1 else []),
        ("dict", {0: values}),
        ("too many", [*values, 1.0]),
        ("too few", values[1:]),
        ("empty", []),
        ("NaN", [math.nan, *values[1:]]),
        ("infinite", torch.tensor([math.inf, *values[1:]])),
        ("a None", [None, *values[1:]]),
        ("beyond float32", [1e300, *values[1:]]),
        ("complex", torch.tensor(values, dtype=torch.complex64) + 1j),
        ("complex array", np.array(values) + 1j),
        ("objects", np.array([object()] * count)),
        ("itself", returned),
        ("ragged", [values, 1.0]),
        ("meta", torch.empty(count, device="meta")),
        ("huge integer", [10**400, *values[1:]]),
        ("bytes", b"x" * count),
        ("set", {1.0}),
    ]
    group, means = rng.choice([(good, "numbers"), (good, "numbers"), (open_, "perhaps"), (bad, "none"), (bad, "none")])
    kind, value = rng.choice(group)
    return value, values if means != "none" else None, means == "numbers", kind


ERRORS = (ValueError, KeyError, SystemExit, MemoryError, RecursionError, StopIteration, AssertionError, AttributeError)


def check_reward(rng: random.Random) -> tuple[str, Callable[[], str]]:
    count = rng.choice([1, 2, 5])
    value, meant, plain, kind = returned(rng, count)
    raising = rng.choice(ERRORS) if rng.random() < 0.15 else None

    def reward(images: torch.Tensor, prompts: Any) -> Any:
        if raising is not None:
            raise raising(rng.choice(["", "a\nb", "x" * 10_000]))
        return value

    def run() -> str:
        try:
            scores = call_reward(reward, torch.zeros(count, 3, 8, 8), [Prompt("x")] * count, rng.choice([None, 20.0]))
        except RewardFailure as failure:
            fine = "\n" not in str(failure) and failure.values.shape == (count,)
            if plain and raising is None:
                return f"numbers are refused: {failure}"
            return "refused" if fine else f"an unreadable failure: {failure!r}"[:300]
        if raising is not None or scores.dtype != torch.float32 or not bool(scores.isfinite().all()):
            return f"{scores} taken"
        if meant is None:
            return f"{kind} taken as {scores.tolist()}"
        right = scores.shape == (count,) and torch.allclose(scores, torch.tensor(meant))
        return "taken" if right else f"{scores} for {meant}"

    return kind if raising is None else raising.__name__, run


def fuzz_rewards(count: int, seed: int) -> Tally:
    """`count` rewards that return or raise anything."""
    tally = Tally()
    for index in range(count):
        kind, run = check_reward(random.Random(f"rewards {seed} {index}"))
        outcome, detail = outcome_of(run)
        tally.add("reward", outcome, f"seed {seed} index {index} {kind}", detail)
    return tally


# --- draws ------------------------------------------------------------------------------------------------------------

GUIDANCE = ("0", "0.5", "1", "1.0", "4.5", "-1", "-0.0", "nan", "inf", "-inf", "1e-30", "1e30", "x", "")


def fuzz_draws(count: int, seed: int) -> Tally:
    """`count` evaluations of a small model with any guidance, and with fewer prompts than are asked for."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        world = World.make(Path(place))
        for index in range(count):
            rng = random.Random(f"draws {seed} {index}")
            guidance, held, limit = rng.choice(GUIDANCE), rng.choice([1, 2, 3]), rng.choice([1, 2, 64, None])
            (world.folder / "p.txt").write_text("".join(f"a cup {i}\n" for i in range(held)))
            out = world.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            argv = ["--model", str(world.folder / "pipeline"), "--prompts", str(world.folder / "p.txt"), "--grid", "0"]
            argv += [
                "--rewards",
                "colour",
                "--steps",
                "1",
                "--resolution",
                "16",
                f"--guidance={guidance}",
                "--out",
                str(out),
            ]
            argv += [] if limit is None else ["--limit", str(limit)]

            def run(
                argv: list[str] = argv, held: int = held, limit: int | None = limit, out: Path = out, g: str = guidance
            ) -> str:
                if evaluate.main(argv) != 0:  # the command line has told it in one line
                    late = out.exists() and g != "1e30"  # which only drawing shows to be too much
                    return "refused after it began" if late else "refused"
                found = json.loads((out / "results.json").read_text())
                value = found["rewards"]["p"]["colour"]
                if found["prompts"]["p"] != min(held, limit or held):
                    return f"{found['prompts']} of {held} prompts, limit {limit}"
                return "taken" if isinstance(value, float) and math.isfinite(value) else f"colour {value}"

            outcome, detail = outcome_of(run)
            tally.add("draws", outcome, f"seed {seed} index {index} guidance {guidance} {held} of {limit}", detail)
    return tally
