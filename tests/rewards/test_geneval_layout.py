"""GenEval's folder of images, read back as GenEval's own evaluator walks it."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from opd_fast.data.prompt_files import Prompt, load_prompts
from opd_fast.errors import UserError
from opd_fast.rewards.geneval_layout import image_record, save_image

LINES = [
    '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}], '
    '"prompt": "a photo of two cups"}',
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
]


def walk(folder: Path) -> list[tuple[dict[str, Any], str, Any]]:
    """Record, name and pixels of every image, found as `evaluate_images.py` finds them."""
    found = []
    for name in sorted(os.listdir(folder)):
        if not (folder / name).is_dir() or not name.isdigit():
            continue
        record = json.load((folder / name / "metadata.jsonl").open())
        for image in sorted(os.listdir(folder / name / "samples")):
            path = folder / name / "samples" / image
            if path.is_file() and re.match(r"\d+\.png", image):
                found.append((record, f"{name}/samples/{image}", np.asarray(ImageOps.exif_transpose(Image.open(path)))))
    return found


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(seed))


def test_geneval_finds_every_image_and_record(tmp_path: Path) -> None:
    (tmp_path / "test_metadata.jsonl").write_text("\n".join(LINES) + "\n")
    prompts = load_prompts(tmp_path / "test_metadata.jsonl")
    folder = tmp_path / "images"
    images = {(index, sample): picture(10 * index + sample) for index in range(2) for sample in range(4)}
    for (index, sample), image in images.items():
        path = save_image(folder, index, sample, image, image_record(prompts[index]))
        assert path == folder / f"0000{index}" / "samples" / f"000{sample}.png"
    found = walk(folder)
    assert [name for _, name, _ in found] == [f"0000{i}/samples/000{s}.png" for i, s in images]
    for ((index, _), image), (record, _, pixels) in zip(images.items(), found, strict=True):
        assert record == json.loads(LINES[index])
        assert (pixels == (image * 255).round().byte().permute(1, 2, 0).numpy()).all()
    for index, line in enumerate(LINES):  # metadata.jsonl is the file's line
        assert (folder / f"0000{index}" / "metadata.jsonl").read_text() == line + "\n"
    # Nothing but the layout is left behind.
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"metadata.jsonl", *(f"000{s}.png" for s in range(4))}


def test_prompts_without_a_record(tmp_path: Path) -> None:
    prompts = [
        Prompt("a hill at noon"),
        Prompt('a sign "café"', {"target": "café"}),
        Prompt("a", {"prompt": "a ", "x": 1}),
    ]
    for index, prompt in enumerate(prompts):
        save_image(tmp_path, index, 0, picture(index), image_record(prompt))
    assert [record for record, _, _ in walk(tmp_path)] == [
        {"prompt": "a hill at noon"},
        {"prompt": 'a sign "café"', "target": "café"},
        {"prompt": "a ", "x": 1},
    ]


def test_values_beyond_the_range_and_large_numbers(tmp_path: Path) -> None:
    image = torch.tensor([-1.0, 0.0019, 0.5, 2.0, float("nan"), 1.0]).expand(3, 2, 6)
    path = save_image(str(tmp_path), 123456, 10000, image.to(torch.bfloat16), {"prompt": "a"})
    assert path == tmp_path / "123456" / "samples" / "10000.png"
    assert np.asarray(Image.open(path))[1, :, 2].tolist() == [0, 0, 128, 255, 0, 255]


def test_another_run_may_replace_images_but_not_mix_prompts(tmp_path: Path) -> None:
    save_image(tmp_path, 0, 0, picture(0), {"prompt": "a"})
    path = save_image(tmp_path, 0, 0, picture(1), {"prompt": "a"})
    assert (np.asarray(Image.open(path)) == (picture(1) * 255).round().byte().permute(1, 2, 0).numpy()).all()
    with pytest.raises(UserError, match=r"metadata.jsonl: belongs to another prompt or prompt file; give a new folder"):
        save_image(tmp_path, 0, 1, picture(1), {"prompt": "b"})
    assert len(walk(tmp_path)) == 1
    record = {"prompt": "café", "day": date(2026, 1, 2)}  # parquet tables hold dates
    save_image(tmp_path, 1, 0, picture(0), record)
    (tmp_path / "00001" / "metadata.jsonl").write_text('{"prompt": "caf\\u00e9",  "day": "2026-01-02"}')
    save_image(tmp_path, 1, 1, picture(0), record)  # the same, written by another program
    (tmp_path / "00001" / "metadata.jsonl").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="belongs to another prompt"):
        save_image(tmp_path, 1, 1, picture(0), record)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; give a folder that you may write to"):
        save_image(tmp_path / "file", 0, 0, picture(0), {"prompt": "a"})
    for index, sample, image, said in ((-1, 0, picture(0), "begin at 0"), (0, 0, picture(0)[:1], "is \\(3, H, W\\)")):
        with pytest.raises(ValueError, match=said):
            save_image(tmp_path, index, sample, image, {"prompt": "a"})


def test_several_writers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: save_image(tmp_path, i % 3, i // 3, picture(i), {"prompt": f"p{i % 3}"}), range(48)))
    found = walk(tmp_path)
    assert len(found) == 48
    for record, name, pixels in found:
        index, sample = int(name[:5]), int(name[-8:-4])
        assert record == {"prompt": f"p{index}"}
        assert (pixels == (picture(index + 3 * sample) * 255).round().byte().permute(1, 2, 0).numpy()).all()
