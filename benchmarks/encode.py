"""Encoding speed compared with sentence-transformers: MiniLM on the same texts.

    python benchmarks/encode.py [--data <BEIR folder>] [--passages 1000]

Also: whether time is linear in tokens, and whether memory is flat in the size of the corpus. The
peer's fastest backend on CPUs, OpenVINO in bf16, is a further row where it is installed
(requirements-extras.txt; `make bench` does).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import apart, highest, paired, report, table
from minilm import collection, minilm, minilm_arguments, model_folder, texts_of
from sentence_transformers import SentenceTransformer

from caravan.data.collection import Collection
from caravan.retrieval.inference import Inference
from caravan.retrieval.store import Embeddings, Store

SETTINGS: dict[str, Any] = {"token_budget": 2048, "num_workers": 1}
BLOCK = 4096


def ours(model: Path, precision: str, corpus: Collection, rows: np.ndarray, to: Path) -> Embeddings:
    """Embed passages the way `evaluate.py` does, shards on disk included."""
    opened = Inference(model, precision=precision, **SETTINGS)
    compute = opened.encode_rows(corpus.corpus, rows, "passage", BLOCK)
    inputs = {"at": time.monotonic_ns()}
    return Store(to).embeddings("passages", inputs, len(rows), BLOCK, compute)


def main() -> None:
    parser = minilm_arguments(__doc__)
    parser.add_argument("--passages", type=int, default=1000)
    options = parser.parse_args()
    # As `evaluate.py` does. By default, 1,024 kernels of half a megabyte are kept, one a shape.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "256")
    weights = minilm(options.model)
    corpus = collection(options.data)
    rows = np.random.default_rng(0).permutation(len(corpus.corpus))[: options.passages]
    texts = texts_of(corpus.corpus, rows)
    rows_by_precision = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(weights, Path(scratch))
        peers = {
            name: SentenceTransformer(str(weights), model_kwargs=kwargs, device="cpu")
            for name, kwargs in (("float32", {}), ("bf16", {"dtype": torch.bfloat16}))
        }
        comparisons = [
            ("both float32", "float32", "float32"),
            ("both bf16", "bf16", "bf16"),
            ("each one's default", "auto", "float32"),
        ]
        if importlib.util.find_spec("openvino"):
            peers["openvino"] = with_openvino(weights)
            comparisons.append(("default, against OpenVINO bf16", "auto", "openvino"))
        exact = peers["float32"].encode(texts)
        to = Path(scratch) / "out"
        for label, precision, peer in comparisons:
            timing = paired(
                lambda p=precision: ours(model, p, corpus, rows, to),
                lambda p=peer: peers[p].encode(texts),
                options.repeats,
            )
            vectors = ours(model, precision, corpus, rows, to).read()
            cosines = {
                "lowest cosine": lowest_cosine(vectors, exact),
                "of theirs": lowest_cosine(peers[peer].encode(texts), exact),
            }
            rows_by_precision.append({"precision": label, **timing, **cosines})
    report(
        f"Encoding {len(texts):,} passages of {corpus.name} with MiniLM, 256 tokens",
        rows_by_precision,
        [
            "`ratio` is sentence-transformers' time over ours, the median of pairs taken in turn;"
            " ours loads its weights anew in each. Cosines are with sentence-transformers in"
            " float32.",
            "",
            *scaling(weights, options.data, options.passages),
        ],
        options.save,
    )


def with_openvino(weights: Path) -> SentenceTransformer:
    """The peer with its network compiled by OpenVINO, in bf16.

    The peer's `backend="openvino"` compiles the same network through a package that needs an older
    transformers.
    """
    import openvino

    peer = SentenceTransformer(str(weights), device="cpu")
    network: Any = peer[0].model
    example = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        converted = openvino.convert_model(LastHidden(network), example_input=example)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

    def forward(**given: Any) -> dict[str, torch.Tensor]:
        states = compiled({name: given[name].numpy() for name in example})[0]
        return {"last_hidden_state": torch.from_numpy(np.asarray(states))}

    network.forward = forward
    return peer


class LastHidden(torch.nn.Module):
    """The last hidden states of a transformer: what the peer pools."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.network(input_ids, attention_mask)[0]
        return states


def lowest_cosine(vectors: np.ndarray, exact: np.ndarray) -> str:
    """The lowest cosine of a vector with the normalized exact one of the same text."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return f"{((vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1)).min():.5f}"


def scaling(weights: Path, data: Path | None, passages: int) -> list[str]:
    """Seconds a token and peak memory at 2, 4 and 8 times the passages, each in its own process."""
    rows = [apart(measured, weights, data, times * passages) for times in (2, 4, 8)]
    return table(rows)


def measured(weights: Path, data: Path | None, passages: int) -> dict[str, Any]:
    """Encode so many passages, from the start again after the last."""
    corpus = collection(data)
    rows = np.arange(passages) % len(corpus.corpus)
    with tempfile.TemporaryDirectory() as scratch:
        opened = Inference(model_folder(weights, Path(scratch)), **SETTINGS)
        opened.load()
        tokens = sum(map(len, opened.templates.passages(corpus.corpus.get(rows))))
        store, started = Store(Path(scratch) / "out"), time.perf_counter()
        compute = opened.encode_rows(corpus.corpus, rows, "passage", 256)
        store.embeddings("passages", {}, len(rows), 256, compute)
        seconds = time.perf_counter() - started
    return {
        "passages": f"{passages:,}",
        "tokens": f"{tokens:,}",
        "microseconds a token": f"{seconds / tokens * 1e6:.1f}",
        "peak MB": f"{highest():,.0f}",
    }


if __name__ == "__main__":
    main()
