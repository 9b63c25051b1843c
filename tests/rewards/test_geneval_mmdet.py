"""mmdet's checkpoint of GenEval's detector, read into transformers' model: names, forms, and mmdet's own module.

The last tests need mmdet, but none of its compiled operators: pip install --no-deps mmdet==3.3.0 mmcv-lite==2.1.0
mmengine==0.10.7 addict yapf terminaltables pycocotools shapely termcolor
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opd_fast.config import RewardModelsConfig
from opd_fast.data.prompt_files import Prompt
from opd_fast.errors import UserError
from opd_fast.rewards.geneval import GenEval
from opd_fast.rewards.geneval_detector import Detector, check_detector, find_detector
from opd_fast.rewards.geneval_mmdet import renamed
from opd_fast.rewards.geneval_rules import CLASSES
from tests.tiny_detector import save_detector

CPU = torch.device("cpu")
SWIN, PIXEL = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder."
QUERIES = "model.transformer_module."


def to_mmdet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' checkpoint under mmdet 3's names, in mmdet's forms."""
    given = {n: w for n, w in state.items() if "criterion" not in n and "encoder.swin.layernorm" not in n}
    made: dict[str, Tensor] = {}

    def take(old: str, new: str, change: Callable[[Tensor], Tensor] = lambda w: w, ends: str = "weight bias") -> None:
        for end in ends.split():
            made[new + end] = change(given.pop(old + end))

    def join(old: list[str], new: str) -> None:
        for end, sep in (("weight", new[-1]), ("bias", new[-1])):
            made[new[:-1] + sep + end] = torch.cat([given.pop(f"{part}.{end}") for part in old])

    def unfolded(w: Tensor) -> Tensor:
        """From [0,0], [1,0], [0,1], [1,1] of all channels to each channel's [0,0], [0,1], [1,0], [1,1]."""
        a, b, c, d = w.chunk(4, -1)
        return torch.stack([a, c, b, d], -1).flatten(-2)

    take(SWIN + "embeddings.patch_embeddings.projection.", "backbone.patch_embed.projection.")
    take(SWIN + "embeddings.norm.", "backbone.patch_embed.norm.")
    for stage in range(4):
        old, new = f"{SWIN}encoder.layers.{stage}.", f"backbone.stages.{stage}."
        take(f"{SWIN}hidden_states_norms.stage{stage + 1}.", f"backbone.norm{stage}.")
        if stage < 3:
            take(old + "downsample.norm.", new + "downsample.norm.", unfolded)
            take(old + "downsample.reduction.", new + "downsample.reduction.", unfolded, "weight")
        old, new = old + "blocks.0.", new + "blocks.0."
        table = "relative_position_bias_table"
        made[f"{new}attn.w_msa.{table}"] = given.pop(f"{old}attention.self.{table}")
        made[f"{new}attn.w_msa.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
        join([f"{old}attention.self.{part}" for part in ("query", "key", "value")], new + "attn.w_msa.qkv.")
        take(old + "attention.output.dense.", new + "attn.w_msa.proj.")
        take(old + "layernorm_before.", new + "norm1.")
        take(old + "layernorm_after.", new + "norm2.")
        take(old + "intermediate.dense.", new + "ffn.layers.0.0.")
        take(old + "output.dense.", new + "ffn.layers.1.")
    head = "panoptic_head.pixel_decoder."
    for index in range(3):
        take(f"{PIXEL}input_projections.{index}.0.", f"{head}input_convs.{index}.conv.")
        take(f"{PIXEL}input_projections.{index}.1.", f"{head}input_convs.{index}.gn.")
    take(PIXEL + "adapter_1.0.", head + "lateral_convs.0.conv.", ends="weight")
    take(PIXEL + "adapter_1.1.", head + "lateral_convs.0.gn.")
    take(PIXEL + "layer_1.0.", head + "output_convs.0.conv.", ends="weight")
    take(PIXEL + "layer_1.1.", head + "output_convs.0.gn.")
    take(PIXEL + "mask_projection.", head + "mask_feature.")
    made[head + "level_encoding.weight"] = given.pop(PIXEL + "level_embed")
    old, new = PIXEL + "encoder.layers.0.", head + "encoder.layers.0."
    for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        take(f"{old}self_attn.{part}.", f"{new}self_attn.{part}.")
    for part, place in (("self_attn_layer_norm", "norms.0"), ("final_layer_norm", "norms.1")):
        take(f"{old}{part}.", f"{new}{place}.")
    take(old + "fc1.", new + "ffn.layers.0.0.")
    take(old + "fc2.", new + "ffn.layers.1.")
    old, new = QUERIES + "decoder.layers.0.", "panoptic_head.transformer_decoder.layers.0."
    join([f"{old}self_attn.{part}_proj" for part in "qkv"], new + "self_attn.attn.in_proj_")
    take(old + "cross_attn.in_proj_", new + "cross_attn.attn.in_proj_")
    for part in ("self_attn", "cross_attn"):
        take(f"{old}{part}.out_proj.", f"{new}{part}.attn.out_proj.")
    norms = {"cross_attn_layer_norm": 0, "self_attn_layer_norm": 1, "final_layer_norm": 2}
    for part, index in norms.items():
        take(f"{old}{part}.", f"{new}norms.{index}.")
    take(old + "fc1.", new + "ffn.layers.0.0.")
    take(old + "fc2.", new + "ffn.layers.1.")
    take(QUERIES + "decoder.layernorm.", "panoptic_head.transformer_decoder.post_norm.")
    take(QUERIES + "queries_embedder.", "panoptic_head.query_embed.", ends="weight")
    take(QUERIES + "queries_features.", "panoptic_head.query_feat.", ends="weight")
    take(QUERIES + "level_embed.", "panoptic_head.level_embed.", ends="weight")
    take("class_predictor.", "panoptic_head.cls_embed.")
    for index in range(3):
        take(f"{QUERIES}decoder.mask_predictor.mask_embedder.{index}.0.", f"panoptic_head.mask_embed.{2 * index}.")
    assert not given
    return made


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdet 3's names as mmdet 2 has them: its layers are mmcv's BaseTransformerLayer."""
    changed = {}
    for name, weight in state.items():
        if name.startswith("panoptic_head.") and ".layers." in name:
            own = "attentions.1" if "transformer_decoder" in name else "attentions.0"
            name = re.sub(r"(layers\.\d+)\.self_attn\.", rf"\1.{own}.", name)
            name = re.sub(r"(layers\.\d+)\.cross_attn\.", r"\1.attentions.0.", name)
            name = re.sub(r"(layers\.\d+)\.ffn\.", r"\1.ffns.0.", name)
        changed[name] = weight
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(tmp_path_factory.mktemp("detector") / "folder")


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return to_mmdet(load_file(folder / "model.safetensors"))


def image() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    broad = torch.rand(2, 3, 5, 7, generator=generator)
    return (nn.functional.interpolate(broad, (96, 128), mode="bicubic").clamp(0, 1) * 255).byte()


@pytest.mark.parametrize("naming", [dict, older], ids=["mmdet 3", "mmdet 2"])
def test_a_file_of_mmdet_is_the_same_detector(
    folder: Path, state: dict[str, Tensor], tmp_path: Path, naming: Any
) -> None:
    torch.save({"meta": {"CLASSES": tuple(CLASSES), "epoch": 50}, "state_dict": naming(state)}, tmp_path / "m.pth")
    found, expected = (Detector.load(source, CPU, torch.float32) for source in (tmp_path / "m.pth", folder))
    assert found.names == dict(enumerate(CLASSES))
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(w, theirs[n]) for n, w in ours.items() if "swin.layernorm" not in n)
    with torch.inference_mode():
        a, b = found.detect(image()), expected.detect(image())
    assert sum(len(objects) for objects in a) > 1
    assert [[(n, i.box, i.score) for n, i in objects] for objects in a] == [
        [(n, i.box, i.score) for n, i in objects] for objects in b
    ]


def test_a_file_of_a_repository(state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cached(repo: str, allow_patterns: Any, local_files_only: bool) -> str:
        asked.append((repo, allow_patterns, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    torch.save(state, tmp_path / "m.pth")
    check_detector("someone/mirror/m.pth")
    assert find_detector("someone/mirror/m.pth") == tmp_path / "m.pth"
    assert asked == [("someone/mirror", ["m.pth"], True)] * 2
    with pytest.raises(UserError, match=r"run: hf download someone/mirror, or give a path"):
        find_detector("someone/mirror")


def test_swin_halves_the_resolution_as_mmdet_does() -> None:
    """mmdet's patch merging is nn.Unfold, a norm and a matrix."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    grid, norm, matrix = torch.randn(2, 6, 8, 5), nn.LayerNorm(20), nn.Linear(20, 10, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    expected = matrix(norm(nn.Unfold(2, stride=2)(grid.permute(0, 3, 1, 2)).transpose(1, 2)))
    given = {"norm.weight": norm.weight, "norm.bias": norm.bias, "reduction.weight": matrix.weight}
    prefix = "backbone.stages.0.downsample."
    read = renamed({prefix + name: weight.detach() for name, weight in given.items()})
    module = SwinModel(SwinConfig(embed_dim=5, depths=[1, 1], num_heads=[1, 1])).encoder.layers[0].downsample
    module.load_state_dict({name: read[f"{SWIN}encoder.layers.0.downsample.{name}"] for name in given})
    torch.testing.assert_close(module(grid.flatten(1, 2), (6, 8)), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {"a": torch.zeros(1)}, "is not mmdet's Mask2Former with a Swin (KeyError"),
        (lambda s: {n: w for n, w in s.items() if "panoptic_head.mask_embed.4" not in n}, "lacks 2 of the weights"),
        (
            lambda s: {**s, "panoptic_head.cls_embed.bias": torch.zeros(12), "panoptic_head.cls_embed.weight": None},
            "has 11 classes, not COCO's 80",
        ),
        (lambda s: b"not a file of torch", "cannot be read"),
    ],
)
def test_another_file_is_named(state: dict[str, Tensor], tmp_path: Path, change: Any, said: str) -> None:
    path, changed = tmp_path / "m.pth", change(dict(state))
    if isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        torch.save({n: torch.zeros(12, 32) if w is None else w for n, w in changed.items()}, path)
    reward = GenEval(RewardModelsConfig(detector=str(path), clip=str(tmp_path)))
    with pytest.raises(UserError) as caught:
        reward.judge.load(CPU, torch.float32)
    assert caught.value.key == "reward_models.detector"
    assert said in caught.value.problem
    assert reward.identity()["detector"] == str(path)
    with pytest.raises(UserError):
        reward(torch.zeros(1, 3, 8, 8), [Prompt("a", {"include": [{"class": "dog", "count": 1}]})])


