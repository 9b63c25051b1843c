"""The embedding cache: in memory, on disk, and what it does about damage, change and interruption."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd_fast.config.command_line import read_config
from opd_fast.data import text_store
from opd_fast.data.prompt_files import load_prompts
from opd_fast.data.text_embeddings import EmbeddingCache
from opd_fast.data.text_store import TextStore, cache_root, text_files, text_key
from opd_fast.errors import UserError
from opd_fast.models import DiffusionModel, TextEmbeds, load_model
from opd_fast.models.text import TextEncoders
from opd_fast.reporting import progress as progress_module
from opd_fast.reporting.progress import progress_of
from opd_fast.training.setup import prepare
from tests.runs import settings, write_world
from tests.tiny import save_tiny

PROMPTS = [f"a photo of {n} {thing}" for n in ("one", "two", "three") for thing in ("cups", "cows", "signs")]


class Letters:
    """A stand-in for a model: embeds a text by its characters, and counts what it is asked."""

    name, path = "letters", "no/such/folder"
    dtype, text_tokens, text_device = torch.float32, 3, None
    folder, text_folders = None, DiffusionModel.text_folders

    def __init__(self, device: str, pooled: bool, mask: bool) -> None:
        self.device, self.parts = torch.device(device), (pooled, mask)
        self.calls: list[list[str]] = []

    def encode(self, prompts: list[str]) -> TextEmbeds:
        self.calls.append(list(prompts))
        values = torch.tensor([[float(len(p)), float(sum(map(ord, p)))] for p in prompts], device=self.device)
        mask = torch.tensor([[True, len(p) > 1, len(p) > 2] for p in prompts], device=self.device)
        pooled, masked = self.parts
        return TextEmbeds(values[:, None, :].expand(-1, 3, -1), values if pooled else None, mask if masked else None)


def letters(device: str = "cpu", *, pooled: bool = True, mask: bool = False) -> Any:
    return Letters(device, pooled, mask)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small SD3 pipeline with a T5 encoder."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "pipeline", t5=True)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> DiffusionModel:
    return load_model(folder, device="cpu", dtype=torch.float32, **{"max_sequence_length": 16, **options})


def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a text encoder is an error from here on."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr("opd_fast.models.pipeline_model._load_text", refuse)


def store(root: Path, model: DiffusionModel) -> TextStore:
    found = TextStore.open(str(root), model)
    assert found is not None
    return found


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def same(a: EmbeddingCache, b: EmbeddingCache, prompts: list[str] = PROMPTS) -> bool:
    """Bit for bit."""
    mine, theirs = a.rows([*prompts, ""]).tensors, b.rows([*prompts, ""]).tensors
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


# --- in memory -------------------------------------------------------------------------------------------------------


def test_cache_encodes_each_text_once_and_gathers() -> None:
    model = letters()
    done: list[tuple[int, int]] = []
    texts = ["b", "a", "b", "c", "", "a"]
    cache = EmbeddingCache.build(model, texts, batch=3, progress=lambda i, n: done.append((i, n)))
    assert sorted(text for call in model.calls for text in call) == ["", "a", "b", "c"]
    assert max(map(len, model.calls)) <= 3
    assert done == [(3, 4), (4, 4)]
    assert len(cache) == cache.encoded == 4
    asked = ["c", "", "c", "a"]
    want = model.encode(asked).tensors
    got = cache.rows(asked).tensors
    assert torch.equal(got["pooled"], want["pooled"])
    assert torch.equal(got["sequence"], want["sequence"])
    assert torch.equal(cache.negative.tensors["pooled"], model.encode([""]).tensors["pooled"])
    with pytest.raises(KeyError, match=r"1 prompts were not encoded beforehand, e.g. 'd'"):
        cache.rows(["a", "d"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cache_above_its_limit_lies_in_host_memory(tmp_path: Path) -> None:
    model = letters("cuda")
    kept = TextStore(tmp_path, model, "key")
    for _ in range(2):  # encoded, then from disk
        cache = EmbeddingCache.build(model, ["a", "b"], device_limit=8, store=kept)
        assert cache._embeds.sequence.device.type == "cpu"
        near = EmbeddingCache.build(model, ["a", "b"], store=kept)
        assert near._embeds.sequence.device.type == "cuda"
        want = model.encode(["b", "a"]).tensors["pooled"]
        for found in (cache, near):
            assert torch.equal(found.rows(["b", "a"]).tensors["pooled"], want)


# --- encoders that are loaded when they are needed -------------------------------------------------------------------


def test_text_encoders_wait_for_the_first_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_encoder(monkeypatch)
    model = load(folder)
    assert model.text_tokens == 77 + 16
    with pytest.raises(AssertionError, match="was loaded"):
        model.encode(["a"])
    model.release_text_encoders()
    with pytest.raises(RuntimeError, match="encode every prompt before"):
        model.encode(["a"])


def test_text_encoders_go_where_they_are_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    original = TextEncoders.get

    def get(self: TextEncoders, device: torch.device) -> Any:
        asked.append(device)
        return original(self, device)

    monkeypatch.setattr(TextEncoders, "get", get)
    for where in (None, "cpu:0"):
        embeds = load(folder, text_device=where).encode(["a"])
        assert embeds.sequence.device == torch.device("cpu")
    assert asked == [torch.device("cpu"), torch.device("cpu", 0)]

    path = write_world(tmp_path)
    for setting, device in (("auto", None), ("cpu", torch.device("cpu"))):
        config = settings(path, model__text_device=setting, evaluation__every=0)
        assert prepare(config, log=lambda text: None).model.text_device == device
    assert asked[2:] == [torch.device("cpu")] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_text_encoders_on_the_cpu_of_a_model_on_the_gpu(folder: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float32, "max_sequence_length": 16}
    model = load_model(folder, text_device="cpu", **options)
    held = torch.cuda.memory_allocated()
    embeds = model.encode(PROMPTS)
    assert embeds.sequence.device.type == embeds.tensors["pooled"].device.type == "cuda"
    size = sum(t.numel() * t.element_size() for t in embeds.tensors.values())
    assert torch.cuda.memory_allocated() - held < 2 * size + 4096  # the embeddings alone
    torch.testing.assert_close(
        embeds.sequence, load_model(folder, **options).encode(PROMPTS).sequence, rtol=0, atol=1e-4
    )


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_second_run_loads_no_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = EmbeddingCache.build(load(folder), PROMPTS, batch=3)
    model = load(folder)
    first = EmbeddingCache.build(model, PROMPTS, batch=3, store=store(tmp_path, model))
    assert (len(first), first.encoded, len(shards(tmp_path))) == (10, 10, 4)
    no_encoder(monkeypatch)
    model = load(folder)
    second = EmbeddingCache.build(model, PROMPTS[::-1], store=store(tmp_path, model))
    assert second.encoded == 0
    assert same(first, plain)
    assert same(second, plain)
    assert not list(tmp_path.rglob(".*"))


def test_what_is_new_is_encoded_and_added(folder: Path, tmp_path: Path) -> None:
    for prompts, encoded in ((PROMPTS[:4], 5), (PROMPTS[2:7], 3), (PROMPTS[:7], 0)):
        model = load(folder)
        cache = EmbeddingCache.build(model, prompts, store=store(tmp_path, model))
        assert cache.encoded == encoded
        torch.testing.assert_close(cache.rows(prompts).sequence, model_rows(folder, prompts), rtol=0, atol=1e-6)


def model_rows(folder: Path, prompts: list[str]) -> torch.Tensor:
    return load(folder).encode(prompts).sequence


def test_a_killed_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    encode, calls = type(model).encode, []

    def killed(self: Any, prompts: list[str]) -> TextEmbeds:
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, prompts)

    monkeypatch.setattr(type(model), "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache.build(model, PROMPTS, batch=3, store=store(tmp_path, model))
    assert len(shards(tmp_path)) == 2
    model = load(folder)
    cache = EmbeddingCache.build(model, PROMPTS, batch=3, store=store(tmp_path, model))
    assert calls[3:] == [PROMPTS[5:8], PROMPTS[8:]]  # ten texts, "" first, of which six were done
    monkeypatch.undo()
    assert same(cache, EmbeddingCache.build(load(folder), PROMPTS, batch=3))


@pytest.mark.parametrize(("pooled", "mask"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_part_of_the_text_comes_back(tmp_path: Path, pooled: bool, mask: bool) -> None:
    model = letters(pooled=pooled, mask=mask)
    texts = ["", "a", "ab", "schön\u2028\ud800", 'a "b"\0c']
    fresh = EmbeddingCache.build(model, texts, batch=2, store=TextStore(tmp_path, model, "key"))
    model.calls.clear()
    read = EmbeddingCache.build(model, texts, store=TextStore(tmp_path, model, "key"))
    assert model.calls == []
    names = {"sequence", *(["pooled"] if pooled else []), *(["mask"] if mask else [])}
    assert set(read.rows(texts).tensors) == names
    assert same(read, fresh, texts)
    for name, tensor in read.rows(texts).tensors.items():
        assert tensor.dtype == (torch.bool if name == "mask" else torch.float32)


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **facts: str) -> None:
    with safe_open(path, framework="pt") as shard:
        before = shard.metadata()
    tensors = tensors or {k: t.clone() for k, t in load_file(path).items()}
    save_file(tensors, path, metadata={**before, **facts})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def other_length(path: Path) -> None:
    rewrite(path, {k: t[:, :50].clone() if k == "sequence" else t.clone() for k, t in load_file(path).items()})


def other_width(path: Path) -> None:
    rewrite(path, {k: t[..., :16].clone() for k, t in load_file(path).items()})


def fewer_rows(path: Path) -> None:
    rewrite(path, {k: t[:1].clone() for k, t in load_file(path).items()})


def other_texts(path: Path) -> None:
    with safe_open(path, framework="pt") as shard:
        texts = json.loads(shard.metadata()["texts"])
    rewrite(path, texts=json.dumps(texts[::-1]))


DAMAGE: list[Callable[[Path], Any]] = [
    cut_short,
    turn_a_bit,
    other_length,
    other_width,
    fewer_rows,
    other_texts,
    lambda path: rewrite(path, key="0" * 32),
    lambda path: rewrite(path, checksums="[1"),
    lambda path: rewrite(path, {"other": torch.zeros(3)}),
    lambda path: save_file({"sequence": torch.zeros(3, 93, 32)}, path),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"not a shard" * 100),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_made_again(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(folder)
    whole = EmbeddingCache.build(model, PROMPTS, batch=3, store=store(tmp_path, model))
    bad = next(path for path in shards(tmp_path) if len(load_file(path)["sequence"]) == 3)
    damage(bad)
    capsys.readouterr()
    mended = EmbeddingCache.build(model, PROMPTS, batch=3, store=store(tmp_path, model))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {bad} is damaged (")
    assert mended.encoded == 3
    assert same(mended, whole)
    again = EmbeddingCache.build(model, PROMPTS, store=store(tmp_path, model))
    assert again.encoded == 0
    assert capsys.readouterr().err == ""
    assert same(again, whole)


def change_weights(folder: Path) -> None:
    file = folder / "text_encoder_3" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})


def change_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer_2" / "tokenizer.json"
    file.write_text(file.read_text() + " ")


def touch(folder: Path) -> None:
    os.utime(folder / "text_encoder" / "model.safetensors", (1, 1))


def change_transformer(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": "changed"})


def key(model: DiffusionModel) -> str:
    return text_key(model, text_files(model))


@pytest.mark.parametrize(
    ("change", "small_files", "noticed"),
    [
        (change_weights, True, True),
        (change_weights, False, True),
        (change_vocabulary, True, True),
        (change_vocabulary, False, True),
        (touch, True, False),  # the content is what counts
        (touch, False, True),  # of a large file, whose content is not read
        (change_transformer, True, False),
    ],
)
def test_a_changed_encoder_is_noticed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], small_files: bool, noticed: bool
) -> None:
    if not small_files:
        monkeypatch.setattr(text_store, "WHOLE_FILE", 256)
    before = key(load(copy))
    assert key(load(copy)) == before
    change(copy)
    assert (key(load(copy)) != before) is noticed


def test_a_changed_encoder_encodes_again(copy: Path, tmp_path: Path) -> None:
    model = load(copy)
    EmbeddingCache.build(model, PROMPTS, store=store(tmp_path / "cache", model))
    change_weights(copy)
    model = load(copy)
    cache = EmbeddingCache.build(model, PROMPTS, store=store(tmp_path / "cache", model))
    assert cache.encoded == 10
    assert same(cache, EmbeddingCache.build(load(copy), PROMPTS))


def test_the_key_is_of_what_decides_the_rows(folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    assert key(load(copy)) == key(model)  # wherever the pipeline lies
    lengths = {key(load(folder, max_sequence_length=length)) for length in (0, 16, None)}
    low = load_model(folder, device="cpu", dtype=torch.bfloat16, max_sequence_length=16)
    assert len({*lengths, key(low)}) == 4
    before = key(model)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert key(model) != before
    assert {file.parent.name for file in text_files(model)} == {
        f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
    }


def test_runs_side_by_side(tmp_path: Path) -> None:
    texts = [str(i) for i in range(60)]
    models = [letters() for _ in range(4)]
    caches: list[EmbeddingCache] = []

    def run(model: Any) -> None:
        for batch in (7, 4, 9):
            caches.append(EmbeddingCache.build(model, texts, batch=batch, store=TextStore(tmp_path, model, "key")))

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = EmbeddingCache.build(letters(), texts)
    assert len(caches) == 12
    assert all(same(cache, want, texts) for cache in caches)
    assert not list(tmp_path.rglob("*.part"))
    last = EmbeddingCache.build(letters(), texts, store=TextStore(tmp_path, letters(), "key"))
    assert last.encoded == 0
    assert same(last, want, texts)


def test_unfinished_shards_of_dead_runs_are_swept_out(tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    old, new = tmp_path / "key" / ".a.part", tmp_path / "key" / ".b.part"
    for part in (old, new):
        part.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    TextStore(tmp_path, letters(), "key")
    assert (old.exists(), new.exists()) == (False, True)


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    model = letters()
    kept = TextStore(tmp_path, model, "key")
    monkeypatch.setattr(os, "replace", full)
    cache = EmbeddingCache.build(model, PROMPTS, batch=2, store=kept)
    monkeypatch.undo()
    assert same(cache, EmbeddingCache.build(letters(), PROMPTS))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "No space left" in warning
    assert not list(kept.folder.iterdir())


def test_rows_that_the_model_does_not_make(tmp_path: Path) -> None:
    model = letters(pooled=True)
    EmbeddingCache.build(model, ["a"], store=TextStore(tmp_path, model, "key"))
    other = letters(pooled=False)
    with pytest.raises(ValueError, match="delete the folder"):
        EmbeddingCache.build(other, ["a", "b"], store=TextStore(tmp_path, other, "key"))


# --- settings --------------------------------------------------------------------------------------------------------


def test_where_the_cache_lies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "opd_fast" / "text"
    model = load(folder)
    assert TextStore.open("off", model) is None
    assert TextStore.open("auto", model) is None  # so small that it is not worth it
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(text_store, "SMALL", 0)
    found = TextStore.open("auto", model)
    assert found is not None
    assert found.folder == cache_root() / key(model)
    assert store(tmp_path / "mine", model).folder == tmp_path / "mine" / key(model)

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^model\.text_cache: .*cannot be made.*name another"):
        TextStore.open(str(tmp_path / "file"), model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert TextStore.open("auto", model) is None
    assert capsys.readouterr().err.count("going on without") == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "opd_fast" / "text"


def test_a_model_that_tells_no_encoders_is_not_kept(tmp_path: Path) -> None:
    model = letters()
    assert model.text_folders() == []
    assert TextStore.open("auto", model) is None
    with pytest.raises(UserError, match=r"^model\.text_cache: letters does not name its text encoders.*give off"):
        TextStore.open(str(tmp_path), model)


@pytest.mark.parametrize(("written", "meant"), [("off", "off"), ("'off'", "off"), ("auto", "auto"), ("x/y", "x/y")])
def test_the_setting_in_a_file(tmp_path: Path, written: str, meant: str) -> None:
    path = write_world(tmp_path)
    path.write_text(path.read_text().replace("model: {", f"model: {{text_cache: {written}, "))
    assert read_config(path).model.text_cache == meant
    with pytest.raises(UserError, match=r"^model\.text_cache: is empty"):
        settings(path, model__text_cache="")


def test_a_run_reads_what_the_run_before_it_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_world(tmp_path / "world")
    said: list[str] = []
    config = settings(path, model__text_cache=str(tmp_path / "cache"))
    first = prepare(config, log=said.append).text
    assert any("encoded 7 distinct prompts, read 0 from" in line for line in said)
    no_encoder(monkeypatch)
    second = prepare(config, log=said.append).text
    assert any(f"encoded 0 distinct prompts, read 7 from {tmp_path / 'cache'}" in line for line in said)
    assert same(first, second, [])
    with pytest.raises(AssertionError, match="was loaded"):
        prepare(settings(path, model__text_cache="off"), log=said.append)


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_of("encoded", "prompts") as progress:
        progress(1, 3)
    assert capsys.readouterr().err == ""  # over before anyone waits
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.0)
    with progress_of("encoded", "prompts") as progress:
        progress(1, 3)
    assert capsys.readouterr().err == "encoded 1/3 prompts\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_of("encoded", "prompts") as progress:
        assert capsys.readouterr().err == ""
        progress(2, 3)
        progress(3, 3)
    assert "3/3" in capsys.readouterr().err


# --- real prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("OPD_FAST_PROMPT_DATA" not in os.environ, reason="OPD_FAST_PROMPT_DATA names no prompt files")
def test_published_prompts_through_the_cache(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(os.environ["OPD_FAST_PROMPT_DATA"])
    prompts = [p.text for name in ("geneval", "ocr") for p in load_prompts(data / name, "test")]
    assert len(prompts) == 3230
    pipeline = save_tiny(tmp_path_factory.mktemp("tiny") / "pipeline")
    model = load(pipeline)
    first = EmbeddingCache.build(model, prompts, store=store(tmp_path, model))
    assert len(first) == first.encoded == len({"", *prompts})
    no_encoder(monkeypatch)
    model = load(pipeline)
    second = EmbeddingCache.build(model, prompts, store=store(tmp_path, model))
    assert second.encoded == 0
    assert same(first, second, prompts)
