"""The threshold against a loop over all thresholds, and what it adds to judgements."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.qrels import Qrels
from caravan.data.readers.labelled import judgements
from caravan.data.relabel import LEAST, choose_threshold, relabel, write_qrels
from caravan.data.runs import Run

QUERIES, PASSAGES = 12, 10


def _random(seed: int, digits: int) -> tuple[Run, Qrels]:
    """A run whose scores tie, and judgements of which some are not in the run."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(q, p) for q in range(QUERIES) for p in range(PASSAGES)])
    relevant = rng.random(len(pairs)) < 0.4
    scores = np.round(rng.normal(2.0 * relevant, 1.0), digits)
    ranked = rng.random(len(pairs)) < 0.9
    grades = np.where(relevant, rng.integers(1, 4, len(pairs)), rng.integers(-1, 1, len(pairs)))
    judged = relevant | (rng.random(len(pairs)) < 0.3)
    run = Run.from_flat(*pairs[ranked].T, scores[ranked])
    return run, Qrels(*pairs[judged].T, grades[judged])


@pytest.mark.parametrize("precision", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("relevant_from", [1, 2])
@pytest.mark.parametrize(("seed", "digits"), [(0, 1), (1, 6)])
def test_the_threshold_is_the_lowest_with_the_wanted_precision(
    precision: float, relevant_from: int, seed: int, digits: int
) -> None:
    run, qrels = _random(seed, digits)
    grades = dict(
        zip(zip(*(qrels.query_rows, qrels.passage_rows), strict=True), qrels.grades, strict=True)
    )
    lines = [
        (float(score), grades.get((q, p), 0) >= relevant_from)
        for q in range(QUERIES)
        for p, score in zip(*run.of(q), strict=True)
    ]
    relevant = sum(grade >= relevant_from for grade in grades.values())
    best = None
    for at in sorted({score for score, _ in lines}, reverse=True):
        above = [is_relevant for score, is_relevant in lines if score >= at]
        if len(above) >= LEAST and sum(above) / len(above) >= precision:
            best = (at, sum(above) / len(above), sum(above) / relevant, len(above))
    if best is None:
        with refused("no-threshold", "--precision"):
            choose_threshold(run, qrels, precision, relevant_from)
    else:
        assert choose_threshold(run, qrels, precision, relevant_from) == pytest.approx(best)


def test_only_unjudged_passages_of_judged_queries_are_added() -> None:
    run, qrels = _random(0, 6)
    qrels = qrels.only(np.arange(QUERIES - 1))  # the last query has no judgement
    own = np.where(np.arange(QUERIES - 1) % 2, -1, 3)
    new, against = relabel(run, qrels, own, 1.0)
    judged = {*zip(qrels.query_rows.tolist(), qrels.passage_rows.tolist(), strict=True)}
    above = {
        (q, int(p))
        for q in range(QUERIES - 1)
        for p, score in zip(*run.of(q), strict=True)
        if score >= 1.0 and p != own[q]
    }
    added = {*zip(new.query_rows.tolist(), new.passage_rows.tolist(), strict=True)}
    assert added == above - judged
    assert added
    assert new.grades.tolist() == [1] * len(new)
    refuted = [pair for pair in above & judged if qrels.grades[_at(qrels, pair)] < 1]
    assert against == len(refuted) > 0


def _at(qrels: Qrels, pair: tuple[int, int]) -> int:
    return int(np.flatnonzero((qrels.query_rows == pair[0]) & (qrels.passage_rows == pair[1]))[0])


def test_the_file_has_the_old_judgements_then_the_new_ones(
    collection: Collection, tmp_path: Path
) -> None:
    old = collection.qrels("train")
    new = Qrels(np.array([0, 2]), np.array([50, 51]), np.array([1, 1]))
    write_qrels(tmp_path / "train.tsv", [old, new], collection)
    read = [judgement for _, judgement in judgements(tmp_path / "train.tsv")]
    queries, passages = (
        collection.queries.ids(old.query_rows),
        collection.corpus.ids(old.passage_rows),
    )
    assert read[: len(old)] == [*zip(queries, passages, old.grades.tolist(), strict=True)]
    assert read[len(old) :] == [("q0", "p50", 1), ("q2", "p51", 1)]
