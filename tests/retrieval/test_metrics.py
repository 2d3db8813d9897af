"""Metrics against pytrec_eval, on random runs with every awkward case."""

from typing import Any

import numpy as np
import pytest
import pytrec_eval
from tests.refusals import refused

from caravan.data.collection import Collection, Qrels, write_collection
from caravan.data.qrels import RowLookup, Unknown
from caravan.data.runs import Run, canonical
from caravan.retrieval.metrics import (
    mean_over_collections,
    parse_measure,
    per_query,
    score_run,
)

QUERIES, PASSAGES = 25, 120
MEASURES = {
    "MRR@10": "recip_rank",  # of a run cut to ten
    "nDCG@10": "ndcg_cut_10",
    "nDCG@5": "ndcg_cut_5",
    "R@100": "recall_100",
    "R@20": "recall_20",
    "MAP@50": "map_cut_50",
    "P@10": "P_10",
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Ids whose order as strings is neither that of the rows nor that of numbers."""
    order = np.random.default_rng(3).permutation(PASSAGES)
    return write_collection(
        tmp_path_factory.mktemp("names") / "names",
        "names",
        [(f"p{i}" if i % 3 else f"é{i}", "", "text") for i in order],
        [(f"q{i}", "", "text") for i in range(QUERIES)],
        {},
    )


def random_case(seed: int) -> tuple[Run, Qrels]:
    """Ties, grades from -1 to 3, queries without judgements, relevant passages or results."""
    rng = np.random.default_rng(seed)
    rows, passages, scores, q, p, g = [], [], [], [], [], []
    for query in range(QUERIES):
        if rng.random() < 0.85:  # the others are missing from the run
            n = int(rng.choice([1, 3, 15, PASSAGES]))  # often fewer than k
            rows += [query] * n
            passages += rng.permutation(PASSAGES)[:n].tolist()
            # few distinct values: most scores tie, across any cutoff
            scores += rng.choice([0.0, -0.5, 0.1, 1 / 3, 2.5, 1e-8], n).tolist()
        if rng.random() < 0.85:  # the others are not judged
            n = int(rng.integers(1, 40))
            q += [query] * n
            p += rng.permutation(PASSAGES)[:n].tolist()
            kind = rng.random()
            low, high = (-1, 4) if kind < 0.6 else (-1, 1) if kind < 0.8 else (1, 2)
            g += rng.integers(low, high, n).tolist()
    run = Run.from_flat(np.array(rows), np.array(passages), np.array(scores))
    return run, Qrels(np.array(q), np.array(p), np.array(g))


def as_dicts(run: Run, qrels: Qrels, names: Collection) -> tuple[dict, dict]:
    def by_id(of: Any, rows: np.ndarray) -> dict:
        ids = zip(names.queries.ids(rows), map(of, rows.tolist()), strict=True)
        return {
            query: dict(zip(names.corpus.ids(found), values.tolist(), strict=True))
            for query, (found, values) in ids
        }

    return by_id(run.of, run.query_rows), by_id(qrels.of, qrels.queries)


@pytest.mark.parametrize("seed", range(8))
def test_metrics_equal_pytrec_eval_with_ties_and_ids_that_the_collection_lacks(
    seed: int, names: Collection
) -> None:
    run, qrels = random_case(seed)
    ranked, judged = as_dicts(run, qrels, names)
    rng = np.random.default_rng(seed)
    for query in [*judged, "only unknown passages", *names.queries.ids(range(QUERIES))[::7]]:
        for i in range(rng.integers(0, 5)):
            judged.setdefault(query, {})[f"gone {i}"] = int(rng.integers(-1, 4))
    judged["gone"] = {"p1": 2, "gone 1": 1}
    lines = [(q, p, grade) for q, of in judged.items() for p, grade in of.items()]
    lookup = RowLookup(names.corpus, names.queries, lambda part, n: part, "count")
    ours = lookup.qrels("qrels/test", [*lines, *lines[::3]])  # some of them twice
    scored = score_run(run, ours, names.queries, names.corpus, list(MEASURES))
    # trec_eval itself breaks the ties here: it gets the scores as they are
    others = {"ndcg_cut.5,10", "recall.20,100", "map_cut.50", "P.10"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, others).evaluate(ranked)
    of_ten = as_dicts(canonical(run, names.corpus).top(10), qrels, names)[0]
    first = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(of_ten)
    assert scored["queries"] == len(judged) >= 5
    for measure, key in MEASURES.items():
        source = first if measure == "MRR@10" else theirs
        expected = {name: source.get(name, {}).get(key, 0.0) for name in judged}
        assert scored["per_query"][measure] == pytest.approx(expected, abs=1e-6)
        mean = np.mean(list(expected.values()))
        assert scored["overall"][measure] == pytest.approx(mean, abs=1e-6)


def test_what_counts_zero_is_reported(names: Collection) -> None:
    run = Run.from_flat(np.array([0, 1, 4]), np.array([5, 5, 5]), np.ones(3))
    # 0 is found and has a relevant passage that the corpus lacks, 1 has no relevant passage, 2 is
    # missing from the run, 4 is not judged, and "gone" has no text
    unknown = Unknown(np.array([0, 1]), np.array([1, 0]), ("gone",))
    qrels = Qrels(np.array([0, 1, 2]), np.array([5, 5, 5]), np.array([1, 0, 2]), unknown)
    result = score_run(run, qrels, names.queries, names.corpus, ["R@10"])
    assert result["overall"] == {"R@10": 0.125}
    assert score_run(run, qrels, names.queries, names.corpus, [])["overall"] == {}
    assert result["per_query"] == {"R@10": {"q0": 0.5, "q1": 0.0, "q2": 0.0, "gone": 0.0}}
    assert {name: count for name, count in result.items() if isinstance(count, int)} == {
        "queries": 4,
        "without_relevant": 1,
        "missing": 2,
        "unknown_passages": 2,
        "unknown_queries": 1,
        "unjudged": 1,
    }


def test_qrels_without_any_relevant_passage_are_refused(names: Collection) -> None:
    run = Run.from_flat(np.array([0]), np.array([5]), np.ones(1))
    qrels = Qrels(np.array([0]), np.array([5]), np.array([0]))
    with refused("no-relevant-passage"):
        score_run(run, qrels, names.queries, names.corpus, ["R@10"])
    assert per_query(run, qrels, ["R@10"])["R@10"].tolist() == [0.0]


@pytest.mark.parametrize(
    "name", ["ndcg@10", "nDCG", "MRR10", "RR@10", "P@0", "nDCG(rel=2)@7", "R(rel=0)@5", ""]
)
def test_an_unknown_measure_is_refused(name: str) -> None:
    with refused("unknown-measure", repr(name)):
        parse_measure(name)


def record(value: float, queries: int = 4) -> dict[str, Any]:
    found: dict[str, Any] = {"system": "reranked", "collection": {"digest": "d"}, "split": "test"}
    found |= {"queries": queries, "passages": 10, "overall": {"nDCG@10": value}, "seconds": 3.0}
    stages = [
        {"stage": name, "overall": {"nDCG@10": score}, "run_xxh3": digest}
        for name, score, digest in (("bm25", value / 2, "a"), ("reranked", value, f"{value}"))
    ]
    return {**found, "stages": [{**one, "seconds": i + 1.0} for i, one in enumerate(stages)]}


def test_collections_weigh_the_same_and_a_group_counts_once() -> None:
    records = {"a": record(0.2, queries=1000), "f/x": record(0.4), "f/y": record(0.8)}
    groups = {"a": "a", "f/x": "f", "f/y": "f"}
    mean = mean_over_collections(records, groups)
    assert mean["overall"]["nDCG@10"] == pytest.approx((0.2 + 0.6) / 2)
    assert [one["overall"]["nDCG@10"] for one in mean["stages"]] == pytest.approx([0.2, 0.4])
    assert (mean["queries"], mean["passages"], mean["seconds"]) == (1008, 30, 9.0)
    assert mean["collection"]["name"] == "a, f"
    assert list(mean["collections"]) == ["a", "f/x", "f/y"]
    other = mean_over_collections({"a": record(0.2)}, groups)
    assert other["collection"]["digest"] != mean["collection"]["digest"]
    assert mean_over_collections({}, {})["overall"] == {}
    records["a"]["overall"] = {"nDCG@10": 0.2, "MRR@10": 0.5}  # which not all have
    assert list(mean_over_collections(records, groups)["overall"]) == ["nDCG@10"]
