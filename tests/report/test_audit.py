"""The audit on planted false negatives and copies, against loops over what was planted."""

from __future__ import annotations

import numpy as np
import pytest
from tests.refusals import refused
from tests.tiny import WORDS

from caravan.data.collection import Collection, write_collection
from caravan.data.mining import Rules, mine
from caravan.data.qrels import Qrels
from caravan.data.runs import Run
from caravan.report.audit import ALL, RECALLS, Audit, audit, candidates, examples, page

QUERIES, EACH = 60, 10
"""Each query has ten different passages in the run: 0 and 1 are judged, 2 and 3 planted."""
MEASURED = {0.0: [1.0, 0.7], 1.5: [0.92, 0.94]}
"""Precision and recall by teacher_margin."""
COPY, NEAR, UNRANKED = 5, 6, 7
"""The places of a copy and a near-copy of passage 0, and of one that the teacher lacks."""


def _row(query: int, place: int) -> int:
    return query * EACH + place


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 14)) for _ in range(QUERIES * EACH)]
    for query in range(QUERIES):
        first = texts[_row(query, 0)]
        texts[_row(query, COPY)] = first.upper().replace(" ", ", ")
        texts[_row(query, NEAR)] = f"{first} end"
    corpus = [(f"p{row}", "", text) for row, text in enumerate(texts)]
    queries = [(f"q{query}", "", f"query {query}") for query in range(QUERIES)]
    qrels = {
        "train": [(f"q{q}", f"p{_row(q, place)}", 1) for q in range(QUERIES) for place in (0, 1)]
    }
    return write_collection(tmp_path_factory.mktemp("c") / "c", "planted", corpus, queries, qrels)


def _run(scores: dict[tuple[int, int], float]) -> Run:
    (query_rows, rows), values = zip(*scores, strict=True), list(scores.values())
    return Run.from_flat(np.array(query_rows), np.array(rows), np.array(values))


@pytest.fixture(scope="module")
def teacher() -> dict[tuple[int, int], float]:
    """Relevant passages, judged or planted, score about 3 more than the others."""
    rng = np.random.default_rng(1)
    relevant = (0, 1, 2, 3)
    return {
        (q, _row(q, place)): float(np.float32(rng.normal(4 if place in relevant else 0, 1)))
        for q in range(QUERIES)
        for place in range(EACH)
        if place != UNRANKED
    }


def _runs() -> dict[str, Run]:
    """One run ranks the relevant passages first, the other last."""
    pairs = [(q, _row(q, place)) for q in range(QUERIES) for place in range(EACH)]
    return {
        "first": _run({pair: EACH - pair[1] % EACH for pair in pairs}),
        "last": _run({pair: 1 + pair[1] % EACH for pair in pairs}),
    }


