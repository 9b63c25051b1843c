"""The blocks of docs/judges.md: the server of HPSv3, the settings of a run, and a judge of one's own."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward
from opd_fast.rewards.judge import to_pixels
from opd_fast.rewards.runner import call_reward
from opd_fast.train import main
from tests import judge_server as fake
from tests.judge_server import Handler, chat, serving
from tests.runs import PROMPTS

PAGE = Path(__file__).parents[2] / "docs" / "judges.md"
IMAGES = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))

PACKAGE = """
import torch

class HPSv3RewardInferencer:
    '''Stands in for the published package: mu and sigma of each image, a tensor (B, 2).'''

    def __init__(self, config_path=None, checkpoint_path=None, device="cuda"):
        assert device == "cuda"

    def reward(self, prompts, image_paths):
        assert len(prompts) == len(image_paths)
        assert all(image.mode == "RGB" for image in image_paths)
        means = [sum(image.tobytes()) / len(image.tobytes()) + len(text) for image, text in zip(image_paths, prompts)]
        return torch.tensor([[mean, -1.0] for mean in means])
"""


def block(page: str, beginning: str) -> str:
    found = [text for text in re.findall(r"^```\w*\n(.*?)^```$", page, re.M | re.S) if text.startswith(beginning)]
    assert len(found) == 1
    return str(found[0])


def test_the_server_of_hpsv3(tmp_path: Path) -> None:
    """The page's file as it stands, but for its port, with a package of the published one's interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = block(PAGE.read_text(), "# hpsv3_server.py")
    assert text.count("18087") == 1
    (tmp_path / "hpsv3_server.py").write_text(text.replace("18087", str(port)))
    (tmp_path / "hpsv3.py").write_text(PACKAGE)
    models = RewardModelsConfig(hps3_server=f"http://127.0.0.1:{port}", batch=2, request_timeout=30.0)
    prompts = [Prompt("x" * i) for i in range(5)]
    reward: Any = get_reward("hpsv3", models)
    process = subprocess.Popen([sys.executable, "hpsv3_server.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                found = reward(IMAGES, prompts)
                break
            except UserError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    means = [Image.fromarray(image).resize((24, 16)).tobytes() for image in to_pixels(IMAGES)]
    expected = [sum(pixels) / len(pixels) + i for i, pixels in enumerate(means)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_judge_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judges.py").write_text(block(PAGE.read_text(), "# my_judges.py"))
    monkeypatch.syspath_prepend(tmp_path)

    def reply(_: Handler, asked: Any) -> Any:
        image, text = asked["messages"][0]["content"]
        assert image["type"] == "image_url"
        assert text["text"].startswith("This image was made for the caption: a sign, number ")
        return chat(f"It is 10 of 10 sharp.\nScore: {2 * fake.digits(text['text'])}")

    with serving(reply, "Qwen/Qwen2.5-VL-7B-Instruct") as server:
        reward = get_reward("my_judges:Legible", RewardModelsConfig(judge_server=f"{server.address}/v1"))
        found = call_reward(reward, IMAGES, [Prompt(f"a sign, number {i + 1}") for i in range(5)], 60.0)
    assert found.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    sys.modules.pop("my_judges")


def test_the_settings_of_a_run(small_world: Path, tmp_path: Path) -> None:
    def either(handler: Handler, asked: Any) -> Any:
        return fake.hpsv3(handler, asked) if handler.path == "/score" else fake.judge(handler, asked)

    with serving(either) as server:
        text = block(PAGE.read_text(), "# judged.yaml")
        for address in ("http://127.0.0.1:17140", "http://127.0.0.1:18087"):
            assert address in text
            text = text.replace(address, server.address)
        page, data = yaml.safe_load(text), yaml.safe_load(small_world.read_text())
        data["reward_models"] = page.pop("reward_models")
        data["evaluation"] |= page.pop("evaluation")
        assert not page
        data["train"]["rounds"] = 1
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
        assert main([str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failures"] == []
    for row in results["rows"].values():
        for task in PROMPTS:
            assert 0.2 <= row[f"{task}/unified_reward"] <= 1
            assert 0 <= row[f"{task}/hpsv3"] <= 15
