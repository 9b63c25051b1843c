"""What a name in the settings refers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opd_fast.config.paths import ASSETS, Kind, Source, bundled_choices, bundled_names, bundled_remedy, resolve_source

KINDS: tuple[Kind, ...] = ("pipeline", "teachers", "prompts")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("bundled", "pipeline", Source("package", ASSETS / "pipeline")),
        ("bundled", "teachers", Source("package", ASSETS / "teachers" / "bundled")),  # which is not there
        ("bundled/text", "teachers", Source("package", ASSETS / "teachers" / "text")),
        ("bundled/text", "prompts", Source("package", ASSETS / "prompts" / "text")),
        ("org/name", "pipeline", Source("hub", None, "org/name")),
        ("org/name", "teachers", Source("hub", None, "org/name")),
        ("org/name", "prompts", Source("local", Path("org/name"))),
        ("org/name/sub", "pipeline", Source("local", Path("org/name/sub"))),
        ("org/name/sub/lora", "teachers", Source("hub", None, "org/name", "sub/lora")),
        ("org/name/a.safetensors", "teachers", Source("hub", None, "org/name", "a.safetensors")),
        ("org/a.safetensors", "teachers", Source("local", Path("org/a.safetensors"))),
        ("./org/name", "teachers", Source("local", Path("org/name"))),
        ("name", "teachers", Source("local", Path("name"))),
        ("~/name", "pipeline", Source("local", Path.home() / "name")),
        ("base", "teachers", Source("local", Path("base"))),  # a setting that has the word looks for it first
    ],
)
def test_names(name: str, kind: Kind, expected: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source(name, kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_that_exists_is_that_path(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_source("org/name", kind) == Source("local", Path("org/name"))
    assert resolve_source("org/nmae", kind) == Source("local", Path("org/nmae"))  # a mistake in a path


def test_every_reader_takes_the_hub_s_names_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before a run, the plan, the record of what a run was made from, and the loaders."""
    from opd_fast.config.serialize import from_dict
    from opd_fast.models import pipeline_folder
    from opd_fast.models.lora import files
    from opd_fast.training.preflight import unchecked
    from opd_fast.training.problems import problems

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "p.txt").write_text("a red circle\n")
    fetched: list[Any] = []

    def fetch(repo: str, patterns: list[str], **options: Any) -> Path:
        fetched.append((repo, patterns[0]))
        return tmp_path / "absent"

    monkeypatch.setattr(files, "fetch", fetch)
    monkeypatch.setattr(pipeline_folder, "fetch", fetch)
    for weights, on_hub in (("org/name/sub", True), ("org/a.safetensors", False), ("mine/typo", False)):
        config = from_dict(
            {
                "model": {"path": "org/model"},
                "teachers": [{"name": "t", "weights": weights, "prompts": "p.txt"}],
            }
        )
        assert unchecked(config) == ["org/model", *[weights] * on_hub]
        assert [error.key for error in problems(config)] == ["teachers[0].weights"] * (not on_hub)
        assert files.find_lora(weights) is None
    assert fetched == [("org/name", "sub/adapter_config.json")]
    pipeline_folder.resolve_pipeline("org/model")
    assert fetched[1:] == [("org/model", "model_index.json")]
    with pytest.raises(ValueError, match="does not exist"):
        pipeline_folder.resolve_pipeline("mine/typo")
    assert len(fetched) == 2


def test_what_the_package_has() -> None:
    assert bundled_names("teachers") == ["bundled/colour", "bundled/composition", "bundled/text"]
    assert bundled_choices("teachers") == "choose one of bundled/colour, bundled/composition, bundled/text"
    assert bundled_remedy("bundled/txet", "teachers") == "did you mean bundled/text?"
