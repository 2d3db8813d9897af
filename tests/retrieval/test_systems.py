"""Dense retrieval of long documents by their segments, against the model segment by segment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.commands import evaluate
from tests.files import ranked
from tests.models.small import alone
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.models import folder as model_folder
from caravan.models import hardware

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
        return alone(model, ids).double().numpy()

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
    found = ranked(tmp_path / "run" / metrics["run"], collection)
    for scores, expected in zip(found.values(), by_hand[segment], strict=True):
        assert scores == pytest.approx(dict(enumerate(expected)), abs=2e-3)  # float16 on disk
        assert sorted(scores.values(), reverse=True) == list(scores.values())
    (products,) = (tmp_path / "run" / "store").glob("segments.*.manifest.json")
    assert len(list(products.with_name(products.name.split(".manifest")[0]).iterdir())) > 1


def test_an_index_that_does_not_fit_is_refused_before_anything_is_encoded(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "host_memory", lambda: 4 * 16 * 60)
    settings = (folders["retriever"], "index=flat", "dim=16", "index.k=20", "measures=[MRR@5]")
    evaluate(beir, tmp_path / "passages", *settings)
    with refused("out-of-memory", "'Flat'", "vectors of 16 dimensions", "index=exact"):
        evaluate(beir, tmp_path / "segments", *settings, "segment=best", "segment_words=5")
    assert not list((tmp_path / "segments").rglob("*.npy"))
