"""The identity of the sources that a run's numbers follow from, and its comparison when a run is resumed.

`identify` hashes the files and prompts that the settings name, and `compare` checks them against what the checkpoint
recorded. Prompts count with their texts, metadata and order, whatever file holds them; files count with their content,
wherever they lie. `digest` says which edits of large weights it sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from opd_fast.config import Config
from opd_fast.config.methods.spec import method_spec
from opd_fast.config.paths import BASE, MERGED, is_bundled, resolve_source
from opd_fast.config.serialize import flatten, from_dict, leaves, refuse_unsafe_changes, sections, teacher_leaves
from opd_fast.errors import UserError

Sources = dict[str, dict[str, str]]
"""By setting: {file below the path that it names, or "" for the path itself: the hash of its content}."""

WHOLE_FILE = 64 * 2**20
"""Bytes up to which a file of weights is hashed from end to end."""
SAMPLE = 4096
"""Bytes of each sample of a larger file."""
STRIDE = 4 * 2**20
"""Bytes of a tensor for each of its samples; a tensor has at least three samples."""
_READ = (".safetensors", ".json", ".txt", ".model", ".jinja")  # what components are loaded from
_WEIGHTED = ("transformer", "vae", "text_encoder")
_PARTS = (*_WEIGHTED, "scheduler", "tokenizer")
_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*")  # which no component is loaded from
_MAY_CHANGE = {
    "student.start": "the run goes on from its checkpoint, which no longer depends on it",
    "model.family": "the rounds before were computed by the former code",
    "libraries": "the numbers may differ by rounding from those of a run that never stopped",
    "model.dtype": "the rounds before were computed in the former",
}
"""Sources whose change is reported and not refused, and why. A reward of the user's own is treated likewise, because
fixing one is a reason to resume."""
_REWARD = "the rounds before learnt from, or were judged by, the former code"


def digest(file: Path) -> str:
    """The SHA-256, in hexadecimal, of a file's content.

    A safetensors file above `WHOLE_FILE` bytes, which takes long to read, counts with its size, its header (names,
    dtypes, shapes, metadata) and, of each tensor, samples of `SAMPLE` bytes: the first, the last, and one in each
    `STRIDE` bytes between. That sees whatever changes a tensor as a whole (training, merging, another precision,
    another tensor) and misses a change of single numbers between the samples.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        if size > WHOLE_FILE and file.suffix == ".safetensors" and (ends := _tensors(content, size)) is not None:
            found = hashlib.sha256(str(size).encode())
            content.seek(0)
            found.update(content.read(ends[0][0]))
            for begin, end in ends[1:]:
                for place in _places(begin, end):
                    content.seek(place)
                    found.update(content.read(min(SAMPLE, end - place)))
            return found.hexdigest()
        return hashlib.file_digest(content, "sha256").hexdigest()


def _tensors(content: Any, size: int) -> list[tuple[int, int]] | None:
    """(begin, end) of a safetensors file's tensors in bytes, after (end of the header, size); None if it is damaged."""
    length = int.from_bytes(content.read(8), "little")
    if length > size - 8:
        return None
    try:
        header = json.loads(content.read(length))
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        found = sorted((8 + length + int(begin), 8 + length + int(end)) for begin, end in spans)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return [(8 + length, size), *found]


