"""Near-copies of texts: the share of common word shingles (Broder 1997, "On the resemblance")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHINGLE = 4  # words
NEAR_COPY = 0.7
"""Near-copies have at least this `resemblance`."""


def shingles(words: Sequence[str], numbers: dict[str, int]) -> set[int]:
    """Hashes of all sequences of `SHINGLE` words; of fewer words, one hash.

    Args:
        numbers: a number for each word, extended here; texts that are compared share it.
    """
    values = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    hashes = np.zeros(max(len(values) - SHINGLE + 1, 1), dtype=np.uint64)
    for at in range(min(SHINGLE, len(values))):
        hashes = (
            hashes * np.uint64(0x9E3779B97F4A7C15) + values[at : at + len(hashes)] + np.uint64(1)
        )
        hashes ^= hashes >> np.uint64(29)
    return set(hashes.tolist())


def resemblance(a: set[int], b: set[int]) -> float:
    """Jaccard's coefficient of two sets of shingles, neither of them empty.

    >>> numbers = {}
    >>> texts = ("camels store fat in the hump", "camels store fat in one hump")
    >>> one, other = (shingles(text.split(), numbers) for text in texts)
    >>> resemblance(one, one), resemblance(one, other)
    (1.0, 0.2)
    """
    both = len(a & b)
    return both / (len(a) + len(b) - both)
