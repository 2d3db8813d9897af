"""The `Index` interface, and indexes by factory string of faiss (Douze et al., arXiv 2401.08281).

`caravan.retrieval.exact` searches without faiss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from pydantic import PositiveInt

from caravan.errors import InputError
from caravan.models import hardware
from caravan.progress import track

SEARCH_CHUNK = 1024
"""Queries per call of faiss; the progress bar advances after each call."""
DEEPER = 4
"""Candidates per result, of documents by their segments and of compressed vectors."""
MOST_FOUND = 1 << 24  # candidates found at a time for all queries together, 12 bytes each

Found = tuple[np.ndarray, np.ndarray]
"""Scores [Q, k] float32, best first, and rows [Q, k] int64; -inf and -1 beyond the corpus."""


class Blocks(Protocol):
    """Vectors of a corpus in order, as `(start_row, vectors [n, dim])`; iterated repeatedly."""

    rows: int
    dim: int

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]: ...


class Index(Protocol):
    """Finds the passages with the greatest dot product for each query.

    Select a custom class by its dotted path: `index._target_=my_package.MyIndex`.

    >>> class Brute:
    ...     k, approximate, bytes_per_vector = 2, False, None
    ...
    ...     def build(self, blocks):
    ...         self.vectors = np.concatenate([vectors for _, vectors in blocks])
    ...
    ...     def search(self, queries, k=None):
    ...         scores = queries @ self.vectors.T
    ...         rows = np.argsort(-scores, axis=1, kind="stable")[:, : k or self.k]
    ...         return np.take_along_axis(scores, rows, axis=1), rows
    >>> index: Index = Brute()
    >>> index.build(ArrayBlocks(np.eye(3, dtype=np.float32)))
    >>> scores, rows = index.search(np.array([[0.1, 0.9, 0.5]], dtype=np.float32))
    >>> rows.tolist()
    [[1, 2]]
    """

    k: int  # default number of passages per query
    approximate: bool  # may miss passages; an evaluation then measures the recall
    bytes_per_vector: int | None  # that a search reads of each passage; None if unknown

    def build(self, blocks: Blocks) -> None:
        """Index all blocks, replacing those of an earlier call."""

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """Scores and rows of the `k` best passages for queries [Q, d] float32."""


class ArrayBlocks:
    """Blocks of vectors in memory, such as those of a validation."""

    def __init__(self, vectors: np.ndarray, block_rows: int = 16_384) -> None:
        self.vectors, self.block_rows = vectors, block_rows
        self.rows, self.dim = vectors.shape

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.rows, self.block_rows):
            yield start, self.vectors[start : start + self.block_rows]


class Faiss:
    """Any index that faiss' factory can name, with inner product.

    Args:
        factory: `Flat`, `SQfp16`, `IVF256,Flat`, `HNSW32`, `OPQ64,IVF4096,PQ64`, ...
        k: default number of passages per query.
        train_rows: vectors to train the index on (IVF, PQ), a fixed random sample of the corpus.
        nprobe: lists that an IVF index visits per query.
        ef_search: candidates that an HNSW index keeps during a search; below `k` recall drops.
        ef_construction: candidates that an HNSW index keeps during construction.
    """

    def __init__(
        self,
        factory: str = "Flat",
        k: PositiveInt = 1000,
        train_rows: int = 100_000,
        nprobe: int | None = None,
        ef_search: int | None = None,
        ef_construction: int | None = None,
    ) -> None:
        self.factory, self.k, self.train_rows = factory, k, train_rows
        self.nprobe, self.ef_search, self.ef_construction = nprobe, ef_search, ef_construction
        self.approximate = factory != "Flat"
        self.bytes_per_vector: int | None = None
        self._index: Any = None

    def build(self, blocks: Blocks) -> None:
        """Train the index if necessary and add all blocks, replacing those of an earlier call.

        Raises:
            InputError: If faiss cannot build the index, or a vector is not finite.
        """
        faiss.omp_set_num_threads(torch.get_num_threads())
        require_rows(blocks)
        factory, index = f"index.factory='{self.factory}'", self._empty(blocks.dim)
        for name, setting, value in (
            ("efConstruction", "ef_construction", self.ef_construction),
            ("nprobe", "nprobe", self.nprobe),
            ("efSearch", "ef_search", self.ef_search),
        ):
            if value is not None:
                text = f"index.{setting}={value} does not apply to {factory}; remove it"
                with _refused("wrong-index-setting", text):
                    faiss.ParameterSpace().set_index_parameter(index, name, value)
        if not index.is_trained:
            sample = _sample(blocks, self.train_rows)
            few = f"{len(sample)} of {blocks.rows} passages; use fewer lists or index=flat"
            with _refused("index-training-failed", f"{factory} cannot be trained on {few}"):
                index.train(sample)
        _reserve(index, blocks.rows)
        for start, block in track(blocks, f"index {self.factory}", unit="blocks"):
            index.add(self.codes(float32(block, f"passages from row {start}")))
        self._index, self.bytes_per_vector = index, _code_size(index)

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        k = self.k if k is None else k
        queries = float32(queries, "the queries")
        scores = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        starts = range(0, len(queries), SEARCH_CHUNK)
        for start in track(starts, "search", len(starts), unit=f"x {SEARCH_CHUNK} queries"):
            span = slice(start, start + SEARCH_CHUNK)
            scores[span], rows[span] = self._index.search(self.codes(queries[span]), k)
        scores[rows < 0] = -np.inf
        return scores, rows

    def refuse_too_large(self, rows: int, dim: int) -> None:
        """Raise an InputError if the index of `rows` vectors does not fit into main memory."""
        size, available = rows * bytes_held(self._empty(dim)), hardware.host_memory()
        if size > available:
            raise InputError(
                "out-of-memory",
                f"index.factory='{self.factory}' of {rows:,} vectors of {dim} dimensions needs at"
                f" least {size / 2**30:.1f} GiB of main memory, and the machine has"
                f" {available / 2**30:.1f} GiB; set index=exact, which streams the vectors",
            )

    def _empty(self, dim: int) -> Any:
        text = f"index.factory='{self.factory}' is not a factory string of faiss, such as HNSW32"
        with _refused("unknown-index", text):
            return self.created(dim)

    def created(self, dim: int) -> Any:
        """An empty index of faiss for vectors of a size."""
        return faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        """What the index takes for vectors [n, d] float32."""
        return vectors


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


def _sample(blocks: Blocks, size: int) -> np.ndarray:
    """A fixed uniform sample of `size` vectors, [size, dim]."""
    picked = np.arange(blocks.rows)
    if blocks.rows > size:
        picked = np.sort(np.random.default_rng(0).choice(blocks.rows, size, replace=False))
    sample = np.empty((len(picked), blocks.dim), dtype=np.float32)
    for start, block in track(blocks, "sample to train the index", unit="blocks"):
        low, high = np.searchsorted(picked, [start, start + len(block)])
        sample[low:high] = float32(block[picked[low:high] - start], f"passages from row {start}")
    return sample


def bytes_held(index: Any) -> float:
    """Bytes of main memory that an index of faiss needs per vector; 0 if unknown.

    Counts its code, its id in an inverted list, and its links, offset and level in a graph.
    Centroids, and the spare capacity of inverted lists, are not counted.
    """
    if isinstance(index, faiss.IndexBinary):
        return float(index.code_size)
    held: Any = faiss.downcast_index(index)  # owned by `index`, which must stay
    if isinstance(held, faiss.IndexPreTransform):
        return bytes_held(held.index)
    if isinstance(held, faiss.IndexIVF):
        return float(held.code_size + 8)
    if isinstance(held, faiss.IndexHNSW):
        graph: Any = held.hnsw
        # A vector on one level is also on the next with probability 1 / M, with M links there:
        # M / (M - 1) links above level 0 on average.
        above = graph.nb_neighbors(1)
        links = graph.nb_neighbors(0) + above / (above - 1)
        return bytes_held(held.storage) + 4 * links + 12  # the offset and the level
    return float(_code_size(held) or 0)


def _reserve(index: Any, rows: int) -> None:
    """Allocate the codes of all vectors of an index of faiss, if it holds them in one array.

    An array that grows block by block is copied, which takes up to twice its memory.
    """
    held: Any = index if isinstance(index, faiss.IndexBinary) else faiss.downcast_index(index)
    is_binary = isinstance(held, faiss.IndexBinaryFlat)
    if isinstance(held, faiss.IndexPreTransform):
        _reserve(held.index, rows)
    elif isinstance(held, faiss.IndexHNSW):
        _reserve(held.storage, rows)
    elif is_binary or isinstance(held, faiss.IndexFlatCodes):
        codes = held.xb if is_binary else held.codes
        codes.resize(rows * held.code_size)
        codes.clear()  # keeps the memory


def _code_size(index: Any) -> int | None:
    """Bytes of a vector's code in an index of faiss; None if unknown, as for a graph."""
    if isinstance(index, faiss.IndexBinary):
        return int(index.code_size)
    try:
        return int(index.sa_code_size())
    except RuntimeError:
        return None


def float32(vectors: np.ndarray, what: str) -> np.ndarray:
    """Contiguous vectors in float32.

    Raises:
        InputError: A value is not finite; `what` names the vectors in the message.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise not_finite(what)
    return vectors


def not_finite(what: str) -> InputError:
    text = f"the vectors of {what} hold NaN or infinite values; check whether the model has"
    return InputError("not-finite", f"{text} diverged, and encode them again")


def require_rows(blocks: Blocks) -> None:
    if not blocks.rows:
        raise InputError("empty-corpus", "there are no vectors to search: the corpus is empty")


@contextmanager
def _refused(code: str, text: str) -> Iterator[None]:
    """Raise an InputError for an error of faiss, without the leading C++ signature."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^Error in .* at \S+:\d+: |Error: '\w+' failed: ", "", str(error)).strip()
        raise InputError(code, f"{text} ({reason})") from None
