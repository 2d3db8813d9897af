from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused
from tests.report.conftest import Report

from caravan.report.suites import Suites, collect_suites, read_suites, show_suite


def _suite(
    folder: Path,
    scores: dict[str, dict[str, float]],
    failed: tuple[str, ...] = (),
    split: str = "test",
) -> Path:
    """A suite with these scores: {collection: {stage: nDCG@10}}."""
    folder.mkdir(parents=True)
    collections = {
        name: {
            "group": name.partition("/")[0],
            "digest": name,
            "split": split,
            "stages": {s: {"nDCG@10": f, "R@100": f / 2} for s, f in stages.items()},
        }
        for name, stages in scores.items()
    }
    record = {"system": "x", "collections": collections, "failed": dict.fromkeys(failed, "broken")}
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def _edit(folder: Path, collection: str, stage: str, overall: dict[str, float]) -> None:
    path = folder / "metrics.json"
    record = json.loads(path.read_text())
    record["collections"][collection]["stages"][stage] = overall
    path.write_text(json.dumps(record))


def _collect(*folders: Path) -> Suites:
    return collect_suites(read_suites(folders))


def _of(suites: Suites, system: str, measure: str = "nDCG@10") -> dict[Any, float]:
    return suites.scores[system, measure].dropna().to_dict()


ONE = {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}}


def test_one_system_shows_all_measures_with_the_mean_over_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _suite(tmp_path / "one", ONE, failed=("b",))
    found = _collect(folder)
    assert list(found.scores.index) == ["a", "f/x", "f/y", "f (mean of 2)", "mean"]
    assert _of(found, "bm25")["mean"] == pytest.approx((0.1 + 0.4) / 2)
    assert _of(found, "bm25", "R@100")["f (mean of 2)"] == pytest.approx(0.2)
    assert found.notes == ["x: not in the mean, as they failed: b"]
    show_suite(json.loads((folder / "metrics.json").read_text()), folder)
    printed = capsys.readouterr().out
    assert "0.2500" in printed
    assert found.notes[0] in printed
    with (folder / "collections.csv").open() as file:
        written = {row["collection"]: row for row in csv.DictReader(file)}
    assert float(written["mean"]["bm25 nDCG@10"]) == pytest.approx(0.25)


def test_several_systems_are_compared_over_what_all_of_them_have(
    tmp_path: Path, report: Report
) -> None:
    one = _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "b": {"bm25": 0.9}})
    two = _suite(tmp_path / "two", {"a": {"retriever": 0.2, "reranked": 0.3}})
    found = _collect(one, two)
    assert list(found.scores.index) == ["a", "b", "mean of 1 that all have"]
    means = [
        _of(found, system)["mean of 1 that all have"]
        for system in ("one", "two retriever", "two reranked")
    ]
    assert means == [0.1, 0.2, 0.3]
    assert "0.9000" in report("collections", one, two)[1]
    assert not (one / "collections.csv").exists()


def test_a_measure_that_some_collections_lack_has_a_mean_over_the_others(tmp_path: Path) -> None:
    folder = _suite(tmp_path / "one", {**ONE, "dl": {"bm25": 0.9}})
    _edit(folder, "dl", "bm25", {"nDCG@10": 0.9, "R(rel=2)@100": 0.6})
    found = _collect(folder)
    group = ["a", "f/x", "f/y", "f (mean of 2)"]
    assert list(found.scores.index) == [*group, "dl", "mean", "mean of 2", "mean of 1"]
    assert _of(found, "bm25")["mean"] == pytest.approx((0.1 + 0.4 + 0.9) / 3)
    assert _of(found, "bm25", "R@100")["mean of 2"] == pytest.approx((0.05 + 0.2) / 2)
    assert _of(found, "bm25", "R(rel=2)@100")["mean of 1"] == pytest.approx(0.6)
    assert "mean" not in _of(found, "bm25", "R@100")


def test_systems_without_a_common_collection_have_means_of_their_own(tmp_path: Path) -> None:
    one = _suite(tmp_path / "one", ONE)
    two = _suite(tmp_path / "two", {"b": {"bm25": 0.2}, "f/z": {"bm25": 0.7}})
    ours, theirs = (_of(_collect(one, two), name) for name in ("one", "two"))
    assert (ours["separate mean"], theirs["separate mean"]) == pytest.approx((0.25, 0.45))
    assert ours["f (separate mean)"] == pytest.approx(0.4)
    assert theirs["f (separate mean)"] == pytest.approx(0.7)


def test_a_measure_that_one_system_lacks_leaves_the_others_their_means(tmp_path: Path) -> None:
    one = _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "b": {"bm25": 0.3}})
    two = _suite(tmp_path / "two", {"a": {"bm25": 0.2}, "b": {"bm25": 0.4}})
    for name in ("a", "b"):
        _edit(two, name, "bm25", {"nDCG@10": 0.2})
    found = _collect(one, two)
    assert list(found.scores.index) == ["a", "b", "mean"]
    assert _of(found, "two")["mean"] == pytest.approx(0.2)
    assert _of(found, "one", "R@100")["mean"] == pytest.approx(0.1)
    assert _of(found, "two", "R@100") == {}


def test_a_group_of_which_a_system_lacks_a_part_is_compared_over_the_rest(tmp_path: Path) -> None:
    one = _suite(tmp_path / "one", {f"f/{name}": {"bm25": 0.2} for name in "xyz"})
    two = _suite(tmp_path / "two", {f"f/{n}": {"bm25": 0.4} for n in "xy"}, failed=("f/z",))
    _edit(one, "f/z", "bm25", {"nDCG@10": 0.9})
    found = _collect(one, two)
    group = "f (mean of 2 that all have)"
    assert list(found.scores.index)[:5] == ["f/x", "f/y", "f/z", group, "mean"]
    assert [_of(found, name)[group] for name in ("one", "two")] == pytest.approx([0.2, 0.4])
    assert found.notes == ["two: not in the mean, as they failed: f/z"]


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
