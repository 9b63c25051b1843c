"""What a file may import, how long it may be, and that docs/architecture.md says the same.

An exception stands here by name with its reason; one that nothing needs any longer fails, and is taken off.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest

from tests import architecture
from tests.architecture import PAGE, ROOMS, Module, file_list, modules, page_with, room_of

FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 80, 10

UPWARD: dict[str, str] = {}
"""`module -> module` of an import that runs up, to the reason."""
CIRCLES: dict[frozenset[str], str] = {}
"""Modules that may import each other in a circle, to the reason."""
FAMILIES_IN_ENGINE: dict[str, str] = {}
"""`module -> module` of a technique that knows a family by name, to the reason."""
LONG: dict[str, str] = {}
"""A file, or a file and its function, that is longer than the limit, to the reason."""

OURS = ("opd_kernels", "opd_fast", "benchmarks", "tests")


@pytest.fixture(scope="module")
def found() -> dict[str, Module]:
    return modules()


def without(exceptions: Mapping[str, str], seen: set[str]) -> set[str]:
    """What is seen and is no exception. Fails on an exception that nothing needs any longer."""
    assert not (stale := set(exceptions) - seen), f"no longer needed, take them off: {sorted(stale)}"
    return seen - set(exceptions)


def upward(found: Mapping[str, Module]) -> set[str]:
    """`module -> module` of every import from a higher room, from the tests, or of a module that does not exist."""
    order = list(ROOMS)
    seen = set()
    for name, module in found.items():
        for target in module.imports(set(found)):
            if target.module.split(".")[0] in OURS and (
                target.module not in found or order.index(room_of(target.module)) > order.index(module.room)
            ):
                seen.add(f"{name} -> {target.module}")
    return seen


def circles(found: Mapping[str, Module]) -> list[frozenset[str]]:
    """The largest sets of modules each of which imports, over others, all the others."""
    edges = {name: {i.module for i in module.imports(set(found))} & set(found) for name, module in found.items()}
    reach: dict[str, set[str]] = {}
    for name in edges:
        reach[name], todo = set(), list(edges[name])
        while todo:
            if (following := todo.pop()) not in reach[name]:
                reach[name].add(following)
                todo += edges[following]
    found_circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in edges if a in reach[a]}
    return sorted(found_circles, key=min)


def too_long(found: Mapping[str, Module]) -> Iterator[str]:
    for name, module in found.items():
        if not name.startswith("opd_fast"):
            continue
        if len(module.path.read_text(encoding="utf-8").splitlines()) > FILE_LINES:
            yield module.file
        if module.room == "config":  # the settings are what it is about, and a list of them is long
            continue
        for function, node in module.functions():
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES or parameters > PARAMETERS:
                yield f"{module.file} {function}"


def test_every_file_is_in_a_room(found: dict[str, Module]) -> None:
    empty = set(ROOMS) - {module.room for module in found.values()}
    assert not empty
    gone = [
        place
        for _, (places, _) in ROOMS.items()
        for place in places
        if not [name for name in found if name.removeprefix("opd_fast.") == place or name == f"opd_fast.{place[:-2]}"]
    ]
    assert not gone, f"ROOMS names what does not exist: {gone}"


def test_no_import_runs_up(found: dict[str, Module]) -> None:
    wrong = without(UPWARD, upward(found))
    assert not wrong, f"imports from a higher room, or of nothing: {sorted(wrong)}"


def test_no_circle(found: dict[str, Module]) -> None:
    seen = circles(found)
    for allowed in CIRCLES:
        assert any(circle <= allowed for circle in seen), f"no longer needed, take it off: {sorted(allowed)}"
    wrong = [sorted(circle) for circle in seen if not any(circle <= allowed for allowed in CIRCLES)]
    assert not wrong, f"these modules import each other: {wrong}"


def test_techniques_name_no_family(found: dict[str, Module]) -> None:
    """No file of the engine imports a family, nor the transformer of one from diffusers or from opd_fast."""
    from opd_fast.models import FAMILIES

    files = {family.__module__ for family in FAMILIES.values()}
    files |= {name for name in found if name.startswith("opd_fast.models.") and name.endswith("_transformer")}
    seen = {
        f"{name} -> {target.module}"
        for name, module in found.items()
        if module.room == "engine"
        for target in module.imports(set(found))
        if target.module in files or target.module.startswith("diffusers.models.transformers")
    }
    wrong = without(FAMILIES_IN_ENGINE, seen)
    assert not wrong, f"a technique asks the model, and names no family: {sorted(wrong)}"


def test_settings_are_read_without_torch(found: dict[str, Module]) -> None:
    """No file of the room `config` imports torch, nor does anything that is imported with it."""
    names = [name for name, module in found.items() if module.room == "config"]
    assert not [name for name in names for i in found[name].imports(set(found)) if i.module.split(".")[0] == "torch"]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    path = os.pathsep.join([str(architecture.ROOT), str(architecture.ROOT / "kernels")])
    command, known = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"


def test_files_and_functions_are_short(found: dict[str, Module]) -> None:
    wrong = without(LONG, set(too_long(found)))
    assert not wrong, f"over {FILE_LINES} lines, {FUNCTION_LINES} in a function, or {PARAMETERS} parameters: {wrong}"


def test_the_page_lists_the_files() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page_with(text, file_list()), "the list of files is old: run python -m tests.architecture"


def test_the_page_has_the_order_of_the_rooms() -> None:
    rooms = re.findall(r"^### (\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rooms == list(ROOMS)


@pytest.fixture
def house(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Writes files of a project in `tmp_path`, and returns its modules."""

    def write(**files: str) -> dict[str, Module]:
        monkeypatch.setattr(architecture, "ROOT", tmp_path)
        for name, text in files.items():
            path = tmp_path / ("kernels" if name.startswith("opd_kernels") else ".") / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return modules()

    return write


