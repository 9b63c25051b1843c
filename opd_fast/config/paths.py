"""What a name in the settings refers to: a file of the package, a path of this machine, or a repository of the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opd_fast.errors import did_you_mean

Split = Literal["train", "test"]
SUFFIXES = (".jsonl", ".txt", ".csv", ".tsv", ".parquet")
"""The suffixes of prompt files."""


def package_file(*parts: str) -> Path:
    """Return a path inside the installed package."""
    return Path(__file__).resolve().parent.parent.joinpath(*parts)


ASSETS = package_file("assets")
Kind = Literal["pipeline", "teachers", "prompts"]
"""What a name may stand for: a pipeline, weights, or prompts. The package has a folder of each."""
BASE = "base"
"""In a setting of weights: those of the pipeline itself."""
MERGED = "merged"
"""In student.start: the mean of the teachers' weight differences."""


@dataclass(frozen=True)
class Source:
    """What a name refers to.

    Attributes:
        where: "package" for `bundled` and `bundled/NAME`, "hub" for a repository, "local" for any other path.
        path: the file or folder, whether it is there or not; None for the hub.
        repo: `owner/name` of a repository of the hub, else empty.
        inside: the folder or file meant in that repository; empty: all of it.
    """

    where: Literal["package", "local", "hub"]
    path: Path | None
    repo: str = ""
    inside: str = ""


def resolve_source(name: str | Path, kind: Kind) -> Source:
    """Return what `name` refers to, without a look at the network.

    A path that exists is that path. Any other text of the form `owner/name` is a repository of the hub, and of weights
    `owner/name/FOLDER_OR_FILE` is a part of one; prompts are never read from there.

    Raises RuntimeError, ValueError or OSError for a name that no path can have.
    """
    text = str(name)
    if is_bundled(text):
        inside = text.removeprefix("bundled/") if text != "bundled" or kind != "pipeline" else ""
        return Source("package", ASSETS / kind / inside)
    path = Path(name).expanduser()
    if kind != "prompts" and not path.exists() and looks_like_hub_id(text):
        owner, repo, *inside_parts = text.split("/")
        if kind == "teachers" or not inside_parts:
            return Source("hub", None, f"{owner}/{repo}", "/".join(inside_parts))
    return Source("local", path)


def is_bundled(name: str) -> bool:
    """Return whether `name` refers to a part of the package."""
    return name == "bundled" or name.startswith("bundled/")


def looks_like_hub_id(text: str) -> bool:
    """Return whether `text` reads as `organisation/name` (or a folder in it) and not as a path of this machine."""
    head, _, tail = text.partition("/")
    shape = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)+", text) is not None
    # One file of a repository is `organisation/name/file.safetensors`.
    files = (".bin", ".pt", ".json") if "/" in tail else (".safetensors", ".bin", ".pt", ".json")
    return shape and not Path(head).exists() and Path(tail).suffix not in files


def bundled_names(kind: Kind) -> list[str]:
    """Return the names `bundled/NAME` of what the package has of a kind."""
    return sorted(f"bundled/{path.name}" for path in (ASSETS / kind).glob("*") if path.is_dir())


def bundled_remedy(name: str, kind: Kind) -> str:
    """Return what to do about a `bundled/NAME` that is not in the package."""
    return did_you_mean(name, known) if (known := bundled_names(kind)) else bundled_choices(kind)


def bundled_choices(kind: Kind) -> str:
    """Return a remedy that lists what the package has of a kind."""
    known = bundled_names(kind)
    return f"choose one of {', '.join(known)}" if known else "build them: python -m opd_fast.worlds.build"


def prompt_file(source: str | Path, split: Split = "train") -> Path:
    """Return the file that ``load_prompts`` reads; raise ValueError where there is none, or more than one."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose train or test")
    name = str(source)
    try:
        path = resolve_source(source, "prompts").path
        assert path is not None  # prompts are never on the hub
        is_folder = path.is_dir()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"prompt file {name!r} cannot be looked for ({error}); give its path in full") from error
    if is_bundled(name) and not is_folder:
        raise ValueError(f"no prompts named {name}; {bundled_choices('prompts')}")
    if is_folder:
        files = _split_files(path, split)
        found = [file for file in files if file.is_file()]
        if len(found) != 1:
            which, names = "several" if found else "none", ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds {which} of {names}; name the file itself")
        return found[0]
    if not path.is_file():
        raise ValueError(
            f"prompt file {path} does not exist; give a file ({', '.join(SUFFIXES)}), a folder, or bundled/NAME"
        )
    if path.suffix not in SUFFIXES:
        kinds = ".jsonl (GenEval) nor .txt (one prompt a line) nor a table (.csv, .tsv, .parquet)"
        raise ValueError(f"{path} is neither {kinds}; rename or convert it")
    return path


def _split_files(folder: Path, split: Split) -> list[Path]:
    return [folder / name for name in (f"{split}_metadata.jsonl", *(f"{split}{suffix}" for suffix in SUFFIXES))]


def held_out(prompts: str, eval_prompts: str | None = None) -> Path | None:
    """Return the file with a task's held-out prompts; None where there is none.

    It is that of ``eval_prompts``, else the test split beside the training ``prompts``: in the same ``bundled/NAME`` or
    folder, or, where they are a file ``train*``, the file of that name with ``test`` for ``train``, else the test split
    of its folder.  Raises ValueError for ``eval_prompts`` that are not there, and for several test splits.
    """
    if eval_prompts is not None:
        return prompt_file(eval_prompts, "test")
    if is_bundled(prompts):
        return prompt_file(prompts, "test")
    path = Path(prompts).expanduser()
    if not path.is_dir():
        if not path.is_file() or not path.name.startswith("train"):
            return None
        twin = path.with_name("test" + path.name.removeprefix("train"))
        if twin.is_file():
            return twin
        path = path.parent
    return prompt_file(path, "test") if any(file.is_file() for file in _split_files(path, "test")) else None
