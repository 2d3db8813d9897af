from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.models.small import ARCHITECTURES, TEXTS, close, model_of
from tests.refusals import refused
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import cpu
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import LONGEST, attention, pack_linears
from caravan.models.loading import set_attention


def _module(causal: bool) -> torch.nn.Module:
    module = torch.nn.Module()
    module.is_causal = causal
    return module


def _exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention [B, L, H, D] in float64, head by head."""
    shared = query.shape[1] // key.shape[1]
    states = torch.zeros(query.shape, dtype=torch.float64)
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        scores = query[b, h].double() @ key[b, h // shared].double().T * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen[b], -torch.inf).softmax(dim=-1)
        states[b, h] = weights @ value[b, h // shared].double()
    return states.transpose(1, 2)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "whole", "padded"])
def test_bf16_attention_equals_float64_loops(kind: str, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 16), (2, heads, 9, 16), (2, heads, 9, 16)]
    query, key, value = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    seen = torch.ones(2, 9, 9, dtype=torch.bool)
    seen = seen.tril() if kind == "causal" else seen
    mask = None
    if kind == "padded":
        seen[1, :, 5:] = False
        mask = seen.unsqueeze(1)
    found, _ = attention(_module(kind == "causal"), query, key, value, mask)
    assert found.dtype == torch.bfloat16
    close(found.double(), _exact(query, key, value, seen), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_embed_alike_with_it_and_with_sdpa(name: str, dtype: torch.dtype) -> None:
    embeddings = []
    for implementation in ("auto", "sdpa"):
        backbone: Any = set_attention(model_of(name), implementation).to(dtype)
        kernel = "caravan" if implementation == "auto" else "sdpa"
        assert backbone.config._attn_implementation == kernel
        with torch.no_grad():
            embeddings.append(BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40)))
    cosines = (embeddings[0] * embeddings[1]).sum(dim=1)
    assert cosines.min() > (0.999999 if dtype == torch.float32 else 0.998)


def test_gradients_flow_through_it_under_autocast() -> None:
    gradients = []
    for implementation in ("auto", "sdpa"):
        backbone = set_attention(model_of("qwen3"), implementation)
        with torch.autocast("cpu", torch.bfloat16):
            embedded = BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40))
        (embedded[0] @ embedded[1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_long_texts_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 1, LONGEST + 1, 8).bfloat16()
    monkeypatch.setattr(torch, "baddbmm", lambda *_, **__: pytest.fail("scores were laid out"))
    assert attention(_module(True), query, query, query, None)[0].shape == (1, LONGEST + 1, 1, 8)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_models_with_capped_logits_or_sinks_keep_their_attention(name: str) -> None:
    embeddings = []
    for implementation in ("auto", "eager"):
        backbone = set_attention(model_of(name, noise=0.3), implementation)
        with torch.no_grad():
            embeddings.append(BiEncoder(backbone, Encoding()).embed(pack(TEXTS, 40)))
    close(embeddings[0], embeddings[1], atol=1e-4)


def test_what_is_not_computed_is_refused() -> None:
    with refused("attention-not-supported", "attention=flash", "BertModel"):
        set_attention(model_of("bert"), "flash")
    query = torch.randn(1, 1, 4, 8)
    attention(_module(True), query, query, query, None, softcap=None)
    with pytest.raises(ValueError, match="softcap"):
        attention(_module(True), query, query, query, None, softcap=torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_linears_change_no_embedding(name: str, dtype: torch.dtype) -> None:
    computed = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = BiEncoder(model_of(name).to(dtype), Encoding())
    linears = 2 * {"bert": 6, "modernbert": 4}.get(name, 7)
    with torch.no_grad():
        plain = model.embed(pack(TEXTS, 40))
        assert pack_linears(model) == (linears if computed else 0)
        left = sum(type(m) is torch.nn.Linear for m in model.modules())
        assert left == (0 if computed else linears)
        fast = model.embed(pack(TEXTS, 40))
    if dtype == torch.float32:
        close(fast, plain)
    else:
        assert (fast * plain).sum(dim=1).min() > 0.998


def test_without_the_operators_linears_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.PackedLinear, "forward", lambda self, states: states.no_operator)
    model = model_of("bert")
    assert pack_linears(model) == 0
    assert any(type(m) is torch.nn.Linear for m in model.modules())
