from __future__ import annotations

import pytest
import torch
from tests.models.test_biencoder import ARCHITECTURES, TEXTS, _architecture

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.models import cpu as packed
from caravan.models.biencoder import BiEncoder
from caravan.models.cpu import pack_linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_linears_change_no_embedding(name: str, dtype: torch.dtype) -> None:
    computed = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = BiEncoder(_architecture(name).to(dtype), Encoding())
    linears = 2 * {"bert": 6, "modernbert": 4}.get(name, 7)
    with torch.no_grad():
        plain = model.embed(pack(TEXTS, 40))
        assert pack_linears(model) == (linears if computed else 0)
        left = sum(type(m) is torch.nn.Linear for m in model.modules())
        assert left == (0 if computed else linears)
        fast = model.embed(pack(TEXTS, 40))
    if dtype == torch.float32:
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)
    else:
        assert (fast * plain).sum(dim=1).min() > 0.998


def test_a_build_without_the_operators_keeps_its_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(packed.PackedLinear, "forward", refuse)
    model = _architecture("bert")
    assert pack_linears(model) == 0
    assert any(type(m) is torch.nn.Linear for m in model.modules())
