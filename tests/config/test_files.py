"""Files and folders that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opd_fast.files import replace_folder, replace_text, replacing


def test_a_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("the place was taken before all was written"))
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_bytes() == b"\xc3\xa4\n"


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_that_raises_leaves_the_old_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path, shared=shared) as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_shared_file_is_written_by_several_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as other:
        other.write_bytes(b"other")
        one.write_bytes(b"one")
    assert path.read_bytes() == b"one"  # the outer block ends last
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    replace_folder(folder, lambda part: (part / "first").write_text("1"))
    (tmp_path / ".student.part").mkdir()  # of a run that was killed
    replace_folder(folder, lambda part: (part / "second").write_text("2"))
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "student",
        "student/second",
    ]
