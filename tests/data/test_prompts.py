"""Prompt files and their errors, the order of prompts, and which tasks a round takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opd_fast.config import Config
from opd_fast.config.command_line import parse, read_config
from opd_fast.config.paths import prompt_file
from opd_fast.config.serialize import from_dict
from opd_fast.config.validate import validate
from opd_fast.data.prompt_files import Prompt, load_prompts, write_geneval, write_lines
from opd_fast.data.schedule import PromptSource, TaskSchedule
from opd_fast.distributed.plan import make_plan
from opd_fast.errors import UserError
from opd_fast.reporting.telemetry import Telemetry, read_metrics
from opd_fast.training.loop import train
from opd_fast.training.methods.opd import OPD
from opd_fast.training.problems import problems
from opd_fast.training.rollout import one_pass
from opd_fast.training.setup import Setup, prepare
from tests.runs import settings, write_world

GENEVAL = [
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bench left of a cow",
    },
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2, "color": "red"}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "a photo of two cups",
    },
]


def test_geneval_round_trip(tmp_path: Path) -> None:
    write_geneval(tmp_path / "train_metadata.jsonl", GENEVAL)
    prompts = load_prompts(tmp_path / "train_metadata.jsonl")
    assert [p.text for p in prompts] == [r["prompt"] for r in GENEVAL]
    assert [p.metadata for p in prompts] == GENEVAL
    assert load_prompts(tmp_path) == prompts


def test_a_line_with_one_quoted_piece_has_it_as_its_target(tmp_path: Path) -> None:
    lines = ['A sign that says "Open Late" in neon', 'A cup with "Tea", steaming']
    write_lines(tmp_path / "a.txt", lines)
    targets = [{"target": "Open Late"}, {"target": "Tea"}]
    assert [p.metadata for p in load_prompts(tmp_path / "a.txt")] == targets
    for other in ('two "a" and "b"', "none", 'open "quote', 'empty ""'):
        write_lines(tmp_path / "b.txt", [other, *lines])
        assert load_prompts(tmp_path / "b.txt") == [
            Prompt(other),
            *(Prompt(line, target) for line, target in zip(lines, targets, strict=True)),
        ]


def test_plain_lines_keep_everything_but_blanks(tmp_path: Path) -> None:
    # U+2028 and a form feed may stand inside a prompt; a byte-order mark, CRLF and blank lines may stand around it.
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\r\n\r\n  two\x0cstill two \n\nthree".encode())
    assert [p.text for p in load_prompts(tmp_path / "a.txt")] == ["one\u2028still one", "two\x0cstill two", "three"]


def test_folder_takes_the_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.txt", ["a"])
    write_lines(tmp_path / "test.txt", ["b"])
    assert load_prompts(tmp_path)[0].text == "a"
    assert load_prompts(tmp_path, "test")[0].text == "b"
    assert load_prompts(tmp_path / "train.txt", "test")[0].text == "a"
    write_geneval(tmp_path / "test_metadata.jsonl", GENEVAL)
    with pytest.raises(ValueError, match="holds several of"):
        load_prompts(tmp_path, "test")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "a list, not a JSON object"),
        ('{"tag": "colors"}', 'lacks the text "prompt"'),
        ('{"prompt": "  "}', 'lacks the text "prompt"'),
        ('{"prompt": "a", "include": {}}', '"include" must be a list'),
        ('{"prompt": "a", "include": [{"count": 1}]}', 'names no "class"'),
        ('{"prompt": "a", "include": [{"class": "cup"}]}', '"count" None'),
        ('{"prompt": "a", "exclude": [{"class": "cup", "count": 0}]}', '"count" 0'),
        ('{"prompt": "a", "include": [{"class": "cup", "count": 1, "color": 3}]}', '"color" 3'),
        ('{"prompt": "a", "include": [{"class": "cup", "count": 1, "position": ["above", 1]}]}', '"position"'),
    ],
)
def test_bad_geneval_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GENEVAL[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=said) as caught:
        load_prompts(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: not UTF-8"):
        load_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        load_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "a.yaml").write_text("a")
    with pytest.raises(ValueError, match=r"neither .jsonl"):
        load_prompts(tmp_path / "a.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"holds none of train_metadata.jsonl"):
        load_prompts(tmp_path / "folder")
    with pytest.raises(ValueError, match="choose train or test"):
        prompt_file(tmp_path, "eval")  # type: ignore[arg-type]
    monkeypatch.setattr("opd_fast.config.paths.ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"no prompts named bundled/nothing; build them: python -m opd_fast\.worlds"):
        load_prompts("bundled/nothing")
    (tmp_path / "prompts" / "colour").mkdir(parents=True)
    write_lines(tmp_path / "prompts" / "colour" / "test.txt", ["red"])
    assert load_prompts("bundled/colour", "test") == [Prompt("red")]
    with pytest.raises(ValueError, match="choose one of bundled/colour"):
        load_prompts("bundled/nothing")


def test_writers_refuse_what_cannot_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record 2"):
        write_geneval(tmp_path / "a.jsonl", [GENEVAL[0], {"tag": "colors"}])
    with pytest.raises(ValueError, match="prompt 1 is empty or spans"):
        write_lines(tmp_path / "a.txt", ["two\nlines"])
    assert list(tmp_path.iterdir()) == []


# --- tables ----------------------------------------------------------------------------------------------------------

DRAWBENCH = [
    ("A red colored car.", "Colors"),
    ("One cat, and two dogs.", "Counting"),
    ("Tcennis rpacket.", "Misspellings"),
]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.txt", ","), ("a.txt", "\t")]
)
def test_drawbench_as_published(tmp_path: Path, name: str, separator: str) -> None:
    rows = [
        separator.join(f'"{c}"' if separator in c else c for c in row) for row in [("Prompts", "Category"), *DRAWBENCH]
    ]
    (tmp_path / name).write_text("\r\n".join(rows) + "\r\n", encoding="utf-8")
    assert load_prompts(tmp_path / name) == [Prompt(text, {"Category": category}) for text, category in DRAWBENCH]


def test_drawbench_as_lines(tmp_path: Path) -> None:
    """The 1,000 lines of the released evaluation: each of 200 prompts five times in a row."""
    lines = [f"prompt number {i // 5}" for i in range(1000)]
    write_lines(tmp_path / "test.txt", lines)
    assert load_prompts(tmp_path, "test") == [Prompt(line) for line in lines]


def test_tables_keep_what_is_quoted_and_the_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbfid,Caption,seed\r\n\r\n1,"a sign ""HK"", lit\nat night",7\r\n2,  a "plain" cup ,\r\n\r\n'
    )
    assert load_prompts(tmp_path / "a.csv") == [
        Prompt('a sign "HK", lit\nat night', {"id": "1", "seed": "7"}),
        Prompt('a "plain" cup', {"id": "2", "seed": ""}),
    ]
    (tmp_path / "train.tsv").write_text("text\none, two\nthree\n")
    assert load_prompts(tmp_path, "train") == [Prompt("one, two"), Prompt("three")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,tag\na,b\n\nc,d,e\n", "line 4: 3 cells where the header has 2"),
        ("prompt,tag\na,b\nc\n", "line 3: 1 cells where the header has 2"),
        ('prompt,tag\na,b\n"c,d\ne,f\n', "line 3: not readable as a table"),
        ('prompt,tag\n"a"x,b\n', "line 2: not readable as a table"),
        ("prompt,tag\na,b\n  ,d\n", "line 3: the column 'prompt' holds no text"),
        ("title,tag\na,b\n", "no column for the prompts among title, tag; call exactly one of them prompt, prompts,"),
        ("Prompt,TEXT,tag\na,b,c\n", "several columns for the prompts among Prompt, TEXT, tag"),
        ("prompt,tag,tag\na,b,c\n", "two columns named 'tag'"),
        ("prompt,tag\n\n", "holds no prompt"),
        ("\n", "holds no prompt"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt\nfine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: not UTF-8"):
        load_prompts(tmp_path / "a.csv")


class Rows:
    """What stands for a `datasets.Dataset`."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0]) if rows else []

    def __iter__(self) -> Any:
        return iter(dict(row) for row in self.rows)


