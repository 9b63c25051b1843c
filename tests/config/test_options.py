"""How options are spelled and read, and the fields of single teachers on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opd_fast import scale
from opd_fast.config.command_line import SWITCHES, Command, parse
from opd_fast.config.options import Option, read, settle
from opd_fast.config.run_dir import prepare_run_dir
from opd_fast.config.serialize import changed, leaves, to_dict
from opd_fast.errors import UserError
from opd_fast.evaluation import command_line

TEACHERS = [{"name": name, "weights": f"org/{name}", "prompts": "p.txt"} for name in ("a-b", "7", "c.d")]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return written(tmp_path)


def written(folder: Path, **sections: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"teachers": TEACHERS, "train": {"lr": 2e-3}, **sections}))
    return str(path)


# --- fields of single teachers ----------------------------------------------------------------------------------------


def test_one_field_of_one_teacher() -> None:
    plain = parse([]).config
    given = parse(["--teachers.text.weight", "2", "--teachers.0.guidance=3", "--teachers.colour.reward", "null"]).config
    assert [t.weight for t in given.teachers] == [plain.teachers[0].weight, 2.0, plain.teachers[2].weight]
    assert [t.guidance for t in given.teachers] == [3.0, None, None]
    assert [t.reward for t in given.teachers] == ["composition", "text", None]
    assert isinstance(given.teachers[1].weight, float)
    assert changed(plain, given) == ["teachers[0].guidance", "teachers[1].weight", "teachers[2].reward"]


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--teachers.a-b.weight", 0),
        ("--teachers.c.d.weight", 2),
        ("--teachers.7.weight", 1),  # a name goes before a number
        ("--teachers.1.weight", 1),
        ("--teachers[2].weight", 2),  # as errors write it
    ],
)
def test_names_and_numbers(recipe: str, option: str, place: int) -> None:
    weights = [t.weight for t in parse([recipe, option, "5"]).config.teachers]
    assert weights == [5.0 if i == place else 1.0 for i in range(3)]


def test_fields_lie_over_a_list_from_the_command_line(recipe: str) -> None:
    more = "{name: new, weights: org/new, prompts: p.txt, weight: 9}"
    options = ["--teachers.new.eval-prompts", "q.txt", "--teachers.new.name", "newer", "--teachers.new.weight", "3"]
    teachers = parse([recipe, *options, "--teachers+", more]).config.teachers
    assert [(t.name, t.weight, t.eval_prompts) for t in teachers[2:]] == [("c.d", 1.0, None), ("newer", 3.0, "q.txt")]


def test_fields_in_stages(tmp_path: Path) -> None:
    other = [{**TEACHERS[0], "name": "other"}]
    path = written(tmp_path, stages=[{"name": "one"}, {"name": "two", "teachers": other}])
    found = parse([path, "--teachers.0.guidance", "2", "--teachers.other.weight", "4"]).configs
    assert [[(t.name, t.guidance, t.weight) for t in config.teachers] for config in found] == [
        [("a-b", 2.0, 1.0), ("7", None, 1.0), ("c.d", None, 1.0)],
        [("other", 2.0, 4.0)],
    ]
    with pytest.raises(UserError, match=r"^teachers\.others: unknown teacher; did you mean other\?"):
        parse([path, "--teachers.others.weight", "4"])


def test_fields_of_a_resumed_run(recipe: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    begun: Command = parse([recipe, "--run-dir", run, "--teachers.c.d.weight", "2.5"])
    prepare_run_dir(begun)
    assert parse(["--resume", run]).config == begun.config
    assert parse(["--resume", run, "--teachers.2.weight", "2.5"]).config.teachers[2].weight == 2.5
    with pytest.raises(UserError, match=r"^teachers\[2\]\.weight: a resumed run keeps its value \(2\.5\)"):
        parse(["--resume", run, "--teachers.c.d.weight", "3"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teachers.txet.weight", "2"], "teachers.txet: unknown teacher; did you mean text?"),
        (["--teachers.zzzz.weight", "2"], "teachers.zzzz: unknown teacher; known: composition, text, colour"),
        (
            ["--teachers.3.weight", "2"],
            "teachers.3: unknown teacher; give a number up to 2, or a name: composition, text, colour",
        ),
        (["--teachers.text.wieght", "2"], "teachers.text.wieght: unknown field; did you mean weight?"),
        (["--teachers.weight", "2"], "teachers.weight: names no element and field; write --teachers.NAME.reward VALUE"),
        (["--teachers.text.weight", "much"], "teachers.text.weight: 'much' is not a number; the default is 1.0"),
        (["--teachers.text.weight", "null"], "teachers.text.weight: 'null' is not a number; the default is 1.0"),
        (["--teachers.text.weight", "-1"], "teachers[1].weight: -1.0 is not above 0; give a positive one"),
        (["--teachers.text.weight"], "teachers.text.weight: has no value; write --teachers.text.weight VALUE"),
        (["--teachers.text.weight+", "2"], "teachers.text.weight: is not a list that + could add to"),
        (["--teachers.text.name", "colour"], "teachers[2].name: 'colour' is used twice"),
    ],
)
def test_refused_fields(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert str(caught.value).startswith(message)


def test_help_tells_of_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--teachers.NAME.FIELD VALUE sets one field of the teacher of that name, or number from 0" in text
    assert "Every option may be spelled with hyphens or with underscores" in text


# --- spelling ---------------------------------------------------------------------------------------------------------


def spellings(name: str) -> set[str]:
    return {name, name.replace("-", "_"), name.replace("_", "-")}


def test_settings_take_hyphens_and_underscores() -> None:
    everything = to_dict(parse(["bundled"]).config)
    argv = ["bundled"]
    for key in leaves():
        section, name = key.split(".")
        value = everything[section][name]
        written = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        argv.append(f"--{section}.{name.replace('_', '-')}={written}")
    assert to_dict(parse(argv).config) == everything
    assert parse(["--train.samples-per-task", "5"]).config.train.samples_per_task == 5
    assert parse(["--engine.fp8-tolerance=0.5", "--engine.precision", "fp8"]).config.engine.fp8_tolerance == 0.5


def test_switches_take_hyphens_and_underscores(tmp_path: Path) -> None:
    plain, under = (
        parse([f"--dry{_}run", f"--run{_}dir", str(tmp_path / "r"), f"--gpu{_}memory=40", "--devices", "3"])
        for _ in "-_"
    )
    assert plain == under
    assert (under.dry_run, under.run_dir, under.gpu_memory, under.devices) == (True, tmp_path / "r", 40.0, 3)
    assert {"--run-dir", "--resume", "--dry-run"} <= set(SWITCHES)


@pytest.mark.parametrize("options", [command_line.OPTIONS, scale.OPTIONS], ids=["evaluate", "scale"])
def test_doors_document_hyphens_and_take_both(options: tuple[Option, ...]) -> None:
    for option in options:
        assert "_" not in option.name
        for spelled in spellings(option.name):
            text = "" if option.hint is None else "value"  # a switch takes none
            words, given = read([f"--{spelled}", *filter(None, [text])], options, "door")
            assert (words, [(one.option, one.text) for one in given]) == ([], [(option, text)])


def test_doors_read_both(tmp_path: Path) -> None:
    required = ["--prompts", "p.txt", "--rewards", "text"]
    for _ in "-_":
        argv = [f"--images{_}per{_}prompt", "3", f"--text{_}cache", "off", f"--reward{_}timeout", "null", "--eta=0.5"]
        found = command_line.read_settings([*required, *argv])
        assert (found.images_per_prompt, found.text_cache, found.reward_timeout, found.eta) == (3, "off", None, 0.5)


def test_what_is_read() -> None:
    options = [
        Option("one", int, 1, "h"),
        Option("many", list[str] | None, None, "h"),
        Option("flag", None, False, "h"),
    ]
    words, given = read(
        ["w", "--one", "-3", "--many+", "a", "--flag", "--many+=[b, c]", "--", "--one"], options, "door"
    )
    assert words == ["w", "--one"]
    assert vars(settle(options, given)) == {"one": -3, "many": ["a", "b", "c"], "flag": True}
    for argv, message in (
        (["--one"], "one: has no value; write --one VALUE"),
        (["--one", "--flag"], "one: has no value; write --one VALUE"),
        (["--flag=1"], "flag: takes no value; write --flag"),
        (["--one+", "2"], "one: is not a list that \\+ could add to"),
        (["-x"], "-x: unknown option; door --help lists all"),
        (["--on", "1"], r"on: unknown option; did you mean --one\?"),
    ):
        with pytest.raises(UserError, match=message):
            read(argv, options, "door")
    with pytest.raises(UserError, match=r"one: '3\.5' is not a whole number; the default is 1"):
        settle(options, read(["--one", "3.5"], options, "door")[1])
    with pytest.raises(UserError, match="one: 'null' is not a whole number; the default is 1"):
        settle(options, read(["--one", "null"], options, "door")[1])


def test_brackets_without_end_on_the_command_line() -> None:
    with pytest.raises(UserError, match=r"^teachers: .*(brackets without end|is not a list of teachers)"):
        parse(["--teachers", "[" * 3000])
