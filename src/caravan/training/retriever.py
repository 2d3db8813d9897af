"""RepLLaMA: train a bi-encoder with hard and in-batch negatives (arXiv 2310.08319, section 2.1).

    python train.py stage=retriever backbone=hf backbone.name=<model> data=beir data.path=<folder>

Every query is scored against every passage of the batch, over all ranks. A column is masked out if
its text is that of a positive of the query or of the passage with the query's id. Digests of the
texts are compared, since copies of a passage may have different ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import EncodeBatch, TrainBatch
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.training import losses, parallel
from caravan.training.gradcache import GradCache
from caravan.training.losses import Loss
from caravan.training.optim import AdamW
from caravan.training.stage import Stage


class Retriever(Stage):
    """A bi-encoder with its loss and optimiser.

    Args:
        in_batch: let the other queries' passages serve as negatives too.
        cross_device: those of the other ranks as well; without it a rank compares its own, and a
            figure depends on how many ranks there are.
        The others: see `Stage`.
    """

    def __init__(
        self,
        backbone: Any,
        peft: Any,
        tokenizer: Any,
        encoding: Encoding,
        loss: Loss,
        optimizer: AdamW,
        seed: int,
        gradcache: GradCache | None = None,
        in_batch: bool = True,
        cross_device: bool = True,
    ) -> None:
        super().__init__(backbone, peft, tokenizer, encoding, loss, optimizer, seed, gradcache)
        self.in_batch, self.cross_device = in_batch, cross_device

    def build(self) -> BiEncoder:
        return BiEncoder(self.adapted(self.backbone.model(self.tokenizer)), self.encoding)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        return self.loss_of(
            lambda queries, passages: self._loss(queries, passages, batch),
            batch_idx,
            *(batch.queries, batch.passages),
        )

    def _loss(self, queries: Tensor, passages: Tensor, batch: TrainBatch) -> Tensor:
        """The loss from embeddings of queries [Q, d] and passages [Q * G, d].

        Logged on the way.
        """
        # Similarities are float32: in bf16 one step is 0.4 of a logit at temperature 0.01.
        with torch.autocast(self.device.type, enabled=False):
            scores, targets, counts = self.scores(queries, passages, batch)
            teacher = self._teacher(batch, scores, targets)
            loss = losses.compute(self.loss, scores, targets, teacher)
        # Weighted by its queries, a rank's mean makes the ranks' mean that of the union batch.
        weight = parallel.weight(counts)
        loss = loss * weight
        self.log_step(loss, scores, targets, weight)
        return loss

    @staticmethod
    def _teacher(batch: TrainBatch, scores: Tensor, targets: Tensor) -> Tensor | None:
        """The teacher's scores [Q, N] of the query's own group, NaN elsewhere."""
        if batch.teacher is None:
            return None
        own = targets.unsqueeze(1) + torch.arange(batch.teacher.shape[1], device=targets.device)
        return torch.full_like(scores, torch.nan).scatter(1, own, batch.teacher)

    def scores(
        self, queries: Tensor, passages: Tensor, batch: TrainBatch
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Scores of this rank's queries with the passages of all ranks, or fewer.

        Args:
            queries: [Q, d] float32. passages: [Q * G, d] float32, group by group.

        Returns:
            scores [Q, N] float32, -inf where masked; targets [Q] int64; the
            number of queries of each rank. N is all ranks' passages, this rank's without
            `cross_device`, or G without `in_batch`.
        """
        group = batch.passage_rows.shape[1]
        counts = parallel.sizes(len(queries), queries.device)
        if self.in_batch:
            keys, first = batch.passage_keys.reshape(-1), 0
            if self.cross_device:
                passages = parallel.gather(passages, [n * group for n in counts])
                keys = parallel.gather(keys, [n * group for n in counts])
                first = sum(counts[: parallel.rank()])
            targets = (first + torch.arange(len(queries), device=queries.device)) * group
            scores = queries @ passages.T
            columns = keys.expand(len(queries), -1)  # [Q, N]
        else:
            scores = torch.einsum("qd,qgd->qg", queries, passages.view(len(queries), group, -1))
            targets = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
            columns = batch.passage_keys  # [Q, G]
        return (
            scores.masked_fill(no_negative(columns, batch.excluded_keys, targets), -torch.inf),
            targets,
            counts,
        )

    def validation_step(
        self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Rows [N] and vectors [N, d]; `RetrievalEvaluation` collects and searches them."""
        return {"rows": batch.rows, "vectors": self.rows_of(batch.texts)}


def no_negative(columns: Tensor, excluded: Tensor, targets: Tensor) -> Tensor:
    """Which columns are no negatives of the query, except the target's own column: [Q, N] bool.

    Args:
        columns: keys of passages [Q, N]. excluded: keys [Q, M]. targets: [Q].
    """
    masked = torch.zeros_like(columns, dtype=torch.bool)
    for key in excluded.T:  # M is the most positives of one query: a handful
        masked |= columns == key.unsqueeze(1)
    return masked.scatter(1, targets.unsqueeze(1), False)