def parquet(monkeypatch: pytest.MonkeyPatch, path: Path, rows: list[dict[str, Any]]) -> None:
    def from_parquet(name: str) -> Rows:
        assert name == str(path)
        return Rows(rows)

    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_parquet=from_parquet)))


def test_parquet_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.parquet"
    parquet(monkeypatch, path, [{"Prompt": " a cup ", "score": 0.5}, {"Prompt": "a cow", "score": None}])
    assert load_prompts(tmp_path) == [Prompt("a cup", {"score": 0.5}), Prompt("a cow", {"score": None})]
    parquet(monkeypatch, path, [{"prompt": "a cup"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"train\.parquet, row 2: the column 'prompt' holds no text"):
        load_prompts(path)
    parquet(monkeypatch, path, [{"caption": "a", "text": "b"}])
    with pytest.raises(ValueError, match="several columns for the prompts among caption, text"):
        load_prompts(path)
    parquet(monkeypatch, path, [{"prompt": "a"}])
    monkeypatch.setattr(sys.modules["datasets"].Dataset, "from_parquet", lambda name: 1 / 0)
    with pytest.raises(ValueError, match=r"cannot be read as parquet \(ZeroDivisionError"):
        load_prompts(path)


def test_parquet_without_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'opd_fast\[datasets\]'"):
        load_prompts(tmp_path / "a.parquet")


def test_parquet_by_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra opd_fast[datasets] is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"Prompts": ["a cup", "a cow"], "Category": ["Colors", "Counting"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert load_prompts(tmp_path / "a.parquet") == [
        Prompt(text, {"Category": category}) for text, category in zip(rows["Prompts"], rows["Category"], strict=True)
    ]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_prompts(tmp_path / "b.parquet")


def test_reading_prompts_needs_no_torch(tmp_path: Path) -> None:
    """The command line looks at prompt files before anything heavy is imported."""
    code = "import sys, opd_fast.data.prompt_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_takes_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "a.txt", ["a"])
    (tmp_path / "a.csv").write_text("prompt\na\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.tsv").write_text("prompt\na\n")
    for name in ("a.txt", "a.csv", "folder"):
        assert not list(problems(made(prompts=str(tmp_path / name)))), name
    parquet(monkeypatch, tmp_path / "a.parquet", [{"prompt": "a"}])
    assert not list(problems(made(prompts=str(tmp_path / "a.parquet"))))
    monkeypatch.setitem(sys.modules, "datasets", None)
    (problem,) = problems(made(prompts=str(tmp_path / "a.parquet")))
    assert (problem.key, problem.remedy.split(",")[0]) == ("teachers[0].prompts", "pip install 'opd_fast[datasets]'")
    (tmp_path / "folder" / "train.tsv").unlink()
    (problem,) = problems(made(prompts=str(tmp_path / "folder")))
    assert problem.key == "teachers[0].prompts"
    assert ".parquet" in problem.remedy


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "OPD_FAST_PROMPT_DATA" not in os.environ, reason="OPD_FAST_PROMPT_DATA names no folder of prompt files"
)
def test_published_files() -> None:
    folder = Path(os.environ["OPD_FAST_PROMPT_DATA"])
    tags = Counter(p.metadata["tag"] for p in load_prompts(folder / "geneval", "test"))
    assert tags == {
        "position": 400,
        "color_attr": 400,
        "two_object": 396,
        "colors": 376,
        "counting": 320,
        "single_object": 320,
    }
    targets = [p.metadata["target"] for p in load_prompts(folder / "ocr", "test")]
    assert len(targets) == 1018
    assert (min(map(len, targets)), max(map(len, targets))) == (2, 29)


@pytest.mark.parametrize(("count", "n"), [(10, 4), (7, 7), (3, 8), (1, 2), (100, 9)])
def test_every_prompt_once_per_epoch(count: int, n: int) -> None:
    source = PromptSource(count, seed=3)
    rounds = 3 * count  # n epochs' worth, three times over
    drawn = [i for r in range(rounds) for i in source.batch(r, n)]
    for start in range(0, len(drawn), count):
        assert sorted(drawn[start : start + count]) == list(range(count))
    if count >= 7:
        assert drawn[:count] != drawn[count : 2 * count]


def test_order_depends_on_seed_stream_and_round_alone() -> None:
    first = PromptSource(50, seed=1)
    late = PromptSource(50, seed=1).batch(37, 6)
    assert [first.batch(r, 6) for r in range(38)][37] == late
    assert PromptSource(50, seed=2).batch(0, 6) != first.batch(0, 6)
    assert PromptSource(50, seed=1, stream=1).batch(0, 6) != first.batch(0, 6)
    # A fixed point: a change of the order would break every resumed run.
    assert PromptSource(8, seed=0).batch(0, 8) == [2, 4, 3, 6, 5, 0, 1, 7]
    assert all(isinstance(i, int) for i in late)
    with pytest.raises(ValueError, match="rounds count from 0"):
        first.batch(-1, 2)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptSource(0, seed=0)


def test_seen_is_what_the_rounds_draw() -> None:
    source = PromptSource(40, seed=5)
    assert source.seen(4, 6) == sorted({i for r in range(4) for i in source.batch(r, 6)})
    assert source.seen(10, 6) == list(range(40))


# --- tasks of a round ------------------------------------------------------------------------------------------------


def made(tasks: int = 1, prompts: str = "bundled/text", shares: Any = None, **sections: Any) -> Config:
    teachers = [{"name": f"t{i}", "weights": "bundled/text", "prompts": prompts} for i in range(tasks)]
    for teacher, share in zip(teachers, shares or [], strict=False):
        teacher["share"] = share
    return from_dict({"teachers": teachers, **sections})


@pytest.mark.parametrize(("tasks", "per_round"), [(3, None), (3, 1), (3, 2), (5, 3), (1, 1)])
def test_round_robin_gives_every_task_its_turn(tasks: int, per_round: Any) -> None:
    schedule = TaskSchedule([1.0] * tasks, per_round)
    k = per_round or tasks
    taken = [task for r in range(2 * tasks) for task, turns in schedule.round(r) for _ in turns]
    assert Counter(taken) == dict.fromkeys(range(tasks), 2 * k)
    for r in range(2 * tasks):
        found = schedule.round(r)
        assert [task for task, _ in found] == sorted({(r * k + j) % tasks for j in range(k)})
        assert all(len(turns) == 1 for _, turns in found)
    assert schedule.expected == [k / tasks] * tasks
    if per_round is None:
        assert all(schedule.round(r) == [(task, range(r, r + 1)) for task in range(tasks)] for r in range(9))


@pytest.mark.parametrize("kind", ["round_robin", "weighted"])
@pytest.mark.parametrize("per_round", [1, 2, 3])
def test_turns_follow_each_other_and_need_no_rounds_before(kind: Any, per_round: Any) -> None:
    shares = [1.0, 3.0, 0.5, 2.0]
    schedule = TaskSchedule(shares, per_round, kind, seed=4)
    had = [0] * 4
    for r in range(50):
        assert schedule.turns(r) == had
        for task, turns in schedule.round(r):
            assert turns.start == had[task]
            had[task] = turns.stop
        assert sum(had) == (r + 1) * per_round
    assert TaskSchedule(shares, per_round, kind, seed=4).round(49) == schedule.round(49)


@pytest.mark.parametrize("per_round", [1, 2, 4])
def test_weighted_rounds_are_in_proportion(per_round: Any) -> None:
    shares = [1.0, 3.0, 0.5, 2.0]
    schedule = TaskSchedule(shares, per_round, "weighted", seed=1)
    assert schedule.expected == pytest.approx([per_round * share / 6.5 for share in shares])
    rounds = 4000
    means = [turns / rounds for turns in schedule.turns(rounds)]
    assert means == pytest.approx(schedule.expected, abs=0.03)
    together: Counter[frozenset[int]] = Counter()
    for r in range(rounds):
        found = dict(schedule.round(r))
        for task, expected in enumerate(schedule.expected):
            assert int(expected) <= len(found.get(task, ())) <= int(expected) + 1
        together[frozenset(found)] += 1
    assert per_round == 1 or len(together) > 2  # any tasks meet, not only neighbours
    other = TaskSchedule(shares, per_round, "weighted", seed=2)
    assert [other.round(r) for r in range(20)] != [schedule.round(r) for r in range(20)]


@pytest.mark.parametrize("kind", ["round_robin", "weighted"])
def test_tasks_that_are_left_out_have_no_turns(kind: Any) -> None:
    """The others come as if they were all there is."""
    some = TaskSchedule([1.0, 3.0, 0.5, 2.0], 1, kind, seed=4, among=[3, 1])
    alone = TaskSchedule([3.0, 2.0], 1, kind, seed=4)
    assert some.expected == [0, alone.expected[0], 0, alone.expected[1]]
    for r in range(30):
        assert some.round(r) == [((1, 3)[task], turns) for task, turns in alone.round(r)]
    with pytest.raises(ValueError, match="no schedule of 0 tasks"):
        TaskSchedule([1.0], among=[])


def test_equal_shares_for_every_task_is_the_plain_round() -> None:
    plain, weighted = TaskSchedule([1.0] * 3), TaskSchedule([0.1] * 3, None, "weighted", seed=3)
    assert [weighted.round(r) for r in range(100)] == [plain.round(r) for r in range(100)]


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no schedule of 0 tasks"):
        TaskSchedule([])
    with pytest.raises(ValueError, match="rounds count from 0"):
        TaskSchedule([1.0]).round(-1)


@pytest.mark.parametrize(
    ("config", "key", "remedy"),
    [
        (made(2, train={"tasks_per_round": 0}), "train.tasks_per_round", "1 or more"),
        (made(2, train={"tasks_per_round": 3}), "train.tasks_per_round", "2 or less"),
        (made(2, shares=[1, 0.0], train={"task_schedule": "weighted"}), "teachers[1].share", "positive"),
        (made(2, shares=[1, 2.0]), "teachers[1].share", "task_schedule weighted"),
        (made(2, shares=[1, float("inf")], train={"task_schedule": "weighted"}), "teachers[1].share", "finite"),
    ],
)
def test_impossible_schedules_are_refused(config: Config, key: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(config)
    assert caught.value.key == key
    assert remedy in caught.value.remedy


def test_schedules_from_the_command_line() -> None:
    options = ["--train.tasks_per_round", "2", "--train.task_schedule", "weighted"]
    config = parse(["bundled", *options]).config
    assert (config.train.tasks_per_round, config.train.task_schedule) == (2, "weighted")
    validate(made(2, shares=[1, 2.0], train={"task_schedule": "weighted"}))
    with pytest.raises(UserError, match="did you mean weighted"):
        parse(["bundled", "--train.task_schedule", "weigted"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def setup(world: Path) -> Setup:
    """Two tasks, the second of three times the weight."""
    config = settings(world, evaluation__every=0)
    config.teachers[1].weight = 3.0
    return prepare(config, log=lambda text: None)


def scheduled(setup: Setup, per_round: int | None, shares: list[float] | None = None) -> OPD:
    kind: Any = "round_robin" if shares is None else "weighted"
    return OPD(replace(setup, schedule=TaskSchedule(shares or [1.0] * 2, per_round, kind, seed=2)))


def gradients(setup: Setup, method: OPD, *batches: Any) -> list[torch.Tensor]:
    """Of the student, summed over the batches."""
    for parameter in setup.student.parameters():
        parameter.grad = None
    for batch in batches:
        one_pass(setup.model, setup.student, setup.teachers, batch, setup.table, method.weight)
    return [p.grad.clone() for p in setup.student.parameters() if p.grad is not None]


def test_rounds_of_one_task_average_to_the_round_of_all(setup: Setup) -> None:
    """The gradient of a round of both tasks is the mean of the two rounds of one task each."""
    whole, single = scheduled(setup, None), scheduled(setup, 1)
    full = whole.batch(0)
    parts = [single.batch(r) for r in range(2)]
    assert [part.tasks for part in parts] == [((0, slice(0, 2)),), ((1, slice(0, 2)),)]
    for (_, rows), part in zip(full.tasks, parts, strict=True):
        assert torch.equal(part.text.sequence, full.text.sequence[rows])
    parts = [replace(part, keys=full.keys[rows]) for (_, rows), part in zip(full.tasks, parts, strict=True)]
    want, got = gradients(setup, whole, full), gradients(setup, single, *parts)
    assert any(float(g.abs().max()) > 0 for g in want)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b / 2, a, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("per_round", "shares"), [(None, None), (1, None), (1, [2.0, 1.0]), (2, [3.0, 1.0])])
def test_the_weight_of_a_task_is_its_own_times_how_often_it_comes(setup: Setup, per_round: Any, shares: Any) -> None:
    method = scheduled(setup, per_round, shares)
    places = per_round or 2
    expected = [places * share / sum(shares) for share in shares] if shares else [places / 2] * 2
    wanted = [w * q for w, q in zip([1.0, 3.0], expected, strict=True)]
    rounds = 12
    totals = [0.0, 0.0]
    for r in range(rounds):
        batch = method.batch(r)
        assert len(batch) == method.samples == 2 * places
        assert len(batch.text) == len(batch.keys.unique()) == len(batch)
        for task, rows in batch.tasks:
            totals[task] += float(batch.scale[rows].sum())
    turns = method.setup.schedule.turns(rounds)
    for task in range(2):  # as if every turn were the expected number of turns
        share = wanted[task] / sum(wanted)
        assert totals[task] / rounds == pytest.approx(share * turns[task] / rounds / expected[task])


def test_prompts_a_run_meets_are_those_embedded(world: Path) -> None:
    config = settings(world, evaluation__every=0, train__tasks_per_round=1, train__rounds=2, train__samples_per_task=1)
    setup = prepare(config, log=lambda text: None)
    method = OPD(setup)
    for r in range(2):
        assert len(method.batch(r)) == 1
    assert len(setup.text) == 3  # one prompt of each task, and the empty one
    with pytest.raises(KeyError, match="not encoded beforehand"):
        [method.batch(r) for r in range(2, 8)]


def student(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "adapter_model.safetensors")


def test_a_resumed_weighted_run_equals_one_that_never_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        world, evaluation__every=0, train__rounds=5, train__tasks_per_round=1, train__task_schedule="weighted"
    )
    config.teachers[1].share = 2.5
    validate(config)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run_dir in (whole, stopped):
        run_dir.mkdir()
    train(config, whole)
    original = Telemetry.round

    def stop(self: Telemetry, index: int, metrics: dict[str, float]) -> None:
        original(self, index, metrics)
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Telemetry, "round", stop)
    assert train(config, stopped)["rounds"] == 3
    monkeypatch.undo()
    train(config, stopped, resume=True)
    mine, theirs = student(stopped), student(whole)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    schedule = TaskSchedule([1.0, 2.5], 1, "weighted", config.train.seed)
    names = [teacher.name for teacher in config.teachers]
    lines = [line for line in read_metrics(stopped / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 5
    for r, line in enumerate(lines):
        tasks = {key for key in line if key.startswith("loss/task_")}
        assert tasks == {f"loss/task_{names[task]}" for task, _ in schedule.round(r)}


def test_the_plan_counts_the_tasks_of_a_round(world: Path) -> None:
    config = read_config(world)
    config.train.tasks_per_round, config.train.task_schedule = 1, "weighted"
    config.teachers[0].share, config.teachers[1].share = 3.0, 1.0
    config.teachers[1].guidance = 2.0
    plan = make_plan(config)
    assert plan.samples == plan.student_rows == 2
    assert plan.turns == {"words": 0.75, "plain": 0.25}
    assert plan.teacher_rows == {"words": 2, "plain": 4}
    assert plan.round_rows["teacher forward"] == round((2 * 0.75 + 4 * 0.25) * 3)


def test_a_file_is_parsed_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check of a run reads the prompts; an edit that keeps size and time is seen all the same."""
    from opd_fast.data import prompt_files

    parsed: list[str] = []
    original = prompt_files._target
    monkeypatch.setattr(prompt_files, "_target", lambda text: parsed.append(text) or original(text))  # type: ignore[func-returns-value]
    file = tmp_path / "a.txt"
    file.write_text("a cat\n")
    first = load_prompts(file)
    first.append(Prompt("another"))
    assert load_prompts(file) == [Prompt("a cat")], "what a caller does to its list is its own affair"
    assert parsed == ["a cat"]
    before = file.stat()
    file.write_text("a dog\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_prompts(file) == [Prompt("a dog")]
