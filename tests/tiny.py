"""Small inputs of tests: a collection of random words, a Llama of a few thousand weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from caravan.encoding import Encoding
from caravan.models.tiny_llama import TinyLlama

WORDS = [
    *("camel", "caravan", "desert", "dune", "water", "oasis", "salt", "trade", "route", "night"),
    *("star", "wind", "sand", "guide", "rest", "silk", "spice", "market", "gold", "tent", "well"),
    *("road", "mountain", "river", "city", "gate", "merchant", "rope", "fire", "song"),
]
TOKEN = Encoding(
    kind="reranker",
    scoring="token",
    append_eos=False,
    prefix="<s>judge:\n",
    query_template="{instruction} ask: {text}\ndocument:",
    suffix="\nanswer:",
    instruction="the salt route",
    positive=" salt",
    negative=" silk",
)
"""A pair in a chat template, scored by the logits of two tokens."""


def write_beir(
    folder: Path, passages: int = 60, queries: int = 24, seed: int = 0, longest: int = 30
) -> Path:
    """A BEIR folder of random words; a query is three words of its passage, some have two."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(4, longest)))) for _ in range(passages)]
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
    splits = {"train": range(queries - 8), "dev": range(queries - 8, queries - 4)}
    splits["test"] = range(queries - 4, queries)
    for split, rows in splits.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for i in rows:
            lines.append(f"q{i}\tp{i}\t1")
            if i % 5 == 0:
                lines.append(f"q{i}\tp{i + queries}\t2")
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_counterarguments(folder: Path) -> Path:
    """As BEIR's ArguAna: each query is a passage, and another one is its answer."""
    (folder / "qrels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(20)]
    rows = [{"_id": f"a{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    lines = [f"a{i}\ta{i + 10}\t1" for i in range(6)]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def tiny_backbone(layers: int = 2) -> TinyLlama:
    return TinyLlama(
        vocab_size=400, hidden_size=32, layers=layers, heads=2, intermediate_size=48, max_length=64
    )


def other_instruction(folder: Path, to: Path, text: str) -> Path:
    """A copy of a model folder with one instruction, for all collections."""
    shutil.copytree(folder, to)
    record = json.loads((to / "caravan.json").read_text())
    record["instruction"] = text
    del record["instructions"]
    (to / "caravan.json").write_text(json.dumps(record))
    return to
