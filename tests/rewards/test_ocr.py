"""The reward `ocr`: its values on given readings, what it gives each engine, failures, and what RapidOCR reads."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opd_fast import rewards
from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import get_reward, ocr, ocr_engines
from opd_fast.rewards.metadata import check_metadata
from opd_fast.rewards.ocr import Ocr, similarity
from opd_fast.rewards.runner import RewardFailure, RewardRunner, call_reward

# fmt: off
TARGETS = (
    "Purr Therapy 5 minute", "Extra Buttery", "Sun Power 101", "Harvest King", "Time for Lunch", "Send More Coffee",
    "Volcano Project 6", "Summer Sale Live Now", "Road Closed Ahead", "undergrad", "Next Gas 100 Miles",
    "Abandon All Hope", "Low Battery 10%", "Deli", "E 4", "The Adventure Begins July 10", "Everest Expedition 2025",
    "Rides Closed Due Rain", "Ball at Midnight", "Caution Hot Contents", "apples are good for you",
    "Critical Care Fluid Only", "Hidden Trail", "Win Giant Panda Prize", "Etsuraku Kousaten", "ribbentrop",
    "Flight 42 On Time", "Tarot Palmistry", "100% Chance of Meteors", "Caution: Telepathic Subjects",
    "Don't Burn the Bread", "Emily & Jake Forever", "Gluten-Free Options Available", "Know Your Future $5",
    "WiFi password: LatteArt123", "Depth Critical", "Who Invented Pizza?", "World's Smallest Horse",
    "You're Being Watched", "In Case Of Fire Use Stairs",
)
# fmt: on
"""Of Flow-GRPO's OCR prompts (MIT licence)."""


