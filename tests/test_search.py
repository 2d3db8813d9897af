"""Search at the command line: queries in, answers for a person or a script out."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT
from tests.conftest import Call
from tests.files import records
from tests.refusals import refused
from tests.retrieval.test_interactive import open_search

from caravan.data.collection import Collection
from caravan.search import answer, config_of, json_line, main, page, read_queries


def test_an_answer_has_texts_scores_and_ranks_of_each_stage(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    search = open_search(beir, tmp_path, f"retriever=[bm25,{folders['retriever']}]", "index.k=60")
    found = answer("salt silk", search, show=60)
    assert set(found["seconds"]) == {"bm25", "retriever", "fused"}
    assert len(found["hits"]) == 60
    texts = {name: (title, text) for name, title, text in records(collection.corpus)}
    missed = 0
    for rank, hit in enumerate(found["hits"], start=1):
        assert (hit["title"], hit["text"]) == texts[hit["id"]]
        assert hit["rank"] == hit["ranks"]["fused"] == rank
        assert (hit["scores"]["bm25"] is None) == (hit["ranks"]["bm25"] is None)
        has_word = {"salt", "silk"} & set(hit["text"].split())
        assert bool(has_word) == (hit["ranks"]["bm25"] is not None)
        missed += not has_word
    assert missed
    assert len(answer("salt", search, show=3)["hits"]) == 3


def test_an_answer_for_a_person_has_scores_ranks_and_times(beir: Path, tmp_path: Path) -> None:
    search = open_search(beir, tmp_path, "retriever=bm25")
    best = answer("salt", search, show=2)
    lines = page(best).splitlines()
    heads = [line for line in lines if re.match(r" \d  p\d+", line)]
    assert [line.split()[1] for line in heads] == [hit["id"] for hit in best["hits"]]
    assert f"    bm25 {best['hits'][1]['scores']['bm25']:.4g} (2)" in lines
    assert re.search(r"score \(rank\) by stage; bm25 [\d.]+ ms$", "\n".join(lines).strip())
    assert "nothing found" in page(answer("unheard", search, show=2))


def test_a_passage_does_not_control_the_terminal() -> None:
    hurt = "\x1b[2J\x1b]0;title\x07{} \x9b31m\u202eand more"
    hit = {"rank": 1, "id": "p1\x1b[8m", "title": hurt.format("Salt"), "text": hurt.format("Gold")}
    found = {"hits": [{**hit, "ranks": {"bm25": 1}, "scores": {"bm25": 2.0}}], "seconds": {}}
    printed, line = page(found), json_line(found)
    assert "Salt 31mand more" in printed
    assert "Gold 31mand more" in printed
    assert json.loads(line) == found  # a script gets the data unchanged
    for text in (printed, line):
        assert not set(text) & {*"\x1b\x07\x9b\u202e"}


@pytest.mark.slow
def test_the_command_answers_each_query_with_a_line_of_json(beir: Path, tmp_path: Path) -> None:
    data = ("data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}")
    given = (*data, f"run_dir={tmp_path / 'search'}", "retriever=bm25", "--show", "2", "--json")
    asked = ("--ask", "salt = gold?", "--ask", "  unheard")
    command = [sys.executable, "-m", "caravan.search", *given, *asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, input="")
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["query"] for one in answers] == ["salt = gold?", "unheard"]
    assert [len(one["hits"]) for one in answers] == [2, 0]
    assert all(one["seconds"]["bm25"] > 0 for one in answers)


def test_standard_input_has_a_query_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"\xef\xbb\xbfsalt?\n\n  gold = silk \nsand \xff"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert list(read_queries(to_stderr=True)) == ["salt?", "gold = silk", "sand \ufffd"]


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ("", "retriever (conf/evaluate.yaml:"),
        ("retriever=FOLDERS/reranker", "retriever (command line)"),
        ("retriever=nowhere", "nowhere"),
        ("retriever=bm25 show=3", "show"),
    ],
)
def test_mistakes_are_reported_before_anything_loads(
    overrides: str, place: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name, path in folders.items():
        overrides = overrides.replace(f"FOLDERS/{name}", path)
    with refused("config-mistakes", "1 mistake", place):
        config_of(overrides.split())


@pytest.mark.parametrize("given", [["--ask", " "], ["-m"], ["--show", "0"], ["model=x"]])
def test_wrong_options_are_refused(given: list[str], call: Call) -> None:
    code, _, error = call(main, "retriever=bm25", *given)
    assert (code, given[0] in error) == (2, True)


def test_a_search_is_one_process(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("several-processes", "2 were started"):
        open_search(beir, tmp_path, "retriever=bm25")