def _places(begin: int, end: int) -> list[int]:
    """Where the samples of a tensor begin: spread evenly, the first at its begin and the last at its end."""
    last = max(begin, end - SAMPLE)
    count = max(2, (end - begin) // STRIDE)
    return sorted({begin + (last - begin) * i // count for i in range(count + 1)})


# --- what there is ---------------------------------------------------------------------------------------------------


def identify(config: Config) -> Sources:
    """Hash the content of each source that `config` names.

    A source that cannot be read, and one of the hub that has not been fetched yet, is left out: loading it reports what
    is wrong with it, or fetches it.
    """
    from opd_fast.distributed.resolve import resolve

    found = {"model.path": pipeline_hashes(config.model.path), "model.family": _family(config.model.family)}
    found["libraries"] = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    found["model.dtype"] = {"": str(resolve(config).dtype).removeprefix("torch.")}
    found["student.start"] = weights_hashes(config.student.start, MERGED)
    found["objective.anchor"] = weights_hashes(config.objective.anchor, BASE)
    for teacher in config.teachers:
        name = f"teachers.{teacher.name}"
        if method_spec(config).has_teachers:
            found[f"{name}.weights"] = weights_hashes(teacher.weights)
        found[f"{name}.prompts"] = _prompts(teacher.prompts, "train")
        if config.evaluates(teacher) and (teacher.eval_prompts or is_bundled(teacher.prompts)):
            found[f"{name}.eval_prompts"] = _prompts(teacher.eval_prompts or teacher.prompts, "test")
        if teacher.reward is not None:
            found[f"{name}.reward"] = _reward(teacher.reward)
    return {key: files for key, files in found.items() if files}


def pipeline_hashes(name: str) -> dict[str, str]:
    """The files that a pipeline's components are loaded from; a folder of another kind counts with its own files.

    Nothing is fetched: a pipeline that is not on this machine yet has none.
    """
    source = resolve_source(name, "pipeline")
    folder = source.path
    if folder is None:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source.repo, local_files_only=True))
        except Exception:  # the hub's errors share no base
            return {}
    with contextlib.suppress(OSError):
        if not folder.is_dir():
            return {"": digest(folder)}
        parts = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.startswith(_PARTS)]
        files = [folder / "model_index.json"] if parts else _loaded(folder)
        for part in parts:
            inside = _loaded(part)
            # Of a hub model, components that the run leaves out have their configuration in the cache and no more.
            if not part.name.startswith(_WEIGHTED) or any(file.suffix == ".safetensors" for file in inside):
                files += inside
        return {file.relative_to(folder).as_posix(): digest(file) for file in files if file.is_file()}
    return {}


def _loaded(folder: Path) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.suffix in _READ and file.is_file())
    return [file for file in files if not any(fnmatch(file.name, variant) for variant in _VARIANTS)]


def weights_hashes(path: str | None, own: str | None = None) -> dict[str, str]:
    """The files of a LoRA or of a whole transformer on this machine; none for no weights or the pipeline's `own`."""
    from opd_fast.models.lora.files import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS

    local = None if path is None or path == own else resolve_source(path, "teachers").path
    if local is None:
        return {}
    with contextlib.suppress(OSError):
        if local.is_file():
            return {"": digest(local)}
        for names in ((PEFT_CONFIG, PEFT_WEIGHTS), (DIFFUSERS_WEIGHTS,)):
            if (files := [local / name for name in names if (local / name).is_file()]) != []:
                return {file.name: digest(file) for file in files}
        folder = local / "transformer" if (local / "transformer").is_dir() else local
        return {file.name: digest(file) for file in _loaded(folder)} if folder.is_dir() else {}
    return {}


def _prompts(source: str, split: Any) -> dict[str, str]:
    """The prompts as the run sees them: texts and metadata, in their order."""
    from opd_fast.data.prompt_files import load_prompts

    try:
        prompts = load_prompts(source, split)
    except (ValueError, OSError):
        return {}
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(json.dumps([prompt.text, prompt.metadata], sort_keys=True, default=str).encode() + b"\n")
    return {"": found.hexdigest()}


def _reward(text: str) -> dict[str, str]:
    """The files that the user's own rewards are written in: those of the module named and of the function itself."""
    from opd_fast.rewards import get_reward, reward_terms

    found: dict[str, str] = {}
    with contextlib.suppress(ValueError, OSError):
        for name in (term.reward for term in reward_terms(text) if ":" in term.reward):
            function = get_reward(name)  # imports its module
            found |= code_hashes(sys.modules.get(name.partition(":")[0]), function)
    return found


def _family(name: str) -> dict[str, str]:
    """The file of a family of the user's own."""
    from opd_fast.models import find_family

    with contextlib.suppress(ValueError, OSError):
        if ":" in name:
            return code_hashes(find_family(name, Path))
    return {}


