"""What a name in the settings refers to: a file of the package, a path of this machine, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from opd_fast.errors import did_you_mean

Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".txt", ".csv", ".tsv", ".parquet")
"""Of prompt files."""
_SPLIT_FILES = ("{split}_metadata.jsonl", *(f"{{split}}{suffix}" for suffix in SUFFIXES))


def package_file(*parts: str) -> Path:
    """A path inside the installed package."""
    return Path(__file__).resolve().parent.parent.joinpath(*parts)


ASSETS = package_file("assets")


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` reads as `organisation/name` (or a folder in it) and not as a path of this machine."""
    head, _, tail = text.partition("/")
    shape = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+", text) is not None
    # One file of a repository is `organisation/name/file.safetensors`.
    files = (".bin", ".pt", ".json") if "/" in tail else (".safetensors", ".bin", ".pt", ".json")
    return shape and not Path(head).exists() and Path(tail).suffix not in files


def bundled_remedy(name: str, folder: Path) -> str:
    known = [f"bundled/{p.name}" for p in sorted(folder.glob("*")) if p.is_dir()]
    return did_you_mean(name, known) if known else "build the bundle with python -m opd_fast.worlds.build"


def prompt_file(source: str | Path, split: Split = "train") -> Path:
    """The file that ``load_prompts`` reads.  Raises ValueError if there is none, or more than one."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose train or test")
    name = str(source)
    if name.startswith("bundled/"):
        path = ASSETS / "prompts" / name.removeprefix("bundled/")
        if not path.is_dir():
            known = sorted(f"bundled/{p.name}" for p in (ASSETS / "prompts").glob("*") if p.is_dir())
            remedy = f"choose one of {', '.join(known)}" if known else "build them: python -m opd_fast.worlds.build"
            raise ValueError(f"no prompts named {name}; {remedy}")
    else:
        try:
            path = Path(source).expanduser()
            path.is_dir()
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"prompt file {name!r} cannot be looked for ({error}); give its path in full") from error
    if path.is_dir():
        names = [pattern.format(split=split) for pattern in _SPLIT_FILES]
        found = [path / file for file in names if (path / file).is_file()]
        if len(found) != 1:
            which = "several" if found else "none"
            raise ValueError(f"{path} holds {which} of {', '.join(names)}; name the file itself")
        return found[0]
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist; give a file, a folder, or bundled/NAME")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} is neither .jsonl (GenEval) nor .txt (one prompt a line) nor a table (.csv, .tsv, .parquet); "
            f"rename or convert it"
        )
    return path


def held_out(prompts: str, eval_prompts: str | None = None) -> Path | None:
    """The file with a task's held-out prompts; None where there is none.

    It is that of ``eval_prompts``, else the test split beside the training ``prompts``: in the same ``bundled/NAME`` or
    folder, or, where they are a file ``train*``, the file of that name with ``test`` for ``train``, else the test split
    of its folder.  Raises ValueError for ``eval_prompts`` that are not there, and for several test splits.
    """
    if eval_prompts is not None:
        return prompt_file(eval_prompts, "test")
    path = Path(prompts).expanduser()
    if prompts.startswith("bundled/"):
        return prompt_file(prompts, "test")
    if not path.is_dir():
        if not path.is_file() or not path.name.startswith("train"):
            return None
        twin = path.with_name("test" + path.name.removeprefix("train"))
        if twin.is_file():
            return twin
        path = path.parent
    there = any((path / pattern.format(split="test")).is_file() for pattern in _SPLIT_FILES)
    return prompt_file(path, "test") if there else None
