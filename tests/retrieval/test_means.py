from __future__ import annotations

import pytest
from caravan.retrieval.means import means

from caravan.cli.suite import Member


def _record(figure: float, queries: int = 4) -> dict:
    overall = {"nDCG@10": figure}
    stages = [
        {"stage": "bm25", "overall": {"nDCG@10": figure / 2}, "seconds": 1.0, "run_xxh3": "a"},
        {"stage": "reranked", "overall": overall, "seconds": 2.0, "run_xxh3": f"{figure}"},
    ]
    return {
        "system": "reranked",
        "collection": {"name": "x", "digest": "d"},
        "split": "test",
        "queries": queries,
        "passages": 10,
        "overall": overall,
        "stages": stages,
        "seconds": 3.0,
    }


def test_collections_weigh_the_same_and_those_of_one_folder_count_as_one() -> None:
    found = means(
        {
            Member("a", None, "a", "a"): _record(0.2, queries=1000),
            Member("f/x", None, "f", "f/x"): _record(0.4),
            Member("f/y", None, "f", "f/y"): _record(0.8),
        }
    )
    assert found["overall"]["nDCG@10"] == pytest.approx((0.2 + 0.6) / 2)
    assert [s["overall"]["nDCG@10"] for s in found["stages"]] == pytest.approx([0.2, 0.4])
    assert (found["queries"], found["passages"], found["seconds"]) == (1008, 30, 9.0)
    assert found["collection"]["name"] == "a, f"
    assert list(found["collections"]) == ["a", "f/x", "f/y"]


def test_a_mean_over_other_collections_is_of_other_data() -> None:
    one = {Member("a", None, "a", "a"): _record(0.2)}
    two = {**one, Member("b", None, "b", "b"): _record(0.2)}
    assert means(one)["collection"]["digest"] != means(two)["collection"]["digest"]


def test_nothing_finished_has_no_mean() -> None:
    assert means({})["overall"] == {}
