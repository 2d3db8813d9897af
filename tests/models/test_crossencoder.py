"""Scores: the same alone, in any batch and as plain transformers and PEFT compute them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.models.small import ARCHITECTURES, TEXTS, close, config_of, model_of, padded, shaken
from tests.refusals import refused
from transformers import AutoModel, AutoModelForSequenceClassification

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import is_causal
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder, head_of, with_head

DECODER = Encoding(kind="reranker", query_length=16, passage_length=48)
ENCODER = replace(DECODER, pooling="cls", pair="pair", append_eos=False)


def _crossencoder(name: str) -> CrossEncoder:
    backbone = model_of(name)
    return CrossEncoder(with_head(backbone, 0), DECODER if is_causal(backbone) else ENCODER).eval()


@torch.no_grad()
def _alone(model: CrossEncoder) -> torch.Tensor:
    """The scores of `TEXTS`, one after the other."""
    return torch.cat([model(*padded([ids], "right", len(ids))) for ids in TEXTS])


def _released_encoder(to: Path, labels: int = 1) -> Any:
    """An encoder released as a cross-encoder, with pooler and classifier."""
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config_of("bert", num_labels=labels))
    plain.save_pretrained(to)
    return plain.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_score_is_the_same_alone_in_any_chunk_and_under_either_padding(name: str) -> None:
    model = _crossencoder(name)
    alone = _alone(model)
    with torch.no_grad():
        for budget in (8, 30, 10_000):
            close(model.score(pack(TEXTS, budget)), alone)
        for side in ("left", "right"):
            close(model(*padded(TEXTS, side)), alone)
    assert alone.std() > 1e-4


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["gemma3_text", "llama", "qwen3"])
def test_a_decoders_folder_scores_as_plain_transformers_and_peft_do(
    name: str, adapter: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model_of(name, noise=0.1).save_pretrained(tmp_path / "base")
    scorer = Pretrained(str(tmp_path / "base")).scorer(tokenizer)
    if adapter:
        scorer = shaken(LoRA(rank=4, alpha=8).apply(scorer))
    model = CrossEncoder(scorer, DECODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, DECODER, {})
    auto: Any = AutoModelForSequenceClassification
    plain = auto.from_pretrained(tmp_path / ("base" if adapter else "m"), num_labels=1)
    if adapter:
        plain = PeftModel.from_pretrained(plain, tmp_path / "m")
    with torch.no_grad():
        expected = torch.cat([plain.eval()(torch.tensor([t])).logits[:, 0] for t in TEXTS])
    close(_alone(model), expected)
    loaded, _, encoding, _ = folder.load(tmp_path / "m")
    close(_alone(loaded), expected)
    assert encoding == DECODER


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_an_encoders_folder_has_its_head(
    name: str, adapter: bool, tmp_path: Path, tokenizer: Any
) -> None:
    model = _crossencoder(name)
    if adapter:
        model_of(name).save_pretrained(tmp_path / "base")
        scorer = Pretrained(str(tmp_path / "base")).scorer(tokenizer)
        model = CrossEncoder(shaken(LoRA(rank=4).apply(scorer)), ENCODER).eval()
    folder.save(tmp_path / "m", model, tokenizer, ENCODER, {})
    close(_alone(folder.load(tmp_path / "m")[0]), _alone(model))
    if adapter:
        return
    head = load_file(tmp_path / "m" / folder.HEAD)["score.weight"][0]
    plain = AutoModel.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        states = [plain(torch.tensor([ids])).last_hidden_state[0, 0] for ids in TEXTS]
    close(_alone(model), torch.stack(states) @ head)
    (tmp_path / "m" / folder.HEAD).unlink()
    with refused("no-trained-head", str(tmp_path / "m")):
        folder.load(tmp_path / "m")


def test_an_encoder_that_was_released_with_a_head_keeps_it(tmp_path: Path, tokenizer: Any) -> None:
    plain = _released_encoder(tmp_path / "released")
    spec = Pretrained(str(tmp_path / "released"))
    model = CrossEncoder(spec.scorer(tokenizer), ENCODER).eval()
    assert not spec.head_is_new
    folder.save(tmp_path / "m", model, tokenizer, ENCODER, {})
    loaded, *_ = folder.load(tmp_path / "m")
    types = torch.tensor([[0, 0, 1, 1, 1]])
    ids, mask = torch.tensor([[2, 7, 3, 9, 3]]), torch.ones(1, 5, dtype=torch.int64)
    with torch.no_grad():
        expected = plain(ids, mask, token_type_ids=types).logits[:, 0]
        close(loaded(ids, mask, token_types=types), expected)
    retriever = FromFolder(str(tmp_path / "m")).model(tokenizer)  # without the head
    assert not any("pooler" in name or "classifier" in name for name in retriever.state_dict())


def test_a_head_of_several_labels_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    _released_encoder(tmp_path / "m", labels=3)
    with refused("several-labels", "3 labels"):
        Pretrained(str(tmp_path / "m")).scorer(tokenizer)


@pytest.mark.parametrize(("name", "encoding"), [("bert", DECODER), ("llama", ENCODER)])
def test_pooling_that_does_not_suit_the_architecture_is_refused(
    name: str, encoding: Encoding
) -> None:
    with refused("unsuitable-pooling", "encoding.pooling"):
        CrossEncoder(with_head(model_of(name)), encoding)


@pytest.mark.parametrize("name", ["llama", "bert", "released"])
def test_the_head_stays_float32_in_bf16_and_when_linears_are_packed(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    if name == "released":
        _released_encoder(tmp_path / "released")
        scorer = Pretrained(str(tmp_path / "released")).scorer(tokenizer)
        saved = CrossEncoder(scorer, ENCODER)
    else:
        saved = _crossencoder(name)
    encoding = DECODER if saved.causal else ENCODER
    folder.save(tmp_path / "m", saved, tokenizer, encoding, {})
    model, *_ = folder.load(tmp_path / "m", torch.bfloat16)
    (_, head), (_, wanted) = head_of(model.plain), head_of(saved.plain)  # type: ignore[misc]
    assert torch.equal(head.weight, wanted.weight)  # not rounded to bf16
    assert next(model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        pack_linears(model)
        scores = model.score(pack(TEXTS, 40))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = saved.eval().score(pack(TEXTS, 40))
        expected = saved.score(pack(TEXTS, 40))
    for found in (scores, autocast):
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        close(found, expected, atol=0.02)


def test_an_encoder_with_a_new_head_can_recompute_activations(
    tokenizer: Any, tmp_path: Path
) -> None:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model_of("bert", **dropout).save_pretrained(tmp_path / "base")
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        spec = Pretrained(str(tmp_path / "base"), checkpointing=checkpointing)
        model = CrossEncoder(spec.scorer(tokenizer), ENCODER).train()
        on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        assert on == checkpointing
        model.score(pack(TEXTS, 40)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        close(gradients[1][key], gradient, rtol=1e-4)
