from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate
from tests.files import ranked, records
from tests.refusals import refused

import caravan
from caravan.data.collection import Collection

FLOAT = ("precision=float32", "measures=[MRR@10]")


def _texts(collection: Collection) -> tuple[list[str], list[tuple[str, str]]]:
    queries = [text for _, _, text in records(collection.queries)]
    return queries[-4:], [(title, text) for _, title, text in records(collection.corpus)]


def _same_run(hits: Any, path: Path, collection: Collection) -> None:
    for of_query, found in zip(ranked(path, collection).values(), hits, strict=True):
        best = dict(list(of_query.items())[: len(found)])
        assert len(best) == len(found) >= 5
        assert [hit.row for hit in found] == list(best)
        assert [hit.score for hit in found] == pytest.approx(list(best.values()), abs=2e-3)


def test_search_finds_what_evaluate_finds(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    queries, passages = _texts(collection)
    model: Any = caravan.load(folders["retriever"], precision="float32")
    embeddings = model.encode_passages(passages)
    assert embeddings.shape == (60, model.dim) == (60, 32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    hits = model.search(queries, embeddings, k=5)
    assert hits == model.search(queries, passages, k=5)
    evaluate(beir, tmp_path / "r", folders["retriever"], *FLOAT, "index.k=100")
    _same_run(hits, tmp_path / "r" / "runs" / "retriever.test.trec", collection)
    best = [passages[found[0].row] for found in hits]
    scores = [found[0].score for found in hits]
    np.testing.assert_allclose(model.score(queries, best), scores, atol=1e-5)


def test_a_reranker_orders_as_evaluate_does(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    queries, passages = _texts(collection)
    model: Any = caravan.load(folders["reranker"], precision="float32")
    hits = model.search(queries, passages, k=5)
    systems = folders["retriever"], f"reranker={folders['reranker']}", "rerank.depth=60"
    evaluate(beir, tmp_path / "r", *systems, *FLOAT, "index.k=60")
    _same_run(hits, tmp_path / "r" / "runs" / "reranked.test.trec", collection)


def test_nothing_in_gives_nothing(folders: dict[str, str]) -> None:
    retriever: Any = caravan.load(folders["retriever"])
    reranker: Any = caravan.load(folders["reranker"])
    assert retriever.encode_queries([]).shape == (0, 32)
    assert retriever.search(["salt"], []) == [[]]
    assert retriever.search([], ["salt"]) == []
    assert reranker.score([], []).shape == (0,)
    assert reranker.search(["salt"], []) == [[]]


@pytest.mark.parametrize("name", ["retriever", "reranker"])
def test_mistakes_are_refused(folders: dict[str, str], name: str) -> None:
    model: Any = caravan.load(folders[name])
    with refused("uneven-pairs", "1 queries and 2 passages"):
        model.score(["salt"], ["gold", "silk"])
    for queries, passages in (("salt", ["gold"]), (["salt"], "gold")):
        with refused("not-a-list"):
            model.search(queries, passages)
    with refused("not-a-text", "query 1", "NoneType"):
        model.search(["salt", None], ["gold"])
    with refused("not-a-text", "passage 1", "tuple"):
        model.search(["salt"], ["gold", ("silk", "sand", "gold")])
    with refused("out-of-range", "k=0"):
        model.search(["salt"], ["gold"], k=0)
    with refused("not-a-model-folder", "caravan.json"):
        caravan.load("src")
    if name == "retriever":
        for shape in ((2, 31), (2, 32, 1), (32,)):
            with refused("wrong-shape", "[N, 32]"):
                model.search(["salt"], np.ones(shape, np.float32))


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, caravan; print('torch' in sys.modules, caravan.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", caravan.__version__]
