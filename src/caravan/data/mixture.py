"""Several collections in one training: their settings, and the batches drawn from them.

    python train.py data=mixture 'data.entries={squad: {source: {_target_: ..., path: ...}}, ...}'

A batch comes from one collection, because passages of another task are too easy as negatives and
may be false ones (F2LLM, arXiv 2510.02294). The choice depends only on (seed, step), not on the
number of ranks, so a resumed run draws the batches of an uninterrupted one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from caravan.data.batch import TokenIds, TrainBatch, Unpacked
from caravan.data.batching import QueryOrder, TrainingSet, same_length
from caravan.data.collection import Collection
from caravan.data.negatives import Sampler
from caravan.data.source import Source
from caravan.encoding import Encoding
from caravan.errors import InputError

BLOCK = 1024  # steps that are drawn at once
DRAW = 0x6D6978  # separates the draw of collections from that of passages


@dataclass(frozen=True)
class Entry:
    """One collection of a mixture; None stands for the setting of the whole training.

    Attributes:
        source: a data source; its splits and held-out queries are used.
        weight: of the collection among the others, times its size ** `alpha`. With 0 it is only
            validated.
        instruction: text of `{instruction}` in the templates.
        number, runs: negatives per query, and runs to draw them from (`sampler`).
        in_batch: False if passages of other queries must not serve as negatives, as in
            classification.
        validation_run: as `validation.run`.
    """

    source: Any
    weight: NonNegativeFloat = 1.0
    instruction: str | None = None
    number: NonNegativeInt | None = None
    runs: list[str] | None = None
    in_batch: bool | None = None
    validation_run: str | None = None


@dataclass
class Mixture(Source):
    """Collections to train on together.

    Args:
        entries: by the names that logs and metrics use.
        alpha: a collection is drawn with a probability proportional to weight * size ** alpha,
            where the size is its number of training queries: 0 draws by weight alone, 1 by size.
        mixed: draw each query of a batch, instead of the collection of a batch.
        name: what logs call the mixture.
    """

    entries: dict[str, Entry]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    mixed: bool = False
    name: str = "mixture"

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = self.entries
        self.entries = {
            name: one if isinstance(one, Entry) else Entry(**one) for name, one in given.items()
        }
        for name, entry in self.entries.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise _invalid(f"entries: the name {name!r} is not of letters, digits, _ . and -")
            if entry.source is None or isinstance(entry.source, Mixture):
                raise _invalid(f"entries.{name}.source must be a data source of one collection")
        if not any(entry.weight for entry in self.entries.values()):
            raise _invalid("entries has no collection to train on: give one a weight above 0")

    def collection(self, cache_dir: str | Path) -> Collection:
        """Refused: only a training reads several collections together."""
        raise InputError(
            "several-collections",
            "data=mixture is for train.py; evaluate the collections one by one, or together with"
            " collections=[...]",
        )


def _invalid(problem: str) -> InputError:
    return InputError("invalid-mixture", f"data.{problem}")


@dataclass(frozen=True)
class Part:
    """One of the collections that a training reads, opened.

    Attributes:
        name: in logs; "" for the only one of a training.
        entry: settings of the collection; those of the whole training without a mixture.
        sampler: draws its negatives; None for unlabelled text.
    """

    name: str
    collection: Collection
    entry: Entry
    sampler: Any

    @property
    def train_split(self) -> str:
        return str(self.entry.source.train_split)

    @property
    def dev_split(self) -> str:
        return str(self.entry.source.dev_split)


def open_parts(source: Any, cache_dir: Path, sampler: Sampler | None) -> list[Part]:
    """Open the collections of a training: one, or those of a `Mixture`.

    Raises:
        InputError: "invalid-mixture" if two collections have one name but other instructions.
    """
    if not isinstance(source, Mixture):
        return [Part("", source.collection(cache_dir), Entry(source), sampler)]
    parts = []
    instructions: dict[str, str | None] = {}
    for name, entry in source.entries.items():
        collection = entry.source.collection(cache_dir)
        own = None if sampler is None else sampler.variant(entry.runs, entry.number)
        if instructions.setdefault(collection.name, entry.instruction) != entry.instruction:
            raise _invalid(
                f"entries.{name}.instruction: another entry with other instructions has a"
                f" collection named {collection.name}; set entries.{name}.source.name"
            )
        parts.append(Part(name, collection, entry, own))
    return parts


def instructed(encoding: Encoding, parts: Sequence[Part]) -> Encoding:
    """The encoding with the instructions that the entries give their collections."""
    given = {part.collection.name: part.entry.instruction for part in parts}
    own = {name: text for name, text in given.items() if text is not None}
    return replace(encoding, instructions={**encoding.instructions, **own}) if own else encoding


def texts_of(parts: Sequence[Part]) -> Any:
    """What a tokenizer is trained on: the collection of a training, or the texts of several."""
    found = [part.collection for part in parts]
    if len(found) < 2:
        return found[0] if found else None
    corpus, queries = [one.corpus for one in found], [one.queries for one in found]
    return SimpleNamespace(corpus=_Tables(corpus), queries=_Tables(queries))


class _Tables:
    """Texts of several collections, one after the other."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *map(len, tables)]).tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def get(self, rows: slice) -> list[tuple[str, str]]:
        """(title, text) of a range of rows."""
        start, stop, _ = rows.indices(len(self))
        found: list[tuple[str, str]] = []
        for table, first in zip(self.tables, self.starts, strict=False):
            found += table.get(slice(max(start - first, 0), max(stop - first, 0)))
        return found


