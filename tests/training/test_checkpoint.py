"""Checkpoints: whole or absent, verified, pruned."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd_fast.errors import UserError
from opd_fast.training.checkpoint import Checkpoints


def state(value: float) -> dict[str, torch.Tensor]:
    weight = torch.full((3, 2), value)
    return {
        "weight": weight,
        "tied": weight,  # safetensors alone refuses shared storage
        "strided": torch.arange(6.0).reshape(2, 3).t(),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
        "step": torch.tensor(int(value)),
    }


def saved(checkpoints: Checkpoints, round: int) -> Path:
    """A checkpoint of `round` on the disk."""
    path = checkpoints.save(round, state(float(round)), {})
    checkpoints.wait()
    return path


def test_round_trip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    held = state(1.0)
    path = checkpoints.save(7, held, {"config_hash": "abc", "ema": {"decay": 0.9}})
    checkpoints.wait()
    tensors, meta = checkpoints.load()
    assert path == checkpoints.latest()
    assert meta == {"round": 7, "config_hash": "abc", "ema": {"decay": 0.9}}
    assert tensors.keys() == held.keys()
    for name, tensor in held.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round in (5, 10, 1_000_000, 15):
        checkpoints.save(round, state(round % 7), {})
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000015", "round-1000000"]
    assert checkpoints.load()[1]["round"] == 1_000_000  # by number, not by name or date


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(4, state(1.0), {})
    checkpoints.save(4, state(2.0), {})
    checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["round-000004"]
    assert checkpoints.load()[0]["step"] == 2


def test_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    path = saved(Checkpoints(tmp_path, keep=1), 1)
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".safetensors"]


def _shard(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def _cut(path: Path) -> None:
    file = _shard(path)
    file.write_bytes(file.read_bytes()[:-5])


def _flip(path: Path) -> None:
    file = _shard(path)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _swap(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, _shard(path))


def _remove_shard(path: Path) -> None:
    _shard(path).unlink()


def _alter_meta(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "round": 7}))


def _remove_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def _garble_meta(path: Path) -> None:
    (path / "meta.json").write_text("[1, 2")


def _list_meta(path: Path) -> None:
    (path / "meta.json").write_text("[]")


DAMAGE = [_cut, _flip, _swap, _remove_shard, _alter_meta, _remove_meta, _garble_meta, _list_meta]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_latest_falls_back(tmp_path: Path, damage: object, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    saved(checkpoints, 1)
    latest = saved(checkpoints, 2)
    damage(latest)  # type: ignore[operator]
    tensors, meta = checkpoints.load()
    assert meta["round"] == 1
    assert tensors["step"] == 1
    said = capsys.readouterr().err
    assert "round-000002" in said
    assert "damaged" in said
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load(latest)


def test_none_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.load()
    _cut(saved(checkpoints, 1))
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoints.load()


def test_another_format_is_named(tmp_path: Path) -> None:
    path = saved(Checkpoints(tmp_path, keep=1), 1)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Checkpoints(tmp_path, keep=1).load(path)


def test_a_crash_while_saving_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    saved(checkpoints, 1)

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            saved(checkpoints, 2)
    assert checkpoints.load()[1]["round"] == 1
    saved(checkpoints, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000001", "round-000003"]  # the leftover is gone


def test_a_crash_while_replacing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    saved(checkpoints, 1)
    replace, calls = os.replace, []

    def crash_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            saved(checkpoints, 1)
    assert not (tmp_path / "round-000001").exists()
    assert checkpoints.load()[1]["round"] == 1


def test_the_state_may_change_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, changed = Checkpoints(tmp_path, keep=1), threading.Event()
    begin = Checkpoints._begin

    def late(self: Checkpoints, temporary: Path) -> None:
        assert changed.wait(20)
        begin(self, temporary)

    monkeypatch.setattr(Checkpoints, "_begin", late)
    live = state(1.0)
    checkpoints.save(1, live, {})  # returns although nothing can be written yet
    for tensor in live.values():
        tensor.zero_()
    changed.set()
    checkpoints.wait()
    assert torch.equal(checkpoints.load()[0]["weight"], torch.full((3, 2), 1.0))


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    saved(checkpoints, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        with pytest.raises(UserError, match=r"No space left on device.*make room"):
            saved(checkpoints, 2)
    assert checkpoints.load()[1]["round"] == 1
    saved(checkpoints, 3)
    assert checkpoints.load()[1]["round"] == 3


def test_restoring_into_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    folder = saved(checkpoints, 1)
    filled = {"weight": torch.zeros(3, 2)}
    checkpoints.restore(folder, filled)
    assert torch.equal(filled["weight"], torch.full((3, 2), 1.0))
    with pytest.raises(ValueError, match=r"weight of shape \(3, 2\), this run \(2, 3\)"):
        checkpoints.restore(folder, {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="holds other of shape None"):
        checkpoints.restore(folder, {"other": torch.zeros(1)})


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="sha256"):
        Checkpoints(tmp_path, keep=1).save(1, state(1.0), {"sha256": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        saved(Checkpoints(tmp_path / "file" / "checkpoints", keep=1), 1)
