"""GenEval's detector and colours: small random models through the real loading, against plain computations."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards import REPORTED, get_reward
from opd_fast.rewards.clip_model import load_clip
from opd_fast.rewards.geneval import GenEval, to_pixels
from opd_fast.rewards.geneval_colours import ColourNamer, crop_pixels
from opd_fast.rewards.geneval_detector import Detector, class_names
from opd_fast.rewards.geneval_rules import CLASSES, COLOURS, Instance, judge
from opd_fast.rewards.metadata import check_metadata
from opd_fast.rewards.runner import RewardRunner
from tests.tiny_clip import SIDE, save_clip
from tests.tiny_detector import COCO, save_detector

CPU = torch.device("cpu")
NAMES = dict(zip(COCO.split(","), CLASSES, strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    top = tmp_path_factory.mktemp("geneval")
    save_clip(top / "clip", projection=4, seed=5)
    return SimpleNamespace(detector=save_detector(top / "detector"), clip=top / "clip")


def settings(folders: SimpleNamespace, **changes: Any) -> RewardModelsConfig:
    return RewardModelsConfig(**{"detector": str(folders.detector), "clip": str(folders.clip), **changes})


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images (count, 3, height, width) float32 in 0..1 of broad shapes."""
    generator = torch.Generator().manual_seed(seed)
    broad = torch.rand(count, 3, 5, 7, generator=generator)
    return torch.nn.functional.interpolate(broad, (height, width), mode="bicubic").clamp(0, 1)


# --- a plain computation of the detector -----------------------------------------------------------------------------


def bilinear(array: Any, height: int, width: int) -> Any:
    """Enlarge or reduce (C, H, W) float64, without antialiasing, pixel centres at halves."""

    def along(a: Any, length: int, axis: int) -> Any:
        old = a.shape[axis]
        where = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(where).astype(int)
        part = (where - low).reshape([-1 if i == axis else 1 for i in range(3)])
        return a.take(low, axis) * (1 - part) + a.take(np.minimum(low + 1, old - 1), axis) * part

    return along(along(array, height, 1), width, 2)