class MixtureOrder(QueryOrder):
    """The batches of an epoch for one rank: arrays [n, 3] of (entry, epoch of it, position in it).

    An epoch has as many batches as all queries together fill. Each entry goes through its own
    epochs.

    Args:
        sizes: queries of each entry, all at least 1.
        weights: of each entry, proportional to its share of the batches; or of the queries, if
            `mixed`.
        batch: queries per batch. A batch of one entry has at most that many: an epoch of the entry
            is cut into batches of equal size.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        batch: int,
        seed: int,
        mixed: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(sum(sizes), batch, rank, world)
        self.sizes, self.batch, self.seed, self.mixed = sizes, batch, seed, mixed
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.batches = -(-sum(sizes) // batch)

    def __len__(self) -> int:
        return self.batches

    @property
    def smallest(self) -> int:
        """Queries in the smallest batch."""
        if self.mixed:
            return self.batch
        return min(size // -(-size // self.batch) for size in self.sizes)

    def __iter__(self) -> Iterator[Any]:
        first, end = self.epoch * len(self) + self.start, (self.epoch + 1) * len(self)
        self.start = 0
        drawn = np.zeros(len(self.sizes), dtype=np.int64)  # batches, or queries, of each entry
        for start in range(0, end, BLOCK):
            rng = np.random.default_rng((self.seed, DRAW, start // BLOCK))
            counts = rng.multinomial(self.batch if self.mixed else 1, self.shares, size=BLOCK)
            before = drawn + np.cumsum(counts, axis=0) - counts
            for at in range(max(first - start, 0), min(end - start, BLOCK)):
                queries = np.concatenate(
                    [
                        self._queries(entry, int(before[at, entry]), int(counts[at, entry]))
                        for entry in np.flatnonzero(counts[at]).tolist()
                    ]
                )
                yield np.array_split(queries, self.world)[self.rank]
            drawn = before[-1] + counts[-1]

    def _queries(self, entry: int, first: int, count: int) -> np.ndarray:
        """`count` batches or queries of an entry from number `first` on, [n, 3]."""
        size, start, end = self.sizes[entry], first, first + count
        if not self.mixed:
            batches = -(-size // self.batch)
            epoch, number = divmod(first, batches)
            start, end = (epoch * size + at * size // batches for at in (number, number + 1))
        epochs, positions = np.divmod(np.arange(start, end), size)
        return np.stack((np.full(len(epochs), entry), epochs, positions), axis=1)


class MixedSet(TrainingSet):
    """Training batches of a mixture, from the training sets of its entries.

    Args:
        parts: those with a weight above 0.
        sets: the training set of each.

    Raises:
        InputError: "uneven-negatives", collections with different numbers of negatives in
            one batch.
    """

    def __init__(
        self, source: Mixture, parts: Sequence[Part], sets: Sequence[TrainingSet], seed: int
    ) -> None:
        self.parts, self.sets = parts, sets
        self.mixed, self.seed = source.mixed, seed
        self.sizes = [len(one) for one in sets]
        pairs = zip(parts, self.sizes, strict=True)
        self.weights = [part.entry.weight * size**source.alpha for part, size in pairs]
        numbers = {part.name: part.sampler.number for part in parts if part.sampler is not None}
        if self.mixed and len(set(numbers.values())) > 1:
            raise InputError(
                "uneven-negatives",
                f"data.mixed=true, but the entries have different numbers of negatives ({numbers});"
                " give all the same, or set data.mixed=false",
            )

    def __len__(self) -> int:
        return sum(self.sizes)

    def order(self, batch: int, rank: int = 0, world: int = 1) -> QueryOrder:
        drawn = (self.sizes, self.weights, batch, self.seed, self.mixed)
        order = MixtureOrder(*drawn, rank, world)
        if order.smallest < world:
            smallest = [size // -(-size // batch) for size in self.sizes]
            name = self.parts[int(np.argmin(smallest))].name
            raise InputError(
                "too-few-texts",
                f"{name}: a batch of {order.smallest} queries is too small for {world} ranks; leave"
                " it out, or set data.mixed=true",
            )
        return order

    def open(self) -> None:
        for one in self.sets:
            one.open()

    def summary(self, name: str, batch: int, accumulated: int) -> str:
        shares = np.array(self.weights) / sum(self.weights)
        each = (
            f"{share:.1%} {part.name}: {own.summary(part.collection.name, batch, accumulated)}"
            for part, share, own in zip(self.parts, shares, self.sets, strict=True)
        )
        unit = "each query" if self.mixed else "each batch"
        return f"{unit} is drawn from one collection: " + "; ".join(each)

    def __getitem__(self, queries: np.ndarray) -> Unpacked[Any]:
        changes = np.flatnonzero(np.diff(queries[:, :2], axis=0).any(axis=1)) + 1
        batches = [self._batch(of) for of in np.split(queries, changes)]
        if len(batches) == 1:
            return batches[0]
        names = batches[0].fields
        fields = {name: _joined([one.fields[name] for one in batches]) for name in names}
        return replace(batches[0], fields=fields)

    def _batch(self, queries: np.ndarray) -> Unpacked[Any]:
        """The batch of queries of one entry and epoch."""
        entry, epoch = queries[0, :2].tolist()
        batch = self.sets[entry][epoch, queries[:, 2]]
        everywhere = all(part.entry.in_batch is not False for part in self.parts)
        if everywhere or batch.kind is not TrainBatch:
            return batch
        in_batch = np.full(len(queries), self.parts[entry].entry.in_batch is not False)
        return replace(batch, fields={**batch.fields, "in_batch": in_batch})


def _joined(values: list[Any]) -> Any:
    """A field of one batch of the queries of several, in their order."""
    missing = [value is None for value in values]
    if all(missing):
        return None
    if any(missing):
        raise InputError(
            "teacher-missing",
            "data.mixed=true, and sampler.teacher has scores for some entries only; set"
            " data.mixed=false",
        )
    if isinstance(values[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*values, strict=True))
    if isinstance(values[0], TokenIds):
        return TokenIds.joined(values)
    if values[0].ndim == 2:
        return same_length([row for value in values for row in value])
    return np.concatenate(values)
