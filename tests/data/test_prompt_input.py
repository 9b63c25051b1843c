"""Prompt files that a later part of a run could not take: judged line by line at reading, before anything heavy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd_fast import evaluate, train
from opd_fast.config.command_line import parse
from opd_fast.data.prompt_files import LONGEST, Prompt, load_prompts, write_geneval, write_lines
from opd_fast.errors import UserError
from opd_fast.rewards.metadata import check_metadata
from opd_fast.training.loop import train as train_run
from opd_fast.training.problems import metadata_problems, problems, read_prompts
from tests.runs import settings

SCENE = {"prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_any_line_end(tmp_path: Path, name: str, end: bytes) -> None:
    lines = {"a.txt": [b"one", b"two"], "a.csv": [b"prompt", b"one", b"two"]}
    records = [json.dumps({"prompt": text}).encode() for text in ("one", "two")]
    (tmp_path / name).write_bytes(end.join([*lines.get(name, records), b""]))
    found = load_prompts(tmp_path / name)
    assert [prompt.text for prompt in found] == ["one", "two"]
    assert [prompt.where for prompt in found] == [
        f"{tmp_path / name}, line {number + (name == 'a.csv')}" for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.jsonl", b'{"prompt": "fine"}\n{"prompt": "a \\ud83d cup"}', 2, r"lone surrogate \ud83d); write the whole"),
        ("a.jsonl", b'{"prompt": "a cup", "tag": ["x", {"\\udc00": 1}]}', 1, r"lone surrogate \udc00)"),
        ("a.jsonl", b'{"prompt": "a \\u0000 cup"}', 1, "holds a NUL character; take it out"),
        ("a.jsonl", b'{"prompt": "a cup", "prompt": "two"}', 1, "two keys named 'prompt'"),
        ("a.jsonl", b"[" * 100_000, 1, "not JSON"),
        ("a.jsonl", b'{"prompt": "a", "include": [{"class": "cup", "count": 1' + b"0" * 400 + b"}]}", 1, "1 to 1000"),
        ("a.jsonl", b'{"prompt": "\\u200b\\u2060"}', 1, 'lacks the text "prompt"'),
        ("a.txt", b"one\ntwo\x00", 2, "holds a NUL byte"),
        ("a.txt", "one\ntwo".encode("utf-16"), 1, "not UTF-8 but UTF-16; convert the file to UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-32"), 1, "not UTF-8 but UTF-32; convert the file to UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), 1, "holds a NUL byte, as UTF-16 does"),
        ("a.txt", "one\u2028two\u2028three".encode(), 1, "the only line holds U+2028, which does not end a line here"),
        ("a.txt", "one\x85two".encode(), 1, "the only line holds U+0085, which does not end a line here"),
        ("a.txt", b"one\n\n" + b"x" * (LONGEST + 1), 3, f"a prompt of {LONGEST + 1} characters"),
        ("a.csv", b"prompt\none\n" + b"x" * (LONGEST + 1), 3, f"a prompt of {LONGEST + 1} characters"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000, 2, "field limit (131072)); close its double quotes, or shorten"),
        ("a.csv", b"prompt,tag\none,b\n\xe2\x80\x8b,b", 3, "the column 'prompt' holds no text"),
        ("a.csv", b"prompt,tag\none,\x00", 2, "holds a NUL byte"),
    ],
)
def test_what_no_later_part_can_take(tmp_path: Path, name: str, content: bytes, line: int, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line") as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as told:
        read_prompts("teachers[0].prompts", str(path), "train")
    assert told.value.key == "teachers[0].prompts"
    assert told.value.problem.startswith(f"{path}, line {line}: ")
    assert told.value.remedy


def test_what_reads_as_it_looks(tmp_path: Path) -> None:
    """Byte-order marks of joined files, invisible lines, and the longest prompt there may be."""
    longest = "x" * LONGEST
    (tmp_path / "a.txt").write_bytes(f"\ufeffone\n\ufefftwo\n\u200b\n \ufeff \n{longest}\nsay \U0001f600\n".encode())
    assert [prompt.text for prompt in load_prompts(tmp_path / "a.txt")] == ["one", "two", longest, "say \U0001f600"]
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a \\ud83d\\ude00"}\n\xef\xbb\xbf{"prompt": "b"}')
    assert [prompt.text for prompt in load_prompts(tmp_path / "a.jsonl")] == ["a \U0001f600", "b"]


def test_writers_refuse_it_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt 2 holds half a character"):
        write_lines(tmp_path / "a.txt", ["one", "\ud83d"])
    with pytest.raises(ValueError, match="record 1: holds half a character"):
        write_geneval(tmp_path / "a.jsonl", [{"prompt": "\ud83d"}])
    assert list(tmp_path.iterdir()) == []


# --- what rewards need -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "metadata", "said"),
    [
        ("text", {}, "has no target"),
        ("text", {"target": ""}, "has the target ''"),
        ("text", {"target": 7}, "has the target 7"),
        ("opd_fast.rewards.text:score", {}, "has no target"),
        ("composition", {}, 'has no GenEval list "include"'),
        ("composition", {"include": []}, 'has no GenEval list "include"'),
        ("composition", {"include": "[]"}, 'has no GenEval list "include"'),
        ("composition", {"include": [{"class": "circle"}]}, '"count" None'),
        ("composition", {"include": [{"class": "cow", "count": 1}]}, "\"class\" 'cow', which its detector does not"),
        ("composition_strict", {"include": [{"class": "circle", "count": 1, "color": "puce"}]}, "\"color\" 'puce'"),
    ],
)
def test_each_reward_says_what_it_needs(reward: str, metadata: dict[str, object], said: str) -> None:
    good = Prompt("x", {"target": "HK", "include": SCENE["include"]})
    check_metadata(reward, [good], "k")
    with pytest.raises(UserError) as caught:
        check_metadata(reward, [good, Prompt("x", metadata, "f.txt, line 9")], "teachers[0].prompts")
    assert caught.value.problem.startswith(f"f.txt, line 9, which the reward {reward} judges, ")
    assert said in str(caught.value)
    assert caught.value.key == "teachers[0].prompts"
    check_metadata("colour", [Prompt("x", metadata)], "k")  # reads none


@pytest.mark.parametrize(
    ("position", "said"),
    [(["behind", 0], "'behind', which its detector does not know"), (["above", 1], "names entry 1 in entry 1")],
)
def test_positions_that_cannot_be_judged(position: list[object], said: str) -> None:
    include = [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": position}]
    with pytest.raises(UserError, match=said):
        check_metadata("composition", [Prompt("x", {"include": include})], "k")


def test_the_bundle_has_what_its_rewards_need() -> None:
    for recipe in ("bundled", "joint-raw-sum", "cascade-nft", "cold-start"):
        assert not [problem for config in parse([recipe]).configs for problem in metadata_problems(config)]


def broken(world: Path, tmp_path: Path) -> Path:
    """Held-out prompts whose third line has no target."""
    path = tmp_path / "held-out.txt"
    path.write_text('a sign that says "HK"\n\na sign without a word\n')
    file = tmp_path / "run.yaml"
    file.write_text(world.read_text().replace(f"eval_prompts: {world.parent / 'words'}.txt", f"eval_prompts: {path}"))
    return file


def test_a_run_is_refused_before_it_loads(
    small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = broken(small_world, tmp_path)
    for part in ("opd_fast.training.setup.load_model", "opd_fast.evaluation.samplers.load_model"):
        monkeypatch.setattr(part, lambda *a, **k: pytest.fail("the model was loaded"))
    said = (
        f"teachers[0].eval_prompts: {tmp_path / 'held-out.txt'}, line 3, which the reward text judges, has no target; "
        "put exactly one piece of the line in double quotes, or add the key or column target"
    )
    assert train.main([str(file), "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "run").exists()
    assert train.main([str(file), "--dry-run"]) == 2
    told = capsys.readouterr()
    assert said in " ".join(told.out.split())
    assert told.err == f"error: {said}\n"
    with pytest.raises(UserError, match=r"line 3, which the reward text judges"):
        train_run(settings(file), tmp_path / "run")
    argv = ["--model", str(small_world.parent / "pipeline"), "--rewards", "text", "--out", str(tmp_path / "out")]
    assert evaluate.main([*argv, "--prompts", str(tmp_path / "held-out.txt")]) == 2
    assert f"prompts: {tmp_path / 'held-out.txt'}, line 3, which" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rewards_are_asked_where_they_judge(small_world: Path, tmp_path: Path) -> None:
    """Under distillation held-out prompts alone; under reinforcement learning training prompts too, for every term."""
    file = broken(small_world, tmp_path)
    config = parse([str(file)]).config
    assert [problem.key for problem in problems(config)] == ["teachers[0].eval_prompts"]
    config.evaluation.every = 0
    assert not list(problems(config))
    config.train.method = "grpo"
    config.teachers[1].reward = "colour + 0.5*text"
    assert [problem.key for problem in problems(config)] == ["teachers[1].prompts"]
    config.train.tasks = ["words"]
    assert not list(problems(config))


def test_names_of_files_in_tables(small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and three files of like names keep their own results."""
    for folder, name in (("x", "a-2"), ("y", "a"), ("z", "a")):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / f"{name}.txt", ["a red circle"])
    files = [str(tmp_path / f) for f in ("x/a-2.txt", "y/a.txt", "z/a.txt")]
    argv = ["--model", str(small_world.parent / "pipeline"), "--prompts", ",".join(files), "--steps", "1"]
    argv += ["--rewards", "colour,colour,colour", "--resolution", "32", "--grid", "0", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 0
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["rewards"]) == ["a-2", "a", "a-3"]
    capsys.readouterr()
    write_lines(tmp_path / "[x].txt", ["a red circle"])
    argv[3] = str(tmp_path / "[x].txt")
    argv[argv.index("--rewards") + 1] = "colour"
    assert evaluate.main(argv) == 0
    assert "[x]" in capsys.readouterr().out
    assert train.main([str(small_world), "--dry-run", "--run-dir", str(tmp_path / "[/b]")]) == 0
    assert "[/b]" in "".join(capsys.readouterr().out.split())