def plain_input(image: Any, short: int, long: int) -> tuple[Any, int, int]:
    """mmdet's test pipeline for one image (3, H, W) uint8: the padded input, and height and width before padding."""
    _, h, w = image.shape
    scale = min(short / min(h, w), long / max(h, w))
    height, width = int(h * scale + 0.5), int(w * scale + 0.5)
    pixels = np.round(bilinear(image.astype(np.float64), height, width))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    normal = (pixels - mean[:, None, None]) / std[:, None, None]
    padded = np.zeros((3, -(-height // 32) * 32, -(-width // 32) * 32))
    padded[:, :height, :width] = normal
    return padded, height, width


def plain_detections(
    folder: Path, image: Any, given: tuple[Any, int, int] | None = None
) -> list[tuple[str, Any, float, Any]]:
    """Class, box, score, mask of the objects in one image (3, H, W) uint8, best first: mmdet's steps, one by one.

    `given` is the input in place of `plain_input`'s.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    padded, height, width = given or plain_input(image, 800, 1333)
    with torch.no_grad():
        out = model(pixel_values=torch.from_numpy(padded[None]).float())
    logits = out.class_queries_logits[0].double().numpy()
    masks = out.masks_queries_logits[0].double().numpy()
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    found = []
    for query in np.flatnonzero(share[:, :80].max(1) > 0.3):  # what multiplies it is at most 1
        whole = bilinear(masks[query][None], *padded.shape[1:])[:, :height, :width]
        whole = bilinear(whole, *image.shape[1:])[0]
        mask = whole > 0
        inside = (1 / (1 + np.exp(-whole)))[mask].mean() if mask.any() else 0.0
        for label in range(80):
            if (score := share[query, label] * inside) > 0.3:
                ys, xs = np.where(mask)
                box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                found.append((NAMES[model.config.id2label[label]], box, score, mask))
    return sorted(found, key=lambda item: -item[2])


@pytest.mark.parametrize(("height", "width"), [(96, 128), (100, 90)])
def test_detections_are_those_of_a_plain_computation(folders: SimpleNamespace, height: int, width: int) -> None:
    images = to_pixels(pictures(4, height, width))
    detector = Detector.load(folders.detector, CPU, torch.float32)
    detector.short, detector.long = 160, 250
    with torch.inference_mode():
        found = detector.detect(images)
        pixels, (inner_height, inner_width) = detector.prepare(images)
    assert sum(len(objects) for objects in found) > 3
    for image, pixel, objects in zip(images.numpy(), pixels.double().numpy(), found, strict=True):
        expected = plain_detections(folders.detector, image, (pixel, inner_height, inner_width))
        objects = sorted(objects, key=lambda item: -item[1].score)
        assert [name for name, _ in objects] == [name for name, *_ in expected]
        for (_, instance), (_, box, score, mask) in zip(objects, expected, strict=True):
            assert instance.box == box
            assert instance.score == pytest.approx(score, abs=1e-5)
            assert instance.mask is not None
            assert (instance.mask == mask).mean() > 0.9995


def test_detections_agree_with_the_processor_of_transformers(folders: SimpleNamespace) -> None:
    """At 384 x 384, where its resizing and its masks of 384 x 384 are what mmdet does."""
    try:
        from transformers.models.mask2former.image_processing_pil_mask2former import (
            Mask2FormerImageProcessorPil as Processor,
        )
    except ImportError:  # transformers 5.0: there the Pillow one has the plain name
        from transformers.models.mask2former.image_processing_mask2former import (
            Mask2FormerImageProcessor as Processor,
        )
    from transformers import Mask2FormerForUniversalSegmentation

    images = to_pixels(pictures(2, 384, 384, seed=3))
    detector = Detector.load(folders.detector, CPU, torch.float32)
    detector.short = detector.long = 384
    processor = Processor(size={"height": 384, "width": 384})
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folders.detector).eval()
    with torch.inference_mode():
        found = detector.detect(images)
        inputs = processor([Image.fromarray(i) for i in images.permute(0, 2, 3, 1).numpy()], return_tensors="pt")
        torch.testing.assert_close(detector.prepare(images)[0], inputs["pixel_values"], atol=1e-5, rtol=0)
        expected = processor.post_process_instance_segmentation(
            model(**inputs), threshold=0.3, target_sizes=[(384, 384)] * 2, return_binary_maps=True
        )
    for objects, result in zip(found, expected, strict=True):
        theirs = [
            (NAMES[model.config.id2label[s["label_id"]]], s["score"], mask.bool().numpy())
            for s, mask in zip(result["segments_info"], result["segmentation"], strict=True)
        ]
        ours = [(name, i.score, i.mask) for name, i in objects]
        assert len(theirs) > 1
        for (name, score, mask), (a, b, c) in zip(
            sorted(ours, key=lambda item: -item[1]), sorted(theirs, key=lambda item: -item[1]), strict=True
        ):
            assert (name, score) == (a, pytest.approx(b, abs=1e-5))
            assert mask is not None
            assert (mask == c).all()


@pytest.mark.parametrize(
    ("size", "inner", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((720, 1280), (750, 1333), (768, 1344)),
        ((1280, 720), (1333, 750), (1344, 768)),
        ((768, 512), (1200, 800), (1216, 800)),
        ((100, 1000), (133, 1333), (160, 1344)),
    ],
)
def test_input_is_resized_and_padded_as_in_mmdet(
    size: tuple[int, int], inner: tuple[int, int], padded: tuple[int, int]
) -> None:
    detector = Detector(SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(CLASSES)))))
    image = to_pixels(pictures(1, *size))
    pixels, found = detector.prepare(image)
    assert (found, tuple(pixels.shape[2:])) == (inner, padded)
    expected, *_ = plain_input(image[0].numpy(), 800, 1333)
    # A pixel whose value lies on a half may be rounded to either side.
    values = bilinear(image[0].numpy().astype(np.float64), *inner)
    sure = np.abs(values % 1 - 0.5) > 1e-3
    assert sure.mean() > 0.95
    difference = np.abs(pixels[0].double().numpy() - expected)[:, : inner[0], : inner[1]]
    assert difference[sure].max() < 1e-5
    assert difference.max() < 1.001 / 57.12
    assert not pixels[..., inner[0] :, :].any()
    assert not pixels[..., inner[1] :].any()


class FixedNetwork:
    """A network whose queries see rectangles of a 96 x 128 image: (class score, label, left, top, right, bottom)."""

    device, dtype = CPU, torch.float32
    config = SimpleNamespace(id2label=dict(enumerate(CLASSES)))

    def __init__(self, *queries: tuple[float, str, int, int, int, int]) -> None:
        self.queries = queries

    def __call__(self, pixel_values: Tensor) -> Any:
        height, width = (edge // 4 for edge in pixel_values.shape[2:])
        classes, masks = (
            torch.full((1, len(self.queries), 81), -30.0),
            torch.full((len(self.queries), 1, 96, 128), -9.0),
        )
        for index, (score, label, left, top, right, bottom) in enumerate(self.queries):
            classes[0, index, CLASSES.index(label)] = float(np.log(score))
            classes[0, index, 80] = float(np.log(1 - score))
            masks[index, 0, top:bottom, left:right] = 9.0
        inner = torch.nn.functional.interpolate(masks, (75, 100))
        whole = torch.full((1, len(self.queries), height, width), 9.0)  # what is in the padding counts for nothing
        whole[0, :, :75, :100] = inner[:, 0]
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=whole)


def test_boxes_lie_where_the_masks_are() -> None:
    """Resized to 300 x 400, padded to 320 x 416; masks come at a quarter of that."""
    network = FixedNetwork(
        (0.95, "dog", 32, 16, 96, 64),
        (0.5, "cat", 0, 0, 128, 96),
        (0.31, "tv", 64, 0, 128, 48),
        (0.29, "cup", 0, 0, 9, 9),
    )
    detector = Detector(network, 300, 400)
    ((dog, cat, tv),) = detector.detect(torch.zeros(1, 3, 96, 128, dtype=torch.uint8))
    assert [dog[0], cat[0], tv[0]] == ["dog", "cat", "tv"]
    assert np.abs(np.subtract(dog[1].box, (32, 16, 96, 64))).max() <= 2
    assert cat[1].box == (0, 0, 128, 96)
    assert np.abs(np.subtract(tv[1].box, (64, 0, 128, 48))).max() <= 2
    assert dog[1].score == pytest.approx(0.95, abs=0.03)
    assert cat[1].score == pytest.approx(0.5, abs=1e-3)


def test_class_names_of_checkpoints() -> None:
    assert class_names(dict(enumerate(COCO.split(",")))) == dict(enumerate(CLASSES))
    assert class_names({i: f"LABEL_{i}" for i in range(80)}) == dict(enumerate(CLASSES))
    panoptic = ["banner", *reversed(CLASSES), "sky-other-merged"]
    assert class_names(dict(enumerate(panoptic))) == {i + 1: name for i, name in enumerate(reversed(CLASSES))}
    with pytest.raises(UserError, match=r"does not know 2 of COCO's 80 classes, such as person"):
        class_names(dict(enumerate(CLASSES[1:-1])))


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "has no config.json of a model"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "clip"}'),
            "holds a model of type clip, not mask2former",
        ),
        (lambda f: (f / "config.json").write_text("[1]"), "has no config.json of a model"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 400), "cannot be loaded"),
        (lambda f: without_weight(f), "lacks 1 of the weights, such as class_predictor.weight"),
    ],
)
def test_a_damaged_detector_is_named(folders: SimpleNamespace, tmp_path: Path, damage: Any, said: str) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(folders.detector, folder)
    damage(folder)
    reward = GenEval(settings(folders, detector=str(folder)))
    if "loaded" not in said and "weights" not in said:
        with pytest.raises(UserError, match=said):
            reward.check()
    with pytest.raises(UserError) as caught:
        reward(pictures(1, 32, 32), [Prompt("a dog", {"include": [{"class": "dog", "count": 1}]})])
    assert caught.value.key == "reward_models.detector"
    assert said in caught.value.problem


def without_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["class_predictor.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_are_not_used_may_be_missing(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Facebook's checkpoints are older than a norm that transformers has put into Swin since."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders.detector, tmp_path / "detector")
    state = load_file(folders.detector / "model.safetensors")
    older = {name: w for name, w in state.items() if "swin.layernorm" not in name and "criterion" not in name}
    assert len(older) < len(state)
    save_file(older, tmp_path / "detector" / "model.safetensors", {"format": "pt"})
    image = to_pixels(pictures(1, 96, 96))
    with torch.inference_mode():
        ((name, found),), ((same, expected),) = (
            Detector.load(folder, CPU, torch.float32).detect(image)[0][:1]
            for folder in (tmp_path / "detector", folders.detector)
        )
    assert (name, found.box, found.score) == (same, expected.box, expected.score)


def test_dtype_of_the_models(folders: SimpleNamespace) -> None:
    for dtype, detector, clip in (("auto", torch.float32, torch.float16), ("bfloat16", torch.bfloat16, torch.bfloat16)):
        reward = GenEval(settings(folders, dtype=dtype))
        reward.load(CPU, torch.float16 if dtype == "auto" else torch.bfloat16)  # what ModelReward gives on a GPU
        assert reward.judge._detector is not None
        assert reward.judge._colours is not None
        assert reward.judge._detector.model.dtype == detector
        assert reward.judge._colours.clip.dtype == clip  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert reward.judge._detector.detect(to_pixels(pictures(2, 64, 64)))


# --- colours ---------------------------------------------------------------------------------------------------------


def plain_colour(folder: Path, image: Any, name: str, box: tuple[int, int, int, int], mask: Any) -> str:
    """The colour of an object: image (H, W, 3) uint8; open_clip's transform and clip_benchmark's classifier."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    left, top, right, bottom = box
    crop = np.where(mask[:, :, None], image, 0x99).astype(np.uint8)[top:bottom, left:right]
    height, width = crop.shape[:2]
    scale = SIDE / min(height, width)
    new = (
        SIDE if width <= height else int(SIDE * width / height),
        SIDE if height < width else int(SIDE * height / width),
    )
    assert min(new) == SIDE
    assert abs(max(new) - scale * max(height, width)) < 1
    small = np.asarray(Image.fromarray(crop).resize(new, Image.Resampling.BICUBIC)).astype(np.float32) / 255
    y, x = round((new[1] - SIDE) / 2), round((new[0] - SIDE) / 2)
    small = small[y : y + SIDE, x : x + SIDE]
    small = (small - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    best, chosen = -9.0, ""
    with torch.no_grad():
        pixels = torch.from_numpy(small).permute(2, 0, 1)[None].float()
        seen = model.get_image_features(pixel_values=pixels).pooler_output[0]
        for colour in COLOURS:
            texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}"]
            texts.append(f"a photo of a {colour} object")
            rows = [model.get_text_features(**tokenizer(t, return_tensors="pt")).pooler_output[0] for t in texts]
            mean = sum(row / row.norm() for row in rows)
            cosine = float(seen @ mean / seen.norm() / mean.norm())
            if cosine > best:
                best, chosen = cosine, colour
    return chosen


def test_colours_are_those_of_a_plain_computation(folders: SimpleNamespace) -> None:
    namer = ColourNamer(load_clip("clip", str(folders.clip), CPU, torch.float32), CPU, 4)
    generator = np.random.default_rng(0)
    boxes = [(3, 5, 40, 60), (0, 0, 64, 64), (10, 10, 11, 50), (5, 30, 60, 33), (20, 20, 49, 48), (7, 9, 8, 10)]
    objects, expected = [], []
    for index in range(18):
        rough = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(rough).resize((64, 64), Image.Resampling.NEAREST))
        name, box = ("dog", "traffic light", "tv remote")[index % 3], boxes[index % len(boxes)]
        mask = generator.random((64, 64)) > (0.2, 0.5)[index % 2]
        objects.append((image, name, Instance(box, 1.0, mask)))
        expected.append(plain_colour(folders.clip, image, name, box, mask))
    with torch.inference_mode():
        assert namer.name(objects) == expected
        assert namer.name([]) == []
    assert len(set(expected)) > 4


def test_what_is_not_the_object_is_grey() -> None:
    image = np.full((40, 40, 3), 255, dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:20, 10:30] = True
    pixels = crop_pixels(image, Instance((10, 10, 30, 30), 1.0, mask), 20)
    assert (pixels[:, :10] == 1).all()
    assert (pixels[:, 10:] == 0x99 / 255).all()
    assert (crop_pixels(image, Instance((10, 10, 30, 30), 1.0), 20) == 1).all()


# --- the rewards -----------------------------------------------------------------------------------------------------


def records_of(folders: SimpleNamespace, images: Tensor) -> tuple[list[Prompt], list[Any]]:
    """Records that ask each image for what a plain computation finds in it, or nearly; and their judgements."""
    prompts, expected = [], []
    for index, image in enumerate(images.numpy()):
        objects: dict[str, list[Instance]] = {}
        for name, box, score, mask in plain_detections(folders.detector, image):
            objects.setdefault(name, []).append(Instance(box, score, mask))
        whole = np.ascontiguousarray(image.transpose(1, 2, 0))
        colours = {n: [plain_colour(folders.clip, whole, n, o.box, o.mask) for o in objects[n]] for n in objects}  # type: ignore[arg-type]
        name, *others = sorted(objects, key=lambda n: -objects[n][0].score)
        count = len(objects[name])
        colour = colours[name][0] if index % 2 else next(c for c in COLOURS if c != colours[name][0])
        include: list[dict[str, Any]] = [{"class": name, "count": count, "color": colour}]
        include += [{"class": other, "count": len(objects[other]) + (index == 1)} for other in others[:1]]
        record = {"tag": "colors", "include": include, "exclude": [{"class": "toaster", "count": 1 + 15 * (index % 2)}]}
        prompts.append(Prompt(f"a photo of {index}", record))
        expected.append(judge(objects, colours, record))
    return prompts, expected


def test_three_rewards_of_one_look(folders: SimpleNamespace) -> None:
    images = pictures(3, 96, 128, seed=7)
    prompts, expected = records_of(folders, to_pixels(images))
    assert len({e.partial for e in expected}) > 1
    models = settings(folders, batch=2)
    names = ("geneval", *REPORTED["geneval"])
    assert names == ("geneval", "geneval_strict", "geneval_accuracy")
    rewards = [get_reward(name, models) for name in names]
    judges = {id(reward.judge) for reward in rewards}  # type: ignore[attr-defined]
    assert len(judges) == 1
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda reward: reward(images, prompts), rewards))
    for values, column in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(values, torch.tensor(column))
    one = rewards[0].judge  # type: ignore[attr-defined]
    assert one.detected == 3
    # The same images in another order, with one of them twice, are known; another pixel or record is not.
    again = rewards[2](images[[2, 0, 2]], [prompts[2], prompts[0], prompts[2]])
    assert again.tolist() == [expected[2].accuracy, expected[0].accuracy, expected[2].accuracy]
    assert one.detected == 3
    rewards[1](images[:1] + torch.tensor(1 / 255).expand_as(images[:1]), prompts[:1])
    assert one.detected == 4
    other = Prompt("a", {**prompts[0].metadata, "tag": "counting"})
    rewards[1](images[:1], [other])
    assert one.detected == 5
    assert rewards[0](images[:0], []).shape == (0,)


