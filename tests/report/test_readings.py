"""The tables and plots of a sweep whose models were evaluated with several lengths."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import sweep_of, write_job, write_page

from caravan.report.sweep import plots, tables


def _entry(score: float, **reading: Any) -> dict[str, Any]:
    given = {"query_length": None, "passage_length": None, "segment": None, "segment_words": 150}
    return {**given, **reading, "scores": {"MRR@10": score, "R@100": score / 2}}


def _job(folder: Path, trained: int, seed: int, read: list[dict[str, Any]]) -> None:
    overrides = [f"encoding.passage_length={trained}", f"seed={seed}"]
    write_job(folder, overrides, {"updates": 4, "train_seconds": 9.0, "read": read})


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for trained in (64, 128):
        for seed in (1, 2):
            read = []
            for length in (64, 128):
                score = (trained + length + seed) / 1000
                cost = {"tokens_per_query": 9.5, "tokens_per_passage": length - 4.0}
                cost |= {"seconds": length / 10, "memory_gib": 0.5}
                read.append(_entry(score, passage_length=length) | cost)
                best = _entry(score / 2, passage_length=length, segment="best", segment_words=60)
                read.append(best | cost | {"tokens_per_passage": 1234.56})
            for length in (8, 16):
                cost = {"tokens_per_query": length / 2, "tokens_per_passage": 99.0}
                read.append(_entry(length / 100, query_length=length) | cost)
            _job(tmp_path, trained, seed, read)
    return tmp_path


def test_each_side_has_a_table_of_training_by_reading_with_its_cost(sweep: Path) -> None:
    passages, queries, every, _ = tables(sweep_of(sweep))
    columns = ["encoding.passage_length", "64", "128", "64, best of 60 words"]
    assert passages.columns == [*columns, "128, best of 60 words"]
    assert passages.rows[0] == ["64", "0.1295", "0.1935", "0.0648", "0.0968"]
    assert passages.rows[1] == ["128", "0.1935", "0.2575", "0.0968", "0.1288"]
    assert passages.strong == {(1, column) for column in range(1, 5)}
    cost = {row[0]: row[1:] for row in passages.rows[2:]}
    assert cost["tokens/passage"] == ["60.0", "124.0", "1,234.6", "1,234.6"]
    assert (cost["read seconds"][1], cost["read GiB"][2]) == ("12.80", "0.50")
    assert queries.columns == ["encoding.passage_length", "8", "16"]
    assert queries.rows[2] == ["tokens/query", "4.0", "8.0"]
    assert len(every.rows) == 2 * 2 * 6  # trainings, seeds, readings


def test_the_score_is_plotted_over_the_tokens_that_are_read(sweep: Path) -> None:
    found = sweep_of(sweep)
    names = ["encoding.passage_length", "query read at", "passage read at", "segments", "seed"]
    assert sorted(found.varied) == sorted(names)
    assert found.scores == ["MRR@10", "R@100"]
    drawn = {plot.name: plot.caption for plot in plots(found)}
    assert next(iter(drawn)) == "sweep-passage-MRR-10"
    assert "MRR@10 over tokens/passage at inference" in drawn["sweep-passage-MRR-10"]
    assert "R@100 over tokens/query at inference" in drawn["sweep-query-R-100"]
    svg = plots(found)[0].svg(page=True)
    assert svg.count("passage_length=") == 2
    assert svg.count("best of 60 words") == 1  # the marks of a training, hollow
    page = write_page(sweep)
    with (sweep / "sweep.csv").open() as file:
        assert {row["tokens/passage"] for row in csv.DictReader(file)} >= {"60.0", "1234.56"}
    assert "MRR@10 by training (rows) and passage length" in page.read_text()


def test_a_reranker_has_its_plot_over_the_tokens_of_a_query_with_its_candidates(
    tmp_path: Path,
) -> None:
    for trained in (64, 128):
        entries = [(length, {"tokens_per_query": 10.0 * length}) for length in (64, 128)]
        read = [_entry(0.1, passage_length=length) | cost for length, cost in entries]
        _job(tmp_path, trained, 1, read)
    (plot,) = plots(sweep_of(tmp_path))
    assert "over tokens/query" in plot.caption
