"""Random settings, files and other inputs against everything that reads them: each ends in one clean line, or right.

    python -m tests.fuzz [--configs 2000] [--files 500] [--prompts 1000] [--weights 300] [--rewards 500] [--draws 50]
                         [--seed 0] [--out FILE.json]

Prompt files are made in tests/fuzz_prompts.py; weights under other names, rewards and evaluations in
tests/fuzz_inputs.py.

A case is made from (seed, index) alone, so that any one can be made again. Prints what went wrong, and ends with
status 1 if anything did.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import torch
import yaml
from safetensors.torch import load_file, save_file

from opd_fast.config.command_line import SWITCHES, parse
from opd_fast.config.serialize import flatten, leaves, sections, teacher_leaves
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError, is_ours
from opd_fast.models import load_model
from opd_fast.models.base import DiffusionModel
from opd_fast.models.lora.files import match, read_lora, save_lora
from opd_fast.models.lora.load import load_with_source
from opd_fast.training.checkpoint import Checkpoints
from opd_fast.training.problems import problems
from tests.runs import random_lora
from tests.tiny import save_tiny

SECONDS = 20
"""After which a case counts as hanging."""
LONGEST = 2000
"""Characters of an error that can still be read."""
GOOD = ("refused", "taken", "help")


class Hang(BaseException):
    """A case took longer than `SECONDS`; no `except Exception` catches it."""


@dataclass
class Tally:
    """What became of the cases of one kind."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, outcome: str, case: str, detail: str = "") -> None:
        self.counts[f"{kind}: {outcome}"] += 1
        if outcome not in GOOD:
            self.faults.append(f"{kind}: {outcome}: {case}\n{detail}")
            print(self.faults[-1], file=sys.stderr, flush=True)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises `Hang` in a block that takes too long."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(run: Callable[[], str]) -> tuple[str, str]:
    """(what became of a case, its detail); `run` returns "taken" or what is wrong with what was taken."""
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return run(), ""
    except Hang:
        return "hang", traceback.format_exc(limit=-6)
    except SystemExit as leave:
        return ("help" if leave.code in (0, None) else "left without a word"), str(leave)
    except ValueError as error:
        if not isinstance(error, UserError) and not is_ours(error.__traceback__):
            return "traceback", traceback.format_exc(limit=-6)
        if not str(error).strip() or (isinstance(error, UserError) and len(str(error)) > LONGEST):
            return "unreadable error", str(error)[:LONGEST]
        return "refused", str(error)
    except Exception:
        return "traceback", traceback.format_exc(limit=-6)


# --- settings ---------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**12, 10**30, -(2**63)),
    *(3.5, -0.0, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan),
    *("", " ", "auto", "on", "off", "null", "~", "bundled", "bundled/text", "1e-3", "0x10", "1_000", "2020-01-01"),
    *("no/such", "/", "..", "~no-such-user/x", "a\nb", "a\x00b", "x" * 5000, "[" * 3000, "ü\U0001f600"),
    *("{", "[1", "*a", "&a 1", "!!python/name:os.system", ":", "json:loads", "no.module:Thing", "a:b:c"),
    *([], [1], [0.9, 0.999], [[]], ["attn.to_q"], {}, {"a": 1}, {"name": "t"}, [{"name": "t"}]),
)
TEACHERS: tuple[dict[str, Any], ...] = (
    {"name": "text", "weights": "bundled/text", "prompts": "bundled/text", "reward": "text"},
    {"name": "colour", "weights": "bundled/colour", "prompts": "bundled/colour", "guidance": 2.0},
)


def likely(rng: random.Random, hint: Any, default: Any) -> Any:
    """A value that may well be accepted."""
    choices = get_args(hint)
    if getattr(hint, "__origin__", None) is Literal:
        return rng.choice(choices)
    if hint is bool:
        return rng.random() < 0.5
    if hint is int or int in choices:
        return rng.choice([1, 2, 3, 4, 8, 16, 32, 64, 0, None if type(None) in choices else 5])
    if hint is float or float in choices:
        return rng.choice([0.1, 0.5, 0.9, 1.0, 2.0, 4.5, 1e-4])
    return default


