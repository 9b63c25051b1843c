"""A run that learns from GenEval's partial score, by small random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_fast.data.prompt_files import write_geneval
from opd_fast.train import main as train
from tests.runs import write_world
from tests.tiny_clip import save_clip
from tests.tiny_detector import save_detector


@pytest.mark.slow
def test_a_run_reports_all_three(tmp_path: Path) -> None:
    """Training on the partial score, evaluations of all, through the command line."""
    save_clip(tmp_path / "clip")
    save_detector(tmp_path / "detector")
    world = write_world(tmp_path / "world")
    records = [of_class(name) for name in ("dog", "cat", "toaster")]
    write_geneval(tmp_path / "test_metadata.jsonl", records)
    prompts = tmp_path / "test_metadata.jsonl"
    task = f"{{name: objects, weights: base, prompts: {prompts}, eval_prompts: {prompts}, reward: geneval}}"
    argv = [str(world), "--teachers", f"[{task}]", "--train.method", "grpo", "--train.rounds", "1", "--train.seed", "1"]
    argv += ["--train.samples_per_task", "2", "--rl.images_per_prompt", "2", "--rl.updates", "1"]
    argv += ["--evaluation.prompts", "3", "--run-dir", str(tmp_path / "run")]
    argv += ["--reward_models.detector", str(tmp_path / "detector"), "--reward_models.clip", str(tmp_path / "clip")]
    assert train(argv) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    base = rows["base"]
    assert set(base) == {"geneval", "geneval_strict", "geneval_accuracy"}
    assert all(np.isfinite(value) for value in base.values())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["evaluation"] == {"objects": base}
    (learnt,) = [line["reward/objects"] for line in lines if "reward/objects" in line]
    assert np.isfinite(learnt)


def of_class(name: str) -> dict[str, Any]:
    return {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
