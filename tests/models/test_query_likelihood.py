"""A query's likelihood: as plain transformers computes it, in any batch, through a model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import GROUPED, TEXTS, close, language_model_of, padded, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from transformers import AutoModelForCausalLM

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import folder, output_layer
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder
from caravan.models.output_layer import log_probabilities
from caravan.models.query_likelihood import QueryLikelihood

LIKELIHOOD = Encoding(
    kind="reranker", scoring="likelihood", append_eos=False, query_length=16, passage_length=48
)
PAIRS = [text for text in TEXTS if len(text) > 2]
SECONDS = [len(text) // 2 for text in PAIRS]
SCALES = {"granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.25}}


def _language_model(name: str) -> Any:
    more = {**GROUPED, **SCALES[name]} if name in SCALES else {}
    return language_model_of(name, **more)


def _expected(model: Any) -> torch.Tensor:
    scores = []
    for ids, second in zip(PAIRS, SECONDS, strict=True):
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
        terms = [logits[at - 1, ids[at]] for at in range(second, len(ids))]
        scores.append(torch.stack(terms).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "granite", "cohere"])
def test_a_score_is_the_mean_log_probability_that_plain_transformers_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _language_model(name)
    model = QueryLikelihood(plain, LIKELIHOOD).eval()
    with torch.no_grad():
        expected = _expected(plain)
        for most in (1 << 25, 100 * 3):  # three tokens' logits at a time
            monkeypatch.setattr(output_layer, "MOST_LOGITS", most)
            for budget in (8, 30, 10_000):
                close(model.score(pack(PAIRS, budget, seconds=SECONDS)), expected)
        ids, mask = padded(PAIRS, "left")
        types = torch.zeros_like(ids)
        for row, (text, second) in enumerate(zip(PAIRS, SECONDS, strict=True)):
            types[row, second - len(text) :] = 1
        close(model(ids, mask, token_types=types), expected)
    assert expected.std() > 1e-3


def test_the_gradient_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for most in (1 << 25, 100 * 3):
        monkeypatch.setattr(output_layer, "MOST_LOGITS", most)
        model = QueryLikelihood(_language_model("gemma2"), LIKELIHOOD).train()
        model.score(pack(PAIRS, 10_000, seconds=SECONDS)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for whole, parts in zip(*gradients, strict=True):
        close(parts, whole, rtol=1e-5)


def test_a_folder_scores_as_before_and_is_a_language_model_of_transformers(
    tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = QueryLikelihood(tiny_backbone().language_model(tokenizer), LIKELIHOOD).eval()
    folder.save(tmp_path / "m", model, tokenizer, LIKELIHOOD, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    loaded, _, encoding, _ = folder.load(tmp_path / "m")
    assert encoding == LIKELIHOOD
    pairs = pack(PAIRS, 64, seconds=SECONDS)
    with torch.no_grad():
        expected = _expected(plain)
        close(model.score(pairs), expected)
        close(loaded.score(pairs), expected)
        pack_linears(loaded)
        close(loaded.score(pairs), expected)


def _base(tokenizer: Any, to: Path, tied: bool = True) -> Any:
    torch.manual_seed(0)
    base: Any = tiny_backbone().language_model(tokenizer)
    if not tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return base


def test_an_adapters_folder_scores_as_before_and_is_trained_further(
    tokenizer: Any, tmp_path: Path
) -> None:
    _base(tokenizer, tmp_path / "base")
    lora = LoRA(rank=4, alpha=8, dropout=0.0)
    scorer = shaken(lora.apply(Pretrained(str(tmp_path / "base")).language_model(tokenizer)))
    model = QueryLikelihood(scorer, LIKELIHOOD).eval()
    folder.save(tmp_path / "m", model, tokenizer, LIKELIHOOD, {})
    pairs = pack(PAIRS, 64, seconds=SECONDS)
    spec = FromFolder(str(tmp_path / "m"))
    merged = QueryLikelihood(spec.language_model(tokenizer), LIKELIHOOD).eval()
    spec.use_adapters(lora)
    kept = spec.adapted(lora, spec.language_model(tokenizer))
    with torch.no_grad():
        expected = model.score(pairs)
        for other in (folder.load(tmp_path / "m")[0], merged, QueryLikelihood(kept, LIKELIHOOD)):
            close(other.eval().score(pairs), expected)


@pytest.mark.parametrize(
    ("kind", "adapter", "tied"),
    [("retriever", True, True), ("retriever", False, False), ("reranker", False, True)],
)
def test_another_stages_adapter_starts_a_likelihood_with_its_bases_output_layer(
    kind: str, adapter: bool, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    base = _base(tokenizer, tmp_path / "base", tied)
    lora, spec = LoRA(rank=4, alpha=8, dropout=0.0), Pretrained(str(tmp_path / "base"))
    encoding = Encoding(kind=kind)
    model: Any
    if kind == "retriever":
        model = BiEncoder(shaken(lora.apply(spec.model(tokenizer))), encoding)
    else:
        model = CrossEncoder(shaken(lora.apply(spec.scorer(tokenizer))), encoding)
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    from_folder = FromFolder(str(tmp_path / "m"))
    from_folder.use_adapters(lora if adapter else None)
    started: Any = from_folder.language_model(tokenizer)
    started = from_folder.adapted(lora, started) if adapter else started
    ids = torch.tensor([PAIRS[0]])
    trunk: Any = folder.load(tmp_path / "m")[0].transformer.base_model
    with torch.no_grad():
        states = trunk(input_ids=ids).last_hidden_state
        close(started.eval()(input_ids=ids).logits, base.lm_head(states))


def test_a_retriever_with_tied_embeddings_starts_a_likelihood(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = BiEncoder(tiny_backbone().model(tokenizer), Encoding())
    folder.save(tmp_path / "r", model, tokenizer, Encoding(), {})
    started: Any = FromFolder(str(tmp_path / "r")).language_model(tokenizer)
    taken = model.transformer.get_input_embeddings().weight  # type: ignore[operator]
    close(started.get_output_embeddings().weight, taken)


def test_a_base_without_its_output_layer_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    language_model_of("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path / "base")
    with refused("weights-mismatch", "lm_head.weight missing"):
        Pretrained(str(tmp_path / "base")).language_model(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        {"pair": "pair"},
        {"append_eos": True},
        {"kind": "retriever", "scoring": "likelihood"},
        {"query_template": "query: {text} ?"},
        {"scoring": "mean"},
    ],
)
def test_an_encoding_that_cannot_be_scored_is_refused(change: dict[str, Any]) -> None:
    with refused("invalid-encoding", f"encoding.{list(change)[-1]} is"):
        replace(LIKELIHOOD, **change)


def test_a_diverged_model_is_refused_as_such(tokenizer: Any, tmp_path: Path) -> None:
    model = QueryLikelihood(tiny_backbone().language_model(tokenizer), LIKELIHOOD)
    with torch.no_grad():
        model.plain.base_model.norm.weight.fill_(3e38)  # finite, unlike what it computes
    folder.save(tmp_path / "m", model, tokenizer, LIKELIHOOD, {})
    with refused("diverged-model", str(tmp_path / "m")):
        folder.load(tmp_path / "m")


def test_log_probabilities_apply_the_soft_cap() -> None:
    model = _language_model("gemma2")
    model.config.final_logit_softcapping = 0.5
    states, tokens = torch.randn(3, 32), torch.tensor([1, 2, 3])
    logits = 0.5 * torch.tanh(model.lm_head(states) / 0.5)
    expected = logits.log_softmax(dim=1)[torch.arange(3), tokens]
    torch.testing.assert_close(log_probabilities(model, states, tokens), expected)
