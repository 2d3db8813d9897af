from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_rel
from tests.refusals import refused
from tests.report.conftest import Evaluations, Report, write_record

from caravan.report.contents import read
from caravan.report.records import Evaluation, Suite, read_metrics
from caravan.report.summary import (
    collect_suites,
    means_sentence,
    stages_table,
    suites_section,
    systems_of,
)
from caravan.report.systems import System
from caravan.report.tables import p_value

ONE = {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}}


def _of_stages(folder: Path, **stages: str) -> Evaluation:
    """An evaluation of several stages: {stage: digest of its run}."""
    one = {"overall": {"MRR@10": 0.3, "R@100": 0.5}, "seconds": 1.0, "run": "runs/x.trec"}
    found = [
        {**one, "stage": name, "run_xxh3": digest, "queries_per_second": 3.5}
        for name, digest in stages.items()
    ]
    record = read_metrics(write_record(folder, stages=found, system=list(stages)[-1]))
    assert isinstance(record, Evaluation)
    return record


def _systems(folder: Path) -> list[System]:
    return systems_of(read([folder]).evaluations, folder)


def test_the_table_is_every_evaluation_below_the_folder(tmp_path: Path, report: Report) -> None:
    write_record(tmp_path / "bm25", overall={"MRR@10": 0.32, "R@100": 0.5})
    write_record(tmp_path / "dense", overall={"R@100": 0.75, "nDCG@10": 0.6})
    (tmp_path / "train").mkdir()
    (tmp_path / "train/metrics.json").write_text('{"best": 0.4}')
    code, printed, _ = report("table", tmp_path)
    assert code == 0
    lines = [re.findall(r"[\w@.-]+", line) for line in printed.splitlines()]
    assert {line[0]: line[1:] for line in lines if len(line) == 5} == {
        "system": ["R@100", "nDCG@10", "MRR@10", "seconds"],
        "bm25": ["0.5000", "-", "0.3200", "1.3"],
        "dense": ["0.7500", "0.6000", "-", "1.3"],
    }
    assert "not tested: the collection of" in printed
    assert [one.name for one in _systems(tmp_path)] == ["dense", "bm25"]  # by MRR@10


def test_each_collection_and_split_has_its_table(tmp_path: Path, report: Report) -> None:
    write_record(tmp_path / "a")
    write_record(tmp_path / "b", split="dev")
    write_record(tmp_path / "c", split="dev", overall={})
    code, printed, _ = report("table", tmp_path)
    assert code == 0
    assert printed.index("tiny test: ") < printed.index("tiny dev: ")
    assert re.search(r"^c +- +- +1\.3$", printed, re.MULTILINE)


def test_a_table_without_an_evaluation_is_refused(tmp_path: Path, report: Report) -> None:
    with refused("no-runs", str(tmp_path)):
        read([tmp_path])
    (tmp_path / "metrics.json").write_text('{"best": 0.4}')
    code, _, error = report("table", tmp_path)
    assert code == 2
    assert str(tmp_path) in error