# --- mmdet's own module ----------------------------------------------------------------------------------------------

needs_mmdet = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="mmdet is not installed")


def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmcv's compiled operators are asked for at import, and not called on a CPU."""

    class Operators(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return None

    monkeypatch.setitem(sys.modules, "mmcv._ext", Operators("mmcv._ext"))


def small_mmdet() -> Any:
    """The published configuration with smaller sizes, and random weights."""
    import mmdet.models
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    name = ".mim/configs/mask2former/mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"
    model = Config.fromfile(os.path.join(os.path.dirname(mmdet.__file__), name)).model
    model.backbone.update(embed_dims=8, depths=[1, 2, 3, 1], num_heads=[1, 1, 2, 2], window_size=4, init_cfg=None)
    head = model.panoptic_head
    head.update(in_channels=[8, 16, 32, 64], feat_channels=32, out_channels=32, num_queries=12)
    head.pixel_decoder.encoder.num_layers = 2
    head.pixel_decoder.encoder.layer_cfg.self_attn_cfg.update(embed_dims=32, num_heads=4)
    head.pixel_decoder.encoder.layer_cfg.ffn_cfg.update(embed_dims=32, feedforward_channels=40)
    head.transformer_decoder.num_layers = 3
    for part in ("self_attn_cfg", "cross_attn_cfg"):
        head.transformer_decoder.layer_cfg[part].update(embed_dims=32, num_heads=4)
    head.transformer_decoder.layer_cfg.ffn_cfg.update(embed_dims=32, feedforward_channels=48)
    head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 16
    built = MODELS.build(model).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, weight in built.named_parameters():
            weight.normal_(0, 0.2 if weight.ndim > 1 else 0.1)
            if weight.ndim == 1 and parameter_name.endswith("weight"):
                weight.add_(1)
        built.panoptic_head.cls_embed.weight.mul_(6)
    return built


@needs_mmdet
def test_the_network_is_mmdets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the network, and objects after mmdet's own steps, padding and a size of their own included."""
    without_operators(monkeypatch)
    theirs = small_mmdet()
    from mmdet.structures import DetDataSample

    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "m.pth")
    detector = Detector.load(tmp_path / "m.pth", CPU, torch.float32)
    detector.short, detector.long = 100, 170
    images = image()
    pixels, inner = detector.prepare(images)
    assert (inner, tuple(pixels.shape[2:])) == ((100, 133), (128, 160))
    sizes = {"img_shape": inner, "batch_input_shape": (128, 160), "pad_shape": (128, 160), "ori_shape": (96, 128)}
    samples = [DetDataSample(metainfo=sizes) for _ in images]
    with torch.no_grad():
        classes, masks = theirs.panoptic_head(theirs.extract_feat(pixels), samples)
        ours = detector.model(pixel_values=pixels)
        torch.testing.assert_close(ours.class_queries_logits, classes[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.masks_queries_logits, masks[-1], atol=1e-4, rtol=1e-4)
        expected = [sample.pred_instances for sample in theirs.predict(pixels, samples, rescale=True)]
        found = detector.detect(images)
    assert sum(len(objects) for objects in found) > 3
    for objects, instances in zip(found, expected, strict=True):
        kept = instances[instances.scores > 0.3]
        kept = kept[kept.scores.argsort(descending=True)]
        objects = sorted(objects, key=lambda item: -item[1].score)
        assert [name for name, _ in objects] == [CLASSES[label] for label in kept.labels.tolist()]
        assert [i.score for _, i in objects] == pytest.approx(kept.scores.tolist(), abs=1e-5)
        assert [list(i.box) for _, i in objects] == kept.bboxes.tolist()
        for (_, instance), mask in zip(objects, kept.masks, strict=True):
            assert (instance.mask == np.asarray(mask)).all()


@needs_mmdet
def test_the_names_of_mmdet_2_are_those_of_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdet 2 builds its layers of this class of mmcv, in this order of operations (its configuration)."""
    without_operators(monkeypatch)
    from mmcv.cnn.bricks.transformer import BaseTransformerLayer

    attention = {"type": "MultiheadAttention", "embed_dims": 8, "num_heads": 2}
    ffn = {"type": "FFN", "embed_dims": 8, "feedforward_channels": 4, "num_fcs": 2}
    order = ("cross_attn", "norm", "self_attn", "norm", "ffn", "norm")
    layer = BaseTransformerLayer(attn_cfgs=[dict(attention), dict(attention)], ffn_cfgs=ffn, operation_order=order)
    prefix = "panoptic_head.transformer_decoder.layers.0."
    written = {prefix + name: weight for name, weight in layer.state_dict().items()}
    read = renamed(written)
    base = QUERIES + "decoder.layers.0."
    assert torch.equal(read[base + "cross_attn.in_proj_weight"], layer.attentions[0].attn.in_proj_weight)
    assert torch.equal(read[base + "self_attn.k_proj.weight"], layer.attentions[1].attn.in_proj_weight[8:16])
    assert torch.equal(read[base + "fc1.weight"], layer.ffns[0].layers[0][0].weight)
    ends = {name.removeprefix(base).split(".")[0] for name in read}
    assert ends == {
        *("cross_attn", "self_attn", "fc1", "fc2"),
        *("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm"),
    }
