"""Inference against plain PyTorch: embeddings in memory and on disk, lengths, precision."""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.commands import evaluate
from tests.files import ranked
from tests.models.small import alone
from tests.refusals import refused

import caravan
from caravan.cli.evaluate import searcher_of
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.models import folder as model_folder
from caravan.retrieval import inference
from caravan.retrieval.inference import Inference, Models
from caravan.retrieval.store import Embeddings, Store
from caravan.search import config_of


@pytest.fixture(scope="module")
def model(folders: dict[str, str]) -> Path:
    return Path(folders["retriever"])


def encode(
    model: Path, collection: Collection, folder: Path, block: int = 16, **settings: Any
) -> Embeddings:
    opened = Inference(model, **{"precision": "float32", "token_budget": 128, **settings})
    rows = np.arange(len(collection.corpus))
    compute = opened.encode_rows(collection.corpus, rows, "passage", block)
    return Store(folder).embeddings("passages", {"model": "a"}, len(rows), block, compute)


def test_embeddings_are_the_models_in_row_order_on_disk_and_in_memory(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    embeddings = encode(model, collection, tmp_path)
    assert (embeddings.rows, embeddings.dim) == (60, 32)
    assert [start for start, _ in embeddings] == [0, 16, 32, 48]
    assert all(vectors.dtype == np.float16 for _, vectors in embeddings)
    texts = collection.corpus.get(np.arange(60))
    in_memory = Inference(model, precision="float32").embed(texts, "passage")
    np.testing.assert_allclose(in_memory, embeddings.read(), atol=1e-3)
    loaded, tokenizer, encoding, _ = model_folder.load(model)
    ids = Templates(tokenizer, encoding).passages(texts)
    for row, text in enumerate(ids):
        np.testing.assert_allclose(in_memory[row], alone(loaded, text), atol=1e-5, err_msg=str(row))


def test_workers_and_budget_change_nothing_but_rounding_and_lengths_do(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    def encoded(name: str, **settings: Any) -> np.ndarray:
        return encode(model, collection, tmp_path / name, **settings).read()

    one = encoded("one")
    np.testing.assert_allclose(one, encoded("two", token_budget=1000, num_workers=1), atol=1e-3)
    assert not np.allclose(one, encoded("cut", overrides={"passage_length": 8}), atol=1e-2)
    assert (one * encoded("bf16", precision="bf16")).sum(axis=1).min() > 0.999


def test_encoding_logs_its_start_and_what_is_cut_and_advances_by_chunk(
    model: Path,
    collection: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps: list[int] = []
    shown = lambda *_: contextlib.nullcontext(steps.append)  # noqa: E731
    monkeypatch.setattr(inference, "progress", shown)
    caplog.set_level(logging.INFO, "caravan")
    texts = collection.corpus.get(np.arange(60))
    templates = Inference(model, "retriever", num_workers=0).templates
    full = sum(len(ids) == 24 for ids in templates.passages(texts))
    assert 0 < full < 60
    for _ in range(2):
        encode(model, collection, tmp_path, block=1000)
        assert caplog.messages == [
            f"encode 60 passages with {model} on cpu, float32",
            f"{full} of 60 passages have 24 tokens: what is longer is cut",
        ]
    assert sum(steps) == 60
    assert len(steps) >= 2  # in the only block


def test_one_model_is_in_memory_at_a_time(folders: dict[str, str]) -> None:
    models = Models("float32", num_workers=0)
    retriever, reranker = Path(folders["retriever"]), Path(folders["reranker"])
    opened = models.open(retriever, "retriever", {})
    assert models.open(retriever, "retriever", {}) is opened
    assert models.open(retriever, "retriever", {"query_length": 8}) is not opened
    models.open(reranker, "reranker", {})
    assert models.open(retriever, "retriever", {}) is not opened
    with refused("wrong-model-kind", str(retriever)):
        models.open(retriever, "reranker", {})


def test_a_model_that_has_diverged_is_refused(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = torch.full_like(weights[name], 1e38)  # finite, but not its products
    save_file(weights, broken / "model.safetensors")
    with refused("diverged-model", str(broken)):
        Inference(broken).embed(collection.corpus.get(np.arange(3)), "query")


def test_every_front_door_cuts_embeddings_to_the_same_dim(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    folder, dim = folders["retriever"], ("dim=8", "precision=float32")
    evaluation = evaluate(beir, tmp_path / "run", folder, *dim)
    assert evaluation["facts"]["dim"] == 8
    data = ("data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}", "num_workers=0")
    given = [f"retriever={folder}", *dim, *data, f"run_dir={tmp_path / 's'}"]
    searcher = searcher_of(config_of(given), reuse=tmp_path)
    assert not (tmp_path / "s").exists()  # it reuses the embeddings of the evaluation
    model: Any = caravan.load(folder, precision="float32", dim=8)
    whole: Any = caravan.load(folder, precision="float32")
    passages, queries = (
        of.get(np.arange(len(of))) for of in (collection.corpus, collection.queries)
    )
    texts = [text for _, text in queries]
    vectors, first = model.encode_passages(passages), whole.encode_passages(passages)[:, :8]
    np.testing.assert_allclose(vectors, first / np.linalg.norm(first, axis=1)[:, None], atol=1e-6)
    (stored,) = (tmp_path / "run/store").glob("passages.*/*.npy")
    np.testing.assert_allclose(np.load(stored), vectors, atol=1e-3)
    for row, scores in ranked(tmp_path / "run/runs/retriever.test.trec", collection).items():
        hits = model.search([texts[row]], vectors, k=60)[0]
        assert searcher(texts[row])[-1].run.of(0)[0].tolist() == list(scores)
        assert {hit.row: hit.score for hit in hits} == pytest.approx(scores, abs=2e-3)


def test_more_dimensions_than_a_model_has_are_refused_before_weights_are_read(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_folder, "load_weights", lambda *_, **__: pytest.fail("read"))
    with refused("dim-too-large", "dim is 64", "32"):
        evaluate(beir, tmp_path / "run", folders["retriever"], "dim=64")
    with refused("invalid-encoding", "encoding.dim is 8"):
        caravan.load(folders["reranker"], dim=8)
