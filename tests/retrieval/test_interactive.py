"""Search finds what evaluations find, reuses their products, and writes none of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.commands import evaluate
from tests.files import ranked
from tests.refusals import refused

from caravan.cli.evaluate import searcher_of
from caravan.data.collection import Collection
from caravan.retrieval import store
from caravan.retrieval.interactive import Searcher
from caravan.search import config_of

FLOAT = "precision=float32"


def open_search(beir: Path, home: Path, *overrides: str) -> Searcher:
    given = [
        *("data=beir", f"data.path={beir}", f"cache_dir={home / 'cache'}", "num_workers=0"),
        *(f"run_dir={home / 'search'}", FLOAT),
        *overrides,
    ]
    return searcher_of(config_of(given), reuse=home)


def compare_with_runs(search: Searcher, runs: Path, collection: Collection) -> int:
    """Compare each stage with its run; returns the number of compared passages."""
    rows = collection.qrels("test").queries
    seen = 0
    for row, (_, query) in zip(rows.tolist(), collection.queries.get(rows), strict=True):
        for result in search(query):
            wanted = ranked(runs / f"{result.stage}.test.trec", collection)[row]
            found = result.run.of(0)
            assert found[0].tolist() == list(wanted), result.stage
            assert found[1] == pytest.approx(list(wanted.values()), abs=1e-5)
            assert result.seconds > 0
            seen += len(found[0])
    return seen


def test_every_stage_finds_what_an_evaluation_finds_with_its_products(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    retrievers = f"[bm25,{folders['retriever']}]"
    fused = ("fuse=weighted", "fuse.normalise=zscore")
    rerank = ("rerank.depth=7", "rerank.weight=0.4", "rerank.rest=keep", "rerank.segment=best")
    segments = ("segment=best", "segment_words=6", "rerank.segment_words=5")
    settings = (f"reranker={folders['reranker']}", *fused, *rerank, *segments, FLOAT)
    evaluate(beir, tmp_path / "run", retrievers, *settings)
    products = tmp_path / "run" / "store"
    before = {path: path.stat().st_mtime_ns for path in products.rglob("*")}
    monkeypatch.setattr(store, "write_shard", lambda *_: pytest.fail("encoded again"))
    search = open_search(beir, tmp_path, f"retriever={retrievers}", *settings)
    assert [one.stage for one in search("salt")] == ["bm25", "retriever", "fused", "reranked"]
    assert compare_with_runs(search, tmp_path / "run" / "runs", collection) > 4 * 60
    assert not (tmp_path / "search").exists()
    assert before == {path: path.stat().st_mtime_ns for path in products.rglob("*")}


def test_other_settings_get_their_own_embeddings_and_a_second_start_encodes_nothing(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"retriever={folders['retriever']}"
    first = open_search(beir, tmp_path, model)("salt")[-1].ranks()
    assert open_search(beir, tmp_path, model, "passage_length=8")("salt")[-1].ranks() != first
    monkeypatch.setattr(store, "write_shard", lambda *_: pytest.fail("encoded again"))
    assert open_search(beir, tmp_path, model)("salt")[-1].ranks() == first


def test_a_query_has_the_instruction_of_the_collection(
    beir: Path, instructed: Path, collection: Collection, tmp_path: Path
) -> None:
    settings = (FLOAT, "data.name=one")
    evaluate(beir, tmp_path / "run", instructed, *settings)
    search = open_search(beir, tmp_path, f"retriever={instructed}", *settings)
    assert compare_with_runs(search, tmp_path / "run" / "runs", collection)
    default = open_search(beir, tmp_path, f"retriever={instructed}", FLOAT)("salt")[-1].ranks()
    assert search("salt")[-1].ranks() != default


def test_neither_a_run_file_nor_several_collections_can_be_searched(
    beir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "some.trec"
    run.touch()
    with refused("run-in-search", str(run)):
        open_search(beir, tmp_path, f"retriever=[bm25,{run}]")
    with refused("several-collections", "collections"):
        open_search(beir.parent, tmp_path, "retriever=bm25", f"collections=[{beir.name}]")