def _audit(
    planted: Collection,
    teacher: dict[tuple[int, int], float],
    margin: float = 0.0,
    rules: Rules | None = None,
    hide: bool = False,
) -> Audit:
    qrels = planted.qrels("train")
    places = np.array([_row(q, place) for q in range(QUERIES) for place in (2, 3)])
    hidden = Qrels(np.repeat(np.arange(QUERIES), 2), places, np.ones(len(places)))
    found = candidates(_runs(), qrels, np.full(QUERIES, -1), rules or Rules())
    return audit(found, planted, qrels, _run(teacher), margin, hidden if hide else None)


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_precision_and_recall_on_planted_false_negatives(
    margin: float, planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    row, *others = _audit(planted, teacher, margin, hide=True).planted().to_dict("records")
    suspects = {
        (q, place)
        for q in range(QUERIES)
        for place in set(range(2, EACH)) - {UNRANKED}
        if teacher[q, _row(q, place)] > min(teacher[q, _row(q, 0)], teacher[q, _row(q, 1)]) - margin
    }
    found = {(q, place) for q, place in suspects if place in (2, 3)}
    counts = {"hidden": 2 * QUERIES, "suspected": len(suspects), "found": len(found)}
    shares = {"precision": len(found) / len(suspects), "recall": len(found) / (2 * QUERIES)}
    assert row == pytest.approx({"margin": margin, **counts, **shares})
    for other, recall in zip(others, RECALLS, strict=True):
        assert recall <= other["recall"] <= recall + 0.05
        again = _audit(planted, teacher, other["margin"], hide=True).planted().iloc[0]
        assert again.to_dict() == pytest.approx(other)
    # As in docs/training.md.
    assert [round(share, 2) for share in shares.values()] == MEASURED[margin]


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_suspects_are_what_the_sampler_would_remove_by_its_teacher_margin(
    margin: float, planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    found = _audit(planted, teacher, margin)
    qrels = planted.qrels("train")
    rules, own = Rules(teacher_margin=margin), np.full(QUERIES, -1)
    for name, run in _runs().items():
        _, facts = mine(run, qrels, own, rules, name, _run(teacher))
        assert found.sources[name]["suspected"].sum() == facts["removed"]["teacher_margin"] > 0


def test_copies_and_near_copies_of_positives_are_counted_and_not_usable(
    planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    found = _audit(planted, teacher)
    for of in found.sources.values():
        places = of["passage"] % EACH
        assert of["copy"].tolist() == (places == COPY).tolist()
        assert of["near_copy"].tolist() == (places == NEAR).tolist()
    usable = found.usable().set_index("run")
    assert usable.loc[ALL, "without_usable"] == 0
    sure = {key: 9.0 if key[1] % EACH > 1 else score for key, score in teacher.items()}
    none = _audit(planted, sure, rules=Rules(range_max=1)).usable().set_index("run")
    assert none.loc["last", "without_usable"] == none.loc["last", "queries"] == QUERIES


def test_shares_are_by_source_rank_and_depth_of_scored_candidates(
    planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    found = _audit(planted, teacher)
    ranks = found.by_rank().set_index(["run", "ranks"])
    first = ranks.loc["first", "1-5"]
    assert ranks["candidates"].groupby("run").sum().tolist() == [8 * QUERIES] * 2
    assert ranks["scored"].groupby("run").sum().tolist() == [7 * QUERIES] * 2
    assert first["share"] == pytest.approx(first["suspected"] / first["scored"])
    for name, of in found.sources.items():
        last = ranks.loc[name, "6-10"]
        assert last["share_to_here"] == pytest.approx(of["suspected"].sum() / (7 * QUERIES))
    gaps = found.gaps().set_index(["run", "gap"])
    of = found.sources["first"]
    expected = np.quantile(of["gap"].dropna(), 0.25)
    assert gaps.loc[("first", "teacher"), "25%"] == pytest.approx(expected, rel=1e-5)


def test_the_page_names_suspects_with_texts_and_tests_the_runs(
    planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    found = _audit(planted, teacher, rules=Rules(range_max=4))
    shown = examples(found, planted, planted.qrels("train"))
    assert len(shown.queries) == 20
    for query in shown.queries:
        suspect, positive = query.passages
        assert (suspect.relevant, positive.relevant) == (False, True)
        assert "in first" in suspect.place or "in last" in suspect.place
        ((_, text),) = planted.corpus.get(planted.corpus.rows([suspect.id]))
        assert suspect.text == text
    made = page(found, planted, planted.qrels("train"), "t.trec", "command")
    assert "first exceeds last" in made.verdict  # the planted ones are at the top of one run
    assert made.verdict.startswith(f"The teacher suspects {found.pairs['suspected'].sum()} of ")
    assert found.as_json()["rules"]["first"]["removed"] == {"range_max": 4 * QUERIES}


def test_a_teacher_without_scores_of_positives_is_refused(
    planted: Collection, teacher: dict[tuple[int, int], float]
) -> None:
    others = {key: value for key, value in teacher.items() if key[1] % EACH > 1}
    with refused("no-teacher-scores", "rerank.judged=true"):
        _audit(planted, others)
    with refused("invalid-setting", "teacher_margin is nan"):
        _audit(planted, teacher, float("nan"))
