from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.small import model_of
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch.utils.flop_counter import FlopCounterMode

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.models.preparing import Checkpointing, _policy, prepared

CHOICES: tuple[Checkpointing, ...] = (False, True, "selective")
PRODUCTS = ("aten.mm", "aten.addmm")


def test_compilation_is_refused_where_torch_could_not_link(
    tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__path__", ["/home/a user/site-packages/torch"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backbone = tiny_backbone()
    backbone.compile = True
    with refused("no-compilation", "backbone.compile", "/home/a user"):
        backbone.model(tokenizer)


@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_activations_give_the_same_gradient(tokenizer: object, bf16: bool) -> None:
    """Of a batch in two chunks, the second of which finds weights that are cast already."""
    gradients = []
    for checkpointing in CHOICES:
        backbone = tiny_backbone()
        backbone.checkpointing = checkpointing
        torch.manual_seed(0)
        model = BiEncoder(backbone.model(tokenizer), Encoding()).train()
        texts = pack([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], 8)
        assert len(texts.chunks) == 2
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            embeddings = model.embed(texts)
        (embeddings @ torch.arange(32.0)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        for other in gradients[1:]:
            # A chunk's gradient is rounded to bf16 before it is added to the other's, or after.
            far = 0.02 * float(gradient.abs().max()) if bf16 else 1e-5
            torch.testing.assert_close(gradient, other[name], atol=far, rtol=0.02, msg=name)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_selective_checkpointing_repeats_no_product_with_weights(name: str) -> None:
    """Of layers with biases (BERT's) neither."""
    products: dict[Any, int] = {}
    for checkpointing in CHOICES:
        model: Any = prepared(model_of(name), checkpointing, False).train()
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(5, 15).view(2, 5)).last_hidden_state.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        products[checkpointing] = sum(n for op, n in counts.items() if str(op) in PRODUCTS)
    assert products[False] == products["selective"] < 0.85 * products[True]


def test_a_random_operation_is_recomputed() -> None:
    """Else later operations would draw other numbers in the recomputation."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    for dropout, wanted in ((0.0, "MUST_SAVE"), (0.1, "PREFER_RECOMPUTE")):
        assert _policy(None, flash, None, None, None, dropout).name == wanted
