"""Language models that score pairs, by a query's likelihood or by two tokens.

Plain transformers is the judge of the scores, alone, in any batch and through a model folder.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tests.commands import adopt
from tests.models.small import (
    GROUPED,
    TEXTS,
    close,
    language_model_of,
    padded,
    saved_base,
    shaken,
)
from tests.refusals import refused
from tests.tiny import TOKEN, tiny_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates, answer_ids
from caravan.encoding import Encoding
from caravan.models import folder, output_layer
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder, QueryLikelihood, TokenScorer
from caravan.models.loading import set_attention

LIKELIHOOD = Encoding(
    kind="reranker", scoring="likelihood", append_eos=False, query_length=16, passage_length=48
)
ANSWERS = (7, 3)
IDS = [text for text in TEXTS if len(text) > 2]
SECONDS = [len(text) // 2 for text in IDS]
SCALES: dict[str, Any] = {
    "granite": {**GROUPED, "logits_scaling": 8.0},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 0.5},
}
PAIRS = [("", "camel water"), ("", "tent"), ("", "")]
PASSAGES = [("Title", "the caravan route " * 60), ("", "star"), ("Wind", "")]
LORA = LoRA(rank=4, alpha=8, dropout=0.0)


def _language_model(name: str, **more: Any) -> Any:
    return language_model_of(name, **SCALES.get(name, {}), **more)


def _likelihoods(model: Any) -> Tensor:
    scores = []
    for ids, second in zip(IDS, SECONDS, strict=True):
        logits = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
        terms = [logits[at - 1, ids[at]] for at in range(second, len(ids))]
        scores.append(torch.stack(terms).mean())
    return torch.stack(scores)


def _differences(model: Any) -> Tensor:
    logits = [model(torch.tensor([ids])).logits[0, -1].float() for ids in TEXTS]
    return torch.stack([row[ANSWERS[0]] - row[ANSWERS[1]] for row in logits])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "granite", "cohere"])
def test_a_score_is_the_mean_log_probability_that_plain_transformers_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _language_model(name)
    model = QueryLikelihood(plain, LIKELIHOOD).eval()
    with torch.no_grad():
        expected = _likelihoods(plain)
        for most in (1 << 25, 100 * 3):  # three tokens' logits at a time
            monkeypatch.setattr(output_layer, "MOST_LOGITS", most)
            for budget in (8, 30, 10_000):
                close(model.score(pack(IDS, budget, seconds=SECONDS)), expected)
        ids, mask = padded(IDS, "left")
        types = torch.zeros_like(ids)
        for row, (text, second) in enumerate(zip(IDS, SECONDS, strict=True)):
            types[row, second - len(text) :] = 1
        close(model(ids, mask, token_types=types), expected)
    assert expected.std() > 1e-3


def test_the_gradient_of_a_likelihood_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for most in (1 << 25, 100 * 3):
        monkeypatch.setattr(output_layer, "MOST_LOGITS", most)
        model = QueryLikelihood(language_model_of("gemma2"), LIKELIHOOD).train()
        model.score(pack(IDS, 10_000, seconds=SECONDS)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for whole, parts in zip(*gradients, strict=True):
        close(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "granite", "cohere", "phi"])
def test_a_score_is_the_difference_of_two_logits_of_plain_transformers(
    name: str, tied: bool
) -> None:
    plain = _language_model(name, tie_word_embeddings=tied)
    model = TokenScorer(plain, TOKEN, ANSWERS).eval()
    with torch.no_grad():
        expected = _differences(plain)
        for budget in (8, 30, 10_000):
            close(model.score(pack(TEXTS, budget)), expected)
        close(model(*padded(TEXTS, "left")), expected)
        close(model(*padded(TEXTS, "right")), expected)
        if name == "qwen3":
            set_attention(plain, "unpadded")
            close(model.score(pack(TEXTS, 30)), expected)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_that_of_full_logits_whatever_the_chunks(tied: bool) -> None:
    plain = language_model_of("qwen3", tie_word_embeddings=tied)
    model = TokenScorer(plain, TOKEN, ANSWERS).train()
    gradients = []
    for scores in (_differences(plain), *(model.score(pack(TEXTS, n)) for n in (8, 10_000))):
        loss = -torch.log_softmax(scores, dim=0)[0]
        found = torch.autograd.grad(loss, list(plain.parameters()))
        assert float(found[0].abs().sum()) > 0
        gradients.append(found)
    for other in gradients[1:]:
        for one, whole in zip(other, gradients[0], strict=True):
            close(one, whole, rtol=1e-4)


@torch.no_grad()
def _of_folder(path: Path, packed: bool = False) -> Tensor:
    model, tokenizer, encoding, _ = folder.load(path)
    if packed:
        pack_linears(model, model.output_layer)
    pairs = PairTemplates(tokenizer, encoding).pairs(PAIRS, PASSAGES)
    found: Tensor = model.score(pack([pair.ids for pair in pairs], 64))
    return found


@torch.no_grad()
def _by_the_model_card(plain: Any, tokenizer: Any, encoding: Encoding) -> Tensor:
    """As Qwen3-Reranker's card: three pieces tokenized apart, the middle one truncated."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = ids_of(encoding.prefix), ids_of(encoding.suffix)
    most = encoding.query_length + encoding.passage_length - len(before) - len(after)
    yes, no = (ids_of(encoding.suffix + text)[-1] for text in (" salt", " silk"))
    scores = []
    for (_, query), (title, text) in zip(PAIRS, PASSAGES, strict=True):
        document = f"{title} {text}" if title else text
        body = f"the salt route ask: {query}\ndocument: passage: {document}"
        logits = plain(torch.tensor([[*before, *ids_of(body)[:most], *after]])).logits[0, -1]
        scores.append(logits[yes] - logits[no])
    return torch.stack(scores)


