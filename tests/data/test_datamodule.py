"""What validation asks and searches, and what cannot be validated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from caravan.contract import Contract
from caravan.data.batching import Groups
from caravan.data.collection import Collection, Qrels
from caravan.data.datamodule import DataModule
from caravan.data.negatives import Negatives
from caravan.data.templates import Templates
from caravan.errors import InputError


class Judged:
    """The tiny collection with other judgements of its development queries."""

    def __init__(self, collection: Collection, dev: Qrels) -> None:
        self._collection, self._dev = collection, dev

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collection, name)

    def qrels(self, split: str) -> Qrels:
        return self._dev if split == "dev" else self._collection.qrels(split)


def _data(collection: Any, templates: Templates, seed: int = 0, **validation: Any) -> DataModule:
    qrels, sampler = collection.qrels("train"), Negatives(number=2)
    return DataModule(
        *(collection, templates),
        Groups(collection, qrels, sampler, templates, 128, seed),
        "dev",
        seed=seed,
        queries_per_batch=6,
        token_budget=128,
        num_workers=0,
        **validation,
    )


@pytest.fixture
def templates(tokenizer: Any, contract: Contract) -> Templates:
    return Templates(tokenizer, contract)


def _dev(grades: list[int]) -> Qrels:
    rows = np.arange(len(grades), dtype=np.int64)
    return Qrels(rows, rows, np.array(grades, dtype=np.int32))


def test_a_split_without_relevant_passages_cannot_be_validated(
    collection: Collection, templates: Templates
) -> None:
    with pytest.raises(InputError, match=r"'dev' has no query with a relevant .*data\.dev_split"):
        _data(Judged(collection, _dev([0, 0, 0])), templates)


def test_validation_asks_only_queries_that_can_be_scored(
    collection: Collection, templates: Templates
) -> None:
    judged = Judged(collection, _dev([0, 1, 0, 2, 0, 0, 1, 0]))
    assert _data(judged, templates).dev_qrels.queries.tolist() == [1, 3, 6]
    drawn = set()
    for seed in range(8):
        queries = _data(judged, templates, seed, queries=2).dev_qrels.queries.tolist()
        assert len(queries) == 2
        drawn.update(queries)
    assert drawn == {1, 3, 6}


def test_the_subset_that_is_searched_holds_all_judged_passages(
    collection: Collection, templates: Templates
) -> None:
    data = _data(collection, templates, passages=20)
    assert len(data.dev_passages) == 20
    assert np.isin(data.dev_qrels.passage_rows, data.dev_passages).all()
    assert (np.diff(data.dev_passages) > 0).all()
