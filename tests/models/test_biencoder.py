from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models.bidirectional import is_causal
from caravan.models.biencoder import BiEncoder


def _architecture(name: str) -> torch.nn.Module:
    from transformers import (
        BertConfig,
        BertModel,
        MistralConfig,
        MistralModel,
        ModernBertConfig,
        ModernBertModel,
        Qwen3Config,
        Qwen3Model,
    )

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    if name == "bert":
        return BertModel(BertConfig(**shape), add_pooling_layer=False).eval()
    if name == "modernbert":
        config = ModernBertConfig(**shape, pad_token_id=0, local_attention=8)
        return ModernBertModel(config).eval()
    decoder = {**shape, "num_key_value_heads": 1, "use_cache": False}
    if name == "qwen3":
        return Qwen3Model(Qwen3Config(**decoder, head_dim=16)).eval()
    return MistralModel(MistralConfig(**decoder, sliding_window=8)).eval()


ARCHITECTURES = ["bert", "modernbert", "qwen3", "mistral"]
TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19], list(range(20, 39))]


def _padded(texts: list[list[int]], side: str, width: int = 24) -> tuple[Tensor, Tensor]:
    ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), None
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        span = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[i, span] = torch.tensor(text)
        mask[i, span] = 1
    return ids, mask


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_embedding_depends_on_neither_batch_nor_padding_side(name: str, pooling: str) -> None:
    model = BiEncoder(_architecture(name), Encoding(pooling=pooling))
    with torch.no_grad():
        alone = torch.cat([model(*_padded([text], "right", len(text)), True) for text in TEXTS])
        left = model(*_padded(TEXTS, "left"))
        right = model(*_padded(TEXTS, "right"))
        packed = model.embed(pack(TEXTS, token_budget=20))
    for other in (left, right, packed):
        torch.testing.assert_close(other, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_equal_plain_transformers_code(name: str) -> None:
    backbone = _architecture(name)
    model = BiEncoder(backbone, Encoding(pooling="last"))
    with torch.no_grad():
        for text in TEXTS:
            states = backbone(input_ids=torch.tensor([text])).last_hidden_state
            expected = torch.nn.functional.normalize(states[:, -1], dim=-1)
            found = model.embed(pack([text], 100))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_last_token_is_found_by_the_mask_not_by_the_pad_id() -> None:
    states = torch.arange(12.0).reshape(1, 4, 3)
    # The ids play no part, even where EOS and padding are one token.
    assert pool(states, torch.tensor([[1, 1, 1, 0]]), "last").tolist() == [[6.0, 7.0, 8.0]]


def test_mean_pooling_leaves_padding_out() -> None:
    states = torch.tensor([[[1.0], [3.0], [100.0]]])
    assert pool(states, torch.tensor([[1, 1, 0]]), "mean").tolist() == [[2.0]]


def test_pooling_is_float32_in_a_bf16_model() -> None:
    states = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.int64)
    assert {pool(states, mask, how).dtype for how in ("last", "mean", "cls")} == {torch.float32}


def test_unnormalised_embeddings_are_left_as_they_come(
    encoder: BiEncoder, encoding: Encoding
) -> None:
    raw = BiEncoder(encoder.backbone, replace(encoding, normalize=False))
    packed = pack(TEXTS, 100)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.nn.functional.normalize(raw.embed(packed), dim=-1), encoder.embed(packed)
        )
        assert not torch.allclose(raw.embed(packed).norm(dim=-1), torch.ones(len(TEXTS)))


def test_only_models_that_look_left_count_as_causal() -> None:
    assert {name: is_causal(_architecture(name)) for name in ARCHITECTURES} == {
        "bert": False,
        "modernbert": False,
        "qwen3": True,
        "mistral": True,
    }
