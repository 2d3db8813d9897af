"""Reranking beside sentence-transformers' CrossEncoder: the same pairs, weights and precision.

    python benchmarks/rerank.py [--data <BEIR folder>] [--pairs 1000]

The weights are MiniLM's with a random head of BERT's own, since speed does not depend on what they
have learned; the scores must agree. Ours runs as `evaluate.py` does: tokenising in a worker, scores
written in blocks, weights loaded anew each time.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, paired, report
from minilm import collection, minilm, minilm_arguments, texts_of
from sentence_transformers import CrossEncoder as Peer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from caravan.cli.compose import compose
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.crossencoder import CrossEncoder
from caravan.retrieval.inference import Inference
from caravan.retrieval.rerank import Reranker, Reranking
from caravan.retrieval.store import Store


def encoding() -> Encoding:
    """A pair of 256 tokens, as the peer reads it."""
    cfg = compose(ROOT / "conf", "train", ["stage=reranker_encoder", "validation.run=x"])
    settings = {**cfg.encoding, "query_length": 32, "passage_length": 224}
    return Encoding(**settings)


def saved(weights: Path, to: Path) -> tuple[Path, Path]:
    """MiniLM with a head of one label: as transformers saves it, and as a Caravan folder."""
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=1)
    plain.save_pretrained(to / "peer")
    tokenizer = AutoTokenizer.from_pretrained(weights)
    tokenizer.save_pretrained(to / "peer")
    model = CrossEncoder(Pretrained(str(to / "peer")).scorer(tokenizer), encoding())
    folder.save(to / "ours", model, tokenizer, encoding(), {"name": "minilm"})
    return to / "peer", to / "ours"


def main() -> None:
    parser = minilm_arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()
    data = collection(options.data)
    rng = np.random.default_rng(0)
    query_rows = np.sort(rng.integers(0, len(data.queries), options.pairs))
    passage_rows = rng.integers(0, len(data.corpus), options.pairs)
    queries = [text for _, text in data.queries.get(query_rows)]
    pairs = list(zip(queries, texts_of(data.corpus, passage_rows), strict=True))
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        peer_folder, our_folder = saved(minilm(options.model), Path(scratch))
        for label, precision, dtype in (
            ("both float32", "float32", torch.float32),
            ("both bf16", "bf16", torch.bfloat16),
        ):
            peer = Peer(
                str(peer_folder), max_length=256, device="cpu", model_kwargs={"dtype": dtype}
            )
            runs = iter(range(1000))

            def ours(precision: str = precision, runs: Any = runs) -> np.ndarray:
                opened = Inference(our_folder, precision=precision, num_workers=1)
                store = Store(Path(scratch) / f"{precision}{next(runs)}")
                save = functools.partial(store.shards, "scores", {})
                texts = (data.queries, data.corpus)
                return Reranker(opened, Reranking()).scores(query_rows, passage_rows, *texts, save)

            def theirs(peer: Any = peer) -> np.ndarray:
                return peer.predict(pairs, batch_size=32, activation_fn=torch.nn.Identity())

            apart = float(np.abs(ours() - theirs()).max())
            timing = paired(ours, theirs, options.repeats)
            table.append({"precision": label, **timing, "largest difference": f"{apart:.1e}"})
    report(
        f"Scoring {options.pairs:,} pairs of {data.name} with MiniLM, 256 tokens",
        table,
        ["`ratio` is sentence-transformers' time over ours, the median of pairs taken in turn."],
        options.save,
    )


if __name__ == "__main__":
    main()
