from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from tests.refusals import refused
from tests.report.conftest import Report

from caravan.report.suites import collect_suites, means_sentence, read_suites, show_suite

ONE = {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}}


def _suite(
    folder: Path,
    scores: dict[str, dict[str, float]],
    failed: tuple[str, ...] = (),
    split: str = "test",
    dropped: tuple[str, ...] = (),
) -> Path:
    """A suite with these scores: {collection: {stage: nDCG@10}}; some have R(rel=2) for R."""
    folder.mkdir(parents=True)
    collections = {
        name: {
            "group": name.partition("/")[0],
            "digest": name,
            "split": split,
            "stages": {
                s: {"nDCG@10": f, "R(rel=2)@100" if name in dropped else "R@100": f / 2}
                for s, f in stages.items()
            },
        }
        for name, stages in scores.items()
    }
    record = {"system": "x", "collections": collections, "failed": dict.fromkeys(failed, "broken")}
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def _collect(*folders: Path) -> tuple[pd.DataFrame, list[str]]:
    return collect_suites(read_suites(folders))


def test_one_system_shows_all_measures_with_the_mean_over_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _suite(tmp_path / "one", ONE, failed=("b",))
    scores, notes = _collect(folder)
    assert list(scores.index) == ["a", "f/x", "f/y", "f (mean)", "mean"]
    assert scores["bm25", "nDCG@10"]["mean"] == pytest.approx((0.1 + 0.4) / 2)
    assert scores["bm25", "R@100"]["f (mean)"] == pytest.approx(0.2)
    assert notes == ["x: not in the mean, as they failed: b"]
    show_suite(json.loads((folder / "metrics.json").read_text()), folder)
    printed = capsys.readouterr().out
    assert "0.2500" in printed
    assert notes[0] in printed
    with (folder / "collections.csv").open() as file:
        written = {row["collection"]: row for row in csv.DictReader(file)}
    assert float(written["mean"]["bm25 nDCG@10"]) == pytest.approx(0.25)


def test_means_are_over_the_collections_that_all_systems_have(
    tmp_path: Path, report: Report
) -> None:
    one = _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "b": {"bm25": 0.9}, "f/x": {"bm25": 0.3}})
    both = {"retriever": 0.2, "reranked": 0.3}
    two = _suite(tmp_path / "two", {"a": both, "f/x": both, "f/y": both}, failed=("b",))
    scores, notes = _collect(one, two)
    means = {name: scores[name, "nDCG@10"]["mean"] for name in scores.columns.unique(0)}
    expected = {"one": 0.2, "two retriever": 0.2, "two reranked": 0.3}
    assert means == pytest.approx(expected)
    sentence = "Mean nDCG@10 of the collections that all systems have: two reranked 0.3000, "
    assert means_sentence(scores).startswith(sentence)
    assert scores["one", "nDCG@10"]["f (mean)"] == pytest.approx(0.3)
    assert "2 of 4 collections" in notes[1]
    assert "0.9000" in report("collections", one, two)[1]
    assert not (one / "collections.csv").exists()
    three = _suite(tmp_path / "three", {"c": {"bm25": 0.4}})
    scores, notes = _collect(one, three)
    assert scores.loc["mean"].isna().all()
    assert "0 of 4 collections" in notes[0]


def test_a_measure_that_some_collections_lack_has_a_mean_over_the_others(tmp_path: Path) -> None:
    folder = _suite(tmp_path / "one", {**ONE, "dl": {"bm25": 0.9}}, dropped=("dl",))
    scores, notes = _collect(folder)
    mean = scores["bm25"].loc["mean"]
    assert mean["nDCG@10"] == pytest.approx((0.1 + 0.4 + 0.9) / 3)
    assert mean["R@100"] == pytest.approx((0.05 + 0.2) / 2)
    assert mean["R(rel=2)@100"] == pytest.approx(0.45)
    assert [note.partition(",")[0] for note in notes] == [
        "mean R@100: over 3 of 4 collections",
        "mean R(rel=2)@100: over 1 of 4 collections",
    ]


def test_folders_of_one_name_get_the_folders_above_them(tmp_path: Path) -> None:
    mine, other = (
        _suite(tmp_path / home / "beir", {"a": {"bm25": 0.1}}) for home in ("mine", "other")
    )
    assert list(read_suites([mine, other])) == ["mine/beir", "other/beir"]
    with refused("given-twice", str(mine)):
        read_suites([mine, tmp_path / "other/../mine/beir"])


def test_suites_that_one_table_cannot_hold_are_refused(tmp_path: Path, report: Report) -> None:
    one = _suite(tmp_path / "one", {"a": {"bm25": 0.1}})
    with refused("mixed-collections", "two", "a"):
        _collect(one, _suite(tmp_path / "two", {"a": {"bm25": 0.1}}, split="dev"))
    with refused("no-evaluation", str(tmp_path)):
        _collect(tmp_path)
    with refused("no-scores"):
        _collect(_suite(tmp_path / "empty", {"a": {}}))
    code, _, error = report("collections", _suite(tmp_path / "failed", {}, failed=("a",)))
    assert code == 2
    assert "a: broken" in error
