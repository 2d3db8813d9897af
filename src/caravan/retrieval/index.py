"""Two indexes behind one small interface: faiss by factory string, and exact search in torch.

`build(blocks)` takes the corpus as blocks of vectors, `search(queries, k)` gives the `k` passages
of greatest dot product. Both read the corpus block by block (float16 on disk becomes float32 one
block at a time). faiss keeps what its factory string says; `Exact` keeps nothing and reads the
blocks again for every search, so its memory does not grow with the corpus.
faiss and torch are imported when first used. faiss: Douze et al., arXiv 2401.08281.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import PositiveInt

from caravan.errors import InputError
from caravan.progress import track

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SEARCH_CHUNK = 1024
"""Queries that faiss is given at once, between two moves of the progress bar."""

Found = tuple[np.ndarray, np.ndarray]
"""scores [Q, k] float32, best first, and rows [Q, k] int64; row -1 and -inf where nothing is."""


class Blocks(Protocol):
    """The vectors of a corpus, in order and in pieces; can be walked through again and again."""

    rows: int
    dim: int

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """`(start_row, vectors [n, dim])`, float16 or float32, `start_row` ascending."""


class ArrayBlocks:
    """Blocks of vectors that are in memory already, such as those of a validation."""

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
        k: Passages a query, where `search` is not told otherwise.
        train_rows: Vectors that train an index which needs training (IVF, PQ), drawn evenly at
            random from the whole corpus, the same ones every time.
        nprobe: Lists that an IVF index visits for a query.
        ef_search: Candidates that an HNSW index keeps while it searches; below `k` recall drops.
        ef_construction: The same while it is built.
        gpu: Search on the GPUs, where the installed faiss has any and they know the index.
    """

    def __init__(
        self,
        factory: str = "Flat",
        k: PositiveInt = 1000,
        train_rows: int = 100_000,
        nprobe: int | None = None,
        ef_search: int | None = None,
        ef_construction: int | None = None,
        gpu: bool = True,
    ) -> None:
        self.factory, self.k, self.train_rows, self.gpu = factory, k, train_rows, gpu
        self.nprobe, self.ef_search, self.ef_construction = nprobe, ef_search, ef_construction
        self._index: Any = None

    @property
    def approximate(self) -> bool:
        """Whether the index may miss passages that exact search finds."""
        return self.factory != "Flat"

    def build(self, blocks: Blocks) -> None:
        """Train (where the index needs it) and add every block; replaces what was built before.

        Raises:
            InputError: The factory string is not one, a parameter does not belong to it, the
                corpus is empty or too small to train it, or a vector is not finite.
        """
        import faiss

        _follow_torch_threads(faiss)
        _require_rows(blocks)
        try:
            index = faiss.index_factory(blocks.dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise InputError(
                f"index.factory='{self.factory}' is not an index that faiss can build over "
                f"vectors of {blocks.dim} dimensions ({_reason(error)}); "
                "examples: Flat, SQfp16, 'IVF256,Flat', HNSW32"
            ) from None
        self._set(faiss, index, "efConstruction", self.ef_construction)
        if not index.is_trained:
            sample = _sample(blocks, self.train_rows)
            try:
                index.train(sample)
            except RuntimeError as error:
                raise InputError(
                    f"index.factory='{self.factory}' cannot be trained on {len(sample)} of "
                    f"{blocks.rows} passages ({_reason(error)}); use fewer lists or index=flat"
                ) from None
        index = self._on_gpus(faiss, index)
        for start, block in track(blocks, f"index {self.factory}", unit="blocks"):
            index.add(_float32(block, f"passages from row {start}"))
        if index.ntotal != blocks.rows:
            raise ValueError(f"the blocks hold {index.ntotal} rows and announce {blocks.rows}")
        self._set(faiss, index, "nprobe", self.nprobe)
        self._set(faiss, index, "efSearch", self.ef_search)
        self._index = index

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        if self._index is None:
            raise RuntimeError("search before build: the index holds nothing yet")
        import faiss

        _follow_torch_threads(faiss)
        k = self.k if k is None else k
        queries = _queries(queries, self._index.d)
        scores = np.empty((len(queries), k), dtype=np.float32)
        rows = np.empty((len(queries), k), dtype=np.int64)
        starts = range(0, len(queries), SEARCH_CHUNK)
        for start in track(starts, "search", len(starts), unit=f"x {SEARCH_CHUNK} queries"):
            span = slice(start, start + SEARCH_CHUNK)
            scores[span], rows[span] = self._index.search(queries[span], k)
        scores[rows < 0] = -np.inf
        return scores, rows

    def _set(self, faiss: Any, index: Any, name: str, value: int | None) -> None:
        if value is None:
            return
        on_gpu = hasattr(faiss, "GpuParameterSpace") and not type(index).__name__.startswith(
            "Index"
        )
        space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            setting = re.sub("[A-Z]", lambda m: "_" + m[0].lower(), name)
            raise InputError(
                f"index.{setting}={value} does not belong to index.factory='{self.factory}'; "
                "nprobe is for IVF, ef_search and ef_construction are for HNSW: leave it out"
            ) from None

    def _on_gpus(self, faiss: Any, index: Any) -> Any:
        count = getattr(faiss, "get_num_gpus", lambda: 0)()
        if not self.gpu or not count or not hasattr(faiss, "GpuMultipleClonerOptions"):
            return index
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True  # the corpus is divided over the GPUs, not copied to each
        try:
            return faiss.index_cpu_to_all_gpus(index, co=options)
        except RuntimeError as error:
            log.warning("index %s stays on the CPU: %s", self.factory, _reason(error))
            return index


class Exact:
    """Every dot product, in float32, streamed over the blocks; nothing is kept between searches.

    Equal scores are ordered by row, the lower first, whatever the chunks and the device: a score
    and its row are one 64-bit key, and keys are never equal.

    Args:
        k: Passages a query, where `search` is not told otherwise.
        query_chunk, passage_chunk: The largest matrix of scores held at once.
        device: `auto` is the GPU if torch has one.
    """

    approximate = False

    def __init__(
        self,
        k: PositiveInt = 1000,
        query_chunk: PositiveInt = 1024,
        passage_chunk: PositiveInt = 16_384,
        device: str = "auto",
    ) -> None:
        self.k, self.query_chunk, self.passage_chunk = k, query_chunk, passage_chunk
        self.device = device
        self._blocks: Blocks | None = None

    def build(self, blocks: Blocks) -> None:
        """Remember where the vectors are; they are read by each search."""
        _require_rows(blocks)
        if blocks.rows >= 2**32:
            raise InputError(f"exact search numbers 2^32 passages, the corpus has {blocks.rows}")
        self._blocks = blocks

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        if self._blocks is None:
            raise RuntimeError("search before build: the index holds nothing yet")
        import torch

        k = self.k if k is None else k
        name = "cuda" if self.device == "auto" and torch.cuda.is_available() else self.device
        device = torch.device("cpu" if name == "auto" else name)
        asked = torch.from_numpy(_queries(queries, self._blocks.dim)).to(device)
        keys = torch.full((len(asked), k), EMPTY, dtype=torch.int64, device=device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # never TF32 or bf16, whatever training uses
        try:
            for start, block in track(self._blocks, "exact search", unit="blocks"):
                vectors = torch.from_numpy(_float32(block, f"passages from row {start}")).to(device)
                for i in range(0, len(vectors), self.passage_chunk):
                    piece = vectors[i : i + self.passage_chunk]
                    for j in range(0, len(asked), self.query_chunk):
                        span = slice(j, j + self.query_chunk)
                        keys[span] = _merge(keys[span], asked[span] @ piece.T, start + i)
        finally:
            torch.set_float32_matmul_precision(precision)
        scores, rows = _unpack(keys.cpu())
        return scores.numpy(), rows.numpy()


EMPTY = -(2**63)
LOW = 2**32 - 1


def _merge(keys: torch.Tensor, scores: torch.Tensor, start: int) -> torch.Tensor:
    """The greatest keys [q, k] of those held [q, k] and of scores [q, n] from row `start` on.

    Only scores that reach the worst one held are looked at; after the first pieces of a corpus
    those are few, and this, not the product, is what most of the time went to.
    """
    import torch

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
    """Float32 scores and rows to int64 keys: a greater score, then a lower row, is greater."""
    import torch

    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 one
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers these order as the floats do
    return (ordered.long() << 32) | (LOW - rows)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = keys == EMPTY
    rows = (LOW - (keys & LOW)).masked_fill(nothing, -1)
    return scores.masked_fill(nothing, -torch.inf), rows


def recall_against_exact(approx_rows: np.ndarray, exact_rows: np.ndarray) -> float:
    """Share of the passages of exact search [Q, k] that the other rows [Q, k'] have too.

    The mean over queries, for which exact search found anything, of |both| / |exact|.
    """
    width = int(max(approx_rows.max(initial=0), exact_rows.max(initial=0))) + 1
    base = np.arange(len(exact_rows))[:, None] * width
    there = np.isin(exact_rows + base, (approx_rows + base)[approx_rows >= 0])
    valid = exact_rows >= 0
    counts = valid.sum(axis=1)
    shares = (there & valid).sum(axis=1)[counts > 0] / counts[counts > 0]
    return float(shares.mean()) if len(shares) else 1.0


def measured_recall(
    rows: np.ndarray, queries: np.ndarray, blocks: Blocks, sample: int = 256
) -> float:
    """Recall of rows [Q, k], found for queries [Q, d], against exact search over the blocks.

    Exact search is run for `sample` queries, evenly spaced, at the depth of `rows`.
    """
    picked = np.unique(np.linspace(0, len(queries) - 1, min(sample, len(queries))).astype(int))
    exact = Exact(k=rows.shape[1])
    exact.build(blocks)
    return recall_against_exact(rows[picked], exact.search(queries[picked])[1])


def _sample(blocks: Blocks, size: int) -> np.ndarray:
    """Vectors of `size` rows [size, dim], drawn evenly from the corpus, the same every time."""
    picked = np.arange(blocks.rows)
    if blocks.rows > size:
        picked = np.sort(np.random.default_rng(0).choice(blocks.rows, size, replace=False))
    sample = np.empty((len(picked), blocks.dim), dtype=np.float32)
    for start, block in track(blocks, "sample to train the index", unit="blocks"):
        low, high = np.searchsorted(picked, [start, start + len(block)])
        sample[low:high] = _float32(block[picked[low:high] - start], f"passages from row {start}")
    return sample


def _float32(vectors: np.ndarray, what: str) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(
            f"the vectors of {what} hold NaN or infinite values; check that the model has not "
            "diverged, and encode again"
        )
    return vectors


def _queries(queries: np.ndarray, dim: int) -> np.ndarray:
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries have shape {queries.shape}, the passages {dim} dimensions")
    return _float32(queries, "the queries")


def _require_rows(blocks: Blocks) -> None:
    if not blocks.rows:
        raise InputError("there are no vectors to search: the corpus is empty")


def _follow_torch_threads(faiss: Any) -> None:
    """faiss takes OMP_NUM_THREADS; where torch was given its own number, that one holds."""
    if "torch" in sys.modules:
        faiss.omp_set_num_threads(sys.modules["torch"].get_num_threads())


def _reason(error: RuntimeError) -> str:
    """faiss' own words, without the C++ signature in front of them."""
    return re.sub(r"^Error in .* at \S+:\d+: |Error: '\w+' failed: ", "", str(error)).strip()