def _base(tokenizer: Any, to: Path, tied: bool = True) -> Any:
    settings = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    base = language_model_of("qwen3", **settings)
    saved_base(tokenizer, to, base)
    return base


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_released_model_is_adopted_by_one_command(
    tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    plain = _base(tokenizer, tmp_path / "released", tied)
    given = ["stage=reranker_token", "encoding.positive=' salt'", "encoding.negative=' silk'"]
    for name in ("prefix", "query_template", "passage_template", "suffix", "instruction"):
        given.append(f"encoding.{name}='{getattr(TOKEN, name)}'")
    adopted = adopt(tmp_path / "released", tmp_path / "run", *given)
    model, _, encoding, facts = folder.load(adopted)
    assert facts["chat_ids"]["positive"] == tokenizer.convert_tokens_to_ids("Ġsalt")
    expected = _by_the_model_card(plain, tokenizer, encoding)
    close(_of_folder(adopted), expected)
    close(_of_folder(adopted, packed=True), expected)
    # The conversion to sequence classification, whose head is the difference of the two rows.
    converted = tmp_path / "converted"
    saved_base(tokenizer, converted, model.as_classifier())
    auto = AutoModelForSequenceClassification
    report = auto.from_pretrained(converted, output_loading_info=True)[1]
    assert not any(report.values())
    with refused("no-language-model", "encoding.scoring=head"):
        adopt(converted, tmp_path / "refused", *given)
    by_head = adopt(converted, tmp_path / "head", *given, "encoding.scoring=head")
    close(_of_folder(by_head), expected)


@pytest.mark.parametrize(
    ("encoding", "quant_type"), [(LIKELIHOOD, None), (TOKEN, None), (TOKEN, "nf4")]
)
def test_an_adapters_folder_scores_as_before_and_is_trained_further(
    encoding: Encoding, quant_type: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    def scorer(transformer: Any) -> CrossEncoder:
        if encoding is LIKELIHOOD:
            return QueryLikelihood(transformer, encoding)
        return TokenScorer(transformer, encoding, answer_ids(tokenizer, TOKEN))

    _base(tokenizer, tmp_path / "base")
    lora = LoRA(rank=4, alpha=8, dropout=0.0, quant_type=quant_type)
    base = Pretrained(str(tmp_path / "base"))
    base.use_adapters(lora)
    model = scorer(shaken(lora.apply(base.language_model(tokenizer))))
    four_bits = [one for one in model.modules() if isinstance(one, Linear4bit)]
    assert len(four_bits) == (14 if quant_type else 0)  # not the output layer
    pairs = pack(IDS, 64, seconds=SECONDS)
    model.train().score(pairs).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and bool(grad.any()) for name, grad in trained.items())
    folder.save(tmp_path / "m", model.eval(), tokenizer, encoding, {})
    spec = FromFolder(str(tmp_path / "m"))
    merged = scorer(spec.language_model(tokenizer))
    spec.use_adapters(lora)
    kept = scorer(spec.adapted(lora, spec.language_model(tokenizer)))
    loaded = folder.load(tmp_path / "m")[0]  # the base in full precision, as `merged`
    with torch.no_grad():
        scores = [one.eval().score(pairs) for one in (model, kept, loaded, merged)]
    close(scores[1], scores[0])
    close(scores[3], scores[2])
    if quant_type is None:
        close(scores[2], scores[0])


@pytest.mark.parametrize(
    ("kind", "adapter", "tied"),
    [("retriever", True, True), ("retriever", False, False), ("reranker", False, True)],
)
def test_another_stages_adapter_starts_a_likelihood_with_its_bases_output_layer(
    kind: str, adapter: bool, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    base = _base(tokenizer, tmp_path / "base", tied)
    spec, encoding = Pretrained(str(tmp_path / "base")), Encoding(kind=kind)
    model: Any
    if kind == "retriever":
        model = BiEncoder(shaken(LORA.apply(spec.model(tokenizer))), encoding)
    else:
        model = CrossEncoder(shaken(LORA.apply(spec.scorer(tokenizer))), encoding)
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    from_folder = FromFolder(str(tmp_path / "m"))
    from_folder.use_adapters(LORA if adapter else None)
    started: Any = from_folder.language_model(tokenizer)
    started = from_folder.adapted(LORA, started) if adapter else started
    ids = torch.tensor([IDS[0]])
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


def test_a_folder_is_a_language_model_of_transformers_with_the_ids_of_its_template(
    tokenizer: Any, tmp_path: Path
) -> None:
    base = tiny_backbone().language_model(tokenizer)
    folder.save(tmp_path / "l", QueryLikelihood(base, LIKELIHOOD), tokenizer, LIKELIHOOD, {})
    model = TokenScorer(base, TOKEN, answer_ids(tokenizer, TOKEN))
    folder.save(tmp_path / "m", model, tokenizer, TOKEN, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    close(_of_folder(tmp_path / "m"), _by_the_model_card(plain, tokenizer, TOKEN))
    loaded = folder.load(tmp_path / "l")[0]
    for _ in range(2):
        with torch.no_grad():
            close(loaded.score(pack(IDS, 64, seconds=SECONDS)), _likelihoods(plain))
            pack_linears(loaded)
    record = json.loads((tmp_path / "m" / "caravan.json").read_text())
    ids = record["facts"]["chat_ids"]
    assert tokenizer.decode(ids["prefix"]) == TOKEN.prefix
    assert tokenizer.decode([*ids["suffix"], ids["negative"]]) == "\nanswer: silk"
    ids["negative"] += 1
    (tmp_path / "m" / "caravan.json").write_text(json.dumps(record))
    with refused("other-token-ids", str(tmp_path / "m")):
        folder.load(tmp_path / "m")


def test_a_model_without_a_usable_output_layer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    language_model_of("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path / "base")
    with refused("weights-mismatch", "lm_head.weight missing"):
        Pretrained(str(tmp_path / "base")).language_model(tokenizer)
    model = QueryLikelihood(tiny_backbone().language_model(tokenizer), LIKELIHOOD)
    with torch.no_grad():
        model.plain.base_model.norm.weight.fill_(3e38)  # finite, unlike what it computes
    folder.save(tmp_path / "m", model, tokenizer, LIKELIHOOD, {})
    with refused("diverged-model", str(tmp_path / "m")):
        folder.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"positive": "yes"}, "encoding.positive='yes'"),
        ({"negative": "  silk"}, "encoding.negative='  silk'"),
        ({"suffix": "answer: ", "positive": "salt"}, "encoding.positive='salt'"),
    ],
)
def test_a_text_that_is_not_one_token_after_the_suffix_is_refused(
    change: dict[str, str], place: str, tokenizer: Any
) -> None:
    joined = replace(TOKEN, suffix="answer: sal", positive="t", negative="r")  # read alone
    assert answer_ids(tokenizer, joined) == tuple(tokenizer.convert_tokens_to_ids(["t", "r"]))
    with refused("not-a-token", place):
        answer_ids(tokenizer, replace(TOKEN, **change))