@pytest.mark.parametrize(
    "statement",
    [
        "from opd_fast.training import loop",
        "import opd_fast.training.loop",
        "from ..training.loop import train",
        "def f():\n    from opd_fast.training.loop import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import opd_fast.training.loop as loop",
    ],
)
def test_an_import_from_above_is_seen(house, statement: str) -> None:
    below = house(opd_fast__models__base=statement, opd_fast__training__loop="")
    assert upward(below) == {"opd_fast.models.base -> opd_fast.training.loop"}


@pytest.mark.parametrize(
    ("name", "statement", "target"),
    [
        ("opd_kernels__step", "from opd_fast import solvers", "opd_fast.solvers"),
        ("opd_fast__train", "import benchmarks.rounds", "benchmarks.rounds"),
        ("opd_fast__train", "from tests.runs import settings", "tests.runs"),
        ("benchmarks__rounds", "from tests import runs", "tests"),
        ("opd_fast__worlds__shapes", "from opd_fast.worlds.build import main", "opd_fast.worlds.build"),
        ("opd_fast__train", "from opd_fast.lost import thing", "opd_fast.lost"),
    ],
)
def test_packages_and_doors_have_their_place(house, name: str, statement: str, target: str) -> None:
    files = {"opd_fast__solvers": "", "benchmarks__rounds": "", "opd_fast__worlds__build": "", name: statement}
    source = name.replace("__", ".")
    assert upward(house(**files)) == {f"{source} -> {target}"}


def test_a_circle_is_seen(house) -> None:
    found = house(
        opd_fast__models__a="from opd_fast.models import b",
        opd_fast__models__b="def f():\n    from opd_fast.models.c import g",
        opd_fast__models__c="from .a import h\nfrom .d import i",
        opd_fast__models__d="import opd_fast.solvers",
        opd_fast__solvers="",
    )
    assert circles(found) == [frozenset(f"opd_fast.models.{name}" for name in "abc")]
    assert upward(found) == set()


def test_what_is_long_is_seen(house) -> None:
    line = "    x = 1\n"
    many = ", ".join(f"a{i}" for i in range(PARAMETERS + 1))
    found = house(
        opd_fast__models__a=f"class A:\n    def f(self, {many[4:]}): ...\ndef g(*, {many}): ...\n",
        opd_fast__models__b=f"def f():\n{line * FUNCTION_LINES}def g():\n{line * (FUNCTION_LINES - 1)}",
        opd_fast__models__c="\n" * (FILE_LINES + 1),
        opd_fast__models__d="\n" * FILE_LINES,
        opd_fast__config__schema=f"def f({many}): ...\n",
    )
    assert sorted(too_long(found)) == [f"opd_fast/models/{name}" for name in ("a.py g", "b.py f", "c.py")]


def test_an_exception_that_nothing_needs_fails() -> None:
    assert without({"a": "a reason"}, {"a", "b"}) == {"b"}
    with pytest.raises(AssertionError, match=r"no longer needed, take them off: \['c'\]"):
        without({"a": "a reason", "c": "a reason"}, {"a"})