def test_systems_of_one_name_never_share_a_row(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    _of_stages(home, retriever="1")
    _of_stages(home / "retriever", retriever="2")
    _of_stages(home / "a", bm25="3", fused="4")
    _of_stages(home / "b", bm25="5", reranked="6")
    _of_stages(home / "a/bm25", bm25="7")
    assert {one.name: one.home for one in _systems(home)} == {
        "./retriever": home,
        "retriever": home / "retriever",
        "bm25 of a": home / "a",
        "fused": home / "a",
        "b/bm25": home / "b",
        "reranked": home / "b",
        "a/bm25": home / "a/bm25",
    }
    assert [one.name for one in _systems(home / "retriever")] == ["retriever"]


def test_given_names_are_left_if_two_evaluations_have_the_same(tmp_path: Path) -> None:
    evaluations = {
        tmp_path / "one/a": _of_stages(tmp_path / "1", a="a"),
        tmp_path / "one/copy": _of_stages(tmp_path / "2", copy="copy"),
        tmp_path / "two": _of_stages(tmp_path / "3", bm25="bm25", x="x"),
    }
    names = {tmp_path / "one/a": "one", tmp_path / "one/copy": "one"}
    found = [one.name for one in systems_of(evaluations, tmp_path, names)]
    assert found == ["one/a", "one/copy", "bm25", "x"]


def test_the_stages_of_an_evaluation_have_gains_and_speeds(tmp_path: Path) -> None:
    table = stages_table(_of_stages(tmp_path / "a", bm25="1", fused="2"))
    assert table.rows[1] == ["fused", "0.3000", "0.5000", "\u2013", "3.5"]


def test_each_system_is_tested_against_the_one_in_the_row_before(
    evaluations: Evaluations, report: Report
) -> None:
    code, printed, _ = report("table", evaluations.folder)
    assert code == 0
    systems = _systems(evaluations.folder)
    scores = [evaluations.per_query(one.run, "MRR@10") for one in systems]
    queries = sorted({query for of in scores for query in of})
    values = [[of.get(query, 0.0) for query in queries] for of in scores]
    names = [one.name for one in systems]
    for i in range(1, len(names)):
        expected = ttest_rel(values[i], values[i - 1]).pvalue
        (row,) = (line for line in printed.splitlines() if line.startswith(f"{names[i]} "))
        assert row.split()[-2] == p_value(expected)
        verb = "beats" if expected < 0.05 else "does not differ significantly from"
        assert f"{names[i]} {verb} {names[i - 1]}" in printed


def test_a_run_that_has_changed_since_it_was_scored_is_not_tested(
    evaluations: Evaluations, tmp_path: Path, report: Report
) -> None:
    shutil.copytree(evaluations.folder, tmp_path / "runs")
    (run,) = (tmp_path / "runs/bm25/runs").glob("*.trec")
    lines = run.read_text().splitlines(keepends=True)
    run.write_text("".join(line for line in lines if line.split()[3] != "1"))
    shutil.copytree(evaluations.folder.parent / "cache", tmp_path / "cache")
    code, printed, _ = report("table", tmp_path / "runs")
    assert code == 0
    assert "not tested: " in printed
    assert f"{run.name} has changed since it was scored" in printed


def _suite(
    folder: Path,
    scores: dict[str, dict[str, float]],
    failed: tuple[str, ...] = (),
    split: str = "test",
    dropped: tuple[str, ...] = (),
) -> Path:
    """A suite with these scores: {collection: {stage: nDCG@10}}; some have R(rel=2) for R."""
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
    failures = dict.fromkeys(failed, "broken")
    return write_record(folder, run="", collections=collections, failed=failures)


def _read(*folders: Path) -> dict[Path, Suite]:
    return {home: one for home in folders if isinstance(one := read_metrics(home), Suite)}


def _collect(*folders: Path) -> tuple[pd.DataFrame, list[str]]:
    return collect_suites({home.name: one for home, one in _read(*folders).items()})


def test_one_system_shows_all_measures_with_the_mean_over_folders(
    tmp_path: Path, report: Report
) -> None:
    folder = _suite(tmp_path / "one", ONE, failed=("b",))
    scores, notes = _collect(folder)
    assert list(scores.index) == ["a", "f/x", "f/y", "f (mean)", "mean"]
    assert scores["bm25", "nDCG@10"]["mean"] == pytest.approx((0.1 + 0.4) / 2)
    assert scores["bm25", "R@100"]["f (mean)"] == pytest.approx(0.2)
    assert notes == ["x: not in the mean, as they failed: b"]
    printed = report("table", folder)[1]
    assert "0.2500" in printed
    assert notes[0] in printed


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
    assert "0.9000" in report("table", one, two)[1]
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
    section, _ = suites_section(_read(mine, other))
    assert section.blocks[0].columns == ["collection", "mine/beir", "other/beir"]
    with refused("given-twice", str(mine)):
        read([mine, tmp_path / "other/../mine/beir"])


def test_suites_that_one_table_cannot_hold_are_refused(tmp_path: Path, report: Report) -> None:
    one = _suite(tmp_path / "one", {"a": {"bm25": 0.1}})
    with refused("mixed-collections", "two", "a"):
        _collect(one, _suite(tmp_path / "two", {"a": {"bm25": 0.1}}, split="dev"))
    with refused("no-scores"):
        _collect(_suite(tmp_path / "empty", {"a": {}}))
    code, _, error = report("table", _suite(tmp_path / "failed", {}, failed=("a",)))
    assert code == 2
    assert "a: broken" in error
