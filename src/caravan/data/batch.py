"""The typed batches that pass between data, models and training.

A batch holds its texts as chunks of similar length, each within a token budget, padded on the
right; `Packed.order` restores the order of the texts. For a model without padding
(`caravan.models.varlen`), chunks are as few as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound="Movable")
B = TypeVar("B")


class Movable:
    """A frozen dataclass of tensors and of other movable dataclasses."""

    def to(self: T, device: torch.device, non_blocking: bool = False) -> T:
        """The same on a device; Lightning calls this for batches."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            is_movable = isinstance(value, Tensor | Movable)
            return value.to(device, non_blocking=non_blocking) if is_movable else value

        values = {name: moved(value) for name, value in vars(self).items()}
        return replace(self, **values)  # type: ignore[type-var]


@dataclass(frozen=True)
class Chunk(Movable):
    """Texts of similar length, padded to the longest of them."""

    input_ids: Tensor  # [n, L] int64
    attention_mask: Tensor  # [n, L] int64, 1 for a real token
    full: bool  # no text is padded, so that no mask is needed
    token_types: Tensor | None = None  # [n, L] int64, 1 for a pair's second text

    def split(self, texts: int) -> list[Chunk]:
        """The same texts as chunks of at most `texts` each."""
        ids, mask = self.input_ids.split(texts), self.attention_mask.split(texts)
        types = [None] * len(ids) if self.token_types is None else self.token_types.split(texts)
        columns = zip(ids, mask, types, strict=True)
        return [Chunk(ids, mask, self.full, kinds) for ids, mask, kinds in columns]


@dataclass(frozen=True)
class Packed(Movable):
    """N texts as chunks; row i of the chunks laid end to end is text `order[i]`."""

    chunks: tuple[Chunk, ...]
    order: Tensor  # [N] int64, a permutation
    tokens: int  # real tokens
    pads: bool = True  # whether the model computes the padding
    extra: int = 0  # repeated chunks at the end, see `lengthened`

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """The texts of all parts, in their order; each part keeps its chunks."""
        starts = accumulate(map(len, parts[:-1]), initial=0)
        order = torch.cat([part.order + start for part, start in zip(parts, starts, strict=True)])
        chunks = tuple(chain.from_iterable(part.chunks for part in parts))
        return cls(chunks, order, sum(part.tokens for part in parts), parts[0].pads)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def sizes(self) -> list[int]:
        """The tokens that the model computes for each chunk."""
        sizes = (c.input_ids.numel() if self.pads else c.attention_mask.sum() for c in self.chunks)
        return list(map(int, sizes))

    @property
    def padded(self) -> int:
        """The tokens that the model computes."""
        padded = sum(chunk.input_ids.numel() for chunk in self.chunks)
        return padded if self.pads else self.tokens  # without waiting for the device

    def split(self, texts: int) -> Packed:
        """The same texts in chunks of at most `texts` each."""
        split = (chunk.split(texts) for chunk in self.chunks)
        return replace(self, chunks=tuple(chain.from_iterable(split)))

    def full(self, length: int) -> int:
        """The number of texts of `length` tokens or more."""
        masks = (chunk.attention_mask for chunk in self.chunks)
        return sum(int((mask.sum(dim=1) >= length).sum()) for mask in masks)

    def lengthened(self, chunks: int) -> Packed:
        """Repeat the last chunk until there are `chunks`, so that all ranks have as many."""
        extra = chunks - len(self.chunks)
        return replace(self, chunks=self.chunks + self.chunks[-1:] * extra, extra=extra)

    def rows_of(
        self, compute: Callable[[Chunk], Tensor], after: Callable[[int], object] | None = None
    ) -> Tensor:
        """Rows [N, ...] of the texts in their order; `compute` gives those [n, ...] of a chunk.

        `after`, to show progress, is called with the number of texts of each chunk.
        """
        rows = []
        for chunk in self.chunks:
            rows.append(compute(chunk))
            if after is not None:
                after(len(chunk.input_ids))
        return self.restore(torch.cat(rows))

    def restore(self, rows: Tensor) -> Tensor:
        """Put rows [N, ...] that were computed chunk by chunk into the order of the texts."""
        rows = rows[: len(self.order)]
        return torch.empty_like(rows).index_copy(0, self.order, rows)


