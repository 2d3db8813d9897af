"""MTEB's own evaluation of a model folder has the metrics of `evaluate.py` on the same data."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate
from tests.files import judged, records
from tests.refusals import refused, uninstall

import caravan
from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.models.digests import folder_digest

FLOAT = ("precision=float32", "measures=[MRR@10,nDCG@10,R@20,MAP@20]")
METRICS = {"mrr_at_10": "MRR@10", "ndcg_at_10": "nDCG@10", "recall_at_20": "R@20"}
METRICS |= {"map_at_20": "MAP@20"}


def load(folder: str | Path, **settings: Any) -> Any:
    pytest.importorskip("mteb")
    from caravan.mteb import load

    return load(folder, precision="float32", **settings)


def local_task(
    collection: Collection, kind: str, top_ranked: dict[str, list[str]] | None = None
) -> Any:
    """A task of MTEB over the test queries of a collection, with nothing to download."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    qrels: dict[str, dict[str, int]] = {}
    for (query, passage), grade in judged(collection, "test").items():
        qrels.setdefault(query, {})[passage] = grade

    class Task(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            type=kind,
            name=f"Local{kind}",
            description="A BEIR folder.",
            dataset={"path": "local/beir", "revision": "0"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            passages = [
                {"id": name, "title": title, "text": text}
                for name, title, text in records(collection.corpus)
            ]
            queries = [
                {"id": name, "text": text}
                for name, _, text in records(collection.queries)
                if name in qrels
            ]
            corpus, asked = Dataset.from_list(passages), Dataset.from_list(queries)
            split = {"corpus": corpus, "queries": asked, "relevant_docs": qrels}
            self.dataset = {"default": {"test": {**split, "top_ranked": top_ranked}}}
            self.data_loaded = True

    return Task()


def metrics_of(model: Any, task: Any) -> dict[str, float]:
    import mteb

    result = mteb.evaluate(
        model, task, cache=None, show_progress_bar=False, co2_tracker=False, raise_error=True
    )
    (scores,) = result.task_results[0].scores["test"]
    return {ours: scores[theirs] for theirs, ours in METRICS.items()}


@pytest.mark.slow
def test_a_retriever_and_a_reranker_have_the_metrics_of_evaluate(
    beir: Path, collection: Collection, folders: dict[str, str], tmp_path: Path
) -> None:
    task, model = local_task(collection, "Retrieval"), load(folders["retriever"])
    from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol

    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, CrossEncoderProtocol)
    wanted = evaluate(beir, tmp_path / "run", folders["retriever"], *FLOAT)["overall"]
    assert metrics_of(model, task) == pytest.approx(wanted, abs=1e-5)
    assert 0 < wanted["nDCG@10"] < 1
    short = load(folders["retriever"], dim=8)
    names = [one.mteb_model_meta.name for one in (model, short)]
    assert (short.mteb_model_meta.embed_dim, names[1]) == (8, f"{names[0]}-8d")
    other = evaluate(beir, tmp_path / "short", folders["retriever"], "dim=8", *FLOAT)["overall"]
    assert metrics_of(short, task) == pytest.approx(other, abs=1e-5)
    assert other != wanted
    settings = (f"reranker={folders['reranker']}", "rerank.depth=20", "index.k=20", *FLOAT)
    wanted = evaluate(beir, tmp_path / "reranked", "bm25", *settings)["overall"]
    first = tmp_path / "reranked" / "runs" / "bm25.test.trec"
    run = read_run(first, collection.queries, collection.corpus)
    names = collection.queries.ids(run.query_rows)
    ranked = [collection.corpus.ids(run.of(row)[0]) for row in run.query_rows.tolist()]
    model = load(folders["reranker"])
    assert isinstance(model, CrossEncoderProtocol)
    assert not isinstance(model, EncoderProtocol)
    task = local_task(collection, "Reranking", dict(zip(names, ranked, strict=True)))
    assert metrics_of(model, task) == pytest.approx(wanted, abs=1e-5)
    assert 0 < wanted["nDCG@10"] < 1


def test_a_task_has_the_instruction_of_its_collection_or_its_own_prompt(
    beir: Path, collection: Collection, instructed: Path, tmp_path: Path
) -> None:
    task, model = local_task(collection, "Retrieval"), load(instructed)
    wanted = evaluate(beir, tmp_path / "tiny", instructed, *FLOAT)["overall"]
    task.metadata = task.metadata.model_copy(update={"name": "Tiny", "prompt": "silk"})
    assert metrics_of(model, task) == pytest.approx(wanted, abs=1e-5)
    assert model.instruction(task.metadata) == "camel"
    assert model.instruction(task.metadata.model_copy(update={"name": "One"})) == "salt road"
    for prompt, text in (("silk", "silk"), ({"query": "gold"}, "gold"), (None, "camel")):
        unknown = task.metadata.model_copy(update={"name": "Local", "prompt": prompt})
        assert model.instruction(unknown) == text
    from mteb.types import PromptType

    own = [{"text": ["tent silk"], "query": ["tent"], "instruction": ["silk"]}]
    found = model.encode(own, task_metadata=task.metadata, prompt_type=PromptType.query)
    plain: Any = caravan.load(instructed, precision="float32")
    assert np.array_equal(found, plain.encode_queries(["tent"], instruction="silk"))
    assert np.array_equal(found, plain.encode_queries([("silk", "tent")]))
    assert not np.allclose(found, plain.encode_queries(["tent"]), atol=1e-3)


def test_texts_are_read_by_the_sides_that_mteb_names(folders: dict[str, str]) -> None:
    model = load(folders["retriever"])
    from mteb.types import PromptType

    text, passages = [{"text": ["salt", "gold silk"]}], ["salt", "gold silk"]
    titled = [{"text": ["Title salt"], "title": ["Title"], "body": ["salt"]}]
    queries = model.model.encode_queries(passages)
    assert np.array_equal(model.encode(text, prompt_type=PromptType.query), queries)
    expected = model.model.encode_passages(passages)
    assert not np.allclose(queries, expected, atol=1e-3)
    for side in (PromptType.document, None):
        assert np.array_equal(model.encode(text, prompt_type=side), expected)
    found = model.encode(titled, prompt_type=PromptType.document)
    assert np.array_equal(found, model.model.encode_passages([("Title", "salt")]))
    scores = model.similarity(queries, found)
    assert scores.shape == (2, 1)
    np.testing.assert_allclose(scores.numpy(), queries @ found.T, atol=1e-6)
    assert model.similarity_pairwise(queries, queries).tolist() == pytest.approx([1, 1])


def test_results_are_filed_under_the_folders_digest(folders: dict[str, str]) -> None:
    metas = {name: load(folders[name]).mteb_model_meta for name in ("retriever", "reranker")}
    for name, meta in metas.items():
        assert meta.revision == folder_digest(Path(folders[name]))
        assert meta.name.startswith("caravan/")
        assert meta.name.count("/") == 1
        assert meta.n_parameters > 1000
    assert (metas["retriever"].embed_dim, metas["retriever"].max_tokens) == (32, 24)
    assert metas["reranker"].is_cross_encoder


def test_without_mteb_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "mteb", "caravan.mteb")
    with refused("missing-extra", "caravan-retrieval[mteb]"):
        importlib.import_module("caravan.mteb")
