"""Training steps compared with sentence-transformers: MiniLM, in-batch negatives, equal batch.

    python benchmarks/train_step.py [--data <BEIR folder>] [--steps 6]

Both train (query, passage) pairs at temperature 0.05 with AdamW and clipping at 1.0, through their
own trainers: Lightning with `Retriever` here, SentenceTransformerTrainer with
MultipleNegativesRankingLoss there. The first steps are not counted.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytorch_lightning as pl
from common import ROOT, report, summary
from datasets import Dataset
from minilm import collection, encoding, minilm, minilm_arguments, texts_of
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import TrainerCallback

from caravan.data.mixture import Entry, Part
from caravan.data.negatives import Negatives
from caravan.models.backbone import Pretrained
from caravan.training.datamodule import DataModule
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever

WARM = 2


class Clock(pl.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        return statistics.median(np.diff(self.ends[WARM - 1 :]))


class PeerClock(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.ends.append(time.perf_counter())


def ours(options: Any, corpus: Any, precision: str) -> float:
    backbone = Pretrained(str(options.model))
    tokenizer = backbone.tokenizer(None, ROOT / ".cache")
    module = Retriever(
        backbone, None, tokenizer, encoding(), InfoNCE(0.05), AdamW(lr=2e-5, warmup_steps=1), seed=0
    )
    splits: Any = SimpleNamespace(train_split="train", dev_split="train")  # validated: never
    parts = [Part("", corpus, Entry(splits), Negatives(number=0))]
    batching = {"queries_per_batch": options.batch, "token_budget": 2048, "num_workers": 1}
    data = DataModule(None, parts, module, {}, **batching)
    clock = Clock()
    pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=options.steps + WARM,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[clock],
    ).fit(module, datamodule=data)
    return clock.seconds()


def theirs(options: Any, corpus: Any, precision: str) -> float:
    qrels = corpus.qrels("train")
    rows = np.random.default_rng(0).permutation(len(qrels))[: options.batch * 40]
    pairs = Dataset.from_dict(
        {
            "anchor": texts_of(corpus.queries, qrels.query_rows[rows]),
            "positive": texts_of(corpus.corpus, qrels.passage_rows[rows]),
        }
    )
    model = SentenceTransformer(str(options.model), device="cpu")
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        settings = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps + WARM,
            learning_rate=2e-5,
            bf16=precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=pairs,
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[PeerClock(clock)],
        ).train()
    return clock.seconds()


def main() -> None:
    parser = minilm_arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    options.model = minilm(options.model)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    corpus = collection(options.data)
    table = []
    for precision in ("float32", "bf16"):
        pairs = [
            (ours(options, corpus, precision), theirs(options, corpus, precision))
            for _ in range(options.repeats)
        ]
        table.append({"precision": precision, **summary(pairs)})
    report(
        f"A training step of {options.batch} pairs of {corpus.name} with MiniLM, 256 tokens",
        table,
        [
            "`ratio` is sentence-transformers' median step over ours, the median of runs in turn.",
            "The peer pads each text to the longest of its batch; Caravan sorts by length.",
        ],
        options.save,
    )


if __name__ == "__main__":
    main()
