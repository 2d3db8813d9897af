"""Datasets whose items are batches: training groups, texts to embed, pairs to score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data import Sampler as BatchSampler

from caravan.data.batch import (
    EncodeBatch,
    Fields,
    PairBatch,
    RerankBatch,
    TokenIds,
    TrainBatch,
    Unpacked,
)
from caravan.data.collection import Collection
from caravan.data.negatives import Sampler
from caravan.data.pairs import PairTemplates
from caravan.data.qrels import Qrels
from caravan.data.texts import Texts, text_keys
from caravan.data.tokenization import Templates
from caravan.errors import InputError


class Permutation:
    """Shuffles rows for an epoch; a pure function of (seed, epoch)."""

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __call__(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self._latest = epoch, self.rows[order]
        return self._latest[1]


class QueryOrder(BatchSampler[Any]):
    """The batches of an epoch for one rank: (epoch, positions [n] in the epoch's permutation).

    A batch has the same queries on any number of ranks; each rank takes a consecutive share.
    The last batch of an epoch may be smaller. It is split evenly over the ranks, or dropped if it
    has fewer queries than ranks, since every rank needs a query.
    """

    def __init__(self, queries: int, batch: int, rank: int = 0, world: int = 1) -> None:
        bounds = [(start, min(start + batch, queries)) for start in range(0, queries, batch)]
        self.bounds = [(start, end) for start, end in bounds if end - start >= world]
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        for start, end in self.bounds[first:]:
            yield self.epoch, np.array_split(np.arange(start, end), self.world)[self.rank]


class TrainingSet(Protocol):
    """Training batches: an item is what `order` yields, such as the positions of an epoch."""

    seed: int

    def __len__(self) -> int:
        """Queries or texts per epoch."""

    def __getitem__(self, item: Any) -> Unpacked[Any]: ...

    def order(self, batch: int, rank: int = 0, world: int = 1) -> QueryOrder:
        """The batches of one rank, a pure function of (seed, epoch); arguments: `QueryOrder`."""
        return QueryOrder(len(self), batch, rank, world)

    def open(self) -> None:
        """Read the files that batches need, if any; called once, before workers are forked."""
        return

    def summary(self, name: str, batch: int, accumulated: int) -> str:
        """Describe the training data in one line.

        Args:
            name: name of the collection.
            batch: queries or texts per forward pass, over all ranks.
            accumulated: forward passes per update.
        """


class Groups(TrainingSet):
    """Training batches of queries, each with its group [positive, negative, ...].

    Args:
        templates: `Templates` give batches of queries and passages (retriever), `PairTemplates`
            batches of pairs (reranker).
        token_budget, pads: see `caravan.data.batch.TokenIds.packed`.

    Attributes:
        teacher_embeddings: a function of query rows [Q] and passage rows [Q, G] that returns the
            fields of a teacher's embeddings (`TrainBatch`); None without a teacher.
    """

    teacher_embeddings: Callable[[np.ndarray, np.ndarray], Fields] | None = None

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        negatives: Sampler,
        templates: Templates | PairTemplates,
        token_budget: int,
        seed: int,
        pads: bool = True,
    ) -> None:
        self.collection, self.qrels, self.negatives = collection, qrels, negatives
        self.query_rows = qrels.relevant.queries
        self.templates = templates
        self.token_budget, self.pads = token_budget, pads
        self.seed = seed
        self.permutation = Permutation(self.query_rows, seed)
        self._opened = False

    def __len__(self) -> int:
        return len(self.query_rows)

    def summary(self, name: str, batch: int, accumulated: int) -> str:
        number = self.negatives.number
        in_batch = ""
        if isinstance(self.templates, Templates):
            in_batch = f", {batch * (1 + number) - 1} with those in the batch"
        return (
            f"{len(self):,} training queries of {name}; {batch * accumulated} queries an update,"
            f" {number} hard negatives a query{in_batch}"
        )

    def open(self) -> None:
        if not self._opened:
            self.negatives.open(self.collection, self.qrels, self.seed)
            self._opened = True

    def __getitem__(
        self, item: tuple[int, np.ndarray]
    ) -> Unpacked[TrainBatch] | Unpacked[RerankBatch]:
        epoch, positions = item
        query_rows = self.permutation(epoch)[positions]
        places = zip(query_rows.tolist(), positions.tolist(), strict=True)
        groups = np.stack([self.negatives.group(row, epoch, position) for row, position in places])
        queries = self.collection.queries.get(query_rows)
        passages = self.collection.corpus.get(groups.reshape(-1))
        shared = {"passage_rows": groups, "teacher": self._teacher(query_rows, groups)}
        packing = self.token_budget, self.templates.pad_id, self.pads
        if isinstance(self.templates, PairTemplates):
            repeated = [query for query in queries for _ in range(groups.shape[1])]
            pairs = pair_ids(self.templates, repeated, passages)
            return Unpacked(RerankBatch, {"texts": pairs, **shared}, *packing)
        read = self.templates.queries(queries), self.templates.passages(passages)
        embeddings = self.teacher_embeddings
        excluded = [self.negatives.excluded_keys(row) for row in query_rows.tolist()]
        fields: Fields = {
            "texts": tuple(map(TokenIds.of, read)),
            "passage_keys": text_keys(passages).reshape(groups.shape),
            "excluded_keys": same_length(excluded),
            **shared,
            **({} if embeddings is None else embeddings(query_rows, groups)),
        }
        return Unpacked(TrainBatch, fields, *packing)

    def _teacher(self, query_rows: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
        rows = zip(query_rows.tolist(), groups, strict=True)
        scores = [self.negatives.teacher_scores(row, group) for row, group in rows]
        known = [row for row in scores if row is not None]
        if known and len(known) < len(scores):
            raise InputError(
                "teacher-missing",
                f"sampler {type(self.negatives).__name__} gives teacher_scores for some queries"
                " only; give NaN for the others",
            )
        return np.stack(known) if known else None


def pair_ids(
    templates: PairTemplates,
    queries: Sequence[tuple[str, str]],
    passages: Sequence[tuple[str, str]],
) -> TokenIds:
    """Token ids of pairs of (instruction, text) queries and (title, text) passages."""
    pairs = templates.pairs(queries, passages)
    seconds = [pair.second for pair in pairs] if templates.typed else None
    return TokenIds.of([pair.ids for pair in pairs], seconds)


def same_length(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows [n] of different n, each filled up by repeating its first value."""
    longest = max(map(len, rows))
    return np.stack([np.append(row, np.full(longest - len(row), row[0])) for row in rows])


@dataclass(eq=False)
class TextBatches(Dataset[Unpacked[EncodeBatch]]):
    """Texts to embed, `batch_size` rows per item; `side` is "query" or "passage"."""

    texts: Texts
    rows: np.ndarray
    templates: Templates
    side: str
    batch_size: int
    token_budget: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> Unpacked[EncodeBatch]:
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        encode = self.templates.queries if self.side == "query" else self.templates.passages
        fields: Fields = {"rows": rows, "texts": TokenIds.of(encode(self.texts.get(rows)))}
        return Unpacked(EncodeBatch, fields, self.token_budget, self.templates.pad_id)


@dataclass(eq=False)
class PairBatches(Dataset[Unpacked[PairBatch]]):
    """Pairs to score, `batch_size` pairs per item, of query rows [N] and passage rows [N]."""

    queries: Texts
    corpus: Texts
    query_rows: np.ndarray
    passage_rows: np.ndarray
    templates: PairTemplates
    batch_size: int
    token_budget: int

    def __len__(self) -> int:
        return -(-len(self.query_rows) // self.batch_size)

    def __getitem__(self, index: int) -> Unpacked[PairBatch]:
        span = slice(index * self.batch_size, (index + 1) * self.batch_size)
        rows = {"query_rows": self.query_rows[span], "passage_rows": self.passage_rows[span]}
        queries = self.queries.get(rows["query_rows"])
        passages = self.corpus.get(rows["passage_rows"])
        fields: Fields = {**rows, "texts": pair_ids(self.templates, queries, passages)}
        return Unpacked(PairBatch, fields, self.token_budget, self.templates.pad_id)
