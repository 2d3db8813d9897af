"""Each rule against a loop over planted scores, and all against sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data import mining
from caravan.data.mining import Rules, mine
from caravan.data.qrels import Qrels
from caravan.data.runs import Run

PASSAGES = 20
JUDGED = {1: [3], 2: [0, 7], 4: [5], 6: [9], 8: [2]}
"""The positives of each training query."""
SCORES: dict[int, dict[int, float]] = {
    1: {4: 1.2, 3: 1.0, 5: 0.96, 6: 0.94, 1: 0.5, 8: 0.1},  # 1 is its own passage
    2: {7: -1.0, 3: -1.02, 4: -1.5, 0: -2.0, 5: -2.05, 6: -2.2},
    3: {1: 5.0, 2: 4.0},  # not a training query
    4: {6: 0.8, 7: 0.7},  # the positive is not in the run
    6: {9: 0.0, 1: -0.1, 2: -0.2, 3: -0.3, 4: -0.4},
    8: {},
}
TEACHER: dict[int, dict[int, float]] = {
    1: {3: 5.0, 4: 6.0, 5: 4.4, 6: 4.6},
    2: {0: 3.0, 7: 9.0, 4: 2.6},  # 7 scores higher than 0
    4: {6: 9.0, 7: 9.0},  # no score for the positive
    5: {6: 9.0},
    6: {9: 1.0, 2: 1.0},
}
LINES = [*((query, row, 1) for query in JUDGED for row in JUDGED[query]), (3, 1, 0)]
QRELS = Qrels(*(np.array(column) for column in zip(*LINES, strict=True)))
OWN = np.array([1, -1, 3, -1, -1, -1])
"""The passage with the id of each judged query."""


def _run(scores: dict[int, dict[int, float]]) -> Run:
    lines = [(query, row, score) for query, of in scores.items() for row, score in of.items()]
    columns = [np.array(column) for column in zip(*lines, strict=True)]
    return Run.from_flat(*columns, all_queries=np.array(list(scores)))


def _by_loop(**rules: Any) -> tuple[dict[int, list[int]], dict[str, int]]:
    """The candidates of each query and how many each rule removed, one passage at a time."""
    kept: dict[int, list[int]] = {}
    removed = dict.fromkeys(Rules(**rules).names, 0)
    for query, scored in SCORES.items():
        of = JUDGED.get(query, [])
        rows: list[int] = []
        taught = [TEACHER[query][p] for p in of if p in TEACHER.get(query, {})]
        for row, score in scored.items() if of else ():
            lowest = min(scored.get(p, -np.inf) for p in of)
            relative = lowest - abs(lowest) * rules.get("relative_margin", 0)
            teacher = TEACHER.get(query, {}).get(row, -np.inf)
            if row in of or (query, row) == (1, 1):
                continue
            if lowest == -np.inf and mining.NO_SCORE in removed:
                rule = mining.NO_SCORE
            elif "absolute_margin" in rules and score > lowest - rules["absolute_margin"]:
                rule = "absolute_margin"
            elif "relative_margin" in rules and score > relative:
                rule = "relative_margin"
            elif score > rules.get("max_score", np.inf):
                rule = "max_score"
            elif score < rules.get("min_score", -np.inf):
                rule = "min_score"
            elif taught and teacher > min(taught) - rules.get("teacher_margin", -np.inf):
                rule = "teacher_margin"
            else:
                rows.append(row)
                continue
            removed[rule] += 1
        first, end = rules.get("range_min", 0), rules.get("range_max", PASSAGES)
        kept[query] = rows[first:end]
        if "range_max" in removed:
            removed["range_max"] += len(rows[end:])
        if "range_min" in removed:
            removed["range_min"] += len(rows[:first])
    return kept, removed


@pytest.mark.parametrize("lines", [1, 8, 1 << 20])  # of a chunk
@pytest.mark.parametrize(
    "rules",
    [
        {"absolute_margin": 0.045},
        {"relative_margin": 0.05},
        {"relative_margin": 0.03},
        {"max_score": 0.7},
        {"min_score": -0.2},
        {"teacher_margin": 0.5},
        {"range_min": 1},
        {"range_max": 2},
        {"absolute_margin": 0.0, "range_min": 1, "range_max": 2},
        {"relative_margin": 0.01, "max_score": 0.95, "min_score": -0.3, "range_max": 3}
        | {"teacher_margin": 0.0},
    ],
    ids=str,
)
def test_a_rule_removes_what_it_should_and_nothing_else(
    rules: dict[str, Any], lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "LINES_AT_ONCE", lines)
    kept, facts = mine(_run(SCORES), QRELS, OWN, Rules(**rules), "a.trec", _run(TEACHER))
    expected, removed = _by_loop(**rules)
    assert {query: kept.of(query)[0].tolist() for query in SCORES} == expected
    assert facts["removed"] == removed
    assert sum(removed.values()) > 0
    assert facts["candidates"] == facts["kept"] + sum(removed.values()) == 14
    assert facts["queries"] == 5
    assert facts["queries_without_candidates"] == sum(not expected[query] for query in JUDGED)


def test_the_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "caravan"):
        _, facts = mine(_run(SCORES), QRELS, OWN, Rules(absolute_margin=0.045), "a.trec")
    assert facts["queries_without_positive_score"] == 2  # 4 and 8
    assert caplog.records[0].levelname == "WARNING"  # most queries have no candidate
    (line,) = caplog.messages
    for part in ("a.trec: candidates 14", "kept 8", "'absolute_margin': 4"):
        assert part in line


def test_a_margin_for_a_run_without_any_positive_is_refused() -> None:
    negatives_only = _run({1: {4: 1.0, 5: 0.5}, 4: {6: 1.0}})
    with refused("no-positive-scores", "a.trec"):
        mine(negatives_only, QRELS, OWN, Rules(relative_margin=0.05), "a.trec")
    kept, _ = mine(negatives_only, QRELS, OWN, Rules(max_score=0.6), "a.trec")
    assert kept.of(1)[0].tolist() == [5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        {"absolute_margin": 0.1},
        {"relative_margin": 0.05, "range_min": 2},
        {"max_score": 0.6, "min_score": 0.0},
        {"absolute_margin": 0.02, "relative_margin": 0.1, "max_score": 0.5, "range_min": 1},
    ],
    ids=str,
)
def test_candidates_equal_those_of_sentence_transformers(rules: dict[str, Any]) -> None:
    from datasets import Dataset
    from sentence_transformers import util

    rng = np.random.default_rng(0)
    queries, passages, depth = 12, 40, 20
    similarities = rng.uniform(-0.4, 1, (queries, passages)).astype(np.float32)
    positives = np.array([(q, p) for q in range(queries) for p in ([q] if q % 3 else [q, q + 12])])
    similarities[positives[:6, 0], positives[:6, 1]] += 0.5

    def rows(texts: Sequence[str]) -> list[int]:
        return [int(text[1:]) for text in texts]

    model: Any = SimpleNamespace(
        device="cpu",
        encode_query=lambda texts, **_: similarities[rows(texts)],
        encode_document=lambda texts, **_: np.eye(passages, dtype=np.float32)[rows(texts)],
        similarity=util.dot_score,
        similarity_pairwise=util.pairwise_dot_score,
    )
    mined = util.mine_hard_negatives(
        Dataset.from_dict(
            {"query": [f"q{q}" for q, _ in positives], "passage": [f"p{p}" for _, p in positives]}
        ),
        model,
        corpus=[f"p{p}" for p in range(passages)],
        range_max=depth - 2,  # it ranks the most positives of a query in addition
        num_negatives=depth - 2 - rules.get("range_min", 0),
        output_format="triplet",
        verbose=False,
        **rules,
    )
    expected: dict[int, set[int]] = {query: set() for query in range(queries)}
    for row in mined:
        expected[int(row["query"][1:])].add(int(row["negative"][1:]))
    order = np.argsort(-similarities, axis=1)[:, :depth]
    scores = np.take_along_axis(similarities, order, axis=1)
    judged = Qrels(positives[:, 0], positives[:, 1], np.ones(len(positives), dtype=np.int32))
    run = Run.from_topk(np.arange(queries), scores, order)
    chosen = Rules(**rules, range_max=depth - 2)
    kept, _ = mine(run, judged, np.full(queries, -1), chosen, "run")
    assert {query: set(kept.of(query)[0].tolist()) for query in expected} == expected
    assert sum(map(len, expected.values())) > 20