def random_case(rng: random.Random, folder: Path) -> tuple[list[str], bool, dict[str, Any]]:
    """(command line, whether it holds a key that does not exist, values that must come out as they went in)."""
    known = leaves()
    data: dict[str, Any] = {"model": {"path": "bundled"}, "teachers": [dict(t) for t in TEACHERS]}
    unknown = False
    expected: dict[str, Any] = {}
    argv: list[str] = []

    tame = rng.random() < 0.4  # else hardly any case of several changes would be accepted

    def value(hint: Any, default: Any) -> Any:
        return likely(rng, hint, default) if tame or rng.random() < 0.6 else rng.choice(ODD)

    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        key = rng.choice(list(known))
        section, name = key.split(".")
        chosen = value(known[key][0], known[key][1])
        data.setdefault(section, {})[name] = chosen
        expected[key] = chosen
    if not tame and rng.random() < 0.1:
        key = misspelt(rng, rng.choice(list(known)))
        section, name = key.split(".", 1) if "." in key else (key, "x")
        unknown = section not in sections() or name not in {k.split(".")[1] for k in known if k.startswith(section)}
        held = data.setdefault(section, {})
        if isinstance(held, dict):
            held[name] = rng.choice(ODD)
    if not tame and rng.random() < 0.3:
        teacher = rng.choice(data["teachers"])
        fields = teacher_leaves()
        name = rng.choice([*fields, misspelt(rng, rng.choice(list(fields)))])
        unknown |= name not in fields
        teacher[name] = value(*fields[name][:2]) if name in fields else rng.choice(ODD)
    if not tame and rng.random() < 0.05:
        data[rng.choice([*sections(), "teachers"])] = rng.choice(ODD)
        expected = {}
    text = yaml.dump(data, sort_keys=False, allow_unicode=True)
    if not tame and rng.random() < 0.2:
        text, expected, unknown = damaged_text(rng, text), {}, False
    file = folder / "case.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))

    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        if not tame and rng.random() < 0.08:
            option = "--" + misspelt(rng, rng.choice(list(known)))
            unknown |= option not in {*SWITCHES, *(f"--{key}" for key in known)}
            argv.append(option)
            argv.append("1")
            continue
        key = rng.choice(list(known))
        hint, default, _ = known[key]
        chosen = value(hint, default)
        words = chosen if isinstance(chosen, str) else json.dumps(chosen)
        argv += [f"--{key}={words}"] if rng.random() < 0.5 else [f"--{key}", words]
        if isinstance(chosen, str) or words in ("NaN", "Infinity", "-Infinity"):
            expected.pop(key, None)  # a word of the command line is read as YAML would
        else:
            expected[key] = chosen
    if rng.random() < 0.05:
        argv.append(rng.choice(["--help", "--", "-x", "two", "--teachers", "--seed", "--resume", "--train", "--a=b"]))
        expected = {}
    if rng.random() < 0.1:
        argv += [rng.choice(["--seed", "--devices", "--gpu-memory"]), str(rng.choice([0, 1, 3, 8, -1, 2.5, "x", 1e9]))]
        expected.pop("train.seed", None)
    recipe = str(file)
    if rng.random() < 0.04:
        words = [str(odd) for odd in ODD if isinstance(odd, str)]
        argv += [rng.choice(["--run-dir", "--resume"]), rng.choice(words)]
        recipe = rng.choice([recipe, rng.choice(words)])
        expected, unknown = {}, False
    return [recipe, "--dry-run", *argv], unknown, expected


def misspelt(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word))
    change = rng.choice(["drop", "double", "swap", "other", "tail"])
    if change == "drop":
        return word[:place] + word[place + 1 :]
    if change == "double":
        return word[:place] + word[place] + word[place:]
    if change == "swap":
        return word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
    return word + ".extra" if change == "tail" else rng.choice(["", "x", "train", "__class__", "validate", "ü"])


def damaged_text(rng: random.Random, text: str) -> str:
    a, b = sorted(rng.sample(range(len(text) + 1), 2))
    kind = rng.choice(
        ["cut", "cut", "hole", "hole", "byte", "byte", "twice", "tabs", "deep", "aliases", "list", "nothing"]
    )
    if kind == "byte":
        return text[:a] + rng.choice(["\x00", "\ud800", "{", "}", "- ", ": ", "&a", "*a", "%"]) + text[a:]
    if kind == "aliases":  # doubles twenty times when written out
        names = "abcdefghijklmnopqrstu"
        return "a: &a [1,1]\n" + "".join(f"{n}: &{n} [*{m}, *{m}]\n" for m, n in pairwise(names))
    return {
        "cut": text[:a],
        "hole": text[:a] + text[b:],
        "twice": text + text,
        "tabs": text.replace("  ", "\t"),
        "deep": "model: " + "[" * 3000,
        "list": "- 1\n- 2\n",
        "nothing": "",
    }[kind]


