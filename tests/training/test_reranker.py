"""RankLLaMA end to end on the tiny collection: trained, validated, saved, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.commands import evaluate, train
from tests.tiny import write_beir

from caravan.data.batch import RerankBatch
from caravan.data.collection import Collection
from caravan.data.pairs import PairTemplates
from caravan.data.readers.beir import Beir
from caravan.data.runs import read_run
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.retrieval.metrics import score_run
from caravan.training.reranker import Reranker


@pytest.fixture(scope="module")
def runs(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("bm25")
    found = {}
    for split in ("train", "dev"):
        evaluate(beir, home / split, "bm25", f"data.split={split}", "index.k=12", "measures=[R@5]")
        found[split] = str(home / split / "runs" / f"bm25.{split}.trec")
    return found


def _settings(runs: dict[str, str], *more: str) -> list[str]:
    return [
        *("stage=reranker", f"sampler.runs=[{runs['train']}]", f"validation.run={runs['dev']}"),
        *("encoding.query_length=16", "encoding.passage_length=32", "trainer.max_steps=12"),
        *("trainer.val_check_interval=6", *more),
    ]


@pytest.fixture(scope="module")
def finished(beir: Path, runs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reranker") / "run"
    train(beir, run_dir, *_settings(runs, "trainer.val_check_interval=12"))
    return run_dir


def _scalars(run_dir: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def test_validation_reorders_the_candidates_and_shows_the_first_stage_beside_it(
    finished: Path, beir: Path, runs: dict[str, str], collection: Collection
) -> None:
    curves = _scalars(finished)
    candidates = read_run(runs["dev"], collection.queries, collection.corpus)
    reordered = read_run(
        finished / "runs" / "validation.trec", collection.queries, collection.corpus
    )
    for row in candidates.query_rows:
        assert set(candidates.of(row)[0]) == set(reordered.of(row)[0])
    for name, run in (("val/first_stage", candidates), ("val", reordered)):
        figures = score_run(
            run, collection.qrels("dev"), collection.queries, collection.corpus, ["MRR@10"]
        )
        assert curves[f"{name}/MRR@10"][-1] == pytest.approx(figures["overall"]["MRR@10"], abs=1e-6)


def test_a_reranker_learns_to_tell_the_positive(finished: Path) -> None:
    losses = _scalars(finished)["train/loss"]
    half = len(losses) // 2
    assert np.mean(losses[half:]) < np.mean(losses[:half])


def test_the_folder_holds_the_trained_head_and_its_encoding(finished: Path) -> None:
    encoding, _ = read_encoding(finished / "model")
    assert (encoding.kind, encoding.pooling, encoding.passage_length) == ("reranker", "last", 32)
    model, *_ = folder.load(finished / "model", kind="reranker")
    assert model.plain.score.weight.abs().sum() > 0


def test_the_validations_scores_are_those_of_the_saved_folder(
    finished: Path, runs: dict[str, str], collection: Collection
) -> None:
    model, tokenizer, encoding, _ = folder.load(finished / "model")
    run = read_run(finished / "runs" / "validation.trec", collection.queries, collection.corpus)
    templates = PairTemplates(tokenizer, encoding)
    for row in run.query_rows[:2]:
        rows, scores = run.of(row)
        query = collection.queries.get([int(row)]) * len(rows)
        pairs = templates.pairs(query, collection.corpus.get(rows))
        with torch.no_grad():
            found = [
                float(model(torch.tensor([p.ids]), torch.ones(1, len(p.ids), dtype=torch.int64)))
                for p in pairs
            ]
        np.testing.assert_allclose(found, scores, atol=1e-4)


def test_a_killed_reranker_resumes_to_the_same_weights(
    beir: Path, runs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(runs, "callbacks.last.every_n_steps=2")
    train(beir, tmp_path / "whole", *settings)
    step = Reranker.training_step

    def killed(self: Reranker, batch: RerankBatch, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 9:
            raise KeyError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Reranker, "training_step", killed)
        with pytest.raises(KeyError, match="killed"):
            train(beir, tmp_path / "killed", *settings)
    train(beir, tmp_path / "killed", *settings, "resume=true")
    whole, resumed = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_reranker_starts_from_a_retrievers_folder(
    beir: Path, runs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(beir, tmp_path / "retriever", "trainer.max_steps=0")
    with caplog.at_level("INFO"):
        train(
            beir,
            tmp_path / "reranker",
            *_settings(runs, f"init_from={tmp_path / 'retriever' / 'model'}"),
            "trainer.max_steps=2",
        )
    assert "weights taken from" in caplog.text
    assert "1 new (score.weight)" in caplog.text


def test_a_reranker_without_a_trained_head_is_not_adopted(
    beir: Path, runs: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no trained head to score with"):
        train(beir, tmp_path / "r", *_settings(runs, "trainer.max_steps=0"))
    assert not (tmp_path / "r" / "model").exists()


def test_a_last_short_batch_keeps_its_groups(tmp_path: Path, runs: dict[str, str]) -> None:
    from tests.tiny import tiny_backbone

    from caravan.data.batching import Groups
    from caravan.data.negatives import Negatives
    from caravan.encoding import Encoding

    collection = Beir(str(write_beir(tmp_path / "b"))).collection(tmp_path / "cache")
    tokenizer = tiny_backbone().tokenizer(collection, tmp_path / "cache")
    qrels, negatives = collection.qrels("train"), Negatives(number=3)
    negatives.open(collection, qrels, seed=0)
    encoding = Encoding(kind="reranker", query_length=16, passage_length=32)
    groups = Groups(collection, qrels, negatives, PairTemplates(tokenizer, encoding), 64, seed=0)
    whole = groups[0, np.arange(len(groups))].packed()
    short = groups[0, np.arange(len(groups) - 2, len(groups))].packed()
    assert short.passage_rows.tolist() == whole.passage_rows[-2:].tolist()
    assert len(short.pairs) == 2 * 4


def test_a_reranker_without_candidates_is_told_before_it_starts(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"validation\.run .*puts a run's candidates into order"):
        train(beir, tmp_path / "r", "stage=reranker")


def test_the_best_weights_are_read_at_other_lengths(
    beir: Path, runs: dict[str, str], tmp_path: Path
) -> None:
    lengths = ("validation.read_lengths=[20,32]", "trainer.val_check_interval=12")
    train(beir, tmp_path / "r", *_settings(runs, *lengths))
    figures = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert set(figures["read"]) == {"20", "32"}
    assert figures["read"]["32"]["MRR@10"] == pytest.approx(figures["best"])
    assert set(figures["read"]["20"]) == {"MRR@10", "nDCG@10", "R@10"}


def test_a_likelihood_learns_the_order_of_what_it_has_seen_without_negatives(
    beir: Path, runs: dict[str, str], tmp_path: Path
) -> None:
    settings = [
        *("stage=reranker_likelihood", "loss=likelihood", "sampler.number=0"),
        *(
            f"validation.run={runs['dev']}",
            "encoding.query_length=16",
            "encoding.passage_length=32",
        ),
        *("trainer.max_steps=30", "trainer.val_check_interval=10", "optimizer.lr=1e-2"),
        *("optimizer.warmup_steps=1", "trainer.log_every_n_steps=1"),
    ]
    train(beir, tmp_path / "run", *settings)
    curves = _scalars(tmp_path / "run")
    assert curves["train/loss"][-1] < curves["train/loss"][0] - 0.5
    assert "train/accuracy" not in curves  # one passage a query: nothing to be told apart
    encoding, _ = read_encoding(tmp_path / "run" / "model")
    assert (encoding.scoring, encoding.append_eos) == ("likelihood", False)
    train(beir, tmp_path / "untrained", *settings, "trainer.max_steps=0")
    figures = [
        evaluate(
            *(beir, tmp_path / f"of_{name}", runs["train"], "data.split=train", "rerank.depth=12"),
            f"reranker={tmp_path / name / 'model'}",
        )
        for name in ("untrained", "run")
    ]
    untrained, trained = (found["overall"]["MRR@10"] for found in figures)
    assert trained > untrained + 0.2
