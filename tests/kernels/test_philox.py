"""Counter-based noise: the generator's words, the normals made from them, and what the key decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opd_kernels import philox_normal
from opd_kernels.philox import INITIAL_NOISE, _round_keys, _words
from tests.kernels.philox_formula import philox4x32

KEYS = torch.tensor([0, 3, -5, 2**62 + 12345, -(2**63), 2**63 - 1])


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(key: tuple[int, int], counter: tuple[int, int, int, int], words: str) -> None:
    """Known-answer vectors of Random123 for philox4x32 with ten rounds."""
    assert " ".join(f"{int(word):08x}" for word in philox4x32(key, counter)) == words


@pytest.mark.parametrize("counter", [0, 7, INITIAL_NOISE, 2**32 - 1])
def test_short_form_gives_the_same_words(counter: int) -> None:
    """The array form, with its first two rounds shortened and its slots swapped, is the generator bit for bit."""
    x, y = _words(_round_keys(KEYS.numpy()), 5, 70, counter)
    low = np.uint64(0xFFFFFFFF)
    for i, key in enumerate(k & (2**64 - 1) for k in KEYS.tolist()):
        c0, c1, c2, c3 = philox4x32((key & 0xFFFFFFFF, key >> 32), (np.arange(5, 70), counter, 0, 0))
        for got, want in ((x[0, i], c0), (y[0, i], c1), (x[1, i], c2), (y[1, i], c3)):
            np.testing.assert_array_equal(got & low, want)


def test_normals_are_box_muller_of_the_words() -> None:
    key, counter = 2**40 + 17, 3
    words = philox4x32((key & 0xFFFFFFFF, key >> 32), (np.arange(64), counter, 0, 0))
    c0, c1, c2, c3 = (w.astype(np.float64) for w in words)
    wanted = np.empty((64, 4))
    for column, (radius, angle) in enumerate(((c0, c1), (c2, c3))):
        r = np.sqrt(-2 * np.log((np.floor(radius / 256) + 1) / 2**24))
        turn = 2 * np.pi * np.floor(angle / 256) / 2**24
        wanted[:, 2 * column], wanted[:, 2 * column + 1] = r * np.cos(turn), r * np.sin(turn)
    got = philox_normal(torch.tensor([key]), (4, 8, 8), counter)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.flatten().numpy(), wanted.flatten(), atol=3e-6, rtol=0)


def test_the_key_decides_not_the_batch() -> None:
    shape = (3, 5, 7)  # not a multiple of four
    whole = philox_normal(KEYS, shape, 4)
    assert whole.shape == (6, *shape)
    for i in range(len(KEYS)):
        assert torch.equal(philox_normal(KEYS[i : i + 1], shape, 4)[0], whole[i])
    assert torch.equal(philox_normal(KEYS.flip(0), shape, 4), whole.flip(0))
    assert torch.equal(philox_normal(KEYS, (105,), 4), whole.flatten(1))
    assert not torch.equal(philox_normal(KEYS, shape, 5), whole)


def test_long_samples_are_drawn_in_pieces_without_a_seam() -> None:
    """Above the chunk size a sample is drawn in pieces, possibly on several threads."""
    keys, elements = KEYS[:2], 4 * 8192 * 2 + 8
    whole = philox_normal(keys, (elements,), 1)
    assert torch.equal(whole, philox_normal(keys, (elements,), 1))
    assert torch.equal(philox_normal(keys, (4 * 8192 + 4,), 1), whole[:, : 4 * 8192 + 4])


def test_moments() -> None:
    z = philox_normal(torch.arange(64), (4, 64, 64), 9).double()
    n = z.numel()
    for power, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - wanted) < 4.5 * (variance / n) ** 0.5
    correlation = torch.corrcoef(z.view(-1, 4).T)
    assert (correlation - torch.eye(4)).abs().max() < 4.5 * (4 / n) ** 0.5


def test_counter_may_be_a_tensor() -> None:
    keys = KEYS[:3]
    assert torch.equal(philox_normal(keys, (2, 6), torch.tensor(11)), philox_normal(keys, (2, 6), 11))


def test_empty_batch() -> None:
    assert philox_normal(torch.empty(0, dtype=torch.int64), (4, 2), 0).shape == (0, 4, 2)


@pytest.mark.parametrize(
    ("keys", "counter", "message"),
    [
        (torch.zeros(2), 0, "keys"),
        (torch.zeros(2, 1, dtype=torch.int64), 0, "keys"),
        (KEYS, -1, "counter"),
        (KEYS, 2**32, "counter"),
        (KEYS, torch.tensor(1.0), "counter"),
        (KEYS, torch.tensor([1]), "counter"),
    ],
)
def test_errors(keys: torch.Tensor, counter: int | torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox_normal(keys, (4,), counter)


def test_operator() -> None:
    torch.library.opcheck(torch.ops.opd_kernels.philox_normal.default, (KEYS, [2, 3], 5, None))
    torch.library.opcheck(torch.ops.opd_kernels.philox_normal.default, (KEYS, [2, 3], 0, torch.tensor(5)))
