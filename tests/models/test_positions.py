"""Lengths beyond a model's positions, against what transformers' own models can read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import model_of
from tests.refusals import refused

from caravan.data.tokenization import log_once
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.positions import refuse_too_long
from caravan.retrieval.inference import Inference

FROM_PADDING = {"max_position_embeddings": 66, "pad_token_id": 1}
"""Of models that number positions from the padding token's id on."""
CLS: dict[str, Any] = {"pooling": "cls", "append_eos": False}


def _made(name: str, **settings: Any) -> Any:
    return model_of(name, **{"vocab_size": 400, "max_position_embeddings": 64, **settings})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bert", {}),
        ("roberta", FROM_PADDING),
        ("mpnet", FROM_PADDING),
        ("gpt2", {}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ],
)
def test_a_length_is_refused_exactly_where_the_model_would_fail(
    name: str, settings: dict[str, Any]
) -> None:
    model = _made(name, **settings)
    refuse_too_long(model, Encoding(passage_length=64))
    with torch.no_grad():
        model(input_ids=torch.full((1, 64), 5))
    with refused("too-long", "encoding.passage_length is 65", "64 tokens"):
        refuse_too_long(model, Encoding(passage_length=65))
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=torch.full((1, 65), 5))


def test_rotary_positions_have_no_limit_but_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        refuse_too_long(_made("llama"), Encoding(passage_length=65))
    assert "64 tokens" in caplog.text


def test_a_query_alone_and_a_rerankers_pair_may_be_too_long_too() -> None:
    model = with_head(_made("bert"))
    with refused("too-long", "encoding.query_length + encoding.passage_length is 65", "64"):
        CrossEncoder(model, Encoding("reranker", query_length=20, passage_length=45, **CLS))
    with refused("too-long", "query_length is 65"):
        BiEncoder(_made("bert"), Encoding(query_length=65, **CLS))


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_lengths_of_an_evaluation_are_compared_before_weights_are_read(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = Encoding(kind, query_length=16, passage_length=32, **CLS)
    trunk = _made("bert")
    retrieves = kind == "retriever"
    model = BiEncoder(trunk, encoding) if retrieves else CrossEncoder(with_head(trunk), encoding)
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    monkeypatch.setattr(folder, "load_weights", lambda *_, **__: pytest.fail("weights are read"))
    most = 64 if retrieves else 48
    Inference(tmp_path / "m", overrides={"passage_length": most}).check_settings()
    place = "passage_length is 65" if retrieves else "rerank.query_length + rerank.passage_length"
    with refused("too-long", place):
        Inference(tmp_path / "m", overrides={"passage_length": most + 1}).check_settings()
    monkeypatch.undo()
    record = json.loads((tmp_path / "m" / "caravan.json").read_text())
    record["passage_length"] = most + 1
    (tmp_path / "m" / "caravan.json").write_text(json.dumps(record))
    with refused("too-long", "passage_length is"):
        folder.load(tmp_path / "m")
