from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from caravan.errors import InputError
from caravan.report import __main__ as command
from caravan.report.collections import collect, show
from caravan.report.summary import collect as table


def _suite(
    folder: Path,
    figures: dict[str, dict[str, float]],
    failed: tuple[str, ...] = (),
    split: str = "test",
) -> None:
    """Figures: {collection: {stage: nDCG@10}}."""
    folder.mkdir(parents=True)
    collections = {
        name: {
            "group": name.partition("/")[0],
            "digest": name,
            "split": split,
            "stages": {s: {"nDCG@10": f, "R@100": f / 2} for s, f in stages.items()},
        }
        for name, stages in figures.items()
    }
    record = {
        "system": "x",
        "collections": collections,
        "failed": dict.fromkeys(failed, "broken"),
        "overall": {"nDCG@10": 0.5},
        "collection": {"name": "2 collections", "digest": "d"},
        "split": "test",
        "queries": 4,
        "passages": 10,
        "seconds": 1.0,
        "run": "",
    }
    (folder / "metrics.json").write_text(json.dumps(record))


def test_one_system_shows_all_measures_with_the_mean_over_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}}
    _suite(tmp_path / "one", figures, failed=("b",))
    rows, columns, told = collect([tmp_path / "one"])
    assert rows == ["a", "f/x", "f/y", "f (mean of 2)", "mean"]
    assert columns["bm25", "nDCG@10"]["mean"] == pytest.approx((0.1 + 0.4) / 2)
    assert columns["bm25", "R@100"]["f (mean of 2)"] == pytest.approx(0.2)
    assert told == ["x: not in the mean, as they failed: b"]
    show([tmp_path / "one"])
    printed = capsys.readouterr().out
    assert "0.2500" in printed
    assert told[0] in printed
    with (tmp_path / "one/collections.csv").open() as file:
        written = {row["collection"]: row for row in csv.DictReader(file)}
    assert float(written["mean"]["bm25 nDCG@10"]) == pytest.approx(0.25)


def test_several_systems_are_compared_over_what_all_of_them_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "b": {"bm25": 0.9}})
    _suite(tmp_path / "two", {"a": {"retriever": 0.2, "reranked": 0.3}})
    rows, columns, _ = collect([tmp_path / "one", tmp_path / "two"])
    assert rows == ["a", "b", "mean of 1 that all have"]
    labels = {label: of[rows[-1]] for (label, m), of in columns.items() if m == "nDCG@10"}
    assert labels == {"one": 0.1, "two retriever": 0.2, "two reranked": 0.3}
    show([tmp_path / "one", tmp_path / "two"])
    assert "0.9000" in capsys.readouterr().out
    assert not (tmp_path / "one/collections.csv").exists()


def _edit(folder: Path, collection: str, stage: str, overall: dict[str, float]) -> None:
    path = folder / "metrics.json"
    record = json.loads(path.read_text())
    record["collections"][collection]["stages"][stage] = overall
    path.write_text(json.dumps(record))


def test_a_measure_that_some_collections_lack_has_a_mean_over_the_others(tmp_path: Path) -> None:
    figures = {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}, "dl": {"bm25": 0.9}}
    _suite(tmp_path / "one", figures)
    _edit(tmp_path / "one", "dl", "bm25", {"nDCG@10": 0.9, "R(rel=2)@100": 0.6})
    rows, columns, _ = collect([tmp_path / "one"])
    assert rows == ["a", "f/x", "f/y", "f (mean of 2)", "dl", "mean", "mean of 2", "mean of 1"]
    assert columns["bm25", "nDCG@10"]["mean"] == pytest.approx((0.1 + 0.4 + 0.9) / 3)
    assert columns["bm25", "R@100"]["mean of 2"] == pytest.approx((0.05 + 0.2) / 2)
    assert columns["bm25", "R(rel=2)@100"]["mean of 1"] == pytest.approx(0.6)
    assert "mean" not in columns["bm25", "R@100"]


def test_systems_without_a_common_collection_have_means_of_their_own(tmp_path: Path) -> None:
    _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}})
    _suite(tmp_path / "two", {"b": {"bm25": 0.2}, "f/z": {"bm25": 0.7}})
    rows, columns, _ = collect([tmp_path / "one", tmp_path / "two"])
    ours, theirs = columns["one", "nDCG@10"], columns["two", "nDCG@10"]
    assert rows[-1] == "mean of 2 of its own"
    assert (ours[rows[-1]], theirs[rows[-1]]) == pytest.approx((0.25, 0.45))
    assert ours["f (mean of 2 of its own)"] == pytest.approx(0.4)
    assert theirs["f (mean of 1 of its own)"] == pytest.approx(0.7)


