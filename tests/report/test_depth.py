"""A measure that looks deeper than a run is no score of it, in no report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate
from tests.report.conftest import Evaluations

from caravan.data.runs import Run
from caravan.report import __main__ as command
from caravan.report import compare, jobs, page, systems
from caravan.report.records import to_depth
from caravan.retrieval.metrics import depth_of, too_deep


def _compared(*paths: Path, measures: list[str]) -> compare.Comparison:
    found = systems.told_apart([systems.system(path) for path in paths])
    return compare.compared(found, systems.judged(found), measures)


def _cells(table: Any) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


@pytest.fixture(scope="module")
def shallow(evaluations: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's BM25 again, 20 passages deep."""
    home = tmp_path_factory.mktemp("shallow") / "bm25-20"
    cache = evaluations.folder.parent / "cache"
    asked = ("data.split=train", "index.k=20", "measures=[MRR@10]", f"cache_dir={cache}")
    evaluate(evaluations.beir, home, "bm25", *asked)
    return home


def test_a_shallower_search_is_not_scored_and_not_tested_by_a_deeper_measure(
    shallow: Path, evaluations: Evaluations
) -> None:
    found = _compared(shallow, evaluations.folder / "bm25", measures=["MRR@10", "R@50"])
    figures, significance, _ = compare.tables(found)
    assert _cells(figures)["bm25-20"][1] == "\u2013"
    assert float(_cells(figures)["bm25"][1]) > 0
    assert found.pairs["R@50"] == []
    assert [row[0] for row in significance.rows] == ["MRR@10"]
    for table in (figures, significance):
        assert "bm25-20 is 20 deep" in table.caption
    # The same ranking: where both are deep enough, they are equal.
    assert found.pairs["MRR@10"][0].difference == 0.0


def test_a_run_file_is_as_deep_as_its_longest_list(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    lines = (evaluations.folder / "bm25/runs/bm25.train.trec").read_text().splitlines(True)
    theirs = tmp_path / "theirs.trec"
    theirs.write_text("".join(line for line in lines if int(line.split()[3]) <= 5))
    found = _compared(evaluations.folder / "bm25", theirs, measures=["R@5", "MRR@10", "nDCG@10"])
    assert _cells(compare.tables(found)[0])["theirs"][1:] == ["\u2013", "\u2013"]
    assert found.pairs["R@5"][0].difference == 0.0
    assert found.measure == "R@5"


def test_run_files_of_one_depth_are_scored_and_their_depth_is_reported(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    lines = (evaluations.folder / "bm25/runs/bm25.train.trec").read_text().splitlines(True)
    short = "".join(line for line in lines if int(line.split()[3]) <= 5)
    for name in ("a", "b"):
        (tmp_path / f"{name}.trec").write_text(short)
    found = _compared(
        evaluations.folder / "bm25", tmp_path / "a.trec", tmp_path / "b.trec", measures=["MRR@5"]
    )
    assert found.depth_note(["MRR@5"]) == ""
    alone = compare.compared(found.systems[1:], found.judged, ["MRR@10"])
    figures, _, _ = compare.tables(alone)
    assert float(_cells(figures)["a"][0]) == pytest.approx(
        found.values["MRR@5"][1].mean(), abs=1e-4
    )
    assert "a is 5 deep (MRR@10), b is 5 deep (MRR@10)" in figures.caption


def test_a_search_that_found_fewer_than_it_was_asked_for_is_as_deep_as_it_was_asked() -> None:
    run = Run.from_flat(np.array([0, 0, 1]), np.array([4, 5, 6]), np.array([3.0, 2.0, 1.0]))
    assert depth_of(run) == 2
    assert depth_of(run, searched=1000) == 1000
    # A ranking of all passages suits every measure, whatever the cutoff.
    assert too_deep(["R@1000"], depth=2, passages=2) == []
    assert too_deep(["MRR@10", "R@2", "R@3"], depth=2, passages=60) == ["MRR@10", "R@3"]


def _record(depth: int, split: str = "test") -> dict[str, Any]:
    """A reranker's top 100 of a retriever's 1,000."""
    retrieved = {"MRR@10": 0.2, "R@1000": 0.9}
    reranked = {"MRR@10": 0.3, "R@1000": 0.6 if depth < 1000 else 0.8}
    both = [("retriever", 1000, retrieved, None), ("reranked", depth, reranked, 0.1)]
    stages = [
        {
            "stage": name, "run": f"runs/{name}.test.trec", "run_xxh3": f"{name}{depth}",
            "overall": overall, "seconds": 1.0, "gain": gain, "queries_per_second": None,
            "depth": deep,
        }
        for name, deep, overall, gain in both
    ]  # fmt: skip
    return {
        "system": "reranked", "collection": {"name": "c", "digest": "d"}, "split": split,
        "queries": 4, "passages": 5000, "run": "runs/reranked.test.trec", "seconds": 2.0,
        "overall": reranked, "stages": stages,
    }  # fmt: skip


def test_a_record_keeps_the_measures_that_each_stage_is_deep_enough_for() -> None:
    found = to_depth(_record(100))
    assert [list(stage["overall"]) for stage in found["stages"]] == [
        ["MRR@10", "R@1000"],
        ["MRR@10"],
    ]
    assert (found["overall"], found["depth"]) == ({"MRR@10": 0.3}, 100)
    assert found["too_deep"] == ["R@1000"]
    without = to_depth(_record(5))
    assert (without["overall"], without["stages"][1]["gain"]) == ({}, None)
    assert to_depth(_record(1000))["overall"] == _record(1000)["overall"]


@pytest.mark.parametrize("report", ["table", "collections", "sweep", "page"])
def test_every_report_leaves_out_a_score_beyond_the_depth_and_says_why(
    report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "runs"
    for depth in (100, 1000):
        folder = home / f"depth-{depth}"
        folder.mkdir(parents=True)
        record = _record(depth)
        if report == "collections":
            own = {"group": "c", "digest": "d", "split": "test", "passages": 5000}
            own["depths"] = {stage["stage"]: stage["depth"] for stage in record["stages"]}
            own["stages"] = {stage["stage"]: stage["overall"] for stage in record["stages"]}
            record = {**record, "collections": {"c": own}, "failed": {}}
        (folder / "metrics.json").write_text(json.dumps(record))
        if report == "sweep":
            jobs.write(folder, [f"rerank.depth={depth}"], jobs.FINISHED)
    given = home / "depth-100" if report == "collections" else home
    monkeypatch.setattr("caravan.report.plots.Plot.svg", lambda *_, **__: "<svg></svg>")
    monkeypatch.setattr("caravan.report.plots.Plot.png", lambda *_: b"")
    monkeypatch.setattr("sys.argv", ["report", report, str(given)])
    assert command.main() == 0
    shown = capsys.readouterr().out
    if report == "page":
        shown = (home / page.FILE).read_text()
    assert "100 deep" in shown
    written = [path.read_text() for path in home.rglob("*.[cm][sd]*")]  # .csv and .md
    assert not any("0.6" in text for text in [shown, *written])
    assert "0.8000" in shown or report == "collections"
