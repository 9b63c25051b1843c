"""A random StableDiffusion3Pipeline of a few hundred kilobytes, shaped like SD3.5 in everything that matters here.

Two MMDiT blocks: the first with dual attention (attn2), the last with context_pre_only (no to_add_out), both with
rms-norm on queries and keys.  VAE factor 8 with four levels is kept small by 32 channels.  Optional T5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CLIP_TOKENS = 77


def tiny_tokenizer() -> Any:
    """A CLIP tokenizer over single bytes: every text has tokens, none is unknown."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=[])
    tokenizer.model_max_length = CLIP_TOKENS
    return tokenizer


def tiny_clip_config(tokenizer: Any) -> Any:
    """The configuration of a CLIP text encoder of width 16 for a tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_transformer(seed: int = 0, layers: int = 2, **overrides: Any) -> Any:
    """A small SD3Transformer2DModel, float32, eval mode, weights of a size that makes outputs of order one."""
    from diffusers import SD3Transformer2DModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": layers,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "out_channels": 4,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    torch.manual_seed(seed)
    return SD3Transformer2DModel(**{**config, **overrides}).eval()


def tiny_vae(scaling_factor: float = 1.5305, shift_factor: float = 0.0609) -> Any:
    """An AutoencoderKL of factor 8 with 4 latent channels, float32, eval mode."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_pipeline(seed: int = 0, *, t5: bool = False, layers: int = 2, **overrides: Any) -> Any:
    """The assembled pipeline, float32 on the CPU: latents (4, R/8, R/8), text width 32, pooled width 32.

    ``overrides``: of the transformer's configuration.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    transformer = tiny_transformer(seed, layers, **overrides)
    tokenizer = tiny_tokenizer()
    clip = tiny_clip_config(tokenizer)
    vae = tiny_vae()
    encoder_3, tokenizer_3 = _tiny_t5() if t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip).eval(),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def save_tiny(folder: str | Path, seed: int = 0, *, t5: bool = False, layers: int = 2, **overrides: Any) -> Path:
    """Build the tiny pipeline and save it (safetensors) as a diffusers folder; returns the folder."""
    tiny_pipeline(seed, t5=t5, layers=layers, **overrides).save_pretrained(folder)
    return Path(folder)


def _tiny_t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(chr(code) for code in range(33, 127))]
    tokenizer = T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval(), tokenizer
