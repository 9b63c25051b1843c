"""A random QwenImagePipeline of a few hundred kilobytes: two double-stream blocks, Qwen2.5-VL, a causal video VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# The pipeline drops as many tokens from the front as its template has with the published vocabulary.
DROPPED = 34
_DESCRIPTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
_BYTES_AROUND = len("<>system\n<>\n<>user\n") - 3  # each pair of brackets stands for one special token
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def byte_tokenizer(*words: str) -> Any:
    """A Qwen2 tokenizer over single bytes, with the chat's special tokens and ``words`` as one token each."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = ["<|endoftext|>", *sorted(bytes_to_unicode().values())]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    special = [AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*special, *(AddedToken(word, normalized=False) for word in words)])
    return tokenizer


def tiny_transformer(seed: int = 0, **overrides: Any) -> Any:
    """A small QwenImageTransformer2DModel, float32, eval mode."""
    from diffusers import QwenImageTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(**{**config, **overrides}).eval()


def tiny_pipeline(seed: int = 0) -> Any:
    """The assembled pipeline, float32 on the CPU: latents (4, R/8, R/8), text width 32."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = tiny_transformer(seed)
    # One long token makes up for what the other bytes of the template are too many.
    tokenizer = byte_tokenizer(_DESCRIPTION[: -(DROPPED - _BYTES_AROUND - 1)])
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[-0.3, 0.2, 0.1, 0.0],
        latents_std=[2.8, 1.4, 2.3, 1.1],
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def save_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Build the tiny pipeline and save it as a diffusers folder; returns the folder."""
    tiny_pipeline(seed).save_pretrained(folder)
    return Path(folder)