PADDING = 0.1
"""The largest share of padding in a chunk that is not small, before its width is rounded."""
SMALL = 4096
"""A chunk of fewer tokens does not fill a GPU, so it takes more texts whatever their padding.
Budgets up to this are those of CPUs, which lose nothing with small chunks."""


def rounded(width: int) -> int:
    """The next width that a padded chunk may have: sixteen in each octave.

    CPU kernels are compiled for each shape; rounding made reranking 10 % faster.

    >>> rounded(13), rounded(33), rounded(130)
    (13, 34, 136)
    """
    step = 1 << max(width.bit_length() - 5, 0)
    return -(-width // step) * step


def first_chunk(lengths: np.ndarray, token_budget: int, pads: bool = True) -> int:
    """The number of texts in the next chunk, at least 1.

    Args:
        lengths: tokens of the remaining texts [n], longest first.
        token_budget: the most tokens of a chunk. If the model `pads`, padding counts, and too much
            of it ends the chunk (`PADDING`, `SMALL`). Otherwise only real tokens count, and the
            padded ids and states may have twice as many.
    """
    width = max(int(lengths[0]), 1)
    lengths = lengths[: (token_budget if pads else 2 * token_budget) // width or 1]
    real, padded = lengths.cumsum(), width * np.arange(1, len(lengths) + 1)
    fits = real <= token_budget
    if pads:
        # Sorted by length, so the share of real tokens falls with every text that is added.
        small = SMALL if token_budget > SMALL else 0
        fits = (real >= (1 - PADDING) * padded) | (padded - width < small)
    return max(int(fits.sum()), 1)


@dataclass(frozen=True)
class TokenIds:
    """Token ids of N texts, end to end; 4 bytes a token."""

    ids: np.ndarray  # [sum of lengths] int32
    lengths: np.ndarray  # [N] int32
    seconds: np.ndarray | None = None  # [N] int32, of pairs: where the second text begins

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], seconds: Sequence[int] | None = None) -> TokenIds:
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        ids = np.fromiter(chain.from_iterable(texts), np.int32, int(lengths.sum()))
        return cls(ids, lengths, None if seconds is None else np.asarray(seconds, dtype=np.int32))

    @classmethod
    def joined(cls, parts: Sequence[TokenIds]) -> TokenIds:
        """The texts of all parts, in their order."""
        ids, lengths = ([getattr(one, name) for one in parts] for name in ("ids", "lengths"))
        seconds = [one.seconds for one in parts if one.seconds is not None]
        joined = np.concatenate(seconds) if seconds else None
        return cls(np.concatenate(ids), np.concatenate(lengths), joined)

    def packed(self, token_budget: int, pad_id: int = 0, pads: bool = True) -> Packed:
        """Sort texts by length and cut them into chunks of at most `token_budget` tokens.

        For a model that `pads`, padding counts, and a chunk ends before it exceeds a tenth; with a
        budget above `SMALL`, only once the chunk has `SMALL` tokens. If its texts differ in length,
        its width is `rounded`. A text longer than the budget is a chunk by itself.

        Args:
            token_budget: see `first_chunk`.
            pad_id: fills the padding; the attention mask hides it, so any valid id will do.
        """
        lengths = self.lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        chunks, start = [], 0
        while start < len(order):
            width = max(int(lengths[order[start]]), 1)
            number = first_chunk(lengths[order[start:]], token_budget, pads)
            rows = order[start : start + number]
            if pads and lengths[rows[-1]] < width:
                longest = max(int(lengths[order[0]]), 1)  # no wider than a model can read
                width = min(rounded(width), longest)
                rows = rows[: max(token_budget // width, 1)]
            places = np.arange(width)
            real = places < lengths[rows, None]
            ids = np.full(real.shape, pad_id, dtype=np.int64)
            ids[real] = self.ids[(starts[rows, None] + places)[real]]
            types = None
            if self.seconds is not None:
                types = torch.from_numpy(
                    (real & (places >= self.seconds[rows, None])).astype(np.int64)
                )
            mask = torch.from_numpy(real.astype(np.int64))
            chunks.append(Chunk(torch.from_numpy(ids), mask, bool(real.all()), types))
            start += len(rows)
        return Packed(tuple(chunks), torch.from_numpy(order), int(lengths.sum()), pads)


def pack(
    texts: Sequence[Sequence[int]],
    token_budget: int,
    pad_id: int = 0,
    seconds: Sequence[int] | None = None,
) -> Packed:
    """Texts as chunks of similar length, see `TokenIds.packed`.

    Args:
        texts: token ids of each text.
        seconds: of pairs, where the second text begins, for models with token types.

    >>> [tuple(c.input_ids.shape) for c in pack([[1], [2] * 9, [3] * 10], token_budget=20).chunks]
    [(2, 10), (1, 1)]
    """
    return TokenIds.of(texts, seconds).packed(token_budget, pad_id)


Field = TokenIds | tuple[TokenIds, ...] | np.ndarray | None
Fields = Mapping[str, Field]


@dataclass(frozen=True)
class Unpacked(Generic[B]):
    """A batch as a DataLoader worker sends it: numpy arrays.

    Tensors would be sent through shared memory, with two file descriptors per chunk. This can
    exceed the usual limit of 1,024 descriptors per process, and the size of a container's /dev/shm.

    Attributes:
        kind: class of the batch, such as `EncodeBatch`.
        fields: of that class. `TokenIds`, or a tuple of them, become one `Packed`; other arrays
            become tensors, and None stays.
        token_budget, pad_id, pads: see `TokenIds.packed`.
    """

    kind: Callable[..., B]
    fields: Fields
    token_budget: int
    pad_id: int
    pads: bool = True

    def packed(self) -> B:
        """The batch as tensors; called in the process that uses it, not in the worker."""
        return self.kind(**{name: self._tensors(value) for name, value in self.fields.items()})

    def _tensors(self, value: Field) -> Packed | Tensor | None:
        packing = self.token_budget, self.pad_id, self.pads
        if isinstance(value, tuple):
            if self.pads and self.token_budget <= SMALL:  # queries are shorter than passages
                return Packed.joined([part.packed(*packing) for part in value])
            value = TokenIds.joined(value)
        if isinstance(value, TokenIds):
            return value.packed(*packing)
        return None if value is None else torch.from_numpy(value)


@dataclass(frozen=True)
class TrainBatch(Movable):
    """Q queries, each with its group of G passages: a positive, then G - 1 negatives."""

    texts: Packed  # Q queries, then their Q * G passages, group by group
    passage_rows: Tensor  # [Q, G] int64; column 0 is the positive
    passage_keys: Tensor  # [Q, G] int64, a digest of each passage's title and text
    # [Q, M] int64, digests that are never negatives of a query (`Negatives.excluded_keys`); padded
    # by repeating the first
    excluded_keys: Tensor
    teacher: Tensor | None = None  # [Q, G] float32, a teacher's scores; NaN where it has none
    # [Q] bool: other queries' passages are negatives of the query; None: for all
    in_batch: Tensor | None = None
    # [Q, t] and [Q * G, t] float16, a teacher's embeddings of the texts
    teacher_queries: Tensor | None = None
    teacher_passages: Tensor | None = None

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Split rows [Q + Q * G, ...] of the texts into those of queries and of passages."""
        queries, passages = rows.split([len(self.passage_rows), self.passage_rows.numel()])
        return queries, passages


@dataclass(frozen=True)
class RerankBatch(Movable):
    """Q queries, each read together with the G passages of its group, the positive first."""

    texts: Packed  # Q * G pairs, group by group
    passage_rows: Tensor  # [Q, G] int64
    teacher: Tensor | None = None  # [Q, G] float32, a teacher's scores; NaN where it has none


@dataclass(frozen=True)
class AdaptationBatch(Movable):
    """Q texts that end with the prompts of T tasks, and the tokens that each task predicts."""

    texts: Packed
    targets: Tensor  # [M] int64, the sets of text 0's tasks, then of text 1's, ...
    counts: Tensor  # [Q, T] int64, tokens of each set; 0 where there is nothing to predict


@dataclass(frozen=True)
class PairBatch(Movable):
    """N pairs to score, with the rows of their query and passage in the collection."""

    query_rows: Tensor  # [N] int64
    passage_rows: Tensor  # [N] int64
    texts: Packed


@dataclass(frozen=True)
class EncodeBatch(Movable):
    """N texts to embed, with their integer rows in the collection."""

    rows: Tensor  # [N] int64
    texts: Packed
