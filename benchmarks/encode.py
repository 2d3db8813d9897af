"""Encoding speed compared with sentence-transformers: MiniLM on the same texts.

    python benchmarks/encode.py [--data <BEIR folder>] [--passages 1000]

Also: whether time is linear in tokens, and whether memory is flat in the size of the corpus.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, collection, model_folder, paired, report, texts_of
from sentence_transformers import SentenceTransformer

from caravan.data.collection import Collection
from caravan.retrieval.inference import Inference
from caravan.retrieval.store import Embeddings, Store

SETTINGS: dict[str, Any] = {"token_budget": 2048, "num_workers": 1}
BLOCK = 4096


COLUMNS = {"passages": 0, "tokens": 0, "us": 1, "mb": 0}


def ours(model: Path, precision: str, corpus: Collection, rows: np.ndarray, to: Path) -> Embeddings:
    """Embed passages the way `evaluate.py` does, shards on disk included."""
    opened = Inference(model, precision=precision, **SETTINGS)
    product = (Store(to), "passages", {"at": time.monotonic_ns()})
    return opened.encode_rows(corpus.corpus, rows, "passage", BLOCK, *product)


def compare(options: Any) -> None:
    corpus = collection(options.data)
    rows = np.random.default_rng(0).permutation(len(corpus.corpus))[: options.passages]
    texts = texts_of(corpus.corpus, rows)
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options.model, Path(scratch))
        peers = {
            name: SentenceTransformer(str(options.model), model_kwargs=kwargs, device="cpu")
            for name, kwargs in (("float32", {}), ("bf16", {"dtype": torch.bfloat16}))
        }
        exact = peers["float32"].encode(texts)
        to = Path(scratch) / "out"
        for label, precision, peer in (
            ("both float32", "float32", "float32"),
            ("both bf16", "bf16", "bf16"),
            ("each one's default", "auto", "float32"),
        ):
            timing = paired(
                lambda p=precision: ours(model, p, corpus, rows, to),
                lambda p=peer: peers[p].encode(texts),
                options.repeats,
            )
            vectors = ours(model, precision, corpus, rows, to).read()
            cosine = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1)
            table.append({"precision": label, **timing, "lowest cosine": f"{cosine.min():.5f}"})
    report(
        "encode",
        f"Encoding {len(texts):,} passages of {corpus.name} with MiniLM, 256 tokens",
        table,
        [
            "`ratio` is sentence-transformers' time over ours, the median of pairs taken in turn;"
            " ours loads its weights anew in each. The cosine is with sentence-transformers in"
            " float32.",
            "",
            *scaling(options),
        ],
    )


def scaling(options: Any) -> list[str]:
    """Seconds a token and peak memory at 1, 2 and 4 times the passages, each in its own process."""
    lines = ["| passages | tokens | microseconds a token | peak MB |", "|---|---|---|---|"]
    for times in (1, 2, 4):
        command = [sys.executable, __file__, "--probe", str(times * options.passages)]
        if options.data:
            command += ["--data", str(options.data)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(printed.splitlines()[-1])
        cells = (f"{found[key]:,.{digits}f}" for key, digits in COLUMNS.items())
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def probe(options: Any) -> None:
    import resource

    corpus = collection(options.data)
    rows = np.arange(options.probe) % len(corpus.corpus)
    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(options.model, Path(scratch))
        opened = Inference(model, **SETTINGS)
        opened.load()
        tokens = sum(map(len, opened.templates.passages(corpus.corpus.get(rows))))
        product = (Store(Path(scratch) / "out"), "passages", {})
        started = time.perf_counter()
        opened.encode_rows(corpus.corpus, rows, "passage", 256, *product)
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts = {"passages": len(rows), "tokens": tokens, "us": seconds / tokens * 1e6, "mb": peak}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--probe", type=int)
    chosen = parser.parse_args()
    probe(chosen) if chosen.probe else compare(chosen)
