"""Lengths beyond a model's positions, against what transformers' own models can read."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.refusals import refused
from torch import nn

from caravan.encoding import Encoding
from caravan.models import folder, positions
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.positions import refuse_too_long
from caravan.retrieval.inference import Inference

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 400}
SIZE |= {"intermediate_size": 48}
OF_GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 400, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": {**SIZE, "max_position_embeddings": 64},
    "Roberta": {**SIZE, "max_position_embeddings": 66, "pad_token_id": 1},
    "MPNet": {**SIZE, "max_position_embeddings": 66, "pad_token_id": 1},
    "GPT2": OF_GPT,
    "GPTJ": {**OF_GPT, "rotary_dim": 8},
    "OPT": {**SIZE, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}
ROTARY: dict[str, dict[str, Any]] = {
    "Llama": {**SIZE, "max_position_embeddings": 64},
    "ModernBert": {**SIZE, "max_position_embeddings": 64, "pad_token_id": 1},
}
PLAIN = {"query_template": "{text}", "passage_template": "{title} {text}", "append_eos": False}


def _made(name: str, settings: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_length_is_refused_exactly_where_the_model_would_fail(name: str) -> None:
    model = _made(name, CONFIGS[name])
    refuse_too_long(model, Encoding(passage_length=64))
    with torch.no_grad():
        model(input_ids=torch.full((1, 64), 5))
    with refused("too-long", "encoding.passage_length is 65", "64 tokens"):
        refuse_too_long(model, Encoding(passage_length=65))
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=torch.full((1, 65), 5))


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_positions_have_no_limit_but_a_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    positions._warn_once.cache_clear()
    model = _made(name, ROTARY[name])
    with caplog.at_level(logging.WARNING):
        refuse_too_long(model, Encoding(passage_length=65))
    assert "was trained on texts of at most 64 tokens" in caplog.text
    with torch.no_grad():
        model(input_ids=torch.full((1, 65), 5))


def test_a_reranker_reads_query_and_passage_together() -> None:
    settings: dict[str, Any] = {"kind": "reranker", "pooling": "cls", "append_eos": False}
    with refused("too-long", "is 65", "set encoding.passage_length to 44"):
        CrossEncoder(
            with_head(_made("Bert", CONFIGS["Bert"])),
            Encoding(query_length=20, passage_length=45, **settings),
        )


def test_a_query_may_be_too_long_too() -> None:
    with refused("too-long", "query_length is 65"):
        BiEncoder(
            _made("Bert", CONFIGS["Bert"]), Encoding(query_length=65, pooling="mean", **PLAIN)
        )


@pytest.fixture(scope="module")
def models(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders of a retriever and a reranker with 64 positions."""
    to = tmp_path_factory.mktemp("encoders")
    short = {"query_length": 16, "passage_length": 32}
    retriever = Encoding(pooling="mean", **short, **PLAIN)
    reranker = Encoding(kind="reranker", pooling="cls", **short, **PLAIN)
    torch.manual_seed(0)
    embeds = BiEncoder(_made("Bert", CONFIGS["Bert"]), retriever)
    scores = CrossEncoder(with_head(_made("Bert", CONFIGS["Bert"])), reranker)
    folder.save(to / "retriever", embeds, tokenizer, retriever, {})
    folder.save(to / "reranker", scores, tokenizer, reranker, {})
    return {"retriever": to / "retriever", "reranker": to / "reranker"}


def test_lengths_of_an_evaluation_are_compared_before_weights_are_read(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("weights are read")

    monkeypatch.setattr(folder, "load_weights", read)
    retriever, reranker = map(str, models.values())
    Inference(retriever, lengths={"passage_length": 64}).check_lengths()
    with refused("too-long", "passage_length is 65"):
        Inference(retriever, lengths={"passage_length": 65}).check_lengths()
    Inference(reranker, lengths={"passage_length": 48}).check_lengths()
    with refused("too-long", "rerank.query_length + rerank.passage_length is 65"):
        Inference(reranker, lengths={"passage_length": 49}).check_lengths()


def test_a_folder_with_longer_texts_is_refused_when_it_loads(
    models: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(models["retriever"], tmp_path / "copied")
    record = json.loads((copied / "caravan.json").read_text())
    (copied / "caravan.json").write_text(json.dumps({**record, "passage_length": 65}))
    with refused("too-long", "encoding.passage_length is 65"):
        folder.load(copied)
