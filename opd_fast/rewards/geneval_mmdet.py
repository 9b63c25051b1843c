"""Reads mmdet's checkpoint of GenEval's detector into transformers' Mask2Former.

The published detector is `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth` of mmdet 2.x
(https://download.openmmlab.com/mmdetection/v2.0/mask2former/); mmdet 3.x has the same training under other names,
`mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth`. Both are read, and the sizes of the
network are taken from the weights. Besides the names, two things differ: mmdet joins query, key and value where
transformers has three matrices, and where Swin halves the resolution mmdet has a pixel's four neighbours inside each
channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from opd_fast.errors import UserError
from opd_fast.rewards.clip_model import read_state
from opd_fast.rewards.geneval_rules import CLASSES

URL = (
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
)
KEY = "reward_models.detector"

_SWIN = "model.pixel_level_module.encoder."
_PIXEL = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_RENAMED: tuple[tuple[str, str], ...] = (
    # mmdet 2.x to 3.x: the layers of attention and of the feed-forward network have numbers there.
    (r"^(panoptic_head\.pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(panoptic_head\.transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"^(panoptic_head\.transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"^(panoptic_head\..*\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    # Swin
    (r"^backbone\.patch_embed\.projection\.", _SWIN + "embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", _SWIN + "embeddings.norm."),
    (r"^backbone\.stages\.(\d+)\.", _SWIN + r"encoder.layers.\1."),
    (r"\.attn\.w_msa\.relative_position_bias_table", ".attention.self.relative_position_bias_table"),
    (r"\.attn\.w_msa\.qkv\.", ".attention.self.qkv."),
    (r"\.attn\.w_msa\.proj\.", ".attention.output.dense."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"(\.blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.ffn\.layers\.1\.", r"\1.output.dense."),
    (r"^backbone\.norm0\.", _SWIN + "hidden_states_norms.stage1."),
    (r"^backbone\.norm1\.", _SWIN + "hidden_states_norms.stage2."),
    (r"^backbone\.norm2\.", _SWIN + "hidden_states_norms.stage3."),
    (r"^backbone\.norm3\.", _SWIN + "hidden_states_norms.stage4."),
    # the pixel decoder
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.", _PIXEL + r"input_projections.\1.0."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.", _PIXEL + r"input_projections.\1.1."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", _PIXEL + "adapter_1.0."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", _PIXEL + "adapter_1.1."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", _PIXEL + "layer_1.0."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", _PIXEL + "layer_1.1."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight", _PIXEL + "level_embed"),
    (r"^panoptic_head\.pixel_decoder\.mask_feature\.", _PIXEL + "mask_projection."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.", _PIXEL + "encoder."),
    (r"(decoder\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.final_layer_norm."),
    # the queries' decoder
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", _QUERIES + "decoder.layernorm."),
    (r"^panoptic_head\.transformer_decoder\.", _QUERIES + "decoder."),
    (r"^(model\.transformer_module\.decoder\.layers\.\d+)\.norms\.0\.", r"\1.cross_attn_layer_norm."),
    (r"^(model\.transformer_module\.decoder\.layers\.\d+)\.norms\.1\.", r"\1.self_attn_layer_norm."),
    (r"^(model\.transformer_module\.decoder\.layers\.\d+)\.norms\.2\.", r"\1.final_layer_norm."),
    (r"_attn\.attn\.", "_attn."),
    (r"\.ffn\.layers\.0\.0\.", ".fc1."),
    (r"\.ffn\.layers\.1\.", ".fc2."),
    (r"^panoptic_head\.query_embed\.", _QUERIES + "queries_embedder."),
    (r"^panoptic_head\.query_feat\.", _QUERIES + "queries_features."),
    (r"^panoptic_head\.level_embed\.", _QUERIES + "level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^panoptic_head\.mask_embed\.0\.", _QUERIES + "decoder.mask_predictor.mask_embedder.0.0."),
    (r"^panoptic_head\.mask_embed\.2\.", _QUERIES + "decoder.mask_predictor.mask_embedder.1.0."),
    (r"^panoptic_head\.mask_embed\.4\.", _QUERIES + "decoder.mask_predictor.mask_embedder.2.0."),
)
"""Patterns of mmdet's names and what takes their place, applied in this order, each to what the ones before left."""