def code_hashes(*made: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for thing in made:
        with contextlib.suppress(TypeError, OSError):  # what has no source file
            if (file := inspect.getsourcefile(inspect.unwrap(thing))) is not None:
                found[Path(file).name] = digest(Path(file))
    return found


# --- what changed ----------------------------------------------------------------------------------------------------


def compare(folder: Path, meta: dict[str, Any], config: Config, found: Sources, *, staged: bool = False) -> list[str]:
    """Hold a run that goes on with `config` to what its checkpoint recorded.

    `meta` is the checkpoint's metadata, with `settings` (`to_dict`) and `sources` (`identify`), and `found` is what
    `identify` finds now. A source that only one of the two has is passed over. `staged` says that the run is a stage of
    another, with which its `student.start` moves.

    Returns lines for the user: what changed and may change, or what an earlier version did not record. Raises UserError
    where a setting or a source that the numbers follow from has changed.
    """
    if "sources" not in meta or "settings" not in meta:
        what = "whether model.path, the prompts, the rewards or the settings in config.yaml have changed since then"
        return [f"{folder.name} was saved by a version that recorded no sources: {what} could not be checked"]
    before: Sources = meta["sources"]
    both = [key for key in before if key in found]
    settings, now = {key: setting for key in both if (setting := _setting(key, config))}, flatten(config)
    besides = [*settings.values(), *(["student.start"] if staged else [])]
    refuse_unsafe_changes(from_dict(_known(meta["settings"])), config, staged=staged, besides=besides)
    lines = []
    for key in both:
        if key.endswith(".eval_prompts") and config.evaluation.every == 0:
            continue  # not read
        change = _change(before[key], found[key], decodes=_decodes(config))
        if change is None:
            continue
        reason = _REWARD if key.endswith(".reward") else _MAY_CHANGE.get(key)
        if reason is not None:
            lines.append(f"note: {key} changed since {folder.name} was saved ({change}); {reason}")
            continue
        path = f"{now[settings[key]]}, " if now.get(settings.get(key, "")) else ""
        problem = f"changed since {folder.name} was saved ({path}{change})"
        raise UserError(key, problem, "put the former files back, or start a new run")
    return lines


def judged_otherwise(meta: dict[str, Any], config: Config, found: Sources) -> list[str]:
    """The settings behind an evaluation's rewards that differ from the checkpoint's.

    Where there are any, base and teachers must be evaluated again. The arguments are those of `compare`.
    """
    if "sources" not in meta or "settings" not in meta:
        return []
    before, sources = meta["settings"]["evaluation"], meta["sources"]
    names = ("prompts", "images_per_prompt", "steps", "guidance", "vae_tiling")
    changed = [f"evaluation.{name}" for name in names if before.get(name) != getattr(config.evaluation, name)]
    return changed + [key for key in sources if key.endswith(".reward") and sources[key] != found.get(key)]


def _change(before: dict[str, str], now: dict[str, str], *, decodes: bool) -> str | None:
    """The first difference in words; None where there is none."""
    parts = [{file.partition("/")[0] for file in files if "/" in file} for files in (before, now)]
    for file in sorted({**before, **now}):
        part, inside, _ = file.partition("/")
        if inside and not all(part in names for names in parts):
            continue  # loading reports what is missing, and what no component names is not read
        if part == "vae" and not decodes:
            continue
        old, new = before.get(file), now.get(file)
        if old != new:
            if old is None or new is None:
                return f"{file} is {'new' if old is None else 'missing'}"
            named = f"{file}: " if file else ""
            hashed = "sha256 " if len(old) == 64 else ""
            return f"{named}{hashed}{old[:12]} then, {new[:12]} now"
    return None


def _decodes(config: Config) -> bool:
    """Whether the run decodes images, so that its numbers follow from the VAE."""
    learns = method_spec(config).looks_at_images and any(teacher.reward is not None for teacher in config.teachers)
    return learns or any(config.evaluates(teacher) for teacher in config.teachers)


def _setting(key: str, config: Config) -> str:
    """The dotted setting whose content a source is, compared in place of the path given there; empty for others."""
    section, _, name = key.rpartition(".")
    for i, teacher in enumerate(config.teachers):
        if section == f"teachers.{teacher.name}" and name != "reward":
            return f"teachers[{i}].{name}"
    return key if key in ("model.path", "student.start", "objective.anchor") else ""


def _known(data: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that this version does not have."""
    known, of_teacher = leaves(), teacher_leaves()
    found: dict[str, Any] = {
        section: {key: value for key, value in data.get(section, {}).items() if f"{section}.{key}" in known}
        for section in sections()
    }
    teachers = data.get("teachers", [])
    return found | {"teachers": [{k: v for k, v in teacher.items() if k in of_teacher} for teacher in teachers]}