def test_settings_decide_who_shares(folders: SimpleNamespace) -> None:
    assert GenEval(settings(folders)).judge is GenEval(settings(folders)).judge
    assert GenEval(settings(folders)).judge is not GenEval(settings(folders, dtype="bfloat16")).judge
    assert GenEval(settings(folders)).identity() == {"detector": str(folders.detector), "clip": str(folders.clip)}


def test_a_failure_is_named_and_the_others_stand(folders: SimpleNamespace, tmp_path: Path) -> None:
    runner = RewardRunner("record", 60, settings(folders, clip=str(tmp_path / "nowhere")))
    prompts = [Prompt("a dog", {"include": [{"class": "dog", "count": 1}]})]
    assert runner("geneval", pictures(1, 32, 32), prompts).isnan().all()
    assert runner.failures == {("geneval", "unavailable"): 1}
    (message,) = runner.messages.values()
    assert "reward_models.clip" in message
    assert "does not exist" in message
    assert runner("colour", pictures(1, 32, 32), prompts).isfinite().all()


def test_prompts_are_checked_before_a_run(folders: SimpleNamespace) -> None:
    good = Prompt("a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}, "a.jsonl, line 1")
    bad = Prompt("a dog", {"include": [{"class": "doge", "count": 1}]}, "a.jsonl, line 2")
    for name in ("geneval", "geneval_strict", "geneval_accuracy", "opd_fast.rewards.geneval:GenEval"):
        check_metadata(name, [good], "teachers[0].prompts")
        with pytest.raises(
            UserError, match=r"a.jsonl, line 2, .*'doge', which GenEval does not know; did you mean dog"
        ):
            check_metadata(name, [good, bad], "teachers[0].prompts")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        get_reward("geneval", settings(folders))(pictures(1, 32, 32), [bad])


def test_pixels_are_rounded_and_whatever_they_are() -> None:
    values = torch.tensor([0.0, 1.0, 0.5, 0.0019, 0.002, 1.7, -3.0, float("nan"), float("inf")]).view(1, 1, 1, 9)
    assert to_pixels(values).flatten().tolist() == [0, 255, 128, 0, 1, 255, 0, 0, 255]
