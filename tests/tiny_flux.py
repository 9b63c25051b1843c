"""A random FluxPipeline of a few hundred kilobytes, shaped like FLUX.1 in everything that matters here.

One double and two single blocks, rotary positions on three axes, guidance embedding (dev) or none (schnell).  T5, the
tokenizers and the VAE are those of the tiny SD3 pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_pipeline


def tiny_flux_transformer(seed: int = 0, **overrides: Any) -> Any:
    """A small FluxTransformer2DModel, float32, eval mode: latents of 4 channels, text width 32, pooled width 16."""
    from diffusers import FluxTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{**config, **overrides}).eval()


def tiny_flux_pipeline(seed: int = 0, *, schnell: bool = False) -> Any:
    """The assembled pipeline, float32 on the CPU; ``schnell``: no guidance embedding, no dynamic shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextModel

    transformer = tiny_flux_transformer(seed, guidance_embeds=not schnell)
    donor = tiny_pipeline(seed, t5=True)
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell, base_shift=0.5, max_shift=1.15
        ),
        vae=donor.vae,
        text_encoder=CLIPTextModel(donor.text_encoder.config).eval(),
        tokenizer=donor.tokenizer,
        text_encoder_2=donor.text_encoder_3,
        tokenizer_2=donor.tokenizer_3,
    )


def save_tiny_flux(folder: str | Path, seed: int = 0, *, schnell: bool = False) -> Path:
    """Build the tiny pipeline and save it (safetensors) as a diffusers folder; returns the folder."""
    tiny_flux_pipeline(seed, schnell=schnell).save_pretrained(folder)
    return Path(folder)
