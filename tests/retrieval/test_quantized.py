"""Compressed indexes against exact search and naive codes."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from tests.commands import evaluate
from tests.retrieval.test_index import reference, vectors

from caravan.retrieval import quantized
from caravan.retrieval.exact import Exact
from caravan.retrieval.index import ArrayBlocks, BestSegments
from caravan.retrieval.quantized import Binary, Rescored

PASSAGES = vectors(700, 20).astype(np.float16)  # 20 bits do not fill their last byte
QUERIES = vectors(30, 20, seed=1)
BLOCKS = ArrayBlocks(PASSAGES, 90)
KINDS = [Rescored, Binary]


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_passages_as_candidates_search_is_exact(
    kind: type[Rescored], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "MOST_NUMBERS", 20 * 64)  # 64 pairs at a time
    monkeypatch.setattr(quantized, "MOST_FOUND", 7 * len(PASSAGES))  # 7 queries at a time
    index, exact = kind(k=25, rescore=10_000), Exact(k=25)
    for one in (index, exact):
        one.build(BLOCKS)
    scores, rows = index.search(QUERIES)
    wanted, expected = exact.search(QUERIES)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    documents = [BestSegments(one, np.full(350, 2)) for one in (index, exact)]
    np.testing.assert_array_equal(documents[0].search(QUERIES)[1], documents[1].search(QUERIES)[1])


def _codes(vectors: np.ndarray) -> np.ndarray:
    """256 levels between the least and the greatest value of each dimension."""
    low, high = PASSAGES.min(axis=0), PASSAGES.max(axis=0)
    low, high = low.astype(np.float64), high.astype(np.float64)
    level = np.floor((vectors - low) / (high - low) * 255).clip(0, 255)
    return low + (level + 0.5) / 255 * (high - low)


def test_candidates_are_the_nearest_by_their_codes() -> None:
    passages = PASSAGES.astype(np.float64)
    bits = [(of > 0).astype(int) for of in (QUERIES, passages)]
    near = {
        Rescored: QUERIES @ _codes(passages).T,
        Binary: -np.abs(bits[0][:, None] - bits[1][None]).sum(axis=2),
    }
    for kind, closeness in near.items():
        index = kind(k=10, rescore=40)
        index.build(BLOCKS)
        _, rows = index.search(QUERIES, 40)
        for query, found in enumerate(rows):
            others = np.setdiff1d(np.arange(len(passages)), found)
            worst, best = closeness[query, found].min(), closeness[query, others].max()
            assert worst >= best - 1e-6, kind
        top, exact = index.search(QUERIES)[1], reference(passages, QUERIES, 10)[1]
        ordered = [
            [row for row in of if row in found] for of, found in zip(exact, top, strict=True)
        ]
        for found, order in zip(top.tolist(), ordered, strict=True):
            assert [row for row in found if row in order] == order  # by their full vectors


@pytest.mark.parametrize(
    ("index", "size"), [(Rescored(), 20), (Binary(), 3), (Exact(), 40), (Rescored("PQ4x4"), 2)]
)
def test_the_bytes_of_a_vector_are_those_in_memory(index: Rescored | Exact, size: int) -> None:
    index.build(BLOCKS)
    assert index.bytes_per_vector == size
    if isinstance(index, Rescored):
        held = index._index
        write = faiss.serialize_index
        if isinstance(held, faiss.IndexBinary):
            write = faiss.serialize_index_binary
        assert size * 700 <= len(write(held)) < size * 700 + 2000  # with ranges or centroids


def test_an_evaluation_records_bytes_and_recall_and_reads_the_stored_vectors(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    store, runs = f"store={tmp_path / 'store'}", {}
    for name, size in (("exact", 32), ("flat", 64), ("int8", 16), ("binary", 2)):
        settings = (f"index={name}", "dim=16", store, "measures=[R@20]", "index.k=60")
        metrics = evaluate(beir, tmp_path / name, folders["retriever"], *settings)
        assert metrics["facts"]["bytes_per_vector"] == size
        recall = metrics["facts"].get("recall_against_exact")
        assert recall == (None if name in ("exact", "flat") else 1)
        lines = (tmp_path / name / metrics["run"]).read_text().splitlines()
        runs[name] = [line.split()[:4] for line in lines]
    assert len(runs["exact"]) == 4 * 60
    # All passages are candidates.
    assert runs["exact"] == runs["flat"] == runs["int8"] == runs["binary"]
