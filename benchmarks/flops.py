"""The operations of an SD3 forward, term by term: the floor of a round, written down.

`rounds.py` takes the count from `FlopCounterMode`, which works for any network; this is the same number as a formula,
so that it can be checked by hand. Matrix products alone, a multiplication and an addition counting as two.
"""

from __future__ import annotations

from benchmarks.models import Shape

PATCH = 2  # latent pixels a side of one token
SINUSOIDS = 256  # of the timestep


def sd3_flops(shape: Shape) -> dict[str, int]:
    """Operations of one forward of one sample (one guidance branch) at the shape's resolution, by kind of product.

    With D the width, I the image's tokens, T the text's, L blocks of which K have dual attention (MMDiT,
    https://arxiv.org/abs/2403.03206, appendix B, figure 2; dual attention: Stable Diffusion 3.5 Medium):

        projections   2 (4 I + 4 T) D^2 L - 2 T D^2      queries, keys, values, output; the last block gives no text out
        dual          2 * 4 I D^2 K                      the same for the image's second attention
        attention     4 (I + T)^2 D L + 4 I^2 D K        q k^T and its product with v
        feed_forward  2 * 8 I D^2 L + 2 * 8 T D^2 (L-1)  two layers of width 4 D; none for the last block's text
        modulation    2 (6 L + 3 K + 6 (L-1) + 2 + 2) D^2   shift, scale and gate from one vector a sample
        embeddings    the patches, the text, the timestep and the pooled text
        output        2 I D (p^2 C)
    """
    d, text, layers, dual = shape.width, shape.text_tokens, shape.layers, len(shape.dual_layers)
    side = shape.resolution // 2 ** (shape.vae_levels - 1) // PATCH
    image = side * side
    patch = PATCH * PATCH * shape.channels
    return {
        "projections": 2 * (4 * image + 4 * text) * d * d * layers - 2 * text * d * d,
        "dual": 2 * 4 * image * d * d * dual,
        "attention": 4 * (image + text) ** 2 * d * layers + 4 * image**2 * d * dual,
        "feed_forward": 2 * 8 * image * d * d * layers + 2 * 8 * text * d * d * (layers - 1),
        "modulation": 2 * (6 * layers + 3 * dual + 6 * (layers - 1) + 2 + 2) * d * d,
        "embeddings": 2 * image * patch * d
        + 2 * text * shape.text_dim * d
        + 2 * (SINUSOIDS + d) * d
        + 2 * (shape.pooled_dim + d) * d,
        "output": 2 * image * d * patch,
    }
