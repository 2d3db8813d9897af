"""The typed batches that pass between data, models and training.

Padding texts of different lengths to one another wastes work. A batch holds its texts as chunks of
similar length, each within a token budget, padded on the right; `Packed.order` restores the order
of the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound="Movable")
B = TypeVar("B")


class Movable:
    """A frozen dataclass of tensors and of other movable dataclasses."""

    stay: ClassVar[tuple[str, ...]] = ()  # fields that are used on the CPU only

    def to(self: T, device: torch.device, non_blocking: bool = False) -> T:
        """The same on a device; Lightning calls this for batches."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            is_movable = isinstance(value, Tensor | Movable)
            return value.to(device, non_blocking=non_blocking) if is_movable else value

        names = {field.name for field in fields(self)} - set(self.stay)  # type: ignore[arg-type]
        moving = {name: moved(getattr(self, name)) for name in names}
        return replace(self, **moving)  # type: ignore[type-var]


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
    padded: int  # tokens with padding
    extra: int = 0  # repeated chunks at the end, see `lengthened`

    def __len__(self) -> int:
        return len(self.order)

    def split(self, texts: int) -> Packed:
        """The same texts in chunks of at most `texts` each."""
        split = (chunk.split(texts) for chunk in self.chunks)
        return replace(self, chunks=tuple(chain.from_iterable(split)))

    def full(self, length: int) -> int:
        """The number of texts of `length` tokens or more."""
        masks = (chunk.attention_mask for chunk in self.chunks)
        return sum(int((mask.sum(dim=1) >= length).sum()) for mask in masks)

    def lengthened(self, chunks: int) -> Packed:
        """Pad to `chunks` chunks by repeating the last one; keeps ranks in step."""
        extra = chunks - len(self.chunks)
        return replace(self, chunks=self.chunks + self.chunks[-1:] * extra, extra=extra)

    def rows_of(
        self, compute: Callable[[Chunk], Tensor], after: Callable[[int], object] | None = None
    ) -> Tensor:
        """Rows [N, ...] of the texts, in their order.

        Args:
            compute: rows [n, ...] of a chunk.
            after: called after each chunk with its number of texts, to show progress.
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
"""Tokens of a chunk below which a GPU waits for the next operation, whatever the padding. Budgets
up to this are those of CPUs, which lose nothing with small chunks."""


def rounded(width: int) -> int:
    """The next width that a padded chunk may have: sixteen in each octave.

    A CPU's kernels are compiled for each shape; rounding saved a tenth of a reranking's time.

    >>> rounded(13), rounded(33), rounded(130)
    (13, 34, 136)
    """
    step = 1 << max(width.bit_length() - 5, 0)
    return -(-width // step) * step


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

    def packed(self, token_budget: int, pad_id: int = 0) -> Packed:
        """Sort texts by length and cut them into chunks of at most `token_budget` padded tokens.

        A chunk that is not small ends earlier if its padding would pass a tenth, and a longer text
        is a chunk alone. If its texts differ in length, the width of a chunk is `rounded`.

        Args:
            token_budget: the largest n * L of a chunk [n, L].
            pad_id: fills the padding; the attention mask hides it, so any valid id will do.
        """
        lengths = self.lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        small = SMALL if token_budget > SMALL else 0
        chunks, start, padded = [], 0, 0
        while start < len(order):
            width = max(int(lengths[order[start]]), 1)
            rows = order[start : start + max(token_budget // width, 1)]
            # Sorted by length, so the share of real tokens falls with every text that is added.
            padded_tokens = width * np.arange(1, len(rows) + 1)
            dense = lengths[rows].cumsum() >= (1 - PADDING) * padded_tokens
            rows = rows[: max(int((dense | (padded_tokens <= small)).sum()), 1)]
            if lengths[rows[-1]] < width:
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
            padded += ids.size
            start += len(rows)
        return Packed(tuple(chunks), torch.from_numpy(order), int(lengths.sum()), padded)


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


Fields = Mapping[str, TokenIds | np.ndarray | None]


@dataclass(frozen=True)
class Unpacked(Generic[B]):
    """A batch as a DataLoader worker sends it: numpy arrays.

    Tensors would be sent as file descriptors of shared memory, two a chunk, which passes the usual
    limit of 1,024 a process and a container's /dev/shm.

    Attributes:
        kind: class of the batch, such as `EncodeBatch`.
        fields: of that class. `TokenIds` become `Packed`, other arrays become tensors.
        token_budget, pad_id: see `TokenIds.packed`.
    """

    kind: Callable[..., B]
    fields: Fields
    token_budget: int
    pad_id: int

    def packed(self) -> B:
        """The batch, as tensors; called in the main process."""
        return self.kind(**{name: self._tensors(value) for name, value in self.fields.items()})

    def _tensors(self, value: TokenIds | np.ndarray | None) -> Packed | Tensor | None:
        if isinstance(value, TokenIds):
            return value.packed(self.token_budget, self.pad_id)
        return None if value is None else torch.from_numpy(value)


class Batch(Movable):
    """A batch whose texts are its `Packed` fields."""

    @property
    def packed(self) -> list[Packed]:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return [value for value in values if isinstance(value, Packed)]

    @property
    def tokens(self) -> int:
        return sum(texts.tokens for texts in self.packed)

    @property
    def padded(self) -> int:
        return sum(texts.padded for texts in self.packed)

    @property
    def chunks(self) -> int:
        return sum(len(texts.chunks) for texts in self.packed)

    @property
    def largest(self) -> int:
        """The tokens of the largest chunk, with padding."""
        return max(chunk.input_ids.numel() for texts in self.packed for chunk in texts.chunks)


@dataclass(frozen=True)
class TrainBatch(Batch):
    """Q queries, each with its group of G passages: a positive, then G - 1 negatives."""

    queries: Packed  # Q texts
    passages: Packed  # Q * G texts, group by group
    passage_rows: Tensor  # [Q, G] int64; column 0 is the positive
    passage_keys: Tensor  # [Q, G] int64, a digest of each passage's title and text
    # [Q, M] int64, digests that are never negatives of a query (`Negatives.excluded_keys`); filled
    # up by repeating the first
    excluded_keys: Tensor
    teacher: Tensor | None = None  # [Q, G] float32, a teacher's scores; NaN where it has none
    # [Q] bool: other queries' passages are negatives of the query; None: for all
    in_batch: Tensor | None = None
    # [Q, t] and [Q * G, t] float16, a teacher's embeddings of the texts
    teacher_queries: Tensor | None = None
    teacher_passages: Tensor | None = None


@dataclass(frozen=True)
class RerankBatch(Batch):
    """Q queries, each read together with the G passages of its group, the positive first."""

    pairs: Packed  # Q * G texts, group by group
    passage_rows: Tensor  # [Q, G] int64
    teacher: Tensor | None = None  # [Q, G] float32, a teacher's scores; NaN where it has none


@dataclass(frozen=True)
class AdaptationBatch(Batch):
    """Q texts that end with the prompts of T tasks, and the tokens that each task predicts."""

    texts: Packed
    targets: Tensor  # [M] int64, the sets of text 0's tasks, then of text 1's, ...
    counts: Tensor  # [Q, T] int64, tokens of each set; 0 where there is nothing to predict


@dataclass(frozen=True)
class PairBatch(Batch):
    """N pairs to score, with the rows of their query and passage in the collection."""

    stay = ("query_rows", "passage_rows")

    query_rows: Tensor  # [N] int64
    passage_rows: Tensor  # [N] int64
    pairs: Packed


@dataclass(frozen=True)
class EncodeBatch(Batch):
    """N texts to embed, with their integer rows in the collection."""

    stay = ("rows",)

    rows: Tensor  # [N] int64
    texts: Packed
