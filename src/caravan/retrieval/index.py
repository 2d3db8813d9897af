"""The `Index` interface, faiss indexes by factory string, and exact search in torch.

`Faiss` (Douze et al., arXiv 2401.08281) stores vectors as its factory string specifies. `Exact`
reads the corpus block by block for every search, so its memory does not grow with the corpus.
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
        _require_rows(blocks)
        factory = f"index.factory='{self.factory}'"
        with _refused(
            "unknown-index", f"{factory} is not a factory string of faiss, such as HNSW32"
        ):
            index = self.created(blocks.dim)
        self._set(index, "efConstruction", self.ef_construction)
        self._set(index, "nprobe", self.nprobe)
        self._set(index, "efSearch", self.ef_search)
        if not index.is_trained:
            sample = _sample(blocks, self.train_rows)
            few = f"{len(sample)} of {blocks.rows} passages; use fewer lists or index=flat"
            with _refused("index-training-failed", f"{factory} cannot be trained on {few}"):
                index.train(sample)
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

    def created(self, dim: int) -> Any:
        """An empty index of faiss for vectors of a size."""
        return faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)

    def codes(self, vectors: np.ndarray) -> np.ndarray:
        """What the index takes for vectors [n, d] float32."""
        return vectors

    def _set(self, index: Any, name: str, value: int | None) -> None:
        if value is None:
            return
        setting = re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name)
        text = f"index.{setting}={value} does not apply to index.factory='{self.factory}'"
        with _refused("wrong-index-setting", f"{text}; remove it"):
            faiss.ParameterSpace().set_index_parameter(index, name, value)


class Exact:
    """Exact search: computes all dot products in float32, reading the blocks for every search.

    Ties are ordered by ascending row for any chunk size and device: each score is packed with its
    row into a unique 64-bit key.

    Args:
        query_chunk, passage_chunk: size of the largest score matrix in memory.
        device: `auto` uses the GPU if there is one.
    """

    approximate = False

    def __init__(
        self,
        k: PositiveInt = 1000,
        query_chunk: PositiveInt = 1024,
        passage_chunk: PositiveInt = 16_384,
        device: str = "auto",
    ) -> None:
        self.k, self.device = k, device
        self.query_chunk, self.passage_chunk = query_chunk, passage_chunk
        self.bytes_per_vector: int | None = None
        self._blocks: Blocks | None = None

    def build(self, blocks: Blocks) -> None:
        """Keep a reference to the blocks, which each search reads."""
        _require_rows(blocks)
        assert blocks.rows < 2**32  # a row takes 32 bits of a key
        self._blocks = blocks
        _, first = next(iter(blocks))
        self.bytes_per_vector = first[0].nbytes

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        assert self._blocks is not None  # build comes first
        k = self.k if k is None else k
        name = "cuda" if self.device == "auto" and torch.cuda.is_available() else self.device
        device = torch.device("cpu" if name == "auto" else name)
        query_vectors = torch.from_numpy(float32(queries, "the queries")).to(device)
        keys = torch.full((len(query_vectors), k), EMPTY, dtype=torch.int64, device=device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # never TF32 or bf16, whatever training uses
        try:
            for start, block in track(self._blocks, "exact search", unit="blocks"):
                vectors = torch.from_numpy(float32(block, f"passages from row {start}")).to(device)
                for i in range(0, len(vectors), self.passage_chunk):
                    chunk = vectors[i : i + self.passage_chunk]
                    for j in range(0, len(query_vectors), self.query_chunk):
                        span = slice(j, j + self.query_chunk)
                        keys[span] = _merge(keys[span], query_vectors[span] @ chunk.T, start + i)
        finally:
            torch.set_float32_matmul_precision(precision)
        scores, rows = _unpack(keys.cpu())
        return scores.numpy(), rows.numpy()


EMPTY = -(2**63)
LOW = 2**32 - 1


def _merge(keys: torch.Tensor, scores: torch.Tensor, start: int) -> torch.Tensor:
    """Merge scores [q, n] of the rows from `start` into the greatest keys [q, k].

    Scores below the worst key are dropped first: sorting all takes longer than the dot products.
    """
    worst, _ = _unpack(keys[:, -1:])
    better = scores >= worst
    counts = better.sum(dim=1)
    width = int(counts.max())
    if width < scores.shape[1] // 4:
        queries, found = better.nonzero(as_tuple=True)
        first = (counts.cumsum(0) - counts)[queries]
        place = torch.arange(len(found), device=scores.device) - first
        fresh = keys.new_full((len(scores), width), EMPTY)
        fresh[queries, place] = _pack(scores[queries, found], found + start)
    else:
        rows = torch.arange(start, start + scores.shape[1], device=scores.device)
        fresh = _pack(scores, rows)
    return torch.cat([keys, fresh], dim=1).topk(keys.shape[1], dim=1).values


def _pack(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Pack float32 scores and rows into int64 keys ordered by score, then by descending row."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (LOW - rows)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = keys == EMPTY
    rows = (LOW - (keys & LOW)).masked_fill(nothing, -1)
    return scores.masked_fill(nothing, -torch.inf), rows


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
        raise InputError(
            "not-finite",
            f"the vectors of {what} hold NaN or infinite values; check whether the model has "
            "diverged and encode them again",
        )
    return vectors


def _require_rows(blocks: Blocks) -> None:
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
