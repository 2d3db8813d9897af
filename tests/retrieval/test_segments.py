"""Dense retrieval of long documents by their segments, against the model segment by segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.commands import evaluate

from caravan.data.collection import Collection
from caravan.data.runs import Run, read_run
from caravan.data.tokenization import Templates
from caravan.models import folder as model_folder
from caravan.retrieval import store

WORDS = 5
BLOCKS = ("block=7", "token_budget=128", "precision=float32", f"segment_words={WORDS}")


def segments_of(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]


@pytest.fixture(scope="module")
def by_hand(folders: dict[str, str], collection: Collection) -> dict[str, np.ndarray]:
    """Scores [Q, N] float64 of the test queries: of the first and of the best segments."""
    model, tokenizer, encoding, _ = model_folder.load(Path(folders["retriever"]))
    templates = Templates(tokenizer, encoding)

    def vector(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids]), torch.ones(1, len(ids)), True)[0].double().numpy()

    rows = collection.qrels("test").queries
    queries = [vector(ids) for ids in templates.queries(collection.queries.get(rows))]
    texts = collection.corpus.get(np.arange(len(collection.corpus)))
    scores = np.empty((2, len(queries), len(texts)))
    for number, (title, text) in enumerate(texts):
        cut = [vector(ids) for ids in templates.passages([(title, s) for s in segments_of(text)])]
        for query, of in enumerate(queries):
            products = [float(of @ segment) for segment in cut]
            scores[:, query, number] = products[0], max(products)
    return {"first": scores[0], "best": scores[1]}


def compare(run: Run, scores: np.ndarray, rows: np.ndarray) -> None:
    """Each passage once, with its score, the best first."""
    for query, expected in zip(rows.tolist(), scores, strict=True):
        passages, found = run.of(query)
        assert sorted(passages.tolist()) == list(range(len(expected)))
        np.testing.assert_allclose(found, expected[passages], atol=2e-3)  # float16 on disk
        assert (np.diff(found) <= 0).all()


@pytest.mark.parametrize(
    ("segment", "index"), [("first", "flat"), ("best", "flat"), ("best", "exact")]
)
def test_a_passage_has_the_score_of_its_first_or_its_best_segment(
    segment: str,
    index: str,
    beir: Path,
    folders: dict[str, str],
    collection: Collection,
    by_hand: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    settings = (*BLOCKS, f"segment={segment}", f"index={index}")
    metrics = evaluate(beir, tmp_path / "run", folders["retriever"], *settings)
    run = read_run(tmp_path / "run" / metrics["run"], collection.queries, collection.corpus)
    compare(run, by_hand[segment], collection.qrels("test").queries)
    (products,) = (tmp_path / "run" / "store").glob("segments.*.manifest.json")
    assert len(list(products.with_name(products.name.split(".manifest")[0]).iterdir())) > 1


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes_to_the_same_run_beside_whole_passages(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = f"store={tmp_path / 'store'}"
    whole = evaluate(beir, tmp_path / "whole", folders["retriever"], shared, *BLOCKS[:3])
    settings = (*BLOCKS, "segment=best")
    evaluate(beir, tmp_path / "alone", folders["retriever"], *settings)
    write, written = store.write_shard, list[str]()

    def write_or_die(path: Path, *content: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *content)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write_shard", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(beir, tmp_path / "run", folders["retriever"], shared, *settings)
    monkeypatch.setattr(store, "write_shard", write)
    resumed = evaluate(beir, tmp_path / "run", folders["retriever"], shared, *settings)
    runs = [tmp_path / name / resumed["run"] for name in ("run", "alone")]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    assert runs[0].read_bytes() != (tmp_path / "whole" / whole["run"]).read_bytes()


@pytest.mark.slow
def test_segments_can_be_fused_and_reranked_and_an_approximate_index_has_its_recall(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    settings = (*BLOCKS, "segment=best", f"reranker={folders['reranker']}", "rerank.depth=5")
    retrievers = f"[bm25,{folders['retriever']}]"
    metrics = evaluate(
        beir, tmp_path / "run", retrievers, *settings, "index.k=20", "measures=[MRR@10]"
    )
    assert [one["stage"] for one in metrics["stages"]] == ["bm25", "retriever", "fused", "reranked"]
    assert [one["depth"] for one in metrics["stages"]][1:] == [20, 20, 5]
    hnsw = evaluate(beir, tmp_path / "hnsw", folders["retriever"], *settings[:-2], "index=hnsw")
    assert 0.5 < hnsw["facts"]["recall_against_exact"] <= 1
