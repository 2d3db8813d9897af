"""Exact search in torch: reads the corpus block by block, so memory does not grow with it.

The best passages of each query are keys: a score and a row,
packed into an int64; descending keys are in the order of descending scores, then ascending rows.
Ties are therefore ordered alike for any chunk size and device, and if parts of the corpus are
searched separately.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt

from caravan.data.tokenization import log_once
from caravan.models import hardware
from caravan.progress import track
from caravan.retrieval.index import (
    BestSegments,
    Blocks,
    Found,
    Index,
    float32,
    not_finite,
    require_rows,
)
from caravan.retrieval.store import Save

EMPTY = -(2**63)
"""The key of a place without a passage; the lowest."""
LOW = 2**32 - 1  # the bits of a key that hold the row


class Exact:
    """Exact search: computes all dot products in float32, reading the blocks for every search.

    Ties are ordered by ascending row.

    Args:
        k: passages per query.
        query_chunk, passage_chunk: shape of the largest score matrix in memory.
        device: `auto` is this process' GPU if there is one (`caravan.models.hardware.device`).
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
        require_rows(blocks)
        assert blocks.rows < 2**32  # a row takes 32 bits of a key
        self._blocks = blocks
        _, first = next(iter(blocks))
        self.bytes_per_vector = first[0].nbytes

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        assert self._blocks is not None  # build comes first
        return _found(self._keys(queries, self._blocks, self.k if k is None else k))

    def search_parts(
        self, queries: np.ndarray, parts: Sequence[Blocks], k: int, save: Save
    ) -> Found:
        """As `search`, over parts of the corpus; the keys of each part are saved as a shard.

        Args:
            parts: blocks of the corpus, which keep its row numbers.
            save: `Store.shards` with the product's name and inputs bound.
        """

        def compute(numbers: list[int]) -> Iterator[np.ndarray]:
            return (self._keys(queries, parts[number], k) for number in numbers)

        def better(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return torch.cat([one, other], dim=1).topk(k, dim=1).values

        saved = (torch.from_numpy(np.array(keys)) for keys in save(len(parts), compute))
        return _found(reduce(better, saved).numpy())

    def _keys(self, queries: np.ndarray, blocks: Blocks, k: int) -> np.ndarray:
        """The keys [Q, k] int64 of the best passages in some blocks, best first."""
        device = hardware.device() if self.device == "auto" else torch.device(self.device)
        log_once(f"exact search on {hardware.named(device)}", logging.INFO)
        query_vectors = torch.from_numpy(float32(queries, "the queries")).to(device)
        keys = query_vectors.new_full((len(query_vectors), k), EMPTY, dtype=torch.int64)
        # TF32 is faster on GPUs and represents every float16 value exactly; sums are in float32.
        # Queries that float16 cannot represent are multiplied in float32.
        halves = bool((query_vectors.half().float() == query_vectors).all())
        for start, block in track(_loaded(blocks, device), "exact search", unit="blocks"):
            tf32 = halves and block.dtype == torch.float16 and device.type == "cuda"
            with _matmul_precision("high" if tf32 else "highest"):
                for i in range(0, len(block), self.passage_chunk):
                    chunk = block[i : i + self.passage_chunk].float()
                    if not chunk.isfinite().all():
                        raise not_finite(f"passages from row {start + i}")
                    for j in range(0, len(query_vectors), self.query_chunk):
                        span = slice(j, j + self.query_chunk)
                        keys[span] = _merge(keys[span], query_vectors[span] @ chunk.T, start + i)
        return keys.cpu().numpy()


def _loaded(blocks: Blocks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """The blocks as tensors on a device; the next is read and copied while one is searched.

    On a GPU, the reading thread copies on a side stream: on the default stream, a copy would wait
    for all kernels of the search.
    """
    on_gpu = device.type == "cuda"

    def start() -> None:
        if on_gpu:  # device and stream of a thread, not of the process
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def load() -> tuple[int, torch.Tensor, Any] | None:
        item = next(remaining, None)
        if item is None:
            return None
        host = torch.from_numpy(np.array(item[1]))  # a copy: the file is read here
        if not on_gpu:
            return item[0], host.to(device), None
        block = host.pin_memory().to(device, non_blocking=True)
        return item[0], block, torch.cuda.current_stream(device).record_event()

    remaining = iter(blocks)
    with ThreadPoolExecutor(1, initializer=start) as reader:
        waiting = reader.submit(load)
        while (loaded := waiting.result()) is not None:
            waiting = reader.submit(load)
            row, block, copied = loaded
            if on_gpu:
                searching = torch.cuda.current_stream(device)
                searching.wait_event(copied)
                block.record_stream(searching)  # its memory is reused after the search of it
            yield row, block


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Multiply float32 in this precision, whatever training uses."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _found(keys: np.ndarray) -> Found:
    """Scores and rows of keys [Q, k]."""
    scores, rows = _unpack(torch.from_numpy(keys))
    return scores.numpy(), rows.numpy()


def _merge(keys: torch.Tensor, scores: torch.Tensor, start: int) -> torch.Tensor:
    """Merge scores [q, n] of the rows from `start` into the greatest keys [q, k].

    Only scores that can be among the best are packed: sorting all takes longer than the dot
    products. Scores equal to the lowest of the best are packed too, since their rows decide.
    """
    k = keys.shape[1]
    least, _ = _unpack(keys[:, -1:])
    if k < scores.shape[1] and (least == -torch.inf).any():  # all would be better
        least = scores.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    queries, columns = (scores >= least).nonzero(as_tuple=True)
    counts = torch.bincount(queries, minlength=len(scores))
    first = (counts.cumsum(0) - counts)[queries]
    place = torch.arange(len(columns), device=scores.device) - first
    fresh = keys.new_full((len(scores), int(counts.max())), EMPTY)
    fresh[queries, place] = _pack(scores[queries, columns], columns + start)
    return torch.cat([keys, fresh], dim=1).topk(k, dim=1).values


def _pack(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Pack float32 scores and rows into int64 keys; a higher score, then a lower row, wins."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (LOW - rows)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = (keys >> 32).int()
    scores = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    nothing = keys == EMPTY
    rows = (LOW - (keys & LOW)).masked_fill(nothing, -1)
    return scores.masked_fill(nothing, -torch.inf), rows


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