def run_config(argv: list[str], unknown: bool, expected: dict[str, Any]) -> str:
    """Parse, validate and plan as the command line does."""
    command = parse(argv)
    if unknown:
        return "unknown key taken"
    plan = make_plan(command.config, command.devices, command.gpu_memory)
    if not all(isinstance(size, int) and size >= 0 for size in [*plan.bytes.values(), *plan.sent.values()]):
        return "a plan of impossible numbers"
    for error in problems(command.config):
        assert isinstance(error, UserError)
    found = flatten(command.config)
    for key, value in expected.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and found.get(key) != value:
            return f"{key} became {found.get(key)!r}, not {value!r}"
    return "taken"


def fuzz_configs(count: int, seed: int) -> Tally:
    """`count` random command lines with YAML files."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            rng = random.Random(f"config {seed} {index}")
            argv, unknown, expected = random_case(rng, Path(folder))

            def run(argv: list[str] = argv, unknown: bool = unknown, expected: Any = expected) -> str:
                return run_config(argv, unknown, expected)

            outcome, detail = outcome_of(run)
            text = (Path(folder) / "case.yaml").read_text(encoding="utf-8", errors="replace")
            tally.add("config", outcome, f"seed {seed} index {index} {argv[1:]}"[:600], f"{text[:600]}\n{detail}")
    return tally


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Whole files of each kind, and the model that they are for."""

    folder: Path
    model: DiffusionModel
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    state: dict[str, torch.Tensor]
    meta: dict[str, Any]

    @classmethod
    def make(cls, folder: Path) -> World:
        pipeline = save_tiny(folder / "pipeline")
        model = load_model(str(pipeline), device="cpu", dtype=torch.float32)
        tensors = random_lora(0)
        save_lora(folder / "peft", tensors, rank=3, alpha=6)
        (folder / "diffusers").mkdir()
        shutil.move(folder / "peft" / "pytorch_lora_weights.safetensors", folder / "diffusers")
        shutil.copytree(pipeline / "transformer", folder / "whole")
        state = {"student.a": torch.randn(4, 3), "optimizer.0.step": torch.tensor(3.0), "b": torch.arange(5)}
        meta = {"rows": {"base": {"text": 0.5}}, "train_seconds": 1.5, "total_seconds": 2.5}
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        checkpoints.save(4, state, meta)
        checkpoints.wait()
        return cls(folder, model, tensors, state, {"round": 4, **meta})


