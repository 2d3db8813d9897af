"""The pipeline past retrieval: fuse, rerank, resume; every stage a run with its figures."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.commands import ROOT, evaluate, evaluate_arguments
from tests.tiny import tiny_backbone, write_beir

from caravan import progress
from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir
from caravan.data.runs import Run, read_run, write_run
from caravan.data.segments import Segments
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder
from caravan.models.tiny_llama import TinyLlama
from caravan.retrieval import shards
from caravan.retrieval.fusion import ReciprocalRank, Weighted
from caravan.retrieval.metrics import score_run
from caravan.retrieval.rerank import Reranking, Scorer

CONTRACT = Encoding(kind="reranker", query_length=16, passage_length=48)


@pytest.fixture(scope="module")
def reranker(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = CrossEncoder(tiny_backbone().scorer(tokenizer), CONTRACT)
    torch.nn.init.normal_(model.plain.score.weight)
    path = tmp_path_factory.mktemp("models") / "reranker"
    folder.save(path, model, tokenizer, CONTRACT, {})
    return path


@pytest.fixture(scope="module")
def retriever(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoding = Encoding(query_length=16, passage_length=24)
    path = tmp_path_factory.mktemp("models") / "retriever"
    torch.manual_seed(4)
    folder.save(
        path, BiEncoder(tiny_backbone().model(tokenizer), encoding), tokenizer, encoding, {}
    )
    return path


# The rusage of a child is no measure: it begins with the memory of the parent that forked it.
TELLS_PEAK = """
import atexit, runpy, sys
status = "/proc/self/status"
atexit.register(lambda: print(open(status).read().split("VmHWM:")[1].split()[0]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _candidates(collection: Collection, depth: int = 9, seed: int = 0) -> Run:
    rng = np.random.default_rng(seed)
    queries = collection.qrels("test").queries
    rows = np.stack([rng.permutation(len(collection.corpus))[:depth] for _ in queries])
    return Run.from_topk(queries, rng.normal(size=rows.shape), rows)


def _scorer(reranker: Path, **settings: Any) -> Scorer:
    return Scorer(reranker, Reranking(**settings), "float32", token_budget=256, num_workers=0)


def _rerank(scorer: Scorer, run: Run, collection: Collection, to: Path, **more: Any) -> Run:
    return scorer.rerank(run, collection.queries, collection.corpus, to, {"of": "test"}, **more)


def test_every_stage_of_the_pipeline_leaves_its_run_and_its_figures(
    beir: Path, retriever: Path, reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    metrics = evaluate(
        *(beir, tmp_path / "run", f"[bm25,{retriever}]"),
        *(f"reranker={reranker}", "rerank.depth=8", "measures=[MRR@10,R@20]", "index.k=20"),
    )
    names = [stage["stage"] for stage in metrics["stages"]]
    assert names == ["bm25", "retriever", "fused", "reranked"]
    best = 0.0
    for stage in metrics["stages"]:
        run = read_run(tmp_path / "run" / stage["run"], collection.queries, collection.corpus)
        texts = collection.queries, collection.corpus
        figures = score_run(run, collection.qrels("test"), *texts, ["MRR@10", "R@20"])["overall"]
        assert stage["overall"] == figures
        if stage["stage"] != "bm25":
            assert stage["gain"] == pytest.approx(figures["MRR@10"] - best)
        best = max(best, figures["MRR@10"])
    assert metrics["overall"] == metrics["stages"][-1]["overall"]
    assert [stage["depth"] for stage in metrics["stages"]] == [20, 20, 20, 8]
    reranked = read_run(tmp_path / "run/runs/reranked.test.trec", *texts)
    fused = read_run(tmp_path / "run/runs/fused.test.trec", *texts)
    for row in fused.query_rows:
        assert set(reranked.of(row)[0]) == set(fused.of(row)[0][:8])


def test_reranking_logs_what_it_does_first_and_advances_by_chunk(
    reranker: Path,
    collection: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = itertools.count(0, 5)
    monkeypatch.setattr(progress.time, "monotonic", clock.__next__)
    run = _candidates(collection)
    with caplog.at_level(logging.INFO, "caravan"):
        _rerank(_scorer(reranker), run, collection, tmp_path / "scores")
    pairs = len(run.passage_rows)
    assert caplog.messages[0] == f"rerank {pairs} pairs with {reranker} on cpu, float32"
    steps = [message for message in caplog.messages if f" of {pairs} pairs, " in message]
    assert len(steps) >= 2  # in the only block


def test_a_run_of_another_system_is_a_retriever_and_its_digest_counts(
    beir: Path, reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    given = tmp_path / "other.trec"
    write_run(given, _candidates(collection), collection.queries, collection.corpus)
    first = evaluate(beir, tmp_path / "run", given, f"reranker={reranker}", "measures=[MRR@10]")
    assert [stage["stage"] for stage in first["stages"]] == ["run", "reranked"]
    write_run(given, _candidates(collection, seed=1), collection.queries, collection.corpus)
    again = evaluate(beir, tmp_path / "again", given, f"reranker={reranker}", "measures=[MRR@10]")
    assert again["stages"][1]["run_xxh3"] != first["stages"][1]["run_xxh3"]


def test_a_run_over_other_queries_is_refused(
    beir: Path, collection: Collection, tmp_path: Path
) -> None:
    write_run(tmp_path / "r.trec", _candidates(collection), collection.queries, collection.corpus)
    with pytest.raises(InputError, match=r"r\.trec ranks none of the dev queries"):
        evaluate(beir, tmp_path / "run", tmp_path / "r.trec", "data.split=dev")


def test_scores_are_those_of_the_pairs_alone(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    scorer = _scorer(reranker, block=7)
    found = _rerank(scorer, _candidates(collection), collection, tmp_path / "s")
    model, templates = folder.load(reranker)[0], scorer.loaded[1]
    for row in found.query_rows:
        rows, scores = found.of(row)
        pairs = templates.pairs(
            collection.queries.get([int(row)]) * len(rows), collection.corpus.get(rows)
        )
        with torch.no_grad():
            alone = [
                float(model(torch.tensor([p.ids]), torch.ones(1, len(p.ids), dtype=torch.int64)))
                for p in pairs
            ]
        np.testing.assert_allclose(scores, alone, atol=1e-5)
        assert (np.diff(scores) <= 0).all()


def test_an_interrupted_reranking_goes_on_and_scores_no_pair_twice(
    reranker: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _candidates(collection)
    whole = _rerank(_scorer(reranker, block=5), run, collection, tmp_path / "whole")
    write, written = shards._write, []

    def write_or_die(path: Path, *content: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *content)

    monkeypatch.setattr(shards, "_write", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        _rerank(_scorer(reranker, block=5), run, collection, tmp_path / "cut")
    monkeypatch.setattr(shards, "_write", lambda *a: (written.append(a[0].name), write(*a)))
    resumed = _rerank(_scorer(reranker, block=5), run, collection, tmp_path / "cut")
    assert len(written) == len(set(written)) == -(-len(run.scores) // 5)
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    np.testing.assert_array_equal(resumed.passage_rows, whole.passage_rows)


def test_what_lies_below_the_depth_is_dropped_or_kept_in_its_order(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    run = _candidates(collection)
    dropped = _rerank(_scorer(reranker, depth=4), run, collection, tmp_path / "d")
    kept = _rerank(_scorer(reranker, depth=4, rest="keep"), run, collection, tmp_path / "k")
    for row in run.query_rows:
        assert set(dropped.of(row)[0]) == set(run.of(row)[0][:4])
        assert kept.of(row)[0].tolist() == [*dropped.of(row)[0], *run.of(row)[0][4:]]


def test_a_weight_below_one_mixes_the_candidates_own_score_in(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    run = _candidates(collection)
    pure = _rerank(_scorer(reranker), run, collection, tmp_path / "p")
    mixed = _rerank(_scorer(reranker, weight=0.25), run, collection, tmp_path / "m")
    for row in run.query_rows:
        parts = []
        for part in (pure, run):
            rows, scores = part.of(row)
            share = (scores - scores.min()) / (scores.max() - scores.min())
            parts.append(dict(zip(rows.tolist(), share, strict=True)))
        for passage, score in zip(*mixed.of(row), strict=True):
            assert score == pytest.approx(
                0.25 * parts[0][passage] + 0.75 * parts[1][passage], abs=1e-5
            )
    with pytest.raises(InputError, match="above 0, and at most 1"):
        Reranking(weight=0.0)


def test_judged_passages_are_scored_for_a_teacher(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    qrels = collection.qrels("test")
    run = _rerank(
        _scorer(reranker, depth=4, judged=True),
        *(_candidates(collection), collection, tmp_path / "j"),
        qrels=qrels,
    )
    for row in qrels.queries:
        assert set(qrels.positives(int(row))) <= set(run.of(int(row))[0])


def test_the_best_segment_scores_at_least_as_high_as_the_first(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    run = _candidates(collection)
    found = {
        segment: _rerank(
            _scorer(reranker, segment=segment, segment_words=5), run, collection, tmp_path / segment
        )
        for segment in ("first", "best")
    }
    better = 0
    for row in run.query_rows:
        first = dict(zip(*found["first"].of(row), strict=True))
        best = dict(zip(*found["best"].of(row), strict=True))
        assert first.keys() == best.keys()
        assert all(best[passage] >= first[passage] - 1e-5 for passage in first)
        better += sum(best[passage] > first[passage] + 1e-5 for passage in first)
    assert better


def test_segments_are_the_words_of_a_document_in_order(collection: Collection) -> None:
    rows = np.array([4, 2, 4])
    segments = Segments(collection.corpus, rows, words=6)
    numbers, counts = segments.of(rows)
    assert counts[0] == counts[2]
    at = np.split(numbers, np.cumsum(counts)[:-1])
    for row, own in zip(rows, at, strict=True):
        ((title, text),) = collection.corpus.get([int(row)])
        cut = segments.get(own)
        assert " ".join(part for _, part in cut) == " ".join(text.split())
        assert all(given == title and len(part.split()) <= 6 for given, part in cut)


def test_reciprocal_ranks_and_weights_by_hand() -> None:
    queries = np.array([0, 3])
    one = Run.from_topk(queries, np.array([[3.0, 1.0], [2.0, 1.0]]), np.array([[5, 6], [7, 8]]))
    two = Run.from_topk(np.array([0]), np.array([[9.0, 8.0]]), np.array([[6, 9]]))
    fused = ReciprocalRank(k=60)([one, two])
    assert fused.of(0)[0].tolist() == [6, 5, 9]
    np.testing.assert_allclose(fused.of(0)[1], [1 / 62 + 1 / 61, 1 / 61, 1 / 62], rtol=1e-6)
    assert fused.of(3)[0].tolist() == [7, 8]
    weighted = Weighted([0.25, 1.0])([one, two])
    assert dict(zip(*weighted.of(0), strict=True)) == {6: 1.0, 5: 0.25, 9: 0.0}
    plain = Weighted([1.0, 0.5], "none")([one, two])
    assert dict(zip(*plain.of(0), strict=True)) == {5: 3.0, 6: 5.5, 9: 4.0}
    deviations = Weighted(normalise="zscore")([one, two])
    np.testing.assert_allclose(sorted(deviations.of(0)[1]), [0.0, 2.0, 2.0], atol=1e-6)
    with pytest.raises(InputError, match="1 numbers for 2 runs"):
        Weighted([1.0])([one, two])


def test_a_retriever_is_refused_as_a_reranker_and_the_reverse(
    beir: Path, retriever: Path, reranker: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a retriever; give the folder of a reranker"):
        evaluate(beir, tmp_path / "a", "bm25", f"reranker={retriever}")
    with pytest.raises(InputError, match="is a reranker; give the folder of a retriever"):
        evaluate(beir, tmp_path / "b", reranker)


def test_a_finished_reranking_is_not_done_again(
    beir: Path, reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (beir, tmp_path / "run", "bm25", f"reranker={reranker}", "measures=[MRR@10]")
    first = evaluate(*asked)
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("scored again"))
    assert evaluate(*asked) == first
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        evaluate(beir, tmp_path / "other", *asked[2:], "rerank.depth=3")


def test_a_block_that_was_lost_is_scored_again(beir: Path, reranker: Path, tmp_path: Path) -> None:
    asked = (beir, tmp_path / "run", "bm25", f"reranker={reranker}", "measures=[MRR@10]")
    evaluate(*asked, "rerank.block=8")
    run = tmp_path / "run" / "runs" / "reranked.test.trec"
    before = run.read_bytes()
    (block,) = (tmp_path / "run" / "store").glob("scores.test.*/00000001.npy")
    block.unlink()
    run.unlink()
    evaluate(*asked, "rerank.block=8")
    assert run.read_bytes() == before


def test_a_reranker_that_has_diverged_is_named(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(reranker, broken)
    weights = load_file(broken / "model.safetensors")
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = torch.full_like(weights[name], 1e38)  # finite, but not its products
    save_file(weights, broken / "model.safetensors")
    rows = np.array([0, 1])
    to = tmp_path / "scores"
    with pytest.raises(InputError, match=r"broken gives scores that are NaN.*2 of 2.*train it"):
        _scorer(broken).scores(rows, rows, collection.queries, collection.corpus, to, {})


def test_lengths_that_leave_no_room_are_told_by_the_names_they_have_here(
    reranker: Path, collection: Collection, tmp_path: Path
) -> None:
    rows = np.array([0, 1])
    short = _scorer(reranker, query_length=4, passage_length=4)
    with pytest.raises(InputError, match=r"rerank\.query_length \+ rerank\.passage_length = 8"):
        short.scores(rows, rows, collection.queries, collection.corpus, tmp_path, {})


@pytest.mark.slow
def test_memory_of_the_pipeline_is_flat_in_queries_and_pairs(
    tokenizer: Any, tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=4000, queries=1100, longest=160)
    texts = Beir(beir).collection(tmp_path / "cache")
    encoding = Encoding(kind="reranker", query_length=16, passage_length=176)
    model = CrossEncoder(
        TinyLlama(vocab_size=400, hidden_size=64, layers=2, heads=2).scorer(tokenizer), encoding
    )
    torch.nn.init.normal_(model.plain.score.weight)
    folder.save(tmp_path / "model", model, tokenizer, encoding, {})
    rng = np.random.default_rng(0)
    peaks = {}
    for queries in (10, 100, 1000):
        rows = np.stack([rng.permutation(len(texts.corpus))[:100] for _ in range(queries)])
        candidates = Run.from_topk(np.arange(queries), rng.normal(size=rows.shape), rows)
        run = tmp_path / f"{queries}.trec"
        write_run(run, candidates, texts.queries, texts.corpus)
        given = evaluate_arguments(
            *(beir, tmp_path / str(queries), run, f"reranker={tmp_path / 'model'}"),
            *("data.split=train", "rerank.block=1000", "measures=[MRR@10]"),
        )
        done = subprocess.run(
            [sys.executable, "-c", TELLS_PEAK, str(ROOT / "evaluate.py"), *given],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks[queries * 100] = int(done.stdout.split()[-1]) / 1024  # MB
    assert peaks[100_000] < peaks[10_000] + 200 < peaks[1000] + 500, peaks


def test_metrics_hold_the_speed_of_each_stage(beir: Path, reranker: Path, tmp_path: Path) -> None:
    evaluate(beir, tmp_path / "run", "bm25", f"reranker={reranker}", "measures=[MRR@10]")
    stages = json.loads((tmp_path / "run" / "metrics.json").read_text())["stages"]
    assert all(stage["queries_per_second"] > 0 for stage in stages)
