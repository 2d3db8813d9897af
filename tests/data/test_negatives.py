from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data.collection import Collection, Qrels, write_collection
from caravan.data.negatives import Negatives
from caravan.data.runs import Run, write_run


@pytest.fixture(scope="module")
def qrels(collection: Collection) -> Qrels:
    return collection.qrels("train")


def _run(path: Path, collection: Collection, qrels: Qrels, seed: int, depth: int = 20) -> str:
    """A run that ranks every positive first, then random passages."""
    rng = np.random.default_rng(seed)
    rows, scores = [], np.linspace(10, 1, depth)
    for query in qrels.queries:
        positives = qrels.positives(int(query))
        others = np.setdiff1d(np.arange(len(collection.corpus)), positives)
        rows.append(np.concatenate((positives, rng.permutation(others)))[:depth])
    run = Run.from_topk(qrels.queries, np.tile(scores, (len(rows), 1)), np.stack(rows))
    write_run(path, run, collection.queries, collection.corpus)
    return str(path)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, collection: Collection, qrels: Qrels
) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [_run(folder / f"{seed}.trec", collection, qrels, seed) for seed in range(2)]


def _opened(collection: Collection, seed: int = 0, **settings: Any) -> Negatives:
    negatives = Negatives(**settings)
    negatives.open(collection, collection.qrels("train"), seed)
    return negatives


@pytest.mark.parametrize("choose", ["random", "top"])
def test_no_positive_is_ever_a_negative(
    collection: Collection, qrels: Qrels, runs: list[str], choose: str
) -> None:
    negatives = _opened(collection, runs=runs, number=7, choose=choose)
    assert len(qrels.queries)
    for epoch in range(5):
        for position, query in enumerate(qrels.queries.tolist()):
            group = negatives.group(query, epoch, position)
            positives = qrels.positives(query)
            assert group[0] in positives
            assert not np.isin(group[1:], positives).any()
            assert len(set(group[1:].tolist())) == 7


def test_a_group_is_a_function_of_seed_epoch_and_position(
    collection: Collection, qrels: Qrels, runs: list[str]
) -> None:
    query = int(qrels.queries[0])
    first, again = (_opened(collection, runs=runs, number=5) for _ in range(2))
    again.group(int(qrels.queries[1]), 3, 9)  # what was asked before plays no part
    assert first.group(query, 1, 2).tolist() == again.group(query, 1, 2).tolist()
    other = _opened(collection, seed=1, runs=runs, number=5)
    assert first.group(query, 1, 2).tolist() != first.group(query, 2, 2).tolist()
    assert first.group(query, 1, 2).tolist() != other.group(query, 1, 2).tolist()


def test_top_takes_the_best_ranks_of_all_runs_in_turn(
    collection: Collection, qrels: Qrels, runs: list[str]
) -> None:
    query = int(qrels.queries[1])  # one positive, at rank 0 of both runs
    negatives = _opened(collection, runs=runs, number=4, choose="top")
    first, second = (collection.read_run(path).of(query)[0] for path in runs)
    blend = [row for pair in zip(first[1:], second[1:], strict=True) for row in pair]
    assert negatives.group(query, 0, 0)[1:].tolist() == list(dict.fromkeys(blend))[:4]


def test_depth_and_range_bound_the_candidates(
    collection: Collection, qrels: Qrels, runs: list[str]
) -> None:
    query = int(qrels.queries[1])
    positives = qrels.positives(query)
    whole = _opened(collection, runs=runs[:1], number=2, depth=6)
    ranked = whole.candidates(query, positives).tolist()
    assert len(ranked) == 5  # without the positive
    negatives = _opened(collection, runs=runs[:1], number=2, depth=6, range_min=2)
    assert negatives.candidates(query, positives).tolist() == ranked[2:]


def test_too_few_candidates_are_filled_up_from_the_corpus(
    collection: Collection, qrels: Qrels, runs: list[str]
) -> None:
    query = next(q for q in qrels.queries.tolist() if len(qrels.positives(q)) == 2)
    for some in (runs[:1], []):
        for number in (30, 58):  # all that the corpus has
            group = _opened(collection, runs=some, number=number).group(query, 0, 0)
            assert len(set(group.tolist())) == 1 + number
            assert not np.isin(group[1:], qrels.positives(query)).any()
        with refused("corpus-too-small", "sampler.number"):
            _opened(collection, runs=some, number=59)


def test_a_run_over_other_queries_is_refused(collection: Collection, tmp_path: Path) -> None:
    path = _run(tmp_path / "dev.trec", collection, collection.qrels("dev"), 0)
    with refused("other-queries", "dev.trec"):
        _opened(collection, runs=[path])


@pytest.mark.parametrize("choose", ["random", "top", None])
def test_neither_the_querys_own_passage_nor_copies_of_the_positive_are_negatives(
    tmp_path: Path, choose: str | None
) -> None:
    """`own` has the query's id, `twin` the text of `own`, and `asked` that of the query."""
    texts = {"right": "salt road", "copy": "salt road", "own": "gold!", "twin": "gold!"}
    texts |= {"asked": "gold?", "copy2": " salt  road\u00a0"}
    texts |= {f"p{i}": f"sand {i}" for i in range(6)}
    corpus = [(name, "", text) for name, text in texts.items()]
    judged = {"train": [("own", "right", 1)]}
    small = write_collection(tmp_path / "small", "small", corpus, [("own", "", "gold?")], judged)
    run = Run.from_topk(np.array([0]), np.arange(10, 0, -1)[None], np.arange(10)[None])
    write_run(tmp_path / "run.trec", run, small.queries, small.corpus)
    settings = {"runs": [str(tmp_path / "run.trec")], "choose": choose} if choose else {}
    for number in (1, 3, 6):  # 6: more than the run's four, and all that there are
        opened, again = (_opened(small, number=number, **settings) for _ in range(2))
        for epoch in range(20):
            group = opened.group(0, epoch, 0)
            negatives = small.corpus.ids(group[1:])
            assert all(name.startswith("p") for name in negatives)
            assert len(set(negatives)) == number
            assert again.group(0, epoch, 0).tolist() == group.tolist()
    with refused("corpus-too-small", "sampler.number"):
        _opened(small, number=7, **settings).group(0, 0, 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"number": -1},
        {"depth": 5, "range_min": 5},
        {"range_min": -1},
        {"range_min": 4, "range_max": 4},
        {"min_score": 0.5, "max_score": 0.4},
        {"absolute_margin": float("nan")},
        {"relative_margin": float("inf")},
        {"teacher": "a.trec", "teacher_margin": float("nan")},
    ],
)
def test_numbers_that_leave_nothing_to_draw_are_refused(settings: dict[str, Any]) -> None:
    with refused("invalid-setting"):
        Negatives(**settings)