def rendered(texts: list[str], seed: int, size: int = 512) -> Tensor:
    """Return images (B, 3, size, size) of the texts in fonts, sizes, colours and places drawn by `seed`."""
    rng = random.Random(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = sorted(str(path) for path in folder.glob("DejaVuS*.ttf") if "Display" not in path.name)
    images = []
    for text in texts:
        back, ink = (0, 0, 0), (0, 0, 0)
        while abs(np.dot(np.subtract(back, ink), (0.299, 0.587, 0.114))) < 90:
            back, ink = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        image = Image.new("RGB", (size, size), back)
        draw = ImageDraw.Draw(image)
        name, points = rng.choice(fonts), rng.randrange(24, 80)
        while (box := draw.textbbox((0, 0), text, font=ImageFont.truetype(name, points)))[2] > 0.9 * size:
            points -= 2
        place = (rng.randint(10, int(size - box[2]) - 10), rng.randint(10, int(size - box[3]) - 10))
        draw.text(place, text, font=ImageFont.truetype(name, points), fill=ink)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    return torch.stack(images)


def quoting(*texts: str) -> list[Prompt]:
    return [Prompt(f'A sign that reads "{text}" by a road') for text in texts]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts its own engines."""
    monkeypatch.setattr(rewards, "_MODEL_REWARDS", {})


Reader = Callable[[Any], list[tuple[str, float]]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ocr]:
    """Makes a reward whose engines, in the place of RapidOCR's, are the given function."""

    def make(read: Reader, count: int = 1) -> Ocr:
        monkeypatch.setattr(ocr, "rapidocr", lambda: read)
        monkeypatch.setattr(ocr, "readers", lambda: count)
        reward = get_reward("ocr")
        assert isinstance(reward, Ocr)
        return reward

    return make


@pytest.mark.parametrize(
    ("strings", "target", "value"),
    [
        ([("Road Closed", 0.9)], "Road Closed", 1.0),
        ([("road", 0.9), ("CLOSED", 0.6)], "Road Closed", 1.0),  # strings are joined, case and spaces do not count
        ([("The Ro ad", 0.9), ("Closed Ahead", 0.9)], "Road Closed", 1.0),  # more text around it does not matter
        ([("Closed", 0.9), ("Road", 0.9)], "Road Closed", 1 - 8 / 10),  # the order of reading does
        ([("Rood Closed", 0.9)], "Road Closed", 1 - 1 / 10),
        ([("Rood", 0.9)], "Road Closed", 1 - 6 / 10),
        ([("Road", 0.9), ("Closed", 0.0)], "Road Closed", 1 - 6 / 10),  # a string without confidence does not count
        ([], "Road Closed", 0.0),
        ([("something long that has nothing in common with it", 0.9)], "Zq", 0.0),  # never below 0
        ([("Don't", 0.9)], "Dont", 1 - 1 / 4),  # punctuation counts
        ([("a\tb", 0.9)], "ab", 1 - 1 / 2),  # so do other kinds of space
    ],
)
def test_the_published_value(
    engine: Callable[..., Ocr], strings: list[tuple[str, float]], target: str, value: float
) -> None:
    assert similarity(strings, target) == pytest.approx(value, abs=1e-12)
    reward = engine(lambda pixels: strings)
    assert call_reward(reward, torch.zeros(1, 3, 8, 8), quoting(target)).tolist() == pytest.approx([value], abs=1e-7)


def test_pixels_are_rounded_and_images_keep_their_order(engine: Callable[..., Ocr]) -> None:
    seen: dict[int, Any] = {}
    busy, most, lock = set(), 0, threading.Lock()

    def read(pixels: Any) -> list[tuple[str, float]]:
        nonlocal most
        if pixels.shape != (4, 5, 3):
            return []  # the word that shows whether an engine works
        with lock:
            busy.add(threading.get_ident())
            most = max(most, len(busy))
        number = int(pixels[0, 0, 0])
        seen[number] = pixels
        time.sleep(0.02 * (number % 3))
        with lock:
            busy.discard(threading.get_ident())
        return [(f"number {number}", 0.9)]

    images = torch.rand(40, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = (torch.arange(40) + 0.4) / 255
    images[:2, 1, 1, 1] = torch.tensor([1.3, -0.2])
    values = call_reward(engine(read, 3), images, quoting(*(f"number {i if i % 2 else 77}" for i in range(40))))
    assert values[1::2].tolist() == [1.0] * 20
    assert (values[::2] < 1).all()
    assert most == 3
    for number, pixels in seen.items():
        expected = (images[number] * 255).round().clamp(0, 255).permute(1, 2, 0).numpy()
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)


def test_the_target_of_a_prompt(engine: Callable[..., Ocr]) -> None:
    reward = engine(lambda pixels: [("Hotel", 0.9)])
    prompts = [
        Prompt('A door that says "Hotel"', {"target": "Hotel"}),
        Prompt("A door", {"target": "Hotel"}),
        Prompt('A door that says "Hostel"', {"target": "Hotel"}),  # what the file says comes before the quotes
        Prompt('A door that says "Hotel" beside one that says "Bar"'),  # the first piece, as published
        Prompt('A door that says "Motel" beside one that says "Hotel"'),
    ]
    check_metadata("ocr", prompts, "teachers[0].prompts")
    values = call_reward(reward, torch.zeros(5, 3, 8, 8), prompts)
    assert values.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8], abs=1e-6)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (
            Prompt("A door", {}, "p.txt, line 3"),
            "p.txt, line 3, which the reward ocr judges, has no target; ",
        ),
        (Prompt('A door that says "Hotel', {}, "p.txt, line 3"), "has no target"),
        (Prompt('A door that says " "', {}, "p.txt, line 3"), "has the target ' '; give the words"),
        (
            Prompt('A door that says "Bar"', {"target": 5}, "p.csv, line 2"),
            "which the reward ocr judges, has the target 5; ",
        ),
    ],
)
def test_a_prompt_without_a_target_is_refused(engine: Callable[..., Ocr], prompt: Prompt, words: str) -> None:
    with pytest.raises(UserError, match=r"^teachers") as error:
        check_metadata("ocr", [*quoting("Bar"), prompt], "teachers[0].prompts")
    assert words in str(error.value)
    with pytest.raises(RewardFailure, match=prompt.where.partition(",")[0]) as failure:
        call_reward(engine(lambda pixels: []), torch.zeros(1, 3, 8, 8), [prompt])
    assert failure.value.kind == "unavailable"


