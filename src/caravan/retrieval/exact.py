"""Exact search in torch: reads the corpus block by block for every search.

Memory does not grow with the corpus. The best passages of each query are keys: a score and a row,
packed into an int64; descending keys are in the order of descending scores, then ascending rows.
Ties are therefore ordered alike for any chunk size and device, and if parts of the corpus are
searched separately.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import PositiveInt

from caravan.progress import track
from caravan.retrieval.index import Blocks, Found, float32, not_finite, require_rows

EMPTY = -(2**63)
"""The key of a place without a passage; the lowest."""
LOW = 2**32 - 1  # the bits of a key that hold the row


class Exact:
    """Exact search: computes all dot products in float32, reading the blocks for every search.

    Ties are ordered by ascending row.

    Args:
        k: passages per query.
        query_chunk, passage_chunk: shape of the largest score matrix in memory.
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
        require_rows(blocks)
        assert blocks.rows < 2**32  # a row takes 32 bits of a key
        self._blocks = blocks
        _, first = next(iter(blocks))
        self.bytes_per_vector = first[0].nbytes

    def search(self, queries: np.ndarray, k: int | None = None) -> Found:
        """The `k` passages of greatest dot product for each of queries [Q, d]."""
        assert self._blocks is not None  # build comes first
        return found(self.keys(queries, self._blocks, self.k if k is None else k))

    def keys(self, queries: np.ndarray, blocks: Blocks, k: int) -> np.ndarray:
        """The keys [Q, k] int64 of the best passages in some blocks, best first (`found`)."""
        name = "cuda" if self.device == "auto" and torch.cuda.is_available() else self.device
        device = torch.device("cpu" if name == "auto" else name)
        query_vectors = torch.from_numpy(float32(queries, "the queries")).to(device)
        keys = torch.full((len(query_vectors), k), EMPTY, dtype=torch.int64, device=device)
        # TF32 is faster on GPUs and represents every float16 value exactly; sums are in float32.
        halves = bool((query_vectors.half().float() == query_vectors).all())
        for start, block in track(_loaded(blocks, device), "exact search", unit="blocks"):
            tf32 = halves and block.dtype == torch.float16 and device.type == "cuda"
            with _matmul_precision("high" if tf32 else "highest"):
                for i in range(0, len(block), self.passage_chunk):
                    chunk = block[i : i + self.passage_chunk].float()
                    if not chunk.isfinite().all():
                        raise not_finite(f"passages from row {start}")
                    for j in range(0, len(query_vectors), self.query_chunk):
                        span = slice(j, j + self.query_chunk)
                        keys[span] = _merge(keys[span], query_vectors[span] @ chunk.T, start + i)
        return keys.cpu().numpy()


def _loaded(blocks: Blocks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """The blocks as tensors on a device; the next is read from disk while one is searched."""

    def load() -> tuple[int, torch.Tensor] | None:
        item = next(remaining, None)
        if item is None:
            return None
        host = torch.from_numpy(np.array(item[1]))  # a copy: the file is read here
        host = host.pin_memory() if device.type == "cuda" else host
        return item[0], host.to(device, non_blocking=True)

    remaining = iter(blocks)
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(load)
        while (loaded := waiting.result()) is not None:
            waiting = reader.submit(load)
            yield loaded


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Multiply float32 in this precision, whatever training uses."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def merged(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The best keys [Q, k] of the keys of several parts of a corpus, each [Q, k]."""
    best, *others = (torch.from_numpy(np.array(part)) for part in parts)
    for part in others:
        best = torch.cat([best, part], dim=1).topk(best.shape[1], dim=1).values
    return best.numpy()


def found(keys: np.ndarray) -> Found:
    """Scores and rows of keys [Q, k]."""
    scores, rows = _unpack(torch.from_numpy(np.array(keys)))
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
