"""A tiny collection and a tiny model, made on the spot: no network, no downloaded weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caravan.contract import Contract
from caravan.data.collection import Collection
from caravan.data.sources import Beir
from caravan.models.backbone import TinyLlama, train_bpe
from caravan.models.biencoder import BiEncoder

WORDS = (
    "camel caravan desert dune water oasis salt trade route night star wind sand guide rest"
    " silk spice market gold tent well road mountain river city gate merchant rope fire song"
).split()


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


def write_beir(folder: Path, passages: int = 60, queries: int = 24, seed: int = 0) -> Path:
    """A BEIR folder of random words; a query is three words of its passage, some have two."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(4, 30)))) for _ in range(passages)]
    (folder / "corpus.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"p{i}", "title": "Title" if i % 3 == 0 else "", "text": text})
            + "\n"
            for i, text in enumerate(texts)
        )
    )
    (folder / "queries.jsonl").write_text(
        "".join(
            json.dumps({"_id": f"q{i}", "text": " ".join(rng.choice(texts[i].split(), 3))}) + "\n"
            for i in range(queries)
        )
    )
    (folder / "qrels").mkdir(exist_ok=True)
    splits = {"train": range(0, queries - 8), "dev": range(queries - 8, queries - 4)}
    splits["test"] = range(queries - 4, queries)
    for split, rows in splits.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for i in rows:
            lines.append(f"q{i}\tp{i}\t1")
            if i % 5 == 0:
                lines.append(f"q{i}\tp{i + queries}\t2")
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("beir") / "tiny")


@pytest.fixture(scope="session")
def collection(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return Beir(str(beir)).collection(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        yield from [" ".join(WORDS), "query: passage: Title"] * 20

    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts(), 400),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="session")
def contract() -> Contract:
    return Contract(query_length=16, passage_length=24, temperature=0.05)


def tiny_backbone(layers: int = 2) -> TinyLlama:
    return TinyLlama(
        vocab_size=400, hidden_size=32, layers=layers, heads=2, intermediate_size=48, max_length=64
    )


@pytest.fixture
def encoder(tokenizer: Any, contract: Contract) -> BiEncoder:
    torch.manual_seed(0)
    return BiEncoder(tiny_backbone().model(tokenizer), contract).eval()
