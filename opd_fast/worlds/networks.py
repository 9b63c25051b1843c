"""The networks of the bundled pipeline: VAE, tokenizer, text encoders and MMDiT, as they are before training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd_fast.worlds import shapes

LATENT_CHANNELS = 4
TEXT_WIDTH = 96
WIDTH = 192
TOKENS = 16


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=shapes.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_text_encoder(tokenizer: Any) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=shapes.SIZE // 2,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=shapes.SIZE // 4,
        qk_norm="rms_norm",
    )


class TextToVelocity(nn.Module):
    """Text encoders and MMDiT in one module, to train them together. It embeds text as the diffusers pipeline does."""

    def __init__(self, encoders: list[nn.Module], transformer: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        sequence = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        pooled = torch.cat([o.text_embeds for o in outputs], -1)
        return self.transformer(x, sequence, pooled, t * 1000, return_dict=False)[0]


def make_tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer whose merges spell the grammar's words, while words in quotes stay letters."""
    from transformers import CLIPTokenizer

    texts = [p.text for task in shapes.TASKS for p in shapes.prompts(task, "train")]
    words = sorted({w for text in texts for w in text.split() if '"' not in w})
    characters = [chr(c) for c in range(33, 127)]
    tokens = characters + [c + "</w>" for c in characters]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:  # left to right, so that no merge joins the two letters of a word to draw
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merged(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Return the byte-pair encoding of one word; the earliest merge that applies goes first."""
    while True:
        pairs = list(itertools.pairwise(parts))
        known = [pair for pair in pairs if pair in merges]
        if not known:
            return parts
        i = pairs.index(min(known, key=merges.index))
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
