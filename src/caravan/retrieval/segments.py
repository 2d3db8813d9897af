"""Search of documents by their best segments, and the recall of an index of either."""

from __future__ import annotations

import numpy as np

from caravan.retrieval.exact import Exact
from caravan.retrieval.index import DEEPER, MOST_FOUND, Blocks, Found, Index


class BestSegments:
    """An index of documents, scored by their best segments (MaxP, arXiv 1905.09217).

    A search repeats with more segments until each query has k documents.

    Args:
        index: of the segments, which are in the order of their documents.
        counts: segments of each document [D].
    """

    def __init__(self, index: Index, counts: np.ndarray) -> None:
        self.index, self.k, self.approximate = index, index.k, index.approximate
        self.bytes_per_vector = index.bytes_per_vector
        self.ends = np.cumsum(counts)

    def build(self, blocks: Blocks) -> None:
        """Index the segments in all blocks."""
        self.index.build(blocks)
        self.bytes_per_vector = self.index.bytes_per_vector

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """Scores and numbers of the `k` best documents for queries [Q, d]."""
        k = self.k if k is None else k
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        left, segments = np.arange(len(queries)), int(self.ends[-1])
        depth = min(DEEPER * k, segments)
        while len(left):
            unfinished = []
            step = max(MOST_FOUND // depth, 1)
            for some in (left[i : i + step] for i in range(0, len(left), step)):
                found = self.index.search(queries[some], depth)
                for query, of, at in zip(some, *found, strict=True):
                    documents = np.searchsorted(self.ends, at[at >= 0], side="right")
                    best = np.sort(np.unique(documents, return_index=True)[1])[:k]
                    if len(best) < k and depth < segments and at[-1] >= 0:
                        unfinished.append(query)
                    scores[query, : len(best)] = of[best]
                    rows[query, : len(best)] = documents[best]
            left, depth = np.array(unfinished), min(DEEPER * depth, segments)
        return scores, rows


def measured_recall(
    rows: np.ndarray,
    queries: np.ndarray,
    blocks: Blocks,
    counts: np.ndarray | None = None,
    sample: int = 256,
) -> float:
    """Recall of rows [Q, k] for queries [Q, d] against exact search over the blocks.

    The mean of |exact ∩ found| / |exact| over `sample` evenly spaced queries, at depth k.

    Args:
        counts: segments of each document, if the rows are documents (`BestSegments`).
    """
    picked = np.unique(np.linspace(0, len(queries) - 1, min(sample, len(queries))).astype(int))
    exact: Index = Exact() if counts is None else BestSegments(Exact(), counts)
    exact.build(blocks)
    most = blocks.rows if counts is None else len(counts)
    found = exact.search(queries[picked], min(rows.shape[1], most))[1]
    both = [np.isin(one, other).mean() for one, other in zip(found, rows[picked], strict=True)]
    return float(np.mean(both))
