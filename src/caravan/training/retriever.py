"""RepLLaMA: train a bi-encoder with hard and in-batch negatives (arXiv 2310.08319, section 2.1).

    python train.py stage=retriever backbone=hf backbone.name=<model> data=beir data.path=<folder>

Every query is scored against every passage of the batch, over all ranks. A column is masked if its
text is that of a positive of the query or of the passage with the query's id. Texts are compared by
their digests, since copies of a passage may have different ids.

With `loss.dims` the loss is summed over embeddings cut to these sizes, scaled to unit length again,
and over whole ones (Matryoshka, arXiv 2205.13147, section 3, with weights of 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import TrainBatch
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.negatives import Sampler
from caravan.data.unlabelled import Unlabelled
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.biencoder import BiEncoder, cut, refuse_large
from caravan.training import parallel
from caravan.training.distillation import Distillation
from caravan.training.gradcache import GradCache
from caravan.training.losses import Loss, Sum
from caravan.training.optim import AdamW
from caravan.training.stage import Stage


class Retriever(Stage):
    """A bi-encoder with its loss and optimizer.

    Args:
        in_batch: use the other queries' passages as negatives too.
        cross_device: those of the other ranks as well. Without it the loss depends on the number
            of ranks.
        distillation: of a teacher's embeddings; None trains by the scores alone.
        The others: see `Stage`.
    """

    def __init__(
        self,
        backbone: Any,
        peft: Any,
        tokenizer: Any,
        encoding: Encoding,
        loss: Loss | Sum,
        optimizer: AdamW,
        seed: int,
        gradcache: GradCache | None = None,
        in_batch: bool = True,
        cross_device: bool = True,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(backbone, peft, tokenizer, encoding, loss, optimizer, seed, gradcache)
        self.in_batch, self.cross_device = in_batch, cross_device
        self.distillation = distillation

    def training_set(
        self, collection: Collection, split: str, sampler: Sampler, token_budget: int
    ) -> Groups | Unlabelled:
        found = super().training_set(collection, split, sampler, token_budget)
        if self.distillation is not None and isinstance(found, Groups):
            found.teacher_embeddings = self.distillation.embeddings(collection, split)
        return found

    def build(self) -> BiEncoder:
        config = self.backbone.config(self.tokenizer)
        refuse_large(config, self.encoding.dim)  # before weights are read
        size = self.encoding.dim or config.get_text_config().hidden_size
        if self._dims and self._dims[-1] > size:
            raise InputError(
                "dim-too-large",
                f"loss.dims: {self._dims[-1]} is more than the {size} dimensions of an embedding;"
                f" leave out sizes above {size}",
            )
        if self.distillation is not None:
            self.distillation.refuse_width(size)
        transformer = self.adapted(self.backbone.model(self.tokenizer))
        if self.distillation is None:
            return BiEncoder(transformer, self.encoding)
        return self.distillation.network(transformer, self.encoding, size)

    @property
    def _dims(self) -> list[int]:
        """The sizes of `loss.dims`, increasing."""
        assert self.loss is not None
        return list(self.loss.dims or ())

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        def loss(rows: Tensor) -> Tensor:
            return self._loss(*batch.sides(rows), batch)

        return self.loss_of(loss, batch_idx, batch.texts)

    def _loss(self, queries: Tensor, passages: Tensor, batch: TrainBatch) -> Tensor:
        """The loss of the network's outputs for queries [Q, d] and passages [Q * G, d]."""
        distance = None
        with torch.autocast(self.device.type, enabled=False):  # similarities are float32
            if self.distillation is not None:
                assert batch.teacher_queries is not None
                assert batch.teacher_passages is not None
                teachers = batch.teacher_queries, batch.teacher_passages
                queries, compared_queries = self.distillation.split(queries)
                passages, compared_passages = self.distillation.split(passages)
                distance = self.distillation((compared_queries, compared_passages), teachers)
            scores, targets, counts = self.scores(queries, passages, batch)
        teacher = batch.teacher  # [Q, G], of the query's own group
        if teacher is not None:
            own = targets.unsqueeze(1) + torch.arange(teacher.shape[1], device=targets.device)
            teacher = torch.full_like(scores[-1], torch.nan).scatter(1, own, teacher)
        values = self.measured(scores, targets, teacher, counts)
        if self.distillation is not None and distance is not None:
            values["distance"] = distance * parallel.weight(counts)
            values["loss"] = self.distillation.scores_weight * values["loss"]
            values["loss"] = values["loss"] + self.distillation.weight * values["distance"]
        self.log_over_ranks(values, len(queries))
        return values["loss"]

    def scores(
        self, queries: Tensor, passages: Tensor, batch: TrainBatch
    ) -> tuple[list[Tensor], Tensor, list[int]]:
        """Scores of this rank's queries against the passages of all ranks, or fewer.

        Args:
            queries: [Q, d] float32. passages: [Q * G, d] float32, group by group.

        Returns:
            scores [Q, N] float32, -inf where masked, of each size in `loss.dims` and of whole
            embeddings; targets [Q] int64; the queries of each rank. N is all ranks' passages, this
            rank's without `cross_device`, or G without `in_batch`.
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
            columns = keys.expand(len(queries), -1)  # [Q, N]
        else:
            targets = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
            columns = batch.passage_keys  # [Q, G]
        masked = no_negative(columns, batch.excluded_keys, targets)
        if self.in_batch and batch.in_batch is not None:
            group_of = torch.arange(columns.shape[1], device=targets.device) // group
            others = group_of != targets.unsqueeze(1) // group  # [Q, N]
            masked |= others & ~batch.in_batch.unsqueeze(1)

        def similarities(dim: int) -> Tensor:
            one, other = (cut(all_, dim, self.encoding.normalize) for all_ in (queries, passages))
            if self.in_batch:
                return one @ other.T
            return torch.einsum("qd,qgd->qg", one, other.view(len(one), group, -1))

        whole = queries.shape[1]
        dims = [dim for dim in self._dims if dim < whole]
        scores = [similarities(dim).masked_fill(masked, -torch.inf) for dim in (*dims, whole)]
        return scores, targets, counts


def no_negative(columns: Tensor, excluded: Tensor, targets: Tensor) -> Tensor:
    """Which columns are not negatives of the query, except the target's own column: [Q, N] bool.

    Args:
        columns: keys of passages [Q, N]. excluded: keys [Q, M]. targets: [Q].
    """
    masked = torch.zeros_like(columns, dtype=torch.bool)
    for key in excluded.T:  # M is the most positives of one query: a handful
        masked |= columns == key.unsqueeze(1)
    return masked.scatter(1, targets.unsqueeze(1), False)
