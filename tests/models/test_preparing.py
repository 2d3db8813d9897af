from __future__ import annotations

import pytest
import torch
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder


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
    for checkpointing in (False, True):
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
        # A chunk's gradient is rounded to bf16 before it is added to the other's, or after.
        far = 0.02 * float(gradient.abs().max()) if bf16 else 1e-5
        torch.testing.assert_close(gradient, gradients[1][name], atol=far, rtol=0.02, msg=name)
