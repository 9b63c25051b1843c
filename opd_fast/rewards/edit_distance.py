"""How near a text that was read comes to the one that was wanted, as OCR rewards measure it."""

from __future__ import annotations


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(b) + 1))
    for i, ca in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, cb in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (ca != cb))
    return row[-1]


def closeness(text: str, target: str) -> float:
    """Return 1 - min(edit distance, n) / n, where n is the length of `target`, at least 1 (arXiv 2505.05470)."""
    return 1 - min(edit_distance(text, target), len(target)) / len(target)