def test_an_image_on_which_the_engine_fails_earns_0(engine: Callable[..., Ocr]) -> None:
    def read(pixels: Any) -> list[tuple[str, float]]:
        if pixels[0, 0, 0] == 1:
            raise ZeroDivisionError("a box without\na width")
        return [("Bar", 0.9)]

    images = torch.zeros(3, 3, 8, 8)
    images[1] = 1 / 255
    with pytest.warns(UserWarning, match="failed on an image, which earns 0: a box without a width"):
        assert call_reward(engine(read, 2), images, quoting("Bar", "Bar", "Bar")).tolist() == [1.0, 0.0, 1.0]


def test_a_broken_engine_is_not_taken_for_bad_images(engine: Callable[..., Ocr]) -> None:
    calls = 0

    def read(pixels: Any) -> list[tuple[str, float]]:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise MemoryError("the engine is gone")
        return [("Bar", 0.9)]

    runner = RewardRunner("record")
    reward = engine(read, 2)
    assert reward is get_reward("ocr", RewardModelsConfig())
    assert runner("ocr", torch.zeros(4, 3, 8, 8), quoting(*["Bar"] * 4)).isnan().all()
    assert runner.failures == {("ocr", "raised"): 4}
    assert "MemoryError: the engine is gone" in str(runner.messages)


def test_an_engine_that_cannot_read_a_word_is_refused_at_once(engine: Callable[..., Ocr]) -> None:
    def read(pixels: Any) -> list[tuple[str, float]]:
        raise OSError("the model's file is damaged")

    with pytest.raises(
        RewardFailure, match=r"reward_models.ocr: rapidocr cannot read \(OSError: the model's"
    ) as failure:
        call_reward(engine(read), torch.zeros(1, 3, 8, 8), quoting("Bar"))
    assert failure.value.kind == "unavailable"


def test_readers_share_the_cores_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, count in ((64, 1, 8), (64, 8, 4), (16, 4, 2), (2, 1, 1), (2, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert ocr_engines.readers() == count


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_no_score(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    runner = RewardRunner("record")
    assert runner("ocr", torch.zeros(2, 3, 8, 8), quoting("Bar", "Bar")).isnan().all()
    assert runner.failures == {("ocr", "unavailable"): 2}
    assert f'{missing}: is not installed; pip install "opd_fast[ocr]"' in str(runner.messages)


# --- PaddleOCR, by a module with its interface ------------------------------------------------------------------------

PADDLE = """
import numpy as np

started, seen, lines = [], [], []

class PaddleOCR:
    def __init__(self, **kwargs):
        started.append(kwargs)

    def ocr(self, img, det=True, rec=True, cls=True):
        assert isinstance(img, np.ndarray) and not cls
        seen.append(img)
        box = [[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.0, 9.0]]
        return [[[box, line] for line in lines] or None]
"""


@pytest.fixture
def paddle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType | None]]:
    """Installs such a module; `version` None leaves its metadata out."""
    names = ("paddleocr", "paddle")
    monkeypatch.syspath_prepend(tmp_path)

    def install(source: str = PADDLE, version: str | None = "2.9.1") -> None:
        (tmp_path / "paddle.py").touch()
        (tmp_path / "paddleocr.py").write_text(source)
        if version is not None:
            info = tmp_path / f"paddleocr-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: paddleocr\nVersion: {version}\n")
        importlib.invalidate_caches()

    yield install
    for name in names:
        sys.modules.pop(name, None)


