"""What validation asks and searches, and what cannot be validated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import train
from tests.refusals import refused

from caravan.data.collection import Collection, Qrels
from caravan.data.tokenization import Templates
from caravan.data.validation import Validation
from caravan.encoding import Encoding


@pytest.fixture
def validation(
    collection: Collection, tokenizer: Any, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Validation]:
    """The validation of the tiny collection, with grades of the first queries if given."""

    def of(grades: list[int] | None = None, **settings: Any) -> Validation:
        if grades is not None:
            rows = np.arange(len(grades))
            dev = Qrels(rows, rows, np.array(grades))
            monkeypatch.setattr(Collection, "qrels", lambda *_: dev)
        return Validation(collection, Templates(tokenizer, encoding), "dev", **settings)

    return of


def test_a_split_without_relevant_passages_cannot_be_validated(
    validation: Callable[..., Validation],
) -> None:
    with refused("empty-split", "data.dev_split"):
        validation([0, 0, 0])


def test_validation_asks_only_queries_that_can_be_scored(
    validation: Callable[..., Validation],
) -> None:
    queries = validation([0, 1, 0, 2, 0, 0, 1, 0], queries=2).qrels.queries.tolist()
    assert len(queries) == 2
    assert set(queries) < {1, 3, 6}


def test_the_subset_that_is_searched_holds_all_judged_passages(
    validation: Callable[..., Validation],
) -> None:
    data = validation(passages=20)
    assert len(data.passages) == 20
    assert np.isin(data.qrels.passage_rows, data.passages).all()
    assert (np.diff(data.passages) > 0).all()


@pytest.mark.slow
def test_trainings_of_two_seeds_validate_the_same_queries_and_passages(
    beir: Path, tmp_path: Path
) -> None:
    subsets = ("validation.queries=2", "validation.passages=20", "validation.train_queries=5")
    validated = []
    for seed in (1, 2):
        run_dir = tmp_path / str(seed)
        train(beir, run_dir, f"seed={seed}", "trainer.max_steps=1", *subsets)
        for split in ("validation", "train_queries"):
            lines = (run_dir / "runs" / f"{split}.trec").read_text().splitlines()
            validated.append({(line.split()[0], line.split()[2]) for line in lines})
    assert validated[:2] == validated[2:]
    assert [len(pairs) for pairs in validated[:2]] == [2 * 20, 5 * 20]


def test_a_query_that_is_a_passage_does_not_find_itself_in_validation(
    counterarguments: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("trainer.max_steps=1", "data.train_split=test", "data.dev_split=test")
    index = ("index.k=7", "callbacks.evaluation.measures=[MRR@5]", "callbacks.best=null")
    found = []
    for given in ("false", "true"):
        caplog.clear()
        asked = (*settings, *index, f"ignore_identical_ids={given}")
        train(counterarguments, tmp_path / given, *asked)
        warned = "queries have the id of a passage" in caplog.text
        assert warned == (given == "false")
        lines = (tmp_path / given / "runs" / "validation.trec").read_text().splitlines()
        found.append([(line.split()[0], line.split()[2]) for line in lines])
    assert any(query == passage for query, passage in found[0])
    assert not any(query == passage for query, passage in found[1])
    assert len(found[0]) == len(found[1]) == 6 * 7  # as deep as ever