def damage_bytes(rng: random.Random, file: Path) -> str:
    """Damage that needs no knowledge of the format; its name."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(
        ["truncated", "bit flip", "bit flip in the header", "empty", "zeros", "junk", "longer", "a folder"]
    )
    if kind == "truncated":
        data = data[: rng.randrange(len(data))]
    elif kind == "bit flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "bit flip in the header":
        data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
    elif kind == "empty":
        data = bytearray()
    elif kind == "zeros":
        data = bytearray(len(data))
    elif kind == "junk":
        data = bytearray(rng.randbytes(len(data)))
    elif kind == "longer":
        data += rng.randbytes(rng.choice([1, 8, 1000]))
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    else:
        file.write_bytes(bytes(data))
    return kind


def damage_tensors(rng: random.Random, file: Path) -> str:
    """Damage that leaves a well-formed safetensors file; its name."""
    kind = rng.choice(["wrong header", "dtype", "label", "NaN", "renamed", "dropped", "reshaped", "extra", "no tensor"])
    if kind in ("wrong header", "label"):
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        key = rng.choice([k for k in header if k != "__metadata__"])
        if kind == "label":
            header[key]["dtype"] = rng.choice(["I32", "U32", "F16", "BF16", "F8_E4M3", "BOOL", "F99", 7])
        else:
            header[key][rng.choice(["shape", "data_offsets"])] = rng.choice(
                [[], [1], [-1, 3], [10**9, 10**9], "x", None]
            )
        new = json.dumps(header).encode()
        size = rng.choice([len(new), len(new), 2**62, 0]) if kind == "wrong header" else len(new)
        file.write_bytes(struct.pack("<Q", size) + new + data[8 + struct.unpack("<Q", data[:8])[0] :])
        return kind
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    if kind == "dtype":
        dtypes = [
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int32,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
        ]
        dtype = rng.choice(dtypes)
        kind = f"dtype {dtype}".replace("torch.", "")
        for name in tensors if rng.random() < 0.5 else [key]:
            tensors[name] = tensors[name].to(dtype)
    elif kind == "NaN":
        key = next(k for k in sorted(tensors, key=lambda _: rng.random()) if tensors[k].is_floating_point())
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[rng.randrange(tensors[key].numel())] = rng.choice([math.nan, math.inf])
    elif kind == "renamed":
        tensors[rng.choice([key + "x", "x" + key, "", key.replace("lora_A", "lora_C"), key.upper()])] = tensors.pop(key)
    elif kind == "dropped":
        del tensors[key]
    elif kind == "reshaped":
        tensors[key] = torch.cat([tensors[key].reshape(-1), tensors[key].reshape(-1)])
    elif kind == "extra":
        tensors[rng.choice(["x", "base_model.model.x.lora_A.weight", key + ".alpha"])] = torch.zeros(3, 8)
    elif kind == "no tensor":
        tensors = {}
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata=metadata)
    return kind


def damage_json(rng: random.Random, file: Path) -> str:
    """A well-formed JSON file with other values; its name."""
    data = json.loads(file.read_text())
    key = rng.choice(["r", "lora_alpha", *data]) if "r" in data else rng.choice(list(data))
    change = rng.choice(["value", "value", "value", "dropped", "list"])
    if change == "list":
        file.write_text(json.dumps([data]))
        return "JSON list"
    if change == "dropped":
        data.pop(key, None)
    else:
        odd = (
            None,
            True,
            0,
            -3,
            3,
            600,
            1e308,
            math.nan,
            math.inf,
            "3",
            "x",
            "(",
            [],
            [1],
            {},
            {"(": 4},
            {".*": 9},
            10**400,
        )
        data[key] = rng.choice(odd)
    file.write_text(json.dumps(data))
    return f"JSON {change}"


def check_lora(world: World, folder: Path) -> str:
    """Read a LoRA; what is taken must be all of it, with the numbers and scales that its files hold."""
    lora = read_lora(folder, world.model)
    modules = match(lora, world.model.transformer)
    if set(modules) != set(world.tensors) or set(lora.tensors) != set(world.tensors):
        return f"a partial load: {len(modules)} of {len(world.tensors)} modules"
    file = next(folder.glob("*.safetensors"))
    prefix = "base_model.model." if file.name.startswith("adapter") else "transformer."
    held = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    for module, pair in world.tensors.items():
        for half, read, was in zip("AB", lora.tensors[module], pair, strict=True):
            if read.shape != was.shape or not torch.equal(read, held[f"{module}.lora_{half}.weight"]):
                return f"{module}.lora_{half} is not what the file holds"
            if not read.is_floating_point() or not bool(read.double().isfinite().all()):
                return f"{module}.lora_{half} holds no finite numbers"
        if lora.scale[module] != scale_of(folder, file) or not math.isfinite(lora.scale[module]):
            return f"{module} has scale {lora.scale[module]}"
    return "taken"


def scale_of(folder: Path, file: Path) -> float:
    """alpha / r as the adapter's configuration, or the file's header, has it."""
    from safetensors import safe_open

    if (folder / "adapter_config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text())
    else:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lora_adapter_metadata")
        if text is None:
            return 1.0
        config = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    by_pattern = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in by_pattern.items() if k == ".*"), config["lora_alpha"])
    return float(alpha) / (math.sqrt(3) if config.get("use_rslora") else 3)


def check_whole(world: World, folder: Path) -> str:
    """Load a transformer; what is taken must be every tensor that the file holds, in floating point."""
    transformer, _ = load_with_source(world.model, str(folder), what="weights")
    held = load_file(next(folder.glob("*.safetensors")))
    state = transformer.state_dict()
    if set(held) != set(state):
        return f"a partial load: {len(set(held) & set(state))} of {len(state)} tensors"
    for name, tensor in state.items():
        if not held[name].is_floating_point() or not torch.equal(tensor, held[name].to(tensor.dtype)):
            return f"{name} is not what the file holds"
        if not bool(tensor.isfinite().all()):
            return f"{name} is not finite"
    return "taken"


def check_checkpoint(world: World, folder: Path) -> str:
    """Load a checkpoint; what is taken must be all that was saved."""
    tensors, meta = Checkpoints(folder, keep=1).load()
    if set(tensors) != set(world.state) or not all(torch.equal(t, world.state[k]) for k, t in tensors.items()):
        return "tensors that were never saved"
    return "taken" if meta == world.meta else "metadata that was never saved"


Damage = Callable[[random.Random, Path], str]
KINDS: dict[str, tuple[str, Callable[[World, Path], str], tuple[tuple[str, Damage], ...]]] = {
    "peft": (
        "peft",
        check_lora,
        (
            ("adapter_model.safetensors", damage_bytes),
            ("adapter_model.safetensors", damage_tensors),
            ("adapter_config.json", damage_bytes),
            ("adapter_config.json", damage_json),
        ),
    ),
    "diffusers": (
        "diffusers",
        check_lora,
        (
            ("pytorch_lora_weights.safetensors", damage_bytes),
            ("pytorch_lora_weights.safetensors", damage_tensors),
        ),
    ),
    "transformer": (
        "whole",
        check_whole,
        (
            ("diffusion_pytorch_model.safetensors", damage_bytes),
            ("diffusion_pytorch_model.safetensors", damage_tensors),
            ("config.json", damage_bytes),
            ("config.json", damage_json),
        ),
    ),
    "checkpoint": (
        "checkpoints",
        check_checkpoint,
        (
            ("round-000004/*.safetensors", damage_bytes),
            ("round-000004/*.safetensors", damage_tensors),
            ("round-000004/meta.json", damage_bytes),
            ("round-000004/meta.json", damage_json),
        ),
    ),
}


def fuzz_files(count: int, seed: int) -> Tally:
    """`count` damaged files, the kinds in turn."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as place:
        world = World.make(Path(place))
        for name, (source, check, _) in KINDS.items():
            assert check(world, world.folder / source) == "taken", name  # undamaged
        for index in range(count):
            rng = random.Random(f"file {seed} {index}")
            name = list(KINDS)[index % len(KINDS)]
            source, check, damages = KINDS[name]
            folder = world.folder / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(world.folder / source, folder)
            pattern, damage = rng.choice(damages)
            file = next(folder.glob(pattern))
            kind = damage(rng, file)

            def run(check: Callable[[World, Path], str] = check, folder: Path = folder) -> str:
                return check(world, folder)

            outcome, detail = outcome_of(run)
            tally.add(name, outcome, f"seed {seed} index {index} {file.name} {kind}", detail)
    return tally


