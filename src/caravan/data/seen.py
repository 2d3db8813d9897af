"""Which ids were there before, and with the same text or another: 16 bytes an id.

A set of ten million strings would take a gigabyte. Hashes are kept in a few sorted arrays, each
twice as long as the next at least, and looked up a batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash


class Seen:
    """Ids with the hashes of their texts."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # uint64, by id, largest first

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Take in a batch.

        Returns:
            `(new, other)`, bool [n]: the first time that an id is there; an id that was there
            before with another text.
        """
        keys, contents = _hashes(ids), _hashes(texts)
        known, first = np.zeros(len(keys), dtype=bool), contents.copy()
        for part, stored in self._parts:
            at = np.minimum(np.searchsorted(part, keys), len(part) - 1)
            here = part[at] == keys
            known |= here
            first[here] = stored[at[here]]
        unique, where, back = np.unique(keys, return_index=True, return_inverse=True)
        repeated = ~known
        first[repeated] = contents[where][back][repeated]  # of the batch's own first
        new = np.zeros(len(keys), dtype=bool)
        new[where] = True
        new &= ~known
        if new.any():
            fresh = new[where]
            self._parts.append((unique[fresh], contents[where[fresh]]))
            self._merge()
        return new, contents != first

    def _merge(self) -> None:
        while len(self._parts) > 1 and len(self._parts[-2][0]) < 2 * len(self._parts[-1][0]):
            (a, b), (c, d) = self._parts[-2:]
            keys, contents = np.concatenate([a, c]), np.concatenate([b, d])
            order = np.argsort(keys, kind="stable")
            self._parts[-2:] = [(keys[order], contents[order])]


def _hashes(texts: Sequence[str]) -> np.ndarray:
    digest = xxhash.xxh3_64_intdigest
    values = (digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    return np.fromiter(values, dtype=np.uint64, count=len(texts))
