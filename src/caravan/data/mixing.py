"""Training batches of several collections.

A batch comes from one collection, because passages of another task are too easy as negatives and
may be false ones (F2LLM, arXiv 2510.02294). Which collection is a pure function of (seed, step),
the same on any number of ranks, so a resumed run draws the batches of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from caravan.data.batch import TokenIds, TrainBatch, Unpacked
from caravan.data.batching import QueryOrder, TrainingSet
from caravan.data.mixture import Mixture, Part
from caravan.errors import InputError

BLOCK = 1024  # steps that are drawn at once
DRAW = 0x6D6978  # separates the draw of collections from that of passages

Queries = tuple[int, int, np.ndarray]
"""Number of an entry, epoch of its collection, and positions [n] in the epoch's permutation."""


class Draw:
    """The queries of each batch, a pure function of (seed, step).

    Args:
        sizes: queries of each entry, all at least 1.
        weights: of each entry, proportional to its share of the batches; or of the queries, if
            `mixed`.
        batch: queries per batch. A batch of one entry has at most so many: an epoch of the entry is
            cut into batches of equal size.

    Attributes:
        batches: batches per epoch, in which as many queries are drawn as there are.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], batch: int, seed: int, mixed: bool
    ) -> None:
        self.sizes, self.batch, self.seed, self.mixed = list(sizes), batch, seed, mixed
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.batches = -(-sum(sizes) // batch)
        self._before = [np.zeros(len(sizes), dtype=np.int64)]  # drawn before each block
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, step: int) -> list[Queries]:
        """The queries of a batch, entry by entry."""
        number, at = divmod(step, BLOCK)
        while len(self._before) <= number:
            self._before.append(self._before[-1] + self._block(len(self._before) - 1).sum(axis=0))
        if self._latest[0] != number:
            self._latest = number, self._block(number)
        block = self._latest[1]
        first = self._before[number] + block[:at].sum(axis=0)
        entries = np.flatnonzero(block[at]).tolist()
        found = (self._queries(i, int(first[i]), int(block[at, i])) for i in entries)
        return [queries for of_one in found for queries in of_one]

    def smallest(self) -> int:
        """Queries in the smallest batch."""
        if self.mixed:
            return self.batch
        return min(size // -(-size // self.batch) for size in self.sizes)

    def _block(self, number: int) -> np.ndarray:
        """How many batches, or queries, each of BLOCK steps takes from each entry."""
        rng = np.random.default_rng((self.seed, DRAW, number))
        return rng.multinomial(self.batch if self.mixed else 1, self.shares, size=BLOCK)

    def _queries(self, entry: int, first: int, count: int) -> Iterator[Queries]:
        """`count` batches or queries of an entry from number `first` on, epoch after epoch."""
        size = self.sizes[entry]
        if not self.mixed:
            batches = -(-size // self.batch)
            epoch, number = divmod(first, batches)
            start, end = number * size // batches, (number + 1) * size // batches
            yield entry, epoch, np.arange(start, end)
            return
        epochs, positions = np.divmod(np.arange(first, first + count), size)
        for epoch in np.unique(epochs).tolist():
            yield entry, epoch, positions[epochs == epoch]


class MixtureOrder(QueryOrder):
    """The batches of an epoch for one rank: lists of `Queries`."""

    def __init__(self, draw: Draw, rank: int = 0, world: int = 1) -> None:
        super().__init__(0, draw.batch, rank, world)
        self.draw = draw

    def __len__(self) -> int:
        return self.draw.batches

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        for number in range(first, len(self)):
            yield self._share(self.draw(self.epoch * len(self) + number))

    def _share(self, queries: list[Queries]) -> list[Queries]:
        """The share of this rank, consecutive queries."""
        sizes = [len(positions) for _, _, positions in queries]
        mine = np.array_split(np.arange(sum(sizes)), self.world)[self.rank]
        low, high, start = int(mine[0]), int(mine[-1]) + 1, 0
        found = []
        for entry, epoch, positions in queries:
            part = positions[max(low - start, 0) : max(high - start, 0)]
            start += len(positions)
            if len(part):
                found.append((entry, epoch, part))
        return found


class MixedSet(Dataset[Any]):
    """Training batches of a mixture, from the training sets of its entries.

    Args:
        parts: those with a weight above 0.
        sets: the training set of each.

    Raises:
        InputError: "uneven-negatives", a batch of several collections with other numbers of them.
    """

    def __init__(
        self, source: Mixture, parts: Sequence[Part], sets: Sequence[TrainingSet], seed: int
    ) -> None:
        self.parts, self.sets = list(parts), list(sets)
        self.mixed, self.seed = source.mixed, seed
        sizes = [len(one) for one in sets]
        self.weights = [
            part.entry.weight * size**source.alpha for part, size in zip(parts, sizes, strict=True)
        ]
        self.switches = any(part.entry.in_batch is False for part in parts)
        numbers = {part.name: part.sampler.number for part in parts if part.sampler is not None}
        if self.mixed and len(set(numbers.values())) > 1:
            raise InputError(
                "uneven-negatives",
                f"data.mixed=true, and the entries have other numbers of negatives ({numbers});"
                " give all the same, or set data.mixed=false",
            )

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def order(self, batch: int, rank: int = 0, world: int = 1) -> QueryOrder:
        """See `caravan.data.batching.TrainingSet`."""
        sizes = [len(one) for one in self.sets]
        draw = Draw(sizes, self.weights, batch, self.seed, self.mixed)
        if draw.smallest() < world:
            raise InputError(
                "too-few-texts",
                f"{self.parts[int(np.argmin(sizes))].name}: {min(sizes)} training queries are too"
                f" few for batches on {world} ranks; leave it out, or set data.mixed=true",
            )
        return MixtureOrder(draw, rank, world)

    def open(self) -> None:
        """Open the training sets."""
        for one in self.sets:
            one.open()

    def summary(self, name: str, batch: int, accumulated: int) -> str:
        """See `caravan.data.batching.TrainingSet`."""
        shares = np.array(self.weights) / sum(self.weights)
        named = zip(self.parts, shares, self.sets, strict=True)
        each = (
            f"{share:.1%} {part.name}: {own.summary(part.collection.name, batch, accumulated)}"
            for part, share, own in named
        )
        unit = "each query" if self.mixed else "each batch"
        return f"{unit} is drawn from one collection: " + "; ".join(each)

    def __getitem__(self, item: list[Queries]) -> Unpacked[Any]:
        return joined([self._batch(*queries) for queries in item])

    def _batch(self, entry: int, epoch: int, positions: np.ndarray) -> Unpacked[Any]:
        batch = self.sets[entry][epoch, positions]
        if not self.switches or batch.kind is not TrainBatch:
            return batch
        in_batch = np.full(len(positions), self.parts[entry].entry.in_batch is not False)
        return replace(batch, fields={**batch.fields, "in_batch": in_batch})


def joined(batches: Sequence[Unpacked[Any]]) -> Unpacked[Any]:
    """One batch of the queries of several, in their order."""
    first = batches[0]
    if len(batches) == 1:
        return first
    fields = {name: _joined([one.fields[name] for one in batches]) for name in first.fields}
    return replace(first, fields=fields)


def _joined(values: list[Any]) -> Any:
    if all(value is None for value in values):
        return None
    if isinstance(values[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*values, strict=True))
    if isinstance(values[0], TokenIds):
        return TokenIds.joined(values)
    known = next(value for value in values if value is not None)
    if any(value is None for value in values):  # a teacher of some collections
        raise InputError(
            "teacher-missing",
            "data.mixed=true, and sampler.teacher has scores for some entries only; set"
            " data.mixed=false",
        )
    if known.ndim == 2:  # keys [Q, M], filled up by repeating the first
        most = max(value.shape[1] for value in values)
        values = [
            np.concatenate((one, np.repeat(one[:, :1], most - one.shape[1], axis=1)), axis=1)
            for one in values
        ]
    return np.concatenate(values)
