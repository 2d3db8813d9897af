"""Validations, also with other lengths and with segments; on several ranks: test_fsdp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import curves, evaluate, train
from tests.files import ranked
from tests.two_ranks import TwoRanks

from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run
from caravan.data.segments import Cut
from caravan.data.tokenization import Templates
from caravan.models import folder
from caravan.retrieval.exact import Exact
from caravan.training.evaluation import Evaluation, RerankingEvaluation, RetrievalEvaluation


@pytest.mark.parametrize(("relevant_from", "mrr"), [(1, 1.0), (2, 0.5)])
def test_passages_are_searched_once_in_any_order_and_low_grades_do_not_count(
    relevant_from: int, mrr: float, collection: Collection, tmp_path: Path
) -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **_: logged.update({name: float(value)})
    )
    data = SimpleNamespace(
        collection=collection,
        name="",
        candidates=None,
        qrels=Qrels(np.array([3, 3]), np.array([7, 5]), np.array([1, 2])),
        relevant_from=relevant_from,
        ignore_identical_ids=False,
        without_own=lambda run, depth: run.top(depth),
        read=Cut(collection.corpus, np.arange(8)),
    )
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(validations=[data]), is_global_zero=True
    )
    evaluation = RetrievalEvaluation(Exact(k=4), ["MRR@10"], str(tmp_path / "run.trec"))
    batches = [(0, [3], [[1.0, 0.0]])]
    parts = ([5, 7], [0, 1, 2], [5, 7])
    batches += [(1, rows, [[float(row), 1.0] for row in rows]) for rows in parts]
    for loader, rows, vectors in batches:
        out = {"rows": torch.tensor(rows), "vectors": torch.tensor(vectors)}
        batch = SimpleNamespace(texts=SimpleNamespace(tokens=2))
        evaluation.on_validation_batch_end(trainer, module, out, batch, 0, loader)
    evaluation.on_validation_epoch_end(trainer, module)
    assert logged == {"val/MRR@10": mrr}
    assert list(ranked(tmp_path / "run.trec", collection)[3]) == [7, 5, 2, 1]


@pytest.mark.parametrize(
    ("evaluation", "name", "kind"),
    [
        (RetrievalEvaluation(None, [], ""), "vectors", np.float16),
        (RerankingEvaluation([], ""), "scores", np.float32),
    ],
)
def test_a_validation_gathers_what_an_evaluation_stores(
    evaluation: Evaluation, name: str, kind: type
) -> None:
    computed = torch.randn(5, 4)
    batch = SimpleNamespace(texts=SimpleNamespace(tokens=2))
    for rows in (computed[:3], computed[3:]):
        evaluation.on_validation_batch_end(None, None, {name: rows}, batch, 0)
    gathered = evaluation.gathered(0, name, torch.device("cpu"))
    assert gathered.dtype == kind
    np.testing.assert_array_equal(gathered, computed.numpy().astype(kind))


class Fixed(RetrievalEvaluation):
    """A validation that finds a random run, in place of a search."""

    def run_of(self, data: Any, loader: int, device: torch.device) -> Run:
        rng = np.random.default_rng(0)
        count = len(data.qrels.queries)
        rows = np.array([rng.permutation(50) for _ in range(count)])
        return Run.from_topk(np.arange(count), -np.sort(-rng.random((count, 50))), rows)

    def _write(self, run: Run, data: Any) -> None:
        pass


def logged(count: int) -> dict[str, float]:
    """The metrics that a rank logs of `count` queries."""
    found: dict[str, float] = {}
    qrels = Qrels(np.arange(count), np.arange(count) % 50, np.ones(count))
    data = SimpleNamespace(
        name="",
        candidates=None,
        relevant_from=1,
        qrels=qrels,
        collection=SimpleNamespace(corpus=None),  # no scores tie
    )
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **_: found.update({name: float(value)})
    )
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(validations=[data]), is_global_zero=True
    )
    Fixed(Exact(k=50), ["MRR@10", "R@100"], "").on_validation_epoch_end(trainer, module)
    return found


def on_rank() -> tuple[dict[str, float], dict[str, float]]:
    return logged(7), logged(1)  # the second rank has three queries, then none


def test_two_ranks_log_the_mean_over_all_queries(two_ranks: TwoRanks) -> None:
    one, other = two_ranks(on_rank)
    assert one == other
    assert one[0] == pytest.approx(logged(7), abs=1e-12)
    assert one[1] == pytest.approx(logged(1), abs=1e-12)
    assert 0 < one[0]["val/MRR@10"] < one[0]["val/R@100"] == 1


@pytest.mark.slow
def test_the_best_weights_are_evaluated_on_training_queries_and_in_each_reading(
    beir: Path, collection: Collection, tmp_path: Path
) -> None:
    readings: list[dict[str, Any]] = [{}, {"passage_length": 10}, {"query_length": 8}]
    readings = [{**one, "segment_words": 6} for one in (*readings, {"segment": "best"})]
    text = str(readings).replace("'", "").replace(" ", "")
    settings = (f"validation.readings={text}", "validation.train_queries=10")
    best = train(beir, tmp_path / "r", *settings, "trainer.max_steps=40")
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert set(metrics["train"]) == {"MRR@10", "nDCG@10", "R@100"}
    assert metrics["train"]["MRR@10"] > metrics["best"] == best  # of queries that it learned
    assert metrics["read"][0]["scores"]["MRR@10"] == pytest.approx(best)
    assert len(curves(tmp_path / "r")["val/MRR@10"]) == 10  # the last validation is in no curve
    _, tokenizer, encoding, _ = folder.load(tmp_path / "r" / "model")
    queries = collection.queries.get(collection.qrels("dev").queries)
    passages = collection.corpus.get(np.arange(len(collection.corpus)))
    for reading, of in zip(readings, metrics["read"], strict=True):
        assert reading.items() <= of.items()
        assert of["seconds"] > 0 < of["memory_gib"] < 64
        lengths = {name: n for name, n in reading.items() if name.endswith("_length")}
        templates = Templates(tokenizer, replace(encoding, **lengths))
        cut, name = passages, "_".join(["read", *(f"{key}_{n}" for key, n in lengths.items())])
        if "segment" in reading:
            name = "read_segment_best_segment_words_6"
            words = [(title, text.split()) for title, text in passages]
            cut = [(t, " ".join(w[i : i + 6])) for t, w in words for i in range(0, len(w), 6)]
        counted = {"query": (queries, templates.queries(queries))}
        counted["passage"] = passages, templates.passages(cut)
        for kind, (documents, ids) in counted.items():
            tokens = sum(map(len, ids)) / len(documents)
            assert of[f"tokens_per_{kind}"] == pytest.approx(tokens, abs=0.051)
        given = [f"{key}={value}" for key, value in reading.items()]
        given += ["data.split=dev", "precision=float32"]
        again = evaluate(beir, tmp_path / name, tmp_path / "r" / "model", *given)
        runs = [tmp_path / "r" / "runs" / f"{name}.trec", tmp_path / name / again["run"]]
        validated, evaluated = (ranked(path, collection) for path in runs)
        for row in collection.qrels("dev").queries.tolist():
            assert validated[row] == pytest.approx(evaluated[row], abs=2e-3)
