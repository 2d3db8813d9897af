"""Compressed indexes whose best candidates are scored again by the vectors on disk.

`Rescored` holds codes, such as a byte per dimension, and `Binary` a bit. The candidates that the
codes find are scored by their float16 vectors, which are read from the store's memory-mapped
shards. With all passages as candidates, the results are those of exact search.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from pydantic import PositiveInt

from caravan.progress import track
from caravan.retrieval.index import DEEPER, MOST_FOUND, Blocks, Faiss, Found, float32

MOST_NUMBERS = 1 << 24
"""Numbers of vectors that are read for rescoring at a time, 64 MB in float32."""


class Rescored(Faiss):
    """Codes of faiss in memory, and scores of the full vectors.

    Args:
        factory: as of `Faiss`; `SQ8` has a byte per dimension, the place in the range that the
            dimension has in a sample; values beyond the range are clipped.
        rescore: candidates per query that are scored again, or the depth of the search if that is
            more; None is four times `k`.
        The others: see `Faiss`.

    >>> from caravan.retrieval.index import ArrayBlocks
    >>> index = Rescored(k=1)
    >>> index.build(ArrayBlocks(np.eye(8, dtype=np.float32)))
    >>> index.search(np.eye(8, dtype=np.float32)[2:3])[1].tolist(), index.bytes_per_vector
    ([[2]], 8)
    """

    def __init__(
        self,
        factory: str = "SQ8",
        k: PositiveInt = 1000,
        rescore: PositiveInt | None = None,
        train_rows: int = 100_000,
        nprobe: int | None = None,
        ef_search: int | None = None,
    ) -> None:
        super().__init__(factory, k, train_rows, nprobe, ef_search)
        self.approximate = True
        self.rescore = DEEPER * k if rescore is None else rescore
        self._blocks: Any = None

    def build(self, blocks: Blocks) -> None:
        """Index the codes of all blocks, and keep a reference to the blocks for rescoring."""
        super().build(blocks)
        self._blocks = blocks

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` candidates of greatest dot product for each of queries [Q, d]."""
        k = self.k if k is None else k
        depth = max(min(max(self.rescore, k), self._blocks.rows), k)
        queries = float32(queries, "the queries")
        scores = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        step = max(MOST_FOUND // depth, 1)
        for start in range(0, len(queries), step):
            span = slice(start, start + step)
            _, candidates = super().search(queries[span], depth)
            scores[span], rows[span] = rescored(queries[span], candidates, self._blocks, k)
        return scores, rows


class Binary(Rescored):
    """A bit per dimension, its sign: candidates are the nearest by Hamming distance.

    Args: see `Rescored`.
    """

    def __init__(self, k: PositiveInt = 1000, rescore: PositiveInt | None = None) -> None:
        super().__init__("BFlat", k, rescore)

    def created(self, dim: int) -> Any:
        return faiss.index_binary_factory(8 * -(-dim // 8), self.factory)

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        return np.packbits(vectors > 0, axis=1)  # the last byte is filled up with zeros


def rescored(queries: np.ndarray, candidates: np.ndarray, blocks: Blocks, k: int) -> Found:
    """The k candidates of greatest dot product, ties by row, from the vectors of their blocks.

    Args:
        queries: [Q, d] float32.
        candidates: rows [Q, C] int64, -1 where a query has fewer.
    """
    rows = candidates.ravel()
    scores = np.full(len(rows), -np.inf, dtype=np.float32)
    order = np.argsort(rows, kind="stable")  # the pairs of each block, one after the other
    ordered = rows[order]
    step = max(MOST_NUMBERS // blocks.dim, 1)
    for start, block in track(blocks, "rescore", unit="blocks"):
        low, high = np.searchsorted(ordered, [start, start + len(block)])
        for i in range(low, high, step):
            pairs = order[i : min(i + step, high)]
            vectors = float32(block[rows[pairs] - start], f"passages from row {start}")
            of = queries[pairs // candidates.shape[1]]
            scores[pairs] = np.einsum("nd,nd->n", of, vectors)
    found = scores.reshape(candidates.shape)
    best = np.lexsort((candidates, -found), axis=1)[:, :k]
    return np.take_along_axis(found, best, axis=1), np.take_along_axis(candidates, best, axis=1)
