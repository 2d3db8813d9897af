"""Scores by two tokens: as plain transformers computes them, in any batch and model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tests.commands import ROOT
from tests.models.small import GROUPED, TEXTS, close, language_model_of, padded, shaken
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from caravan.cli.compose import compose
from caravan.cli.train import train
from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates, answer_ids
from caravan.encoding import Encoding
from caravan.export import sentence_transformers
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.cpu import pack_linears
from caravan.models.loading import load_tokenizer, set_attention
from caravan.models.released_pairs import check_released
from caravan.models.token_scorer import TokenScorer

TOKEN = Encoding(
    kind="reranker",
    scoring="token",
    append_eos=False,
    prefix="<s>judge:\n",
    query_template="{instruction} ask: {text}\ndocument:",
    suffix="\nanswer:",
    instruction="the salt route",
    positive=" salt",
    negative=" silk",
)
ANSWERS = (7, 3)
SCALES: dict[str, Any] = {
    "granite": {**GROUPED, "logits_scaling": 8.0},
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 0.5},
}
PAIRS = [("", "camel water"), ("", "tent"), ("", "")]
PASSAGES = [("Title", "the caravan route " * 60), ("", "star"), ("Wind", "")]


def _expected(model: Any) -> Tensor:
    logits = [model(torch.tensor([ids])).logits[0, -1].float() for ids in TEXTS]
    return torch.stack([row[ANSWERS[0]] - row[ANSWERS[1]] for row in logits])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "granite", "cohere", "phi"])
def test_a_score_is_the_difference_of_two_logits_of_plain_transformers(
    name: str, tied: bool
) -> None:
    plain = language_model_of(name, tie_word_embeddings=tied, **SCALES.get(name, {}))
    model = TokenScorer(plain, TOKEN, ANSWERS).eval()
    with torch.no_grad():
        expected = _expected(plain)
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
    for scores in (_expected(plain), *(model.score(pack(TEXTS, n)) for n in (8, 10_000))):
        loss = -torch.log_softmax(scores, dim=0)[0]
        found = torch.autograd.grad(loss, list(plain.parameters()))
        assert float(found[0].abs().sum()) > 0
        gradients.append(found)
    for other in gradients[1:]:
        for one, whole in zip(other, gradients[0], strict=True):
            close(one, whole, rtol=1e-4)


def _saved(to: Path, tokenizer: Any, tied: bool = True) -> Any:
    settings = {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    base = language_model_of("qwen3", **settings)
    base.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return base


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


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_released_model_is_adopted_by_one_command(
    tied: bool, beir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    plain = _saved(tmp_path / "released", tokenizer, tied)
    given = ["stage=reranker_token", "backbone=hf", f"backbone.name={tmp_path / 'released'}"]
    for name in ("prefix", "query_template", "passage_template", "suffix", "instruction"):
        given.append(f"encoding.{name}='{getattr(TOKEN, name)}'")
    given += ["encoding.positive=' salt'", "encoding.negative=' silk'", "trainer.max_steps=0"]
    given += ["data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}"]
    train(compose(ROOT / "conf", "train", [*given, f"run_dir={tmp_path / 'run'}"]))
    _, _, encoding, facts = folder.load(tmp_path / "run" / "model")
    assert facts["chat_ids"]["positive"] == tokenizer.convert_tokens_to_ids("Ġsalt")
    expected = _by_the_model_card(plain, tokenizer, encoding)
    close(_of_folder(tmp_path / "run" / "model"), expected)
    close(_of_folder(tmp_path / "run" / "model", packed=True), expected)
    # The conversion to sequence classification, whose head is the difference of the two rows.
    head = folder.load(tmp_path / "run" / "model")[0].as_classifier()
    head.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )[1]
    assert not any(report.values())
    given[2] = f"backbone.name={tmp_path / 'converted'}"
    again = compose(ROOT / "conf", "train", [*given, f"run_dir={tmp_path / 'refused'}"])
    with refused("no-language-model", "encoding.scoring=head"):
        train(again)
    given += ["encoding.scoring=head", f"run_dir={tmp_path / 'head'}"]
    train(compose(ROOT / "conf", "train", given))
    close(_of_folder(tmp_path / "head" / "model"), expected)


@pytest.mark.parametrize("quant_type", [None, "nf4"], ids=["LoRA", "QLoRA"])
def test_an_adapters_folder_scores_as_before_and_is_trained_further(
    quant_type: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    _saved(tmp_path / "base", tokenizer)
    lora = LoRA(rank=4, alpha=8, dropout=0.0, quant_type=quant_type)
    base = Pretrained(str(tmp_path / "base"))
    base.use_adapters(lora)
    answers = answer_ids(tokenizer, TOKEN)
    model = TokenScorer(shaken(lora.apply(base.language_model(tokenizer))), TOKEN, answers)
    four_bits = [one for one in model.modules() if isinstance(one, Linear4bit)]
    assert len(four_bits) == (14 if quant_type else 0)  # not the output layer
    model.train().score(pack(TEXTS, 64)).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and bool(grad.any()) for name, grad in trained.items())
    folder.save(tmp_path / "m", model.eval(), tokenizer, TOKEN, {})
    spec = FromFolder(str(tmp_path / "m"))
    merged = TokenScorer(spec.language_model(tokenizer), TOKEN, answers)
    spec.use_adapters(lora)
    kept = TokenScorer(spec.adapted(lora, spec.language_model(tokenizer)), TOKEN, answers)
    loaded = folder.load(tmp_path / "m")[0]  # the base in full precision, as `merged`
    with torch.no_grad():
        scores = [one.eval().score(pack(TEXTS, 64)) for one in (model, kept, loaded, merged)]
    close(scores[1], scores[0])
    close(scores[3], scores[2])
    if quant_type is None:
        close(scores[2], scores[0])


def test_a_folder_is_a_language_model_of_transformers_with_the_ids_of_its_template(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = TokenScorer(
        tiny_backbone().language_model(tokenizer), TOKEN, answer_ids(tokenizer, TOKEN)
    )
    folder.save(tmp_path / "m", model, tokenizer, TOKEN, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    close(_of_folder(tmp_path / "m"), _by_the_model_card(plain, tokenizer, TOKEN))
    record = json.loads((tmp_path / "m" / "caravan.json").read_text())
    ids = record["facts"]["chat_ids"]
    assert tokenizer.decode(ids["prefix"]) == TOKEN.prefix
    assert tokenizer.decode([*ids["suffix"], ids["negative"]]) == "\nanswer: silk"
    ids["negative"] += 1
    (tmp_path / "m" / "caravan.json").write_text(json.dumps(record))
    with refused("other-token-ids", str(tmp_path / "m")):
        folder.load(tmp_path / "m")


def test_an_answer_that_the_tokenizer_would_join_with_the_suffix_is_read_alone(
    tokenizer: Any,
) -> None:
    joined = replace(TOKEN, suffix="answer: sal", positive="t", negative="r")
    assert answer_ids(tokenizer, joined) == tuple(tokenizer.convert_tokens_to_ids(["t", "r"]))


def test_the_files_of_sentence_transformers_must_agree(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TokenScorer(
        tiny_backbone().language_model(tokenizer), TOKEN, answer_ids(tokenizer, TOKEN)
    )
    folder.save(tmp_path / "m", model, tokenizer, TOKEN, {})
    released = str(tmp_path / "released")
    sentence_transformers.export(tmp_path / "m", Path(released))
    own = load_tokenizer(released)
    check_released(released, None, own, TOKEN)
    assert "truncate" not in caplog.text
    check_released(released, None, own, replace(TOKEN, passage_length=TOKEN.passage_length + 1))
    assert f"the files of {released} truncate a pair at" in caplog.text
    for change, code in (
        ({"negative": " tent"}, "other-tokens"),
        ({"instruction": "the silk route"}, "other-chat-template"),
    ):
        with refused(code, released, "encoding."):
            check_released(released, None, own, replace(TOKEN, **change))
    (tmp_path / "released" / "modules.json").write_text('[{"type": "a.Pooling", "path": "1"}]')
    with refused("not-readable", "Pooling"):
        check_released(released, None, own, TOKEN)


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
    with refused("not-a-token", place):
        answer_ids(tokenizer, replace(TOKEN, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"pair": "pair", "prefix": "", "suffix": ""},
        {"append_eos": True},
        {"pooling": "cls"},
        {"positive": ""},
        {"negative": " salt"},
        {"instruction": ""},
        {"query_template": "{text}"},
        {"suffix": r"\nanswer:"},
        {"kind": "retriever", "scoring": "head"},
    ],
)
def test_an_encoding_that_cannot_be_scored_is_refused(change: dict[str, Any]) -> None:
    with refused("invalid-encoding", "encoding."):
        replace(TOKEN, **change)