def test_a_measure_that_one_system_was_not_asked_for_leaves_the_others_their_means(
    tmp_path: Path,
) -> None:
    _suite(tmp_path / "one", {"a": {"bm25": 0.1}, "b": {"bm25": 0.3}})
    _suite(tmp_path / "two", {"a": {"bm25": 0.2}, "b": {"bm25": 0.4}})
    for name in ("a", "b"):
        _edit(tmp_path / "two", name, "bm25", {"nDCG@10": 0.2})
    rows, columns, _ = collect([tmp_path / "one", tmp_path / "two"])
    assert rows == ["a", "b", "mean"]
    assert columns["two", "nDCG@10"]["mean"] == pytest.approx(0.2)
    assert columns["one", "R@100"]["mean"] == pytest.approx(0.1)
    assert columns["two", "R@100"] == {}


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for i, home in enumerate(("mine", "other"), 1):
        (tmp_path / home).mkdir()
        _suite(tmp_path / home / "beir", {"a": {"bm25": i / 10}})
    _, columns, _ = collect([tmp_path / "mine/beir", tmp_path / "other/beir"])
    figures = {label: of["mean"] for (label, m), of in columns.items() if m == "nDCG@10"}
    assert figures == {"mine/beir": 0.1, "other/beir": 0.2}
    with pytest.raises(InputError, match="mine/beir is given twice"):
        collect([tmp_path / "mine/beir", tmp_path / "other/../mine/beir"])


def test_a_group_of_which_a_system_lacks_a_part_is_compared_over_the_rest(tmp_path: Path) -> None:
    _suite(tmp_path / "one", {"f/x": {"bm25": 0.2}, "f/y": {"bm25": 0.4}, "f/z": {"bm25": 0.9}})
    _suite(tmp_path / "two", {"f/x": {"bm25": 0.3}, "f/y": {"bm25": 0.5}}, failed=("f/z",))
    rows, columns, told = collect([tmp_path / "one", tmp_path / "two"])
    group = "f (mean of 2 that all have)"
    assert rows == ["f/x", "f/y", "f/z", group, "mean"]
    figures = {label: of[group] for (label, m), of in columns.items() if m == "nDCG@10"}
    assert figures == {"one": pytest.approx(0.3), "two": pytest.approx(0.4)}
    assert told == ["two: not in the mean, as they failed: f/z"]


def test_collections_that_differ_are_not_put_side_by_side(tmp_path: Path) -> None:
    _suite(tmp_path / "one", {"a": {"bm25": 0.1}})
    _suite(tmp_path / "two", {"a": {"bm25": 0.1}}, split="dev")
    with pytest.raises(InputError, match="two has measured a with another content or split than"):
        collect([tmp_path / "one", tmp_path / "two"])


def test_a_suite_of_which_nothing_is_finished_tells_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _suite(tmp_path / "one", {}, failed=("a",))
    monkeypatch.setattr("sys.argv", ["report", "collections", str(tmp_path / "one")])
    assert command.main() == 2
    assert "no collection of" in (told := capsys.readouterr().err)
    assert "is finished: a: broken; mend what failed" in told


def test_a_table_of_evaluations_shows_a_suite_by_its_mean(tmp_path: Path) -> None:
    _suite(tmp_path / "one", {"a": {"bm25": 0.1}})
    _suite(tmp_path / "two", {"a": {"bm25": 0.1}})
    (tmp_path / "one/a").mkdir()
    (tmp_path / "one/a/metrics.json").write_text('{"overall": {"nDCG@10": 0.1}}')
    assert list(table(tmp_path)[0]) == ["one", "two"]


def test_a_folder_that_is_no_suite_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no evaluation of several collections"):
        collect([tmp_path])
    monkeypatch.setattr("sys.argv", ["report", "collections", str(tmp_path)])
    assert command.main() == 2
    assert "holds no evaluation of several" in capsys.readouterr().err


def test_collections_without_a_score_are_told_in_a_sentence(tmp_path: Path) -> None:
    _suite(tmp_path / "one", {"a": {}})
    with pytest.raises(InputError, match=r"no collection of .*one has scores"):
        collect([tmp_path / "one"])