# --- the command ------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """No network, no noise."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    from opd_fast.reporting.telemetry import quiet_libraries

    quiet_libraries()
    make_plan(parse(["bundled"]).config)  # the first one imports what all use


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--configs", type=int, default=2000, help="random command lines with YAML files")
    parser.add_argument("--files", type=int, default=500, help="damaged files")
    parser.add_argument("--prompts", type=int, default=1000, help="prompt files")
    parser.add_argument("--weights", type=int, default=300, help="LoRA files and transformers under other names")
    parser.add_argument("--rewards", type=int, default=500, help="rewards that return anything")
    parser.add_argument("--draws", type=int, default=50, help="evaluations with any guidance and number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    settings = parser.parse_args(argv)
    prepare()
    from tests import fuzz_inputs as inputs  # both import this file
    from tests.fuzz_prompts import fuzz_prompts

    results: dict[str, Any] = {"seed": settings.seed}
    faults: list[str] = []
    parts = {
        "files": fuzz_files,
        "prompts": fuzz_prompts,
        "weights": inputs.fuzz_weights,
        "rewards": inputs.fuzz_rewards,
        "draws": inputs.fuzz_draws,
        "configs": fuzz_configs,
    }
    for name, fuzz in parts.items():
        count = getattr(settings, name)
        begun = time.monotonic()
        tally = fuzz(count, settings.seed)
        seconds = round(time.monotonic() - begun, 1)
        results[name] = {"cases": count, "seconds": seconds, "outcomes": dict(sorted(tally.counts.items()))}
        faults += tally.faults
    print(json.dumps(results, indent=2))
    if settings.out is not None:
        settings.out.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
