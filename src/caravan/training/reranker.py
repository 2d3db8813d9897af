"""RankLLaMA: train a pointwise reranker on hard negatives (arXiv 2310.08319, section 2.2).

    python train.py stage=reranker backbone=from_folder backbone.folder=<folder> \
        sampler.runs=[<run>] validation.run=<run>

A query's positive and its hard negatives are scored one by one, each read together with the query;
the loss compares the scores within this group. There are no in-batch negatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import RerankBatch
from caravan.data.pairs import answer_ids
from caravan.models.crossencoder import CrossEncoder, QueryLikelihood, TokenScorer
from caravan.training import parallel
from caravan.training.stage import Stage


class Reranker(Stage):
    """A cross-encoder with its loss and optimizer."""

    def build(self) -> CrossEncoder:
        if self.encoding.scoring == "head":
            return CrossEncoder(self.adapted(self.backbone.scorer(self.tokenizer)), self.encoding)
        if self.encoding.scoring == "likelihood":
            language_model = self.backbone.language_model(self.tokenizer)
            return QueryLikelihood(self.adapted(language_model), self.encoding)
        answers = answer_ids(self.tokenizer, self.encoding)  # refused before weights are loaded
        language_model = self.backbone.language_model(self.tokenizer)
        return TokenScorer(self.adapted(language_model), self.encoding, answers)

    def training_step(self, batch: RerankBatch, batch_idx: int) -> Tensor:
        return self.loss_of(lambda scores: self._loss(scores, batch), batch_idx, batch.texts)

    def _loss(self, scores: Tensor, batch: RerankBatch) -> Tensor:
        """The loss of the scores [Q * G] of all pairs, group by group."""
        queries, group = batch.passage_rows.shape
        targets = torch.zeros(queries, dtype=torch.int64, device=scores.device)
        counts = parallel.sizes(queries, scores.device)
        values = self.measured([scores.view(queries, group)], targets, batch.teacher, counts)
        self.log_over_ranks(values, queries)
        return values["loss"]

    def validation_step(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Query rows, passage rows and scores [N] of a `caravan.data.batch.PairBatch`."""
        return {
            "query_rows": batch.query_rows,
            "passage_rows": batch.passage_rows,
            "scores": self.rows_of(batch.texts),
        }
