"""Checkpoints: whole or absent, verified, pruned."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opd_fast.checkpoint import Checkpoints
from opd_fast.errors import UserError


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


def test_round_trip(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    saved = state(1.0)
    path = checkpoints.save(7, saved, {"config_hash": "abc", "ema": {"decay": 0.9}})
    tensors, meta = checkpoints.load()
    assert path == checkpoints.latest()
    assert meta == {"round": 7, "config_hash": "abc", "ema": {"decay": 0.9}}
    assert tensors.keys() == saved.keys()
    for name, tensor in saved.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def test_keeps_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for round in (5, 10, 1_000_000, 15):
        checkpoints.save(round, state(round % 7), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000015", "round-1000000"]
    assert checkpoints.load()[1]["round"] == 1_000_000  # by number, not by name or date


def test_saving_a_round_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(4, state(1.0), {})
    checkpoints.save(4, state(2.0), {})
    assert [p.name for p in tmp_path.iterdir()] == ["round-000004"]
    assert checkpoints.load()[0]["step"] == 2


def test_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, keep=1).save(1, state(1.0), {})
    assert sorted(p.name for p in path.iterdir()) == ["meta.json", "state.safetensors"]


def _cut(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _flip(path: Path) -> None:
    file = path / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _swap(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, path / "state.safetensors")


def _remove_meta(path: Path) -> None:
    (path / "meta.json").unlink()


def _garble_meta(path: Path) -> None:
    (path / "meta.json").write_text("[1, 2")


def _list_meta(path: Path) -> None:
    (path / "meta.json").write_text("[]")


@pytest.mark.parametrize("damage", [_cut, _flip, _swap, _remove_meta, _garble_meta, _list_meta])
def test_damaged_latest_falls_back(tmp_path: Path, damage: object, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1.0), {})
    latest = checkpoints.save(2, state(2.0), {})
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
    _cut(checkpoints.save(1, state(1.0), {}))
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoints.load()


def test_another_format_is_named(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path, keep=1).save(1, state(1.0), {})
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(UserError, match="format 99"):
        Checkpoints(tmp_path, keep=1).load(path)


def test_a_crash_while_saving_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1.0), {})

    def crash(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, state(2.0), {})
    assert checkpoints.load()[1]["round"] == 1
    checkpoints.save(3, state(3.0), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000001", "round-000003"]  # the leftover is gone


def test_mistakes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="sha256"):
        Checkpoints(tmp_path, keep=1).save(1, state(1.0), {"sha256": "x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1).save(1, state(1.0), {})
