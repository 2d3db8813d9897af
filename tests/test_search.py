"""Questions find what queries find, with scores and times; what was made of a corpus is taken."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, evaluate

from caravan.cli.compose import compose
from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.errors import InputError
from caravan.retrieval import interactive, shards
from caravan.search import answer, questions, shown, told

FLOAT = "precision=float32"
FUSED = ("fuse=weighted", "fuse.normalise=zscore")
RERANK = ("rerank.depth=7", "rerank.weight=0.4", "rerank.rest=keep")


def arguments(beir: Path, home: Path, *overrides: str) -> list[str]:
    return [
        *("data=beir", f"data.path={beir}", f"cache_dir={home / 'cache'}", "num_workers=0"),
        *(f"run_dir={home / 'search'}", f"reuse={home}", FLOAT),
        *overrides,
    ]


def asker(beir: Path, home: Path, *overrides: str) -> interactive.Asker:
    return interactive.asker(compose(ROOT / "conf", "search", arguments(beir, home, *overrides)))


def same_as_evaluated(asked: interactive.Asker, runs: Path, collection: Collection) -> int:
    """Compare what each stage finds with its run; the number of passages that were compared."""
    rows = collection.qrels("test").queries
    seen = 0
    for row, (_, question) in zip(rows.tolist(), collection.queries.get(rows), strict=True):
        for stage in asked(question):
            path = runs / f"{stage.stage}.test.trec"
            wanted = read_run(path, collection.queries, collection.corpus).of(row)
            found = stage.run.of(0)
            assert found[0].tolist() == wanted[0].tolist(), stage.stage
            assert found[1] == pytest.approx(wanted[1], abs=1e-5)
            assert stage.seconds > 0
            seen += len(found[0])
    return seen


def test_every_stage_finds_what_evaluate_finds(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    stages = f"[bm25,{folders['retriever']}]"
    settings = (f"reranker={folders['reranker']}", *FUSED, *RERANK, FLOAT)
    evaluate(beir, tmp_path / "run", stages, *settings)
    asked = asker(beir, tmp_path, f"retriever={stages}", *settings)
    assert [stage.stage for stage in asked("salt")] == ["bm25", "retriever", "fused", "reranked"]
    assert same_as_evaluated(asked, tmp_path / "run" / "runs", collection) > 4 * 60


def test_documents_are_judged_by_segments_as_evaluate_does(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = (f"reranker={folders['reranker']}", "rerank.segment=best", "rerank.segment_words=5")
    evaluate(beir, tmp_path / "run", "bm25", *settings, FLOAT)
    asked = asker(beir, tmp_path, "retriever=bm25", *settings)
    assert same_as_evaluated(asked, tmp_path / "run" / "runs", collection) > 20


def test_what_an_evaluation_has_made_is_taken_and_left_as_it_is(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = f"retriever=[bm25,{folders['retriever']}]"
    evaluate(beir, tmp_path / "run", both.removeprefix("retriever="), FLOAT)
    store = tmp_path / "run" / "store"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("encoded again"))
    asker(beir, tmp_path, both)("salt")
    assert not (tmp_path / "search").exists()
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*")}


def test_a_second_start_encodes_nothing_and_another_model_takes_no_others_place(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"model={folders['retriever']}"
    first = asker(beir, tmp_path, model)("salt")[-1].ranks()
    asker(beir, tmp_path, model, "passage_length=8")("salt")
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("encoded again"))
    assert asker(beir, tmp_path, model)("salt")[-1].ranks() == first
    assert len(list((tmp_path / "search" / "store").glob("passages.*.manifest.json"))) == 2


@pytest.mark.parametrize("name", ["other", "tiny"])
def test_a_collection_that_the_model_was_not_trained_on_is_told(
    beir: Path,
    folders: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    model = shutil.copytree(folders["retriever"], tmp_path / "model")
    record = json.loads((model / "caravan.json").read_text())
    record["facts"]["collection"] = f"{name} (0123456789ab)"
    (model / "caravan.json").write_text(json.dumps(record))
    asker(beir, tmp_path, f"retriever={model}")
    told = f"what is searched is tiny, and {model} was trained on other" in caplog.text
    assert told == (name == "other")


def test_an_answer_has_texts_scores_and_ranks_of_each_stage(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    asked = asker(beir, tmp_path, f"retriever=[bm25,{folders['retriever']}]", "index.k=60")
    found = answer("salt silk", asked, show=60)
    assert set(found["seconds"]) == {"bm25", "retriever", "fused"}
    assert len(found["hits"]) == 60
    every = slice(0, 60)
    ids, read = collection.corpus.ids(every), collection.corpus.get(every)
    texts = dict(zip(ids, read, strict=True))
    missed = 0
    for rank, hit in enumerate(found["hits"], start=1):
        assert (hit["title"], hit["text"]) == texts[hit["id"]]
        assert hit["rank"] == hit["ranks"]["fused"] == rank
        assert (hit["scores"]["bm25"] is None) == (hit["ranks"]["bm25"] is None)
        has_word = {"salt", "silk"} & set(hit["text"].split())
        assert bool(has_word) == (hit["ranks"]["bm25"] is not None)
        missed += not has_word
    assert missed
    assert len(answer("salt", asked, show=3)["hits"]) == 3


def search(home: Path, *given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "caravan.search", *given]
    return subprocess.run(command, capture_output=True, text=True, cwd=home, input="")


def test_questions_are_answered_by_a_line_of_json_each(beir: Path, tmp_path: Path) -> None:
    given = arguments(beir, tmp_path, "retriever=bm25", "show=2", "--json")
    done = search(tmp_path, *given, "--ask", "salt = gold?", "--ask", "  unheard")
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["question"] for one in answers] == ["salt = gold?", "unheard"]
    assert [len(one["hits"]) for one in answers] == [2, 0]
    assert all(one["seconds"]["bm25"] > 0 for one in answers)


def test_standard_input_has_a_question_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"\xef\xbb\xbfsalt?\n\n  gold = silk \nsand \xff"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert list(questions(None, quiet=True)) == ["salt?", "gold = silk", "sand \ufffd"]


def test_an_answer_for_a_person_has_scores_ranks_and_times(beir: Path, tmp_path: Path) -> None:
    asked = asker(beir, tmp_path, "retriever=bm25")
    best = answer("salt", asked, show=2)["hits"]
    lines = shown("salt", asked, show=2).splitlines()
    heads = [line for line in lines if re.match(r" \d  p\d+", line)]
    assert [line.split()[1] for line in heads] == [hit["id"] for hit in best]
    assert f"    bm25 {best[1]['scores']['bm25']:.4g} (2)" in lines
    assert re.search(r"score \(rank\) by stage; bm25 [\d.]+ ms$", "\n".join(lines).strip())
    assert "nothing found" in shown("unheard", asked, show=2)


def test_a_passage_does_not_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    hurt = "\x1b[2J\x1b]0;title\x07{} \x9b31m\u202eand more"
    hit = {"rank": 1, "id": "p1\x1b[8m", "title": hurt.format("Salt"), "text": hurt.format("Gold")}
    found = {"hits": [{**hit, "ranks": {"bm25": 1}, "scores": {"bm25": 2.0}}], "seconds": {}}
    monkeypatch.setattr("caravan.search.answer", lambda *_: found)
    printed = shown("salt", None, show=1)  # type: ignore[arg-type]
    assert "p1 Salt and more" in printed
    assert "Gold and more" in printed
    line = told("salt", None, show=1)  # type: ignore[arg-type]
    assert json.loads(line) == found  # for a script, the data as they are
    for text in (printed, line):
        assert not set(text) & {*"\x1b\x07\x9b\u202e"}


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("", r"model \(conf/search.yaml:\d+\): nothing says what searches; give a model folder"),
        ("model=FOLDERS/reranker", r"model \(command line\): .* is a reranker; give the folder of"),
        ("model=nowhere", r"model \(command line\): there is no folder nowhere$"),
        ("model=FOLDERS/retriever retriever=bm25", "retriever is given too, and says what"),
        ("retriever=[bm25,README.md]", "README.md is a file, and no run knows new questions"),
        ("retriever=bm25 show=0", "it must be at least 1, not 0"),
        ("retriever=bm25 shwo=3", r"did you mean show\?"),
    ],
)
def test_mistakes_are_told_before_anything_loads(
    overrides: str, wanted: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name, path in folders.items():
        overrides = overrides.replace(f"FOLDERS/{name}", path)
    with pytest.raises(InputError, match=r"^1 mistake in the config[^\n]*\n[^\n]*" + wanted):
        compose(ROOT / "conf", "search", overrides.split())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--ask", " "], "argument --ask: it is empty; write a question after it, in quotes"),
        (["-m"], "-m: a search has no jobs; leave it out"),
    ],
)
def test_options_are_told_too(given: list[str], wanted: str, tmp_path: Path) -> None:
    done = search(tmp_path, "retriever=bm25", *given)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