def test_paddleocr_reads_as_published(paddle: Callable[..., None]) -> None:
    paddle()
    reward = get_reward("ocr", RewardModelsConfig(ocr="paddleocr"))
    assert isinstance(reward, Ocr)
    reward.check()
    assert "paddleocr" not in sys.modules  # a check imports nothing
    assert reward.identity() == {"ocr": "paddleocr", "version": "2.9.1"}
    images = torch.zeros(2, 3, 6, 7)
    images[:, 0] = 1  # red
    assert call_reward(reward, images, quoting("Bar", "Bar")).tolist() == [0.0, 0.0]  # it returns [None]
    module: Any = sys.modules["paddleocr"]
    assert module.started == [{"use_angle_cls": False, "lang": "en", "use_gpu": False, "show_log": False}]
    np.testing.assert_array_equal(module.seen[-1], np.full((6, 7, 3), (255, 0, 0), np.uint8))
    module.lines = [("The", 0.99), ("B ar", 0.51), ("rot", 0.0)]
    assert call_reward(reward, images, quoting("Bar", "The Bat")).tolist() == pytest.approx([1.0, 5 / 6], abs=1e-6)
    assert len(module.started) == 1


def test_paddleocr_is_refused_where_it_is_missing_or_another(paddle: Callable[..., None]) -> None:
    reward = get_reward("ocr", RewardModelsConfig(ocr="paddleocr"))
    assert isinstance(reward, Ocr)
    if importlib.util.find_spec("paddleocr") is None:
        with pytest.raises(UserError, match=r'^paddleocr: is not installed; pip install "paddleocr==2.9.1"'):
            reward.check()
    paddle(version="3.1.0")
    with pytest.raises(UserError, match=r"^paddleocr: is version 3.1.0, whose models and interface are not"):
        reward.check()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libpaddle.so is missing')", r"does not start \(ImportError: libpaddle.so is missing\)"),
        ("import sys\n\ndef PaddleOCR(**kwargs):\n    sys.exit(0)", r"does not start \(SystemExit: 0\); let it fetch"),
    ],
)
def test_paddleocr_that_does_not_start(paddle: Callable[..., None], source: str, words: str) -> None:
    paddle(source)
    with pytest.raises(RewardFailure, match=words) as failure:
        call_reward(
            get_reward("ocr", RewardModelsConfig(ocr="paddleocr")), torch.zeros(1, 3, 8, 8), quoting("Bar"), name="ocr"
        )
    assert failure.value.kind == "unavailable"


# --- RapidOCR itself --------------------------------------------------------------------------------------------------


def read_by_rapidocr(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the values of `count` rendered texts against themselves, and against another of the texts."""
    texts = [TARGETS[i % len(TARGETS)] for i in range(count)]
    images = rendered(texts, seed)
    right = call_reward("ocr", images, quoting(*texts))
    other = call_reward("ocr", images[:10], quoting(*(TARGETS[(i + 7) % len(TARGETS)] for i in range(min(count, 10)))))
    return right, other


def test_rapidocr_knows_its_settings() -> None:
    """It accepts any key in silence, so a key that another version renames would be lost."""
    known = yaml.safe_load(
        (Path(importlib.import_module("rapidocr").__file__ or "").parent / "config.yaml").read_text()
    )
    for key, value in ocr_engines.RAPID.items():
        default = functools.reduce(lambda section, name: section[name], key.split("."), known)
        assert type(default) is type(value) or {type(default), type(value)} == {int, float}, key


def test_rapidocr_reads_rendered_texts() -> None:
    right, other = read_by_rapidocr(10, seed=1)
    assert float(right.mean()) >= 0.97
    assert float(other.mean()) < 0.4
    assert get_reward("ocr").identity() == {"ocr": "rapidocr", "version": importlib.metadata.version("rapidocr")}  # type: ignore[attr-defined]
    blank = torch.full((1, 3, 512, 512), 0.5)
    assert call_reward("ocr", blank, quoting("Hotel")).tolist() == [0.0]
    # Rows of letters are read from the top, and each row from the left.
    rows = torch.cat([rendered(["Road", "Closed"], seed=3, size=256)[i] for i in (0, 1)], dim=1)
    assert call_reward("ocr", rows[None], quoting("Road Closed")).tolist() == [1.0]


@pytest.mark.slow
def test_rapidocr_reads_200_rendered_texts() -> None:
    right, other = read_by_rapidocr(200, seed=2)
    assert float(right.mean()) >= 0.97
    assert float((right == 1).float().mean()) >= 0.9
    assert float(other.mean()) < 0.4
