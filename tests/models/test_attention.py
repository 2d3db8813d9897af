from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_biencoder import ARCHITECTURES, TEXTS, _architecture
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import LONGEST, attention
from caravan.models.loading import set_attention


def _exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention [B, L, H, D] in float64, head by head."""
    shared = query.shape[1] // key.shape[1]
    states = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            scores = query[b, h].double() @ key[b, h // shared].double().T * query.shape[-1] ** -0.5
            weights = scores.masked_fill(~seen[b], -torch.inf).softmax(dim=-1)
            states[b, h] = weights @ value[b, h // shared].double()
    return states.transpose(1, 2)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "whole", "padded"])
def test_bf16_attention_is_attention(kind: str, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 16), (2, heads, 9, 16), (2, heads, 9, 16)]
    query, key, value = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    seen = torch.ones(2, 9, 9, dtype=torch.bool)
    mask = None
    if kind == "causal":
        seen = seen.tril()
    if kind == "padded":
        seen[1, :, 5:] = False
        mask = seen.unsqueeze(1)
    module = torch.nn.Module()
    module.is_causal = kind == "causal"
    found, _ = attention(module, query, key, value, mask)
    expected = _exact(query, key, value, seen)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_embed_alike_with_it_and_with_sdpa(name: str, dtype: torch.dtype) -> None:
    embeddings = []
    for implementation in ("auto", "sdpa"):
        backbone = set_attention(_architecture(name), implementation).to(dtype)
        with torch.no_grad():
            embeddings.append(BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40)))
    cosines = (embeddings[0] * embeddings[1]).sum(dim=1)
    assert cosines.min() > (0.999999 if dtype == torch.float32 else 0.998)


def test_gradients_flow_through_it_under_autocast(tokenizer: Any) -> None:
    gradients = []
    for implementation in ("auto", "sdpa"):
        torch.manual_seed(0)
        backbone = set_attention(_architecture("qwen3"), implementation)
        with torch.autocast("cpu", torch.bfloat16):
            embedded = BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40))
        (embedded[0] @ embedded[1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert cosine > 0.99


def test_long_texts_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 1, LONGEST + 1, 8).bfloat16()
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: pytest.fail("scores were laid out"))
    module = torch.nn.Module()
    module.is_causal = True
    assert attention(module, query, query, query, None)[0].shape == (1, LONGEST + 1, 1, 8)


def test_an_implementation_that_there_is_not_is_refused() -> None:
    from caravan.errors import InputError

    with pytest.raises(InputError, match=r"attention=flash"):
        set_attention(_architecture("bert"), "flash")


def _own_attention(name: str) -> Any:
    """Models whose attention is more than a softmax of products: capped, or with sinks."""
    from transformers import Gemma2Config, Gemma2Model, GptOssConfig, GptOssModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "head_dim": 16,
        "use_cache": False,
    }
    if name == "gemma2":
        model = Gemma2Model(Gemma2Config(**shape, attn_logit_softcapping=0.05))
    else:
        model = GptOssModel(GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.fill_(3.0)
            elif parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_with_an_attention_of_their_own_keep_it(name: str) -> None:
    embeddings = []
    for implementation in ("auto", "eager"):
        backbone = set_attention(_own_attention(name), implementation)
        with torch.no_grad():
            embeddings.append(BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40)))
    torch.testing.assert_close(embeddings[0], embeddings[1], atol=1e-4, rtol=0)


def test_models_that_need_nothing_more_get_it() -> None:
    for name in ARCHITECTURES:
        backbone: Any = set_attention(_architecture(name), "auto")
        assert backbone.config._attn_implementation == "caravan"


@pytest.mark.parametrize("setting", ["s_aux", "softcap"])
def test_what_it_does_not_compute_is_refused_and_not_passed_over(setting: str) -> None:
    query = torch.randn(1, 1, 4, 8)
    module = torch.nn.Module()
    module.is_causal = True
    attention(module, query, query, query, None, **{setting: None})
    with pytest.raises(ValueError, match=f"wants {setting}"):
        attention(module, query, query, query, None, **{setting: torch.ones(1)})
