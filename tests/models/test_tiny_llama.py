from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import close
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.data.collection import Collection
from caravan.models.tiny_llama import TinyLlama


def test_the_bpe_is_a_function_of_the_collection(collection: Collection, tmp_path: Path) -> None:
    first, again = (tiny_backbone().tokenizer(collection, tmp_path) for _ in range(2))
    text = "camel caravan \N{BACTRIAN CAMEL}\n"
    assert first.get_vocab() == again.get_vocab()
    assert len(first) <= 400
    assert first.decode(first(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_copying_initializes_the_product_of_value_and_output(share: float, tokenizer: Any) -> None:
    shape = {"vocab_size": 400, "hidden_size": 32, "heads": 2, "intermediate_size": 48}
    model: Any = TinyLlama(**shape, copying=share).model(tokenizer)  # type: ignore[arg-type]
    for layer in model.layers:
        product = layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight
        if share:
            close(product, share * torch.eye(32))
        else:
            assert product.abs().max() < 0.05


def test_an_impossible_shape_is_refused() -> None:
    with refused("indivisible-width", "heads=3"):
        TinyLlama(hidden_size=32, heads=3)
