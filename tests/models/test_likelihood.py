"""A query's likelihood: what plain transformers gives, in any batch, and through a model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_biencoder import TEXTS
from tests.tiny import tiny_backbone

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder, output_layer
from caravan.models.adapters import LoRA
from caravan.models.backbone import FromFolder, Pretrained
from caravan.models.bidirectional import is_causal
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears
from caravan.models.crossencoder import CrossEncoder, with_head
from caravan.models.output_layer import log_probabilities
from caravan.models.query_likelihood import QueryLikelihood

CONTRACT = Encoding(
    kind="reranker",
    scoring="likelihood",
    append_eos=False,
    query_length=16,
    passage_length=48,
)
PAIRS = [text for text in TEXTS if len(text) > 2]
SECONDS = [len(text) // 2 for text in PAIRS]


def _language_model(name: str) -> Any:
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (transformers.LlamaConfig, {"num_key_value_heads": 1, "intermediate_size": 24}),
        "qwen3": (
            transformers.Qwen3Config,
            {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8},
        ),
        "gemma2": (
            transformers.Gemma2Config,
            {"num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8},
        ),
        "gpt2": (transformers.GPT2Config, {}),
        "granite": (
            transformers.GraniteConfig,
            {"num_key_value_heads": 1, "intermediate_size": 24, "logits_scaling": 8.0},
        ),
        "cohere": (
            transformers.CohereConfig,
            {"num_key_value_heads": 1, "intermediate_size": 24, "logit_scale": 0.25},
        ),
    }
    kind, more = kinds[name]
    torch.manual_seed(0)
    config = kind(vocab_size=64, pad_token_id=0, use_cache=False, **shape, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _expected(model: Any, ids: list[int], second: int) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=1)
    terms = [logits[at - 1, ids[at]] for at in range(second, len(ids))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "granite", "cohere"])
def test_a_score_is_the_mean_log_probability_that_plain_transformers_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _language_model(name)
    model = QueryLikelihood(plain, CONTRACT).eval()
    with torch.no_grad():
        expected = torch.stack(
            [_expected(plain, *pair) for pair in zip(PAIRS, SECONDS, strict=True)]
        )
        for piece in (1 << 25, 64 * 3):  # three tokens' logits at a time
            monkeypatch.setattr(output_layer, "MOST_LOGITS", piece)
            for budget in (8, 30, 10_000):
                found = model.score(pack(PAIRS, budget, seconds=SECONDS))
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 1e-3


def test_padding_on_the_left_changes_no_score() -> None:
    model = QueryLikelihood(_language_model("llama"), CONTRACT).eval()
    chunk = pack([*PAIRS, PAIRS[0]], 10_000, seconds=[*SECONDS, 1]).chunks[0]
    rows = []
    for row in (chunk.input_ids, chunk.attention_mask, chunk.token_types):
        lengths = chunk.attention_mask.sum(dim=1)
        rows.append(
            torch.stack([r.roll(len(r) - int(n)) for r, n in zip(row, lengths, strict=True)])
        )
    with torch.no_grad():
        right = model(chunk.input_ids, chunk.attention_mask, token_types=chunk.token_types)
        left = model(rows[0], rows[1], token_types=rows[2])
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_the_gradient_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for piece in (1 << 25, 64 * 3):
        monkeypatch.setattr(output_layer, "MOST_LOGITS", piece)
        model = QueryLikelihood(_language_model("gemma2"), CONTRACT).train()
        model.score(pack(PAIRS, 10_000, seconds=SECONDS)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    assert gradients[0]


def test_a_folder_scores_as_before_and_is_a_language_model_of_transformers(
    tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = QueryLikelihood(tiny_backbone().language_model(tokenizer), CONTRACT).eval()
    folder.save(tmp_path / "m", model, tokenizer, CONTRACT, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    loaded, _, encoding, _ = folder.load(tmp_path / "m", kind="reranker")
    assert encoding == CONTRACT
    pairs = pack(PAIRS, 64, seconds=SECONDS)
    with torch.no_grad():
        expected = torch.stack(
            [_expected(plain, *pair) for pair in zip(PAIRS, SECONDS, strict=True)]
        )
        torch.testing.assert_close(model.score(pairs), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(loaded.score(pairs), expected, atol=1e-5, rtol=0)
        pack_linears(loaded)
        torch.testing.assert_close(loaded.score(pairs), expected, atol=1e-5, rtol=0)


def test_an_adapters_folder_scores_as_before_and_training_goes_on_from_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    tiny_backbone().language_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoRA(rank=4, alpha=8, dropout=0.0)
    scorer: Any = lora.apply(Pretrained(str(tmp_path / "base")).language_model(tokenizer))
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model = QueryLikelihood(scorer, CONTRACT).eval()
    folder.save(tmp_path / "m", model, tokenizer, CONTRACT, {})
    pairs = pack(PAIRS, 64, seconds=SECONDS)
    loaded, *_ = folder.load(tmp_path / "m")
    spec = FromFolder(str(tmp_path / "m"))
    again = QueryLikelihood(spec.adapted(lora, spec.language_model(tokenizer)), CONTRACT).eval()
    merged = FromFolder(str(tmp_path / "m")).language_model(tokenizer)
    with torch.no_grad():
        expected = model.score(pairs)
        torch.testing.assert_close(loaded.score(pairs), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(again.score(pairs), expected, atol=1e-5, rtol=0)
        found = QueryLikelihood(merged, CONTRACT).eval().score(pairs)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_an_adapter_of_another_kind_starts_a_likelihood_with_its_bases_output_layer(
    kind: str, adapter: bool, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base: Any = tiny_backbone().language_model(tokenizer)
    if not tied:
        base.config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora, spec = LoRA(rank=4, alpha=8, dropout=0.0), Pretrained(str(tmp_path / "base"))
    made: Any = lora.apply(spec.model(tokenizer) if kind == "retriever" else spec.scorer(tokenizer))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    encoding = Encoding(kind=kind)
    model = BiEncoder(made, encoding) if kind == "retriever" else CrossEncoder(made, encoding)
    folder.save(tmp_path / "m", model, tokenizer, encoding, {})
    trained = FromFolder(str(tmp_path / "m"), adapter=adapter)
    started: Any = trained.language_model(tokenizer)
    started = trained.adapted(lora, started) if adapter else started
    ids = torch.tensor([PAIRS[0]])
    trunk: Any = folder.load(tmp_path / "m")[0].transformer.base_model
    with torch.no_grad():
        states = trunk(input_ids=ids).last_hidden_state
        found = started.eval()(input_ids=ids).logits
        torch.testing.assert_close(found, base.lm_head(states), atol=1e-5, rtol=0)


def test_a_retriever_with_tied_embeddings_starts_a_likelihood(
    tokenizer: Any, tmp_path: Path
) -> None:
    encoding = Encoding()
    model = BiEncoder(tiny_backbone().model(tokenizer), encoding)
    folder.save(tmp_path / "r", model, tokenizer, encoding, {})
    spec = FromFolder(str(tmp_path / "r"))
    started: Any = spec.language_model(tokenizer)
    taken = model.transformer.get_input_embeddings().weight
    torch.testing.assert_close(started.get_output_embeddings().weight, taken)
    assert spec.told == f"{len(list(started.parameters()))} weights taken from {tmp_path / 'r'}"


def test_a_base_without_its_output_layer_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"lm_head\.weight missing"):
        Pretrained(str(tmp_path / "base")).language_model(tokenizer)


def test_a_scorer_that_is_no_language_model_is_refused_by_name(tokenizer: Any) -> None:
    headed = with_head(tiny_backbone().model(tokenizer), 0)
    assert is_causal(headed)
    with pytest.raises(InputError, match=r"encoding\.scoring=likelihood: LlamaFor.* is no causal"):
        QueryLikelihood(headed, CONTRACT)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pair": "pair"}, "leave it joined"),
        ({"append_eos": True}, "no word of a query"),
        ({"kind": "retriever"}, "only a reranker scores so"),
        ({"query_template": "query: {text} ?"}, "must end with {text}"),
        ({"scoring": "mean"}, "must be one of head, likelihood"),
    ],
)
def test_a_encoding_that_cannot_be_scored_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        replace(CONTRACT, **change)


def test_log_probabilities_heed_the_soft_cap() -> None:
    model = _language_model("gemma2")
    model.config.final_logit_softcapping = 0.5
    states, tokens = torch.randn(3, 16), torch.tensor([1, 2, 3])
    logits = 0.5 * torch.tanh(model.lm_head(states) / 0.5)
    expected = logits.log_softmax(dim=1)[torch.arange(3), tokens]
    torch.testing.assert_close(log_probabilities(model, states, tokens), expected)
