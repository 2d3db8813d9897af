"""Decoders that look both ways: equal to a mask that hides nothing, remembered, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tests.models.test_biencoder import TEXTS, _padded
from tests.models.test_presets import GROUPED
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.bidirectional import check_direction, is_causal, make_bidirectional
from caravan.models.biencoder import BiEncoder
from caravan.models.llara import Layout, SlotEncoder
from caravan.models.loading import set_attention
from caravan.models.query_likelihood import QueryLikelihood

BOTH = Encoding(bidirectional=True, query_length=16, passage_length=24)
WINDOW = 4
MIXED = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, **MIXED, sliding_window=WINDOW),
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
OTHERS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS),
    "gpt2": lambda: transformers.GPT2Config(**GROUPED),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **GROUPED, attention_types=[[["global", "local"], 1]]
    ),
    "mamba": lambda: transformers.MambaConfig(**GROUPED),
    "jamba": lambda: transformers.JambaConfig(
        **GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=1, use_mamba_kernels=False
    ),
    "llama4": lambda: transformers.Llama4TextConfig(**GROUPED, **EXPERTS, head_dim=16),
    "stablelm": lambda: transformers.StableLmConfig(**GROUPED),
    "bert": lambda: transformers.BertConfig(**GROUPED),
}


def _model(name: str, attention: str = "auto") -> Any:
    """A decoder of transformers that looks to the left, its weights large enough to matter."""
    torch.manual_seed(0)
    config = {**DECODERS, **OTHERS}[name]()
    config.use_cache = False
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return set_attention(model.eval(), attention)


def _encoder(name: str, attention: str = "auto", pooling: str = "last") -> BiEncoder:
    model = make_bidirectional(_model(name, attention))
    return BiEncoder(model, replace(BOTH, pooling=pooling)).eval()


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", DECODERS)
def test_an_embedding_depends_on_neither_batch_nor_padding(
    name: str, pooling: str, attention: str
) -> None:
    model = _encoder(name, attention, pooling)
    with torch.no_grad():
        alone = torch.cat([model(*_padded([text], "right", len(text)), True) for text in TEXTS])
        batched = [model(*_padded(TEXTS, side)) for side in ("left", "right")]
        filled = model(*_padded(TEXTS, "right", width=40))
        packed = model.embed(pack(TEXTS, token_budget=20))
    for other in (*batched, filled, packed):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)


def _with_a_mask(name: str, text: list[int]) -> Tensor:
    """States [1, L, d] of the decoder as it was made, under a mask of one's own."""
    places = torch.arange(len(text))
    near = (places[:, None] - places).abs() <= WINDOW
    masks = {"full_attention": torch.ones_like(near)[None, None], "sliding_attention": near}
    masks["sliding_attention"] = near[None, None]
    kinds = {"llama": "full_attention", "qwen3": "full_attention", "mistral": "sliding_attention"}
    model = _model(name, "sdpa")
    assert is_causal(model)
    mask: Any = masks if name == "gemma3" else masks[kinds[name]]
    states: Tensor = model(torch.tensor([text]), attention_mask=mask).last_hidden_state
    return states


@pytest.mark.parametrize("name", DECODERS)
def test_embeddings_equal_plain_transformers_under_a_mask_that_hides_nothing(name: str) -> None:
    model = _encoder(name)
    with torch.no_grad():
        for text in TEXTS:
            expected = torch.nn.functional.normalize(_with_a_mask(name, text)[:, -1], dim=-1)
            found = model.embed(pack([text], 100))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("name", [*DECODERS, "mixtral", "gpt2"])
def test_the_last_token_moves_the_first_tokens_state(name: str, both: bool) -> None:
    model = _model(name)
    encoding = Encoding(pooling="cls", bidirectional=both, query_length=8, passage_length=8)
    encoder = BiEncoder(make_bidirectional(model) if both else model, encoding)
    with torch.no_grad():
        rows = encoder.embed(pack([[5, 6, 7, 8], [5, 6, 7, 9]], 100))
    assert bool((rows[0] - rows[1]).abs().max() > 1e-3) == both


def test_a_processors_own_attention_in_bf16_looks_both_ways() -> None:
    exact, rounded = _encoder("llama"), _encoder("llama")
    assert rounded.backbone.config._attn_implementation == "caravan"
    rounded.bfloat16()
    with torch.no_grad():
        cosines = (exact.embed(pack(TEXTS, 99)) * rounded.embed(pack(TEXTS, 99))).sum(dim=1)
    assert cosines.min() > 0.998
    check_direction(BOTH, rounded.backbone)


@pytest.mark.parametrize(
    ("name", "attention", "told"),
    [
        ("gpt_neo", "auto", "is for decoders.*GPTNeoModel's does not"),
        ("mamba", "auto", "is for decoders.*MambaModel's does not"),
        ("bert", "auto", "is for decoders.*BertModel's does not"),
        ("jamba", "auto", r"JambaModel has layers \(linear_attention\) that look to the left"),
        ("llama4", "auto", r"Llama4TextModel has layers \(chunked_attention\)"),
        ("stablelm", "sdpa", "StableLmModel does not heed .*=sdpa .* in layers 0, 1; set it"),
    ],
)
def test_an_architecture_that_cannot_make_bidirectional_is_refused_by_name(
    name: str, attention: str, told: str
) -> None:
    with pytest.raises(InputError, match=rf"backbone\.bidirectional.* {told}"):
        _encoder(name, attention)


def test_an_attention_that_heeds_the_setting_where_another_does_not_is_taken() -> None:
    model = _encoder("stablelm", "eager")
    with torch.no_grad():
        alone = torch.cat([model.embed(pack([text], 100)) for text in TEXTS])
        torch.testing.assert_close(model(*_padded(TEXTS, "left")), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fault", ["to the left", "padding"])
def test_one_layer_that_goes_its_own_way_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model("llama", "sdpa")
    attention = model.layers[1].self_attn
    forward = attention.forward

    def other(**given: Any) -> Any:
        if fault == "padding":
            return forward(**{**given, "attention_mask": None})
        return forward(**{**given, "is_causal": True})

    monkeypatch.setattr(attention, "forward", other)
    with pytest.raises(InputError, match=r"LlamaModel does not heed .* in layers 1; set it to"):
        BiEncoder(make_bidirectional(model), BOTH)


def test_a_model_and_its_encoding_look_the_same_way() -> None:
    with pytest.raises(InputError, match=r"looks both ways .* set backbone\.bidirectional=true"):
        BiEncoder(make_bidirectional(_model("qwen3")), Encoding())
    with pytest.raises(InputError, match="looks to the left alone, but its encoding says"):
        BiEncoder(_model("qwen3"), BOTH)


def test_neither_likelihood_nor_adaptation_looks_both_ways(tokenizer: Any) -> None:
    language_model = make_bidirectional(tiny_backbone().language_model(tokenizer))
    likelihood = Encoding(kind="reranker", scoring="likelihood", append_eos=False)
    with pytest.raises(InputError, match="is no causal language model"):
        QueryLikelihood(language_model, likelihood)
    with pytest.raises(InputError, match=r"encoding\.bidirectional is set, but a likelihood"):
        replace(likelihood, bidirectional=True)
    with pytest.raises(InputError, match="does not look to the left alone"):
        SlotEncoder(language_model, language_model.base_model, BOTH, Layout(1, (3, 3), 1))
