"""A random ZImagePipeline of a few megabytes: one refiner of each kind, two main blocks, Qwen3 with a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_vae
from tests.tiny_qwen import byte_tokenizer

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_transformer(seed: int = 0, **overrides: Any) -> Any:
    """A small ZImageTransformer2DModel of diffusers, float32, eval mode; its learned padding is not zero."""
    from diffusers import ZImageTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [4, 6, 6],
        "axes_lens": [160, 16, 16],
    }
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(**{**config, **overrides})
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    return transformer.eval()


def tiny_pipeline(seed: int = 0) -> Any:
    """The assembled pipeline, float32 on the CPU: latents (4, R/8, R/8), text width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen3Config, Qwen3Model

    transformer = tiny_transformer(seed)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _CHAT
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(text).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def save_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Build the tiny pipeline and save it as a diffusers folder; returns the folder."""
    tiny_pipeline(seed).save_pretrained(folder)
    return Path(folder)
