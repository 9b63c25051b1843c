"""ImageReward by its published description, in plain torch with the checkpoint's own names, at any size.

The names and the layout are those of ImageReward.pt: a ViT of timm's form with q, k and v in one product, a BERT whose
layers have a cross-attention between their self-attention and their feed-forward, and a head of linear layers between
which dropout stands. It is the reference that the port on transformers is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

MEAN, STD = 0.16717362830052426, 1.0333394966054072


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(join_heads((q @ k.mT / 8).softmax(-1) @ v))


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 64)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class VisionTransformer(nn.Module):
    def __init__(self, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertProjections(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)


class BertOutput(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)


class BertAttention(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.self = BertProjections(width, source)
        self.output = BertOutput(width, width)

    def forward(self, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            split_heads(self.self.query(x)),
            split_heads(self.self.key(source)),
            split_heads(self.self.value(source)),
        )
        scores = (q @ k.mT / 8).masked_fill(~seen[:, None, None, :], float("-inf"))
        return self.output.LayerNorm(x + self.output.dense(join_heads(scores.softmax(-1) @ v)))


class BertIntermediate(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)


class BertLayer(nn.Module):
    def __init__(self, width: int, inner: int, source: int) -> None:
        super().__init__()
        self.attention, self.crossattention = BertAttention(width, width), BertAttention(width, source)
        self.intermediate, self.output = BertIntermediate(width, inner), BertOutput(inner, width)

    def forward(self, x: Tensor, seen: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x, seen)
        x = self.crossattention(x, image, torch.ones(image.shape[:2], dtype=torch.bool))
        inner = nn.functional.gelu(self.intermediate.dense(x))
        return self.output.LayerNorm(x + self.output.dense(inner))


class BertEmbeddings(nn.Module):
    def __init__(self, words: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings, self.position_embeddings = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(positions)[None])


class BertEncoder(nn.Module):
    def __init__(self, width: int, inner: int, source: int, depth: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(width, inner, source) for _ in range(depth))


class Bert(nn.Module):
    def __init__(self, words: int, positions: int, width: int, inner: int, source: int, depth: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(words, positions, width)
        self.encoder = BertEncoder(width, inner, source, depth)

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        table = self.embeddings
        x = table.word_embeddings(tokens) + table.position_embeddings.weight[: tokens.shape[1]]
        x = table.LayerNorm(x)
        for layer in self.encoder.layer:
            x = layer(x, mask.bool(), image)
        return x


class Blip(nn.Module):
    def __init__(self, vision: VisionTransformer, text: Bert, width: int, text_width: int) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = vision, text
        self.vision_proj, self.text_proj = nn.Linear(width, 256), nn.Linear(text_width, 256)  # of BLIP's pretraining


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )


class ReferenceImageReward(nn.Module):
    """The model; the published sizes are `side=224, patch=16, width=1024, depth=24, words=30524, positions=512,
    text_width=768, inner=3072, layers=12`. Heads are 64 wide in both parts."""

    def __init__(
        self,
        side: int = 48,
        patch: int = 16,
        width: int = 128,
        depth: int = 2,
        *,
        words: int,
        positions: int = 40,
        text_width: int = 192,
        inner: int = 256,
        layers: int = 3,
    ) -> None:
        super().__init__()
        vision = VisionTransformer(side, patch, width, depth)
        self.blip = Blip(vision, Bert(words, positions, text_width, inner, width, layers), width, text_width)
        self.mlp = Head(text_width)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        read = self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(read[:, 0]).squeeze(1) - MEAN) / STD


def random_reference(seed: int, **sizes: int) -> ReferenceImageReward:
    """Return a model of random weights whose scores differ from image to image and from prompt to prompt."""
    generator = torch.Generator().manual_seed(seed)
    model = ReferenceImageReward(**sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
            elif weight.ndim == 1:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
            elif "embed" in name or "cls" in name:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
            else:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
    return model.eval()


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz,.", *(f"##{c}" for c in "aeinorst"))
WORDS += ("red", "cat", "dog", "hill", "on", "the", "sky", "blue")
"""Of the tokenizer: a cat is one token, a cart is `c`, `##a`, ... or unknown."""


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """Write a tokenizer in the files of bert-base-uncased with the given tokens, and return its folder."""
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
