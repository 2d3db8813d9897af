"""`evaluate.py collections=[...]`: many collections, each model loaded once."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from tests.commands import evaluate
from tests.refusals import refused
from tests.tiny import other_instruction, write_beir

from caravan.files import claimed
from caravan.models import folder
from caravan.retrieval import peers, stages
from caravan.retrieval.index import Faiss

NAMES = "collections=[one,two,forums]"
SHORT = "measures=[nDCG@10,R@100]"


def test_metrics_are_those_of_each_collection_alone_and_their_mean(
    suite: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = folder.load, list[str]()

    def counted(path: Path, *settings: Any) -> Any:
        loaded.append(path.parent.name)
        return load(path, *settings)

    monkeypatch.setattr(folder, "load", counted)
    retrievers = f"[bm25,{folders['retriever']}]"
    more = (f"reranker={folders['reranker']}", "rerank.depth=10", SHORT)
    metrics = evaluate(suite, tmp_path / "all", retrievers, NAMES, *more)
    assert loaded == ["retriever", "reranker"]
    alone = {
        name: evaluate(suite / name, tmp_path / "alone" / name, retrievers, *more)
        for name in ("one", "forums/x")
    }
    for name, expected in alone.items():
        written = json.loads((tmp_path / "all" / name / "metrics.json").read_text())
        assert written["overall"] == metrics["collections"][name]["overall"] == expected["overall"]
        for stage in expected["stages"]:
            own = (tmp_path / "all" / name / stage["run"]).read_bytes()
            assert own == (tmp_path / "alone" / name / stage["run"]).read_bytes()
    values = {name: of["overall"]["nDCG@10"] for name, of in metrics["collections"].items()}
    forums = fmean((values["forums/x"], values["forums/y"]))
    expected_mean = fmean((values["one"], values["two"], forums))
    assert metrics["overall"]["nDCG@10"] == pytest.approx(expected_mean)
    assert metrics == json.loads((tmp_path / "all/metrics.json").read_text())


@pytest.mark.slow
def test_a_mean_is_not_overwritten_by_that_of_other_collections_or_systems(
    suite: Path, tmp_path: Path
) -> None:
    asked = (suite, tmp_path / "all", "bm25", SHORT)
    first = evaluate(*asked, "collections=[one,two]")
    before = {path: path.read_bytes() for path in asked[1].rglob("*.json")}
    with refused("occupied-run-dir", "collections"):
        evaluate(*asked, "collections=[one,forums]")
    with refused("occupied-run-dir", "all/one", "bm25.k1: 0.9 -> 2"):
        evaluate(*asked, "collections=[one,two]", "bm25.k1=2")
    assert before == {path: path.read_bytes() for path in before}
    assert evaluate(*asked, "collections=[one,two]") == first


def test_a_collection_that_fails_is_named_at_the_end_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "broken", "c", "defect"):
        write_beir(tmp_path / "data" / name)
    lines = (tmp_path / "data/broken/corpus.jsonl").read_text().splitlines()
    broken = "\n".join([*lines[:3], '{"_id": 4'])
    (tmp_path / "data/broken/corpus.jsonl").write_text(broken)
    bm25 = stages.Stages.bm25

    def fails(self: stages.Stages, name: str) -> Any:
        return 1 / 0 if self.collection.name == "defect" else bm25(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stages, "bm25", fails)
        with refused("collections-failed", "broken/corpus.jsonl:4", "ZeroDivisionError"):
            evaluate(tmp_path / "data", tmp_path / "run", "bm25", "collections=['*']", SHORT)
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert [list(metrics[of]) for of in ("collections", "failed")] == [
        ["a", "c"], ["broken", "defect"],
    ]  # fmt: skip
    assert "not in the mean, as they failed: broken, defect" in capsys.readouterr().out

    (tmp_path / "data/broken/corpus.jsonl").write_text("\n".join(lines) + "\n")
    metrics = evaluate(tmp_path / "data", tmp_path / "run", "bm25", "collections=['*']", SHORT)
    assert list(metrics["collections"]) == ["a", "broken", "c", "defect"]
    assert metrics["failed"] == {}


@pytest.mark.parametrize(
    ("processes", "error"),
    [
        ("1", RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")),
        ("2", ZeroDivisionError("one of several processes")),
    ],
)
def test_what_ends_all_collections(
    processes: str, error: Exception, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(peers, "join", lambda: None)  # the other process is not there
    monkeypatch.setattr(stages.Stages, "bm25", fails)
    with pytest.raises(type(error)):
        evaluate(suite, tmp_path / "run", "bm25", NAMES)


@pytest.mark.slow
def test_one_index_is_held_at_a_time(
    suite: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, built = Faiss.build, list[weakref.ref[Faiss]]()

    def watched(self: Faiss, blocks: Any) -> None:
        gc.collect()
        assert not any(one() for one in built)
        built.append(weakref.ref(self))
        build(self, blocks)

    monkeypatch.setattr(Faiss, "build", watched)
    evaluate(suite, tmp_path / "run", folders["retriever"], NAMES, SHORT, "index=flat")
    assert len(built) == 4


def test_a_collection_whose_folder_another_evaluation_holds_is_refused(
    suite: Path, tmp_path: Path
) -> None:
    with (
        claimed(tmp_path / "all/two"),
        refused("collections-failed", "two: run_dir is in use by"),
    ):
        evaluate(suite, tmp_path / "all", "bm25", "collections=[one,two]", SHORT)
    assert (tmp_path / "all/one/metrics.json").exists()
    assert not (tmp_path / "all/two/config.yaml").exists()


def test_each_collection_has_its_instruction_and_an_unknown_one_the_default(
    suite: Path, instructed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "caravan")
    float32 = ("precision=float32", SHORT)
    metrics = evaluate(suite, tmp_path / "all", instructed, "collections=[one,two]", *float32)
    assert caplog.text.count("the model has no instruction for two (it has those of") == 1
    assert "no instruction for one" not in caplog.text
    for name, text in (("one", "salt road"), ("two", "camel")):
        alone = other_instruction(instructed, tmp_path / name, text)
        wanted = evaluate(suite / name, tmp_path / "alone" / name, alone, *float32)
        assert metrics["collections"][name]["overall"] == wanted["overall"]
        runs = (tmp_path / part / name / "runs/retriever.test.trec" for part in ("all", "alone"))
        assert len({run.read_bytes() for run in runs}) == 1
    # Of one store, other instructions find no embeddings of queries, but those of passages.
    run_dir, store = tmp_path / "renamed", f"store={tmp_path / 'all' / 'store' / 'one'}"
    renamed = evaluate(suite / "one", run_dir, instructed, *float32, store, "data.name=three")
    products = [path.name for path in (tmp_path / "all/store/one").glob("*.manifest.json")]
    assert sorted(name.partition(".")[0] for name in products) == ["passages", *["queries"] * 2]
    with refused("occupied-run-dir", "instructions"):
        evaluate(suite / "one", run_dir, instructed, *float32, store, "data.name=one")
    ranked = (one / "runs/retriever.test.trec" for one in (run_dir, tmp_path / "all" / "one"))
    assert len({run.read_bytes() for run in ranked}) == 2
    assert renamed["collection"]["name"] == "three"
