from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from caravan.errors import InputError
from caravan.report import __main__ as command
from caravan.report.summary import collect, rows, show, show_stages


def _evaluation(folder: Path, mrr: float, split: str = "test", **overall: float) -> None:
    folder.mkdir(parents=True)
    record = {
        "overall": overall or {"MRR@10": mrr, "R@100": 0.5},
        "collection": {"name": "tiny", "digest": "d"},
        "split": split,
        "queries": 4,
        "passages": 60,
        "seconds": 1.26,
        "run": "runs/x.trec",
    }
    (folder / "metrics.json").write_text(json.dumps(record))


def test_the_table_is_every_evaluation_below_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _evaluation(tmp_path / "bm25", 0.32)
    _evaluation(tmp_path / "untrained", 0.01)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.json").write_text('{"best": 0.4}')
    show(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "untrained": {"MRR@10": 0.01, "R@100": 0.5, "seconds": 1.3},
        "bm25": {"MRR@10": 0.32, "R@100": 0.5, "seconds": 1.3},
    }
    assert list(summary) == ["untrained", "bm25"]
    printed = capsys.readouterr().out
    assert "0.3200" in printed
    assert "tensorboard" not in printed
    (tmp_path / "train/tensorboard").mkdir()
    (tmp_path / "train/tensorboard/events.out.tfevents.1").touch()
    show(tmp_path)
    assert f"tensorboard --logdir {tmp_path}" in capsys.readouterr().out


def test_figures_stand_under_their_measure_whatever_each_system_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _evaluation(tmp_path / "bm25", 0.3)
    _evaluation(tmp_path / "dense", 0, **{"R@100": 0.75, "nDCG@10": 0.6})
    show(tmp_path)
    lines = [re.findall(r"[\w@.-]+", line) for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 5}
    assert rows == {
        "system": ["MRR@10", "R@100", "nDCG@10", "seconds"],
        "bm25": ["0.3000", "0.5000", "-", "1.3"],
        "dense": ["-", "0.7500", "0.6000", "1.3"],
    }


def test_an_evaluation_without_figures_is_told_in_a_sentence(tmp_path: Path) -> None:
    _evaluation(tmp_path / "bm25", 0.3)
    path = tmp_path / "bm25" / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "overall": {}}))
    with pytest.raises(InputError, match=r"metrics\.json has no figures"):
        collect(tmp_path)


def test_one_table_does_not_mix_splits(tmp_path: Path) -> None:
    _evaluation(tmp_path / "a", 0.1)
    _evaluation(tmp_path / "b", 0.2, split="dev")
    with pytest.raises(InputError, match=r"a \(tiny test\), b \(tiny dev\)"):
        collect(tmp_path)


def test_a_folder_without_evaluations_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["report", "table", str(tmp_path)])
    assert command.main() == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_a_broken_file_is_told_in_a_sentence(tmp_path: Path) -> None:
    _evaluation(tmp_path / "a", 0.1)
    (tmp_path / "a/metrics.json").write_text('{"overall":')
    with pytest.raises(InputError, match=r"metrics\.json is not JSON"):
        collect(tmp_path)


def _of_stages(folder: Path, stages: dict[str, str]) -> None:
    """An evaluation of several stages: {stage: digest of its run}."""
    _evaluation(folder, 0.3)
    path = folder / "metrics.json"
    record = json.loads(path.read_text())
    one = {"overall": record["overall"], "seconds": 1.0, "run": "runs/x.trec", "gain": None}
    record["stages"] = [
        {**one, "stage": name, "run_xxh3": digest, "queries_per_second": 3.5}
        for name, digest in stages.items()
    ]
    path.write_text(json.dumps({**record, "system": list(stages)[-1]}))


def test_systems_of_one_name_never_share_a_row(tmp_path: Path) -> None:
    home = tmp_path / "runs"
    _of_stages(home, {"retriever": "1"})
    _of_stages(home / "retriever", {"retriever": "2"})
    _of_stages(home / "a", {"bm25": "3", "fused": "4"})
    _of_stages(home / "b", {"bm25": "5", "reranked": "6"})
    _of_stages(home / "a/bm25", {"bm25": "7"})
    assert {name: record["folder"] for name, record in collect(home)[1].items()} == {
        "./retriever": ".",
        "retriever": "retriever",
        "bm25 of a": "a",
        "fused": "a",
        "b/bm25": "b",
        "reranked": "b",
        "a/bm25": "a/bm25",
    }


def test_given_names_are_left_where_two_evaluations_have_the_same() -> None:
    record = {"overall": {"MRR@10": 0.1}, "seconds": 1.0, "run": "runs/x.trec"}
    several = {"stages": [{**record, "stage": name, "run_xxh3": name} for name in ("bm25", "x")]}
    records = {"one/a": record, "one/copy": record, "two": {**record, **several}}
    given = {"one/a": "one", "one/copy": "one"}
    assert list(rows(records, given)) == ["one/a", "one/copy", "bm25", "x"]
    assert list(rows(records, {"one/a": "mine"})) == ["mine", "one/copy", "bm25", "x"]


def test_all_tables_are_light(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _of_stages(tmp_path / "a", {"bm25": "1", "fused": "2"})
    show(tmp_path)
    show_stages(json.loads((tmp_path / "a/metrics.json").read_text()))
    printed = capsys.readouterr().out
    assert "\u2500" in printed
    assert not set(printed) & set("\u2501\u2502\u2503\u250f\u2513\u2517\u2521")


def test_a_run_directory_by_itself_is_named_after_its_system(tmp_path: Path) -> None:
    _evaluation(tmp_path / "a", 0.1)
    path = tmp_path / "a/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "system": "retriever"}))
    summary, records = collect(tmp_path / "a")
    assert list(summary) == ["retriever"]
    assert records["retriever"]["folder"] == "."
