"""RepLLaMA: train a bi-encoder with hard and in-batch negatives (arXiv 2310.08319, section 2.1).

    python train.py stage=retriever backbone=hf backbone.name=<model> data=beir data.path=<folder>

Every query is scored against every passage of the batch, over all ranks. A column that holds
another positive of the query, or its own positive once more, is no negative and is masked out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from caravan.batches import EncodeBatch, TrainBatch
from caravan.contract import Contract
from caravan.errors import InputError
from caravan.models.biencoder import BiEncoder
from caravan.training import parallel
from caravan.training.optim import AdamW, updates

Loss = Callable[[Tensor, Tensor], Tensor]


class Retriever(pl.LightningModule):
    """A bi-encoder with its loss and optimiser.

    Args:
        backbone: describes the transformer (`caravan.models.backbone`).
        peft: adapters to put on it, or None for full fine-tuning.
        tokenizer: the backbone's tokenizer.
        contract: pooling, normalisation, temperature.
        loss: f(scores [Q, N], targets [Q]) -> scalar.
        seed: makes weights and dropout reproducible, from every step on.
        in_batch: let the other queries' passages serve as negatives too.
    """

    def __init__(
        self,
        backbone: Any,
        peft: Any,
        tokenizer: Any,
        contract: Contract,
        loss: Loss,
        optimizer: AdamW,
        seed: int,
        in_batch: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.peft = peft
        self.tokenizer = tokenizer
        self.contract = contract
        self.loss = loss
        self.optimizer = optimizer
        self.seed = seed
        self.in_batch = in_batch
        self.encoder: BiEncoder | None = None
        # Frozen weights are not in a checkpoint; `on_load_checkpoint` does the strict check.
        self.strict_loading = False

    def configure_model(self) -> None:
        if self.encoder is not None:
            return
        torch.manual_seed(self.seed)
        model = self.backbone.model(self.tokenizer)
        if self.peft is not None:
            model = self.peft.apply(model)
        self.encoder = BiEncoder(model, self.contract)

    @property
    def model(self) -> BiEncoder:
        if self.encoder is None:
            raise RuntimeError("the model is built by configure_model()")
        return self.encoder

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> None:
        # Dropout becomes a function of (seed, batch, rank): a resumed run repeats it exactly.
        torch.manual_seed(
            (self.seed * 1_000_003 + self.trainer.fit_loop.total_batch_idx) * 4099
            + self.global_rank
        )

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        queries = self.model.embed(batch.queries)  # [Q, d]
        passages = self.model.embed(batch.passages)  # [Q * G, d]
        # Similarities are float32: in bf16 one step is 0.4 of a logit at temperature 0.01.
        with torch.autocast(self.device.type, enabled=False):
            scores, targets, counts = self.scores(queries, passages, batch)
            loss = self.loss(scores, targets)
        # Weighted by its queries, a rank's mean makes the ranks' mean that of the union batch.
        weight = parallel.weight(counts)
        loss = loss * weight
        self.log("train/loss", loss, prog_bar=True, batch_size=len(queries), sync_dist=True)
        with torch.no_grad():
            hit = (scores.argmax(dim=1) == targets).float().mean() * weight
        self.log("train/accuracy", hit, batch_size=len(queries), sync_dist=True)
        return loss

    def scores(
        self, queries: Tensor, passages: Tensor, batch: TrainBatch
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Scores of this rank's queries with the passages of all ranks.

        Args:
            queries: [Q, d] float32. passages: [Q * G, d] float32, group by group.

        Returns:
            scores [Q, N] float32 over the temperature, -inf where masked; targets [Q] int64; the
            number of queries of each rank. N is all ranks' passages, or G without `in_batch`.
        """
        group = batch.passage_rows.shape[1]
        counts = parallel.sizes(len(queries), queries.device)
        if self.in_batch:
            passages = parallel.gather(passages, [n * group for n in counts])
            rows = parallel.gather(batch.passage_rows.reshape(-1), [n * group for n in counts])
            first = sum(counts[: parallel.rank()])
            targets = (first + torch.arange(len(queries), device=queries.device)) * group
            scores = queries @ passages.T / self.contract.temperature
            columns = rows.expand(len(queries), -1)  # [Q, N]
        else:
            scores = torch.einsum("qd,qgd->qg", queries, passages.view(len(queries), group, -1))
            scores = scores / self.contract.temperature
            targets = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
            columns = batch.passage_rows  # [Q, G]
        return (
            scores.masked_fill(no_negative(columns, batch.positive_rows, targets), -torch.inf),
            targets,
            counts,
        )

    def validation_step(
        self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Rows [N] and vectors [N, d]; `RetrievalEvaluation` collects and searches them."""
        return {"rows": batch.rows, "vectors": self.model.embed(batch.texts)}

    def configure_optimizers(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = data.batches_per_epoch(self.trainer)
        return self.optimizer.build(self, updates(self.trainer, batches))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the norm of the gradient and limit it, or its values; no limit is None or 0."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.log("train/gradient_norm", norm)
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self._trainable()
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored, wanted = set(checkpoint["state_dict"]), self._trainable()
        if stored != wanted:
            raise InputError(
                f"the checkpoint is of another model: {len(wanted - stored)} trainable weights are"
                f" missing in it and {len(stored - wanted)} are not used; choose another run_dir"
            )


def no_negative(columns: Tensor, positive_rows: Tensor, targets: Tensor) -> Tensor:
    """Which columns are positives of the query, except the target's own column: [Q, N] bool.

    Args:
        columns: passage rows [Q, N]. positive_rows: [Q, M], filled up with -1. targets: [Q].
    """
    masked = torch.zeros_like(columns, dtype=torch.bool)
    for positive in positive_rows.T:  # M is the most positives of one query: a handful
        masked |= columns == positive.unsqueeze(1)
    return masked.scatter(1, targets.unsqueeze(1), False)
