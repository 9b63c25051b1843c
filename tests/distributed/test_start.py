"""A start builds the model without weights once, whoever asks for it: the choice of a strategy, checks, the setup."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_fast import train
from opd_fast.config.serialize import to_yaml
from opd_fast.distributed.plan import Planner
from opd_fast.distributed.world import World
from opd_fast.engine.cuda_graphs import Graphs
from opd_fast.models import SD3
from opd_fast.training.methods.opd import OPD
from opd_fast.training.setup import checkpointed_blocks, prepare
from opd_fast.training.student import Student
from tests.recorded import RecordedBackend
from tests.runs import settings, write_world


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a run of one round."""
    folder = tmp_path_factory.mktemp("start")
    config = settings(write_world(folder), train__rounds=1, evaluation__every=0, checkpoint__every=0)
    file: Path = folder / "one.yaml"
    file.write_text(to_yaml(config))
    return file


def counted(built: list[str]) -> Any:
    """SD3's builder of models without weights, which also adds to `built`."""
    build = SD3.meta.__func__  # type: ignore[attr-defined]

    def count(cls: type[SD3], *arguments: Any, **options: Any) -> SD3:
        built.append(cls.__name__)
        model: SD3 = build(cls, *arguments, **options)
        return model

    return classmethod(count)


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_one_process_builds_it_once(
    run: Path, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(SD3, "meta", counted(built))
    assert train.main([str(run), "--run-dir", str(tmp_path / "run"), *options]) == 0
    assert built == ["SD3"]


def test_setup_and_plan_share_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan decides how many blocks are checkpointed on a GPU. It reads the model that was checked."""
    built: list[str] = []
    monkeypatch.setattr(SD3, "meta", counted(built))
    config = settings(run.parent / "run.yaml", evaluation__every=0)
    planner = Planner(config, 1)
    before = [(p.dtype, p.requires_grad) for p in planner.model.transformer.parameters()]
    prepare(config, lambda text: None, planner=planner)
    assert planner.plan is planner.plan
    assert planner.plan.workload.parameters == sum(p.numel() for p in planner.model.transformer.parameters())
    assert checkpointed_blocks(planner) == 0
    assert built == ["SD3"]
    assert [(p.dtype, p.requires_grad) for p in planner.model.transformer.parameters()] == before


@pytest.mark.slow
def test_each_of_two_processes_builds_it_once(run: Path, tmp_path: Path) -> None:
    from tests.distributed.test_parallel import finished, torchrun

    code, said = finished(torchrun(2, "-m", "tests.distributed.test_start", str(run), str(tmp_path)))
    assert code == 0, said
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [["SD3"]] * 2


def main(run: str, out: Path) -> int:
    import os

    built: list[str] = []
    SD3.meta = counted(built)  # type: ignore[method-assign]
    code = train.main([run, "--run-dir", str(out / "run")])
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(built))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))


def test_nothing_on_a_sharded_base_is_captured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards are gathered by hooks, which no graph records: not for the teachers on it, nor for the anchor."""
    monkeypatch.setattr(Student, "distribute", lambda student, world: setattr(student, "world", world))
    changes = {"engine__placement": "shared", "objective__anchor": "base", "evaluation__every": 0}
    setup = prepare(settings(run.parent / "run.yaml", **changes), lambda text: None, World(strategy="fsdp2"))
    graphs = Graphs(RecordedBackend())
    setup = dataclasses.replace(setup, active=dataclasses.replace(setup.active, graphs=graphs))
    losses = OPD(setup).accumulate(0, torch.amp.GradScaler("cpu", enabled=False))
    assert bool((losses > 0).all())
    assert graphs.captured == 0
