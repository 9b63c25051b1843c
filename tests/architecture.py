"""The rooms of the project, lowest first, and what its files import: read from the source, without running it.

`python -m tests.architecture` writes the list of files in docs/architecture.md, from the first sentence of every file's
docstring. tests/test_architecture.py holds the imports to the order of the rooms, and the page to this list.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

ROOMS: dict[str, tuple[tuple[str, ...], str]] = {
    "kernels": (("opd_kernels",), "The operators, a package of their own."),
    "ground": (
        ("opd_fast", "solvers", "objectives", "seeds", "device", "errors", "files", "waiting"),
        "The mathematics, and what everything stands on.",
    ),
    "config": (("config.*",), "What a run is. No file of it imports torch."),
    "reporting": (("reporting.*",), "What a run says while it runs, and what it leaves for its reader."),
    "models": (("models.*",), "A frozen pipeline and its weights; a family of models is one file."),
    "engine": (("engine.*",), "The techniques that make a round fast. They know no student, no method and no family."),
    "data": (("data.*",), "Prompts, and their embeddings."),
    "distributed": (("distributed.*",), "Several devices, and the plan of what a run needs of them."),
    "worlds": (("worlds.*",), "The bundled world."),
    "rewards": (("rewards.*",), "What judges images; a reward is one file."),
    "training": (("training.*",), "The training step; a method is one file in `methods`."),
    "evaluation": (("evaluation.*",), "Models judged image by image, and compared."),
    "doors": (("train", "evaluate", "scale", "worlds.build"), "The command lines."),
    "benchmarks": (("benchmarks",), "What measures the engine, and the published loop that it is measured against."),
}
"""Name of a room to its modules and a sentence about it. A module imports from its own room and from those above it
in this list. `X.*` is a folder of opd_fast; a module's own name wins over its folder's."""

BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"


@dataclass(frozen=True)
class Import:
    """One imported name: the module that it is in, and the line of the statement."""

    module: str
    line: int


@dataclass(frozen=True)
class Module:
    """A file of the project, by its dotted name."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """The file, parsed."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def file(self) -> str:
        """The path in the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def room(self) -> str:
        """The room that the module is in. Raises KeyError where it is in none."""
        return room_of(self.name)

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring. Raises ValueError where the file has none."""
        text = ast.get_docstring(self.tree)
        if not text:
            raise ValueError(f"{self.file} has no docstring: say in one sentence what is in it")
        paragraph = " ".join(text.split("\n\n")[0].split())
        return re.split(r"(?<=\.)\s", paragraph)[0].rstrip(":.") + "."

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        """Every function and method, at any level, with its dotted name in the file."""

        def within(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    name = f"{prefix}{child.name}"
                    if not isinstance(child, ast.ClassDef):
                        yield name, child
                    yield from within(child, f"{name}.")
                else:
                    yield from within(child, prefix)

        return within(self.tree, "")

    def imports(self, known: set[str]) -> Iterator[Import]:
        """Every import, wherever it stands in the file; a name that is a module itself counts as that module."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*parts, *([node.module] if node.module else [])])
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield Import(inner if inner in known else source, node.lineno)


def modules() -> dict[str, Module]:
    """The files of opd_kernels, opd_fast and benchmarks, by dotted name."""
    found = {}
    for base, package in ((ROOT / "kernels", "opd_kernels"), (ROOT, "opd_fast"), (ROOT, "benchmarks")):
        for path in sorted((base / package).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found[name] = Module(name, path)
    return found


def room_of(name: str) -> str:
    """The room of a module of the project. Raises KeyError where `ROOMS` has no place for it."""
    inner = name.removeprefix("opd_fast.")
    top = inner.split(".")[0]
    for wanted in (inner, f"{top}.*" if name.startswith("opd_fast.") else top):
        for room, (places, _) in ROOMS.items():
            if wanted in places:
                return room
    raise KeyError(f"{name} is in no room: name it in ROOMS of tests/architecture.py")


def file_list() -> str:
    """Every room with its files, in Markdown, as docs/architecture.md has it between the two marks."""
    found = sorted(modules().values(), key=lambda module: (module.path.parent.as_posix(), module.path.stem))
    lines = []
    for room, (_, about) in ROOMS.items():
        lines += [f"### {room}", "", about, ""]
        if room == "benchmarks":
            lines += ["[`benchmarks/README.md`](../benchmarks/README.md) has its files, commands and results.", ""]
            continue
        own = [module for module in found if module.room == room]
        lines += [f"- [`{module.file}`](../{module.file}): {module.sentence}" for module in own]
        lines.append("")
    return "\n".join(lines)


def page_with(text: str, files: str) -> str:
    """The page with the part between the two marks replaced. Raises ValueError where it does not have each once."""
    if (text.count(BEGIN), text.count(END)) != (1, 1):
        raise ValueError(f"{PAGE} needs {BEGIN.strip()} and {END.strip()}, each on a line, once")
    return text.partition(BEGIN)[0] + BEGIN + files + END + text.partition(END)[2]


def main() -> None:
    """Write the list of files into the page."""
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), file_list()), encoding="utf-8")


if __name__ == "__main__":
    main()
