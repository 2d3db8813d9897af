"""Validations with other lengths and with segments, against plain counts and evaluate.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate, train

from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.data.tokenization import Templates
from caravan.models import folder


@pytest.mark.slow
def test_each_reading_counts_its_tokens_and_finds_what_an_evaluation_finds(
    beir: Path, collection: Collection, tmp_path: Path
) -> None:
    readings: list[dict[str, Any]]
    readings = [{"passage_length": 10}, {"query_length": 8}, {"segment": "best"}]
    readings = [{**one, "segment_words": 6} for one in readings]
    text = str(readings).replace("'", "").replace(" ", "")
    train(beir, tmp_path / "r", f"validation.readings={text}", "trainer.max_steps=4")
    found = json.loads((tmp_path / "r" / "metrics.json").read_text())["read"]
    _, tokenizer, encoding, _ = folder.load(tmp_path / "r" / "model")
    queries = collection.queries.get(collection.qrels("dev").queries)
    passages = collection.corpus.get(np.arange(len(collection.corpus)))
    texts = collection.queries, collection.corpus
    for reading, of in zip(readings, found, strict=True):
        assert reading.items() <= of.items()
        lengths = {name: n for name, n in reading.items() if name.endswith("_length")}
        templates = Templates(tokenizer, replace(encoding, **lengths))
        cut = passages
        if "segment" in reading:
            words = [(title, text.split()) for title, text in passages]
            cut = [(t, " ".join(w[i : i + 6])) for t, w in words for i in range(0, len(w), 6)]
        each = (("query", queries, templates.queries(queries)),)
        each += (("passage", passages, templates.passages(cut)),)
        for name, documents, ids in each:
            tokens = sum(map(len, ids)) / len(documents)
            assert of[f"tokens_per_{name}"] == pytest.approx(tokens, abs=0.051)
        name = "_".join(["read", *(f"{key}_{value}" for key, value in lengths.items())])
        if "segment" in reading:
            name = "read_segment_best_segment_words_6"
        settings = [f"{key}={value}" for key, value in reading.items()]
        settings += ["data.split=dev", "precision=float32"]
        again = evaluate(beir, tmp_path / name, tmp_path / "r" / "model", *settings)
        runs = [tmp_path / "r" / "runs" / f"{name}.trec", tmp_path / name / again["run"]]
        validated, evaluated = (read_run(path, *texts) for path in runs)
        for row in collection.qrels("dev").queries.tolist():
            scores = dict(zip(*validated.of(row), strict=True))
            assert scores == pytest.approx(dict(zip(*evaluated.of(row), strict=True)), abs=2e-3)
