"""RankLLaMA end to end on the tiny collection: trained, validated, saved, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.commands import curves, evaluate, train
from tests.files import ranked
from tests.models.small import scored_alone
from tests.refusals import refused

from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.retrieval.metrics import score_run

LENGTHS = ("encoding.query_length=16", "encoding.passage_length=32")
READINGS = "validation.readings=[{passage_length:32},{segment:best,segment_words:5}]"


@pytest.fixture(scope="module")
def settings(bm25_runs: dict[str, Path]) -> list[str]:
    read = [f"sampler.runs=[{bm25_runs['train']}]", f"validation.run={bm25_runs['dev']}"]
    read.append("sampler.range_max=9")
    steps = ["trainer.max_steps=12", "trainer.val_check_interval=6"]
    return ["stage=reranker", *read, *LENGTHS, *steps, "callbacks.resume_point.every_n_steps=2"]


@pytest.fixture(scope="module")
def finished(beir: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reranker") / "run"
    train(beir, run_dir, *settings, READINGS)
    return run_dir


def test_it_learns_and_is_validated_on_the_candidates_in_both_orders(
    finished: Path, bm25_runs: dict[str, Path], collection: Collection
) -> None:
    found = curves(finished)
    losses = list(found["train/loss"].values())
    assert np.mean(losses[len(losses) // 2 :]) < np.mean(losses[: len(losses) // 2])
    texts = collection.queries, collection.corpus
    candidates = read_run(bm25_runs["dev"], *texts)
    reordered = read_run(finished / "runs" / "validation.trec", *texts)
    for row in candidates.query_rows:
        assert set(candidates.of(row)[0]) == set(reordered.of(row)[0])
    for name, run in (("val/first_stage", candidates), ("val", reordered)):
        overall = score_run(run, collection.qrels("dev"), *texts, ["MRR@10"])["overall"]
        assert found[f"{name}/MRR@10"][12] == pytest.approx(overall["MRR@10"], abs=1e-6)


def test_the_manifest_has_the_counts_of_the_rules(
    finished: Path, bm25_runs: dict[str, Path]
) -> None:
    counts = manifests.facts(finished / "model")["sampler"][str(bm25_runs["train"])]
    assert counts["removed"].keys() == {"range_max"}
    assert counts["candidates"] - counts["kept"] == counts["removed"]["range_max"] > 0


def test_the_folder_has_the_head_and_gives_the_scores_of_the_validation(
    finished: Path, collection: Collection
) -> None:
    model, _, encoding, _ = folder.load(finished / "model")
    assert (encoding.kind, encoding.pooling, encoding.passage_length) == ("reranker", "last", 32)
    assert model.plain.score.weight.abs().sum() > 0
    best = json.loads((finished / "metrics.json").read_text())
    assert best["read"][0]["scores"]["MRR@10"] == pytest.approx(best["best"])
    validated = ranked(finished / "runs" / "read_passage_length_32.trec", collection)
    for row, scores in list(validated.items())[:2]:
        found = scored_alone(finished / "model", row, list(scores), collection)
        np.testing.assert_allclose(found, list(scores.values()), atol=1e-4)


@pytest.mark.slow
def test_the_best_segments_in_a_validation_are_those_of_an_evaluation(
    finished: Path, bm25_runs: dict[str, Path], beir: Path, collection: Collection, tmp_path: Path
) -> None:
    settings = (f"reranker={finished / 'model'}", "rerank.segment=best", "rerank.segment_words=5")
    more = ("data.split=dev", "precision=float32", "measures=[MRR@5]", "index.k=12")
    again = evaluate(beir, tmp_path / "run", bm25_runs["dev"], *settings, *more)
    name = "read_segment_best_segment_words_5.trec"
    paths = [finished / "runs" / name, tmp_path / "run" / again["run"]]
    validated, evaluated = (ranked(path, collection) for path in paths)
    for row, scores in validated.items():
        assert scores == pytest.approx(evaluated[row], abs=1e-4)
    read = json.loads((finished / "metrics.json").read_text())["read"]
    assert read[1]["tokens_per_query"] > read[0]["tokens_per_query"]  # all, and prompts repeat


def test_without_a_trained_head_or_candidates_a_reranker_is_refused(
    beir: Path, settings: list[str], tmp_path: Path
) -> None:
    with refused("untrained-head", "trainer.max_steps"):
        train(beir, tmp_path / "r", *settings, "trainer.max_steps=0")
    assert not (tmp_path / "r" / "model").exists()
    with pytest.raises(InputError, match=r"validation\.run"):
        train(beir, tmp_path / "s", "stage=reranker")


@pytest.mark.slow
def test_a_likelihood_learns_the_order_of_its_training_queries_without_negatives(
    beir: Path, bm25_runs: dict[str, Path], tmp_path: Path
) -> None:
    settings = [
        *("stage=reranker_likelihood", "loss=likelihood", "sampler.number=0", *LENGTHS),
        *(f"validation.run={bm25_runs['dev']}", "trainer.max_steps=30", "optimizer.lr=1e-2"),
        *("trainer.val_check_interval=30", "optimizer.warmup_steps=1"),
        "trainer.log_every_n_steps=1",
    ]
    train(beir, tmp_path / "run", *settings)
    learned = curves(tmp_path / "run")
    first, *_, last = learned["train/loss"].values()
    assert last < first - 0.5
    assert "train/accuracy" not in learned  # one passage a query: there is nothing to compare
    encoding, _ = read_encoding(tmp_path / "run" / "model")
    assert (encoding.scoring, encoding.append_eos) == ("likelihood", False)
    train(beir, tmp_path / "untrained", *settings, "trainer.max_steps=0")
    found = {}
    for name in ("untrained", "run"):
        given = ("data.split=train", "rerank.depth=12", f"reranker={tmp_path / name / 'model'}")
        metrics = evaluate(beir, tmp_path / f"of_{name}", bm25_runs["train"], *given)
        found[name] = metrics["overall"]["MRR@10"]
    assert found["run"] > found["untrained"] + 0.2
