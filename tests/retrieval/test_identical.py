from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tests.commands import evaluate

from caravan.data.runs import Run


def _lines(run_dir: Path, run: str) -> list[list[str]]:
    return [line.split() for line in (run_dir / run).read_text().splitlines()]


def test_a_query_does_not_find_itself_and_the_run_is_as_deep(
    counterarguments: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    retrievers = f"[bm25,{folders['retriever']}]"
    small = ("index.k=7", "measures=[MRR@5]")
    asked = ("ignore_identical_ids=true", *small)
    evaluate(counterarguments, tmp_path / "left_out", retrievers, *asked)
    evaluate(counterarguments, tmp_path / "kept", retrievers, *small)
    for stage in ("bm25", "retriever"):
        run = f"runs/{stage}.test.trec"
        kept = _lines(tmp_path / "kept", run)
        left = _lines(tmp_path / "left_out", run)
        assert any(line[0] == line[2] for line in kept)
        assert len(left) == len(kept) == 6 * 7
        pairs = [(line[0], line[2]) for line in kept if line[0] != line[2]]
        assert [pair for pair in pairs if pair not in {(x[0], x[2]) for x in left}] == []
        assert not any(line[0] == line[2] for line in left)


def test_a_given_run_loses_them_too(counterarguments: Path, tmp_path: Path) -> None:
    run = "runs/bm25.test.trec"
    before = evaluate(counterarguments, tmp_path / "one", "bm25", "measures=[MRR@10]")
    given = tmp_path / "one" / run
    after = evaluate(
        *(counterarguments, tmp_path / "given", given, "measures=[MRR@10]"),
        "ignore_identical_ids=true",
    )
    again = evaluate(
        *(counterarguments, tmp_path / "two", "bm25", "measures=[MRR@10]"),
        "ignore_identical_ids=true",
    )
    assert after["overall"] == again["overall"]
    assert again["overall"]["MRR@10"] > before["overall"]["MRR@10"]


def test_a_collection_whose_queries_are_passages_is_told_of(
    counterarguments: Path, beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measures = "measures=[MRR@10]"
    with caplog.at_level(logging.WARNING):
        evaluate(counterarguments, tmp_path / "ids", "bm25", measures, "ignore_identical_ids=true")
        evaluate(beir, tmp_path / "beir", "bm25", measures)
        texts = (counterarguments / "queries.jsonl").read_text().splitlines()
        assert not caplog.records
        evaluate(counterarguments, tmp_path / "told", "bm25", measures)
        assert "counter: 6 of 6 queries are passages" in caplog.text
        caplog.clear()
        others = [json.dumps({**json.loads(line), "text": "camel"}) for line in texts]
        (counterarguments / "queries.jsonl").write_text("\n".join(others) + "\n")
        evaluate(counterarguments, tmp_path / "numbers", "bm25", measures)
        assert not caplog.records


def test_one_passage_of_each_query_is_left_out() -> None:
    queries = np.array([2, 5, 9])
    run = Run.from_flat([2, 2, 5, 9, 9], [0, 1, 1, 4, 3], [3.0, 2.0, 5.0, 2.0, 1.0])
    left = run.without(queries, np.array([0, 1, -1]))
    assert left.query_rows.tolist() == [2, 5, 9]
    assert left.counts.tolist() == [1, 0, 2]
    assert left.passage_rows.tolist() == [1, 4, 3]
    part = run.only(np.array([9])).without(queries, np.array([0, 1, 3]))
    assert part.passage_rows.tolist() == [4]
