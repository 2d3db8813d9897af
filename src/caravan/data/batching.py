"""Order and batches: which queries make a batch, and texts as batches of token ids.

The order of an epoch is a permutation drawn from (seed, epoch) alone, and a batch is the same set
of queries on one process or on many, each rank taking its consecutive share. What was consumed is
two integers, so a checkpoint in mid-epoch continues with the very next batch.
Items are numpy arrays (`caravan.data.batch.Unpacked`), made tensors in `caravan.data.loaders`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from caravan.data.batch import (
    EncodeBatch,
    Fields,
    PairBatch,
    RerankBatch,
    TokenIds,
    TrainBatch,
    Unpacked,
)
from caravan.data.collection import Collection, Qrels, Texts
from caravan.data.negatives import Negatives
from caravan.data.pairs import PairTemplates
from caravan.data.texts import text_keys
from caravan.data.tokenization import Templates


class Permutation:
    """Rows in the order of an epoch: a function of (seed, epoch)."""

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._latest: tuple[int, np.ndarray] | None = None

    def __call__(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self._latest = epoch, self.rows[order]
        return self._latest[1]


class QueryOrder(Sampler[tuple[int, np.ndarray]]):
    """The batches of an epoch for one rank: (epoch, positions [n] in the epoch's permutation).

    The last batch of an epoch may be short. It is shared out as evenly as the others; with fewer
    queries than ranks it is left out, since no rank can go without a query.
    """

    def __init__(self, queries: int, batch: int, rank: int = 0, world: int = 1) -> None:
        bounds = [(start, min(start + batch, queries)) for start in range(0, queries, batch)]
        self.bounds = [(start, end) for start, end in bounds if end - start >= world]
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        begin, self.start = self.start, 0
        for start, end in self.bounds[begin:]:
            yield self.epoch, np.array_split(np.arange(start, end), self.world)[self.rank]


def limited(batches: int, limit: int | float) -> int:
    """The batches of an epoch that Lightning's `limit_train_batches` leaves, a number or a share.

    >>> limited(10, 4), limited(10, 0.5), limited(10, 1.0)
    (4, 5, 10)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class Groups(Dataset[Any]):
    """Training batches: item (epoch, positions) is the batch of these queries' groups.

    Args:
        templates: a retriever's, whose batches are queries and passages, or a reranker's, whose
            batches are pairs.
    """

    def __init__(
        self,
        collection: Collection,
        qrels: Qrels,
        negatives: Negatives,
        templates: Templates | PairTemplates,
        token_budget: int,
        seed: int,
    ) -> None:
        self.collection = collection
        self.qrels = qrels
        self.query_rows = np.array([q for q in qrels.queries if len(qrels.positives(int(q)))])
        self.negatives = negatives
        self.templates = templates
        self.token_budget = token_budget
        self.seed = seed
        self.permutation = Permutation(self.query_rows, seed)
        self._opened = False

    def __len__(self) -> int:
        return len(self.query_rows)

    def told(self, name: str, batch: int, accumulated: int) -> str:
        """What is trained on, in one line: how many queries, and how many passages for each."""
        number = self.negatives.number
        in_batch = ""
        if isinstance(self.templates, Templates):
            in_batch = f", {batch * (1 + number) - 1} with those in the batch"
        return (
            f"{len(self):,} training queries of {name}; {batch * accumulated} queries an update,"
            f" {number} hard negatives a query{in_batch}"
        )

    def open(self) -> None:
        """Read the sampler's runs, once, before workers are forked."""
        if not self._opened:
            self.negatives.open(self.collection, self.qrels, self.seed)
            self._opened = True

    def __getitem__(
        self, item: tuple[int, np.ndarray]
    ) -> Unpacked[TrainBatch] | Unpacked[RerankBatch]:
        epoch, positions = item
        query_rows = self.permutation(epoch)[positions]
        groups = np.stack(
            [
                self.negatives.group(int(row), epoch, int(position))
                for row, position in zip(query_rows, positions, strict=True)
            ]
        )
        queries = self.collection.queries.get(query_rows)
        passages = self.collection.corpus.get(groups.reshape(-1))
        shared = {"passage_rows": groups, "teacher": self._teacher(query_rows, groups)}
        how = self.token_budget, self.templates.pad_id
        if isinstance(self.templates, PairTemplates):
            repeated = [query for query in queries for _ in range(groups.shape[1])]
            pairs = pair_ids(self.templates, repeated, passages)
            return Unpacked(RerankBatch, {"pairs": pairs, **shared}, *how)
        fields: Fields = {
            "queries": TokenIds.of(self.templates.queries(queries)),
            "passages": TokenIds.of(self.templates.passages(passages)),
            "passage_keys": text_keys(passages).reshape(groups.shape),
            "excluded_keys": self._excluded(query_rows),
            **shared,
        }
        return Unpacked(TrainBatch, fields, *how)

    def _excluded(self, query_rows: np.ndarray) -> np.ndarray:
        """Digests of passages that are never negatives of each query, [Q, M] int64."""
        each = [self.negatives.excluded_keys(int(row)) for row in query_rows]
        most = max(map(len, each))
        filled = [np.append(of, np.full(most - len(of), of[0])) for of in each]
        return np.stack(filled)

    def _teacher(self, query_rows: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
        scores = [
            self.negatives.teacher_scores(int(row), group)
            for row, group in zip(query_rows, groups, strict=True)
        ]
        known = [row for row in scores if row is not None]
        return np.stack(known) if known else None


def pair_ids(
    templates: PairTemplates,
    queries: Sequence[tuple[str, str]],
    passages: Sequence[tuple[str, str]],
) -> TokenIds:
    """Token ids of pairs of texts, (title, text) each."""
    pairs = templates.pairs(queries, passages)
    seconds = [pair.second for pair in pairs] if templates.typed else None
    return TokenIds.of([pair.ids for pair in pairs], seconds)


class TextBlocks(Dataset[Unpacked[EncodeBatch]]):
    """Queries or passages to embed, `block` rows an item."""

    def __init__(
        self,
        texts: Texts,
        rows: np.ndarray,
        templates: Templates,
        side: str,
        block: int,
        token_budget: int,
    ) -> None:
        self.texts = texts
        self.rows = rows
        self.encode = templates.queries if side == "query" else templates.passages
        self.pad_id = templates.pad_id
        self.block = block
        self.token_budget = token_budget

    def __len__(self) -> int:
        return -(-len(self.rows) // self.block)

    def __getitem__(self, index: int) -> Unpacked[EncodeBatch]:
        rows = self.rows[index * self.block : (index + 1) * self.block]
        texts = TokenIds.of(self.encode(self.texts.get(rows)))
        fields: Fields = {"rows": rows, "texts": texts}
        return Unpacked(EncodeBatch, fields, self.token_budget, self.pad_id)


def rank_share(items: int, rank: int, world: int) -> list[int]:
    """The items of one rank, the same number on each; the first ones are repeated to even it out.

    >>> [rank_share(5, rank, 2) for rank in range(2)]
    [[0, 2, 4], [1, 3, 0]]
    """
    each = -(-items // world)
    return [(rank + i * world) % items for i in range(each)]


class PairBlocks(Dataset[Unpacked[PairBatch]]):
    """Queries with passages to score, `block` pairs an item.

    Args:
        query_rows, passage_rows: [N], a pair each.
    """

    def __init__(
        self,
        queries: Texts,
        corpus: Texts,
        query_rows: np.ndarray,
        passage_rows: np.ndarray,
        templates: PairTemplates,
        block: int,
        token_budget: int,
    ) -> None:
        self.queries, self.corpus = queries, corpus
        self.query_rows, self.passage_rows = query_rows, passage_rows
        self.templates = templates
        self.block = block
        self.token_budget = token_budget

    def __len__(self) -> int:
        return -(-len(self.query_rows) // self.block)

    def __getitem__(self, index: int) -> Unpacked[PairBatch]:
        span = slice(index * self.block, (index + 1) * self.block)
        query_rows, passage_rows = self.query_rows[span], self.passage_rows[span]
        distinct, inverse = np.unique(query_rows, return_inverse=True)
        asked = self.queries.get(distinct)
        passages = self.corpus.get(passage_rows)
        pairs = pair_ids(self.templates, [asked[i] for i in inverse], passages)
        fields: Fields = {"query_rows": query_rows, "passage_rows": passage_rows, "pairs": pairs}
        return Unpacked(PairBatch, fields, self.token_budget, self.templates.pad_id)
