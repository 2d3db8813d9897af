"""Reranking against the model pair by pair; depth, weight, segments, interruption, memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import evaluate
from tests.files import random_run
from tests.models.small import scored_alone
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.data.collection import Collection
from caravan.data.runs import Run, write_run
from caravan.data.segments import Segments
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.crossencoder import CrossEncoder
from caravan.retrieval.inference import Inference
from caravan.retrieval.rerank import Reranker, Reranking

ENCODING = Encoding(kind="reranker", query_length=16, passage_length=48)


@pytest.fixture(scope="module")
def reranker(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = CrossEncoder(tiny_backbone().scorer(tokenizer), ENCODING)
    torch.nn.init.normal_(model.plain.score.weight)
    path = tmp_path_factory.mktemp("models") / "reranker"
    folder.save(path, model, tokenizer, ENCODING, {})
    return path


@pytest.fixture
def candidates(collection: Collection) -> Run:
    return random_run(collection, "test", 9)


def opened(folder: Path, **settings: Any) -> Reranker:
    chosen = Reranking(**settings)
    model = Inference(folder, "reranker", "float32", token_budget=256, overrides=chosen.lengths)
    return Reranker(model, chosen)


def rerank(reranker: Reranker, run: Run, collection: Collection, **more: Any) -> Run:
    return reranker.rerank(run, collection.queries, collection.corpus, **more)


def test_scores_are_those_of_the_pairs_alone(
    reranker: Path, collection: Collection, candidates: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "caravan")
    run, model = candidates, opened(reranker, block=7)
    found = rerank(model, run, collection)
    assert f"rerank {len(run.scores)} pairs with {reranker} on cpu, float32" in caplog.text
    for row in found.query_rows.tolist():
        rows, scores = found.of(row)
        np.testing.assert_allclose(scores, scored_alone(reranker, row, rows, collection), atol=1e-5)
        assert (np.diff(scores) <= 0).all()


def test_candidates_below_the_depth_are_dropped_kept_in_their_order_or_added_if_judged(
    reranker: Path, collection: Collection, candidates: Run
) -> None:
    run, qrels = candidates, collection.qrels("test")
    judged = rerank(opened(reranker, depth=4, judged=True), run, collection, qrels=qrels)
    dropped = rerank(opened(reranker, depth=4), run, collection)
    kept = rerank(opened(reranker, depth=4, rest="keep"), run, collection)
    for row in run.query_rows:
        assert set(dropped.of(row)[0]) == set(run.of(row)[0][:4])
        assert set(judged.of(row)[0]) == {*run.of(row)[0][:4], *qrels.of(row)[0]}
        assert kept.of(row)[0].tolist() == [*dropped.of(row)[0], *run.of(row)[0][4:]]


@pytest.mark.parametrize("normalise", ["minmax", "none"])
def test_a_weight_below_one_mixes_in_the_candidates_own_score(
    reranker: Path, collection: Collection, candidates: Run, normalise: str
) -> None:
    run = candidates
    pure = rerank(opened(reranker), run, collection)
    mixed = rerank(opened(reranker, weight=0.25, normalise=normalise), run, collection)
    for row in run.query_rows:
        parts = []
        for rows, scores in (pure.of(row), run.of(row)):
            if normalise == "minmax":
                scores = (scores - scores.min()) / (scores.max() - scores.min())
            parts.append(dict(zip(rows.tolist(), scores, strict=True)))
        for passage, score in zip(*mixed.of(row), strict=True):
            expected = 0.25 * parts[0][passage] + 0.75 * parts[1][passage]
            assert score == pytest.approx(expected, abs=1e-5)


def test_the_best_segment_scores_at_least_as_high_as_the_first(
    reranker: Path, collection: Collection, candidates: Run
) -> None:
    run = candidates
    found = {
        segment: rerank(opened(reranker, segment=segment, segment_words=5), run, collection)
        for segment in ("first", "best")
    }
    better = 0
    for row in run.query_rows:
        first, best = (dict(zip(*found[name].of(row), strict=True)) for name in ("first", "best"))
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


def test_the_run_of_another_system_can_be_reranked_and_its_digest_counts(
    beir: Path, reranker: Path, collection: Collection, candidates: Run, tmp_path: Path
) -> None:
    given, model = tmp_path / "other.trec", f"reranker={reranker}"
    write_run(given, candidates, collection.queries, collection.corpus)
    first = evaluate(beir, tmp_path / "run", given, model, "measures=[MRR@10]")
    assert [stage["stage"] for stage in first["stages"]] == ["run", "reranked"]
    other = random_run(collection, "test", 9, seed=1)
    write_run(given, other, collection.queries, collection.corpus)
    again = evaluate(beir, tmp_path / "again", given, model, "measures=[MRR@10]")
    assert again["stages"][1]["run_xxh3"] != first["stages"][1]["run_xxh3"]
    with refused("run-of-other-queries", "other.trec", "dev"):
        evaluate(beir, tmp_path / "dev", given, "data.split=dev")