def read_mmdet(file: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the Mask2FormerConfig and the weights, by the names of transformers' checkpoints, of an mmdet file.

    Raises UserError for a file that cannot be read or is not a Mask2Former with a Swin for COCO's 80 classes.
    """
    given = read_state("detector", file)
    try:
        config = _config(given)
    except (KeyError, ValueError) as error:
        problem = f"{file} is not mmdet's Mask2Former with a Swin ({type(error).__name__}: {error})"
        raise UserError(KEY, problem, f"fetch {URL}, or give a folder of transformers") from error
    if config.num_labels != len(CLASSES):
        problem = f"{file} has {config.num_labels} classes, not COCO's 80"
        raise UserError(KEY, problem, f"fetch {URL}, or give a folder of transformers")
    return config, renamed(given)


def renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return mmdet's weights under the names, and in the forms, of transformers' checkpoints."""
    state: dict[str, Tensor] = {}
    for name, weight in given.items():
        if not name.endswith("relative_position_index"):
            for pattern, place in _RENAMED:
                name = re.sub(pattern, place, name)
            state.update(_in_form(name, weight))
    return state


def _in_form(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    if ".attention.self.qkv." in name:
        for part, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
            yield name.replace(".qkv.", f".{part}."), third.clone()
    elif re.search(r"transformer_module\.decoder\.layers\.\d+\.self_attn\.in_proj_", name):
        for part, third in zip("qkv", weight.chunk(3), strict=True):
            yield name.replace(".in_proj_", f".{part}_proj."), third.clone()
    elif ".downsample." in name:
        # mmdet: channel, row, column; transformers: column, row, channel.
        channels = weight.shape[-1] // 4
        parts = weight.view(*weight.shape[:-1], channels, 2, 2)
        yield name, parts.transpose(-3, -1).reshape(weight.shape).clone()
    else:
        yield name, weight


def _config(given: Mapping[str, Tensor]) -> Any:
    """Return the configuration that the weights' shapes tell. Raises KeyError or ValueError where one is missing."""
    from transformers import Mask2FormerConfig, SwinConfig

    def blocks(pattern: str) -> int:
        found = {int(match[1]) for name in given if (match := re.match(pattern, name))}
        return len(found)

    stages = [f"backbone.stages.{stage}.blocks" for stage in range(4)]
    tables = [given[f"{stage}.0.attn.w_msa.relative_position_bias_table"] for stage in stages]
    backbone = SwinConfig(
        embed_dim=given["backbone.patch_embed.projection.weight"].shape[0],
        depths=[blocks(re.escape(stage) + r"\.(\d+)\.") for stage in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(tables[0].shape[0] ** 0.5) + 1) // 2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    queries, width = given["panoptic_head.query_feat.weight"].shape
    labels = len(given["panoptic_head.cls_embed.bias"]) - 1
    encoder, decoder = "panoptic_head.pixel_decoder.encoder.layers", "panoptic_head.transformer_decoder.layers"
    offsets, *_ = (w for n, w in given.items() if n.startswith(encoder) and n.endswith("sampling_offsets.bias"))
    inner, *_ = (w for n, w in given.items() if n.startswith(encoder) and n.endswith("layers.0.0.bias"))
    outer, *_ = (w for n, w in given.items() if n.startswith(decoder) and n.endswith("layers.0.0.bias"))
    return Mask2FormerConfig(
        backbone_config=backbone,
        hidden_dim=width,
        feature_size=width,
        mask_feature_size=given["panoptic_head.pixel_decoder.mask_feature.weight"].shape[0],
        encoder_layers=blocks(re.escape(encoder) + r"\.(\d+)\."),
        decoder_layers=blocks(re.escape(decoder) + r"\.(\d+)\.") + 1,  # transformers counts the prediction before them
        num_attention_heads=len(offsets) // (3 * 4 * 2),  # levels, points, x and y
        encoder_feedforward_dim=len(inner),
        dim_feedforward=len(outer),
        num_queries=queries,
        id2label={index: CLASSES[index] if index < 80 else str(index) for index in range(labels)},
    )
