"""Prompt files and their errors, the order of prompts, and the embedding cache."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from opd_fast.models.base import TextEmbeds
from opd_fast.prompts import (
    EmbeddingCache,
    Prompt,
    PromptSource,
    load_prompts,
    prompt_file,
    write_geneval,
    write_lines,
)

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


def test_geneval_round_trip(tmp_path):
    write_geneval(tmp_path / "train_metadata.jsonl", GENEVAL)
    prompts = load_prompts(tmp_path / "train_metadata.jsonl")
    assert [p.text for p in prompts] == [r["prompt"] for r in GENEVAL]
    assert [p.metadata for p in prompts] == GENEVAL
    assert load_prompts(tmp_path) == prompts


def test_ocr_lines_need_one_quoted_piece_each(tmp_path):
    lines = ['A sign that says "Open Late" in neon', 'A cup with "Tea", steaming']
    write_lines(tmp_path / "a.txt", lines)
    assert [p.metadata for p in load_prompts(tmp_path / "a.txt")] == [{"target": "Open Late"}, {"target": "Tea"}]
    for other in ('two "a" and "b"', "none", 'open "quote', 'empty ""'):
        write_lines(tmp_path / "b.txt", [*lines, other])
        assert load_prompts(tmp_path / "b.txt") == [Prompt(line) for line in [*lines, other]]


def test_plain_lines_keep_everything_but_blanks(tmp_path):
    # U+2028 and a form feed may stand inside a prompt; a byte-order mark, CRLF and blank lines may stand around it.
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still one\r\n\r\n  two\x0cstill two \n\nthree".encode())
    assert [p.text for p in load_prompts(tmp_path / "a.txt")] == ["one\u2028still one", "two\x0cstill two", "three"]


def test_folder_takes_the_split(tmp_path):
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
def test_bad_geneval_lines_are_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GENEVAL[0]) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=said) as caught:
        load_prompts(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_files_are_named(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: not UTF-8"):
        load_prompts(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        load_prompts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(tmp_path / "absent.txt")
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"neither .jsonl"):
        load_prompts(tmp_path / "a.csv")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"holds none of train_metadata.jsonl"):
        load_prompts(tmp_path / "folder")
    with pytest.raises(ValueError, match="choose train or test"):
        prompt_file(tmp_path, "eval")  # type: ignore[arg-type]
    monkeypatch.setattr("opd_fast.prompts.ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"no prompts named bundled/nothing; build them: python -m opd_fast\.worlds"):
        load_prompts("bundled/nothing")
    (tmp_path / "prompts" / "colour").mkdir(parents=True)
    write_lines(tmp_path / "prompts" / "colour" / "test.txt", ["red"])
    assert load_prompts("bundled/colour", "test") == [Prompt("red")]
    with pytest.raises(ValueError, match="choose one of bundled/colour"):
        load_prompts("bundled/nothing")


def test_writers_refuse_what_cannot_be_read_back(tmp_path):
    with pytest.raises(ValueError, match="record 2"):
        write_geneval(tmp_path / "a.jsonl", [GENEVAL[0], {"tag": "colors"}])
    with pytest.raises(ValueError, match="prompt 1 is empty or spans"):
        write_lines(tmp_path / "a.txt", ["two\nlines"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("OPD_FAST_PROMPTS" not in os.environ, reason="OPD_FAST_PROMPTS names no folder of prompt files")
def test_published_files():
    folder = Path(os.environ["OPD_FAST_PROMPTS"])
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
def test_every_prompt_once_per_epoch(count, n):
    source = PromptSource(count, seed=3)
    rounds = 3 * count  # n epochs' worth, three times over
    drawn = [i for r in range(rounds) for i in source.batch(r, n)]
    for start in range(0, len(drawn), count):
        assert sorted(drawn[start : start + count]) == list(range(count))
    if count >= 7:
        assert drawn[:count] != drawn[count : 2 * count]


def test_order_depends_on_seed_stream_and_round_alone():
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


def test_seen_is_what_the_rounds_draw():
    source = PromptSource(40, seed=5)
    assert source.seen(4, 6) == sorted({i for r in range(4) for i in source.batch(r, 6)})
    assert source.seen(10, 6) == list(range(40))


class Letters:
    """A stand-in for a model: embeds a text by its characters, and counts what it is asked."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.calls: list[list[str]] = []

    def encode(self, prompts: list[str]) -> TextEmbeds:
        self.calls.append(list(prompts))
        values = torch.tensor([[float(len(p)), float(sum(map(ord, p)))] for p in prompts], device=self.device)
        return TextEmbeds(values[:, None, :].expand(-1, 3, -1), values)


def test_cache_encodes_each_text_once_and_gathers():
    model = Letters()
    done: list[tuple[int, int]] = []
    texts = ["b", "a", "b", "c", "", "a"]
    cache = EmbeddingCache.build(model, texts, batch=3, progress=lambda i, n: done.append((i, n)))  # type: ignore[arg-type]
    assert sorted(text for call in model.calls for text in call) == ["", "a", "b", "c"]
    assert max(map(len, model.calls)) <= 3
    assert done == [(3, 4), (4, 4)]
    assert len(cache) == 4
    asked = ["c", "", "c", "a"]
    want = model.encode(asked)
    got = cache.rows(asked)
    assert torch.equal(got.pooled, want.pooled)
    assert torch.equal(got.sequence, want.sequence)
    assert torch.equal(cache.negative.pooled, model.encode([""]).pooled)
    with pytest.raises(KeyError, match=r"1 prompts were not encoded beforehand, e.g. 'd'"):
        cache.rows(["a", "d"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cache_above_its_limit_lies_in_host_memory():
    model = Letters("cuda")
    cache = EmbeddingCache.build(model, ["a", "b"], device_limit=8)  # type: ignore[arg-type]
    assert cache._embeds.pooled.device.type == "cpu"
    assert torch.equal(cache.rows(["b", "a"]).pooled, model.encode(["b", "a"]).pooled)
    near = EmbeddingCache.build(model, ["a", "b"])  # type: ignore[arg-type]
    assert near._embeds.pooled.device.type == "cuda"
