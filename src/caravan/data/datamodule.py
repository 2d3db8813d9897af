"""The LightningDataModule: training batches, and the validation of each collection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from caravan.data.batching import PairBatches, TextBatches, TrainingSet
from caravan.data.loaders import TextLoader, TrainLoader, limited, rank_share
from caravan.data.validation import Validation
from caravan.errors import InputError

FEW_BATCHES = 8  # tokenized in seconds


class DataModule(pl.LightningDataModule):
    """Loaders of a run's training batches and of its validations.

    Args:
        name: of the collection, or of the mixture of collections.
        training: the training set (`caravan.training.stage.Stage.training_set`).
        validations: one for each collection; none for unlabelled text.
        queries_per_batch: queries (or segments) per forward pass, summed over ranks.
        token_budget: padded tokens per chunk (see `caravan.data.batch.pack`).
        num_workers: worker processes for tokenization.
    """

    def __init__(
        self,
        name: str,
        training: TrainingSet,
        validations: Sequence[Validation],
        queries_per_batch: int,
        token_budget: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.name, self.training, self.validations = name, training, list(validations)
        self.queries_per_batch = queries_per_batch
        self.token_budget = token_budget
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        self.training.open()

    def train_dataloader(self) -> TrainLoader:
        trainer = self._trainer
        ranks = (trainer.global_rank, trainer.world_size)
        order = self.training.order(self.queries_per_batch, *ranks)
        if not len(order):
            raise InputError(
                "too-few-texts",
                f"{len(self.training)} training texts are too few for {trainer.world_size} ranks",
            )
        per_epoch = limited(len(order), trainer.limit_train_batches)
        return TrainLoader(self.training, order, self.num_workers, per_epoch)

    def batches_per_epoch(self, trainer: pl.Trainer) -> int:
        """Batches per epoch on one rank, under `limit_train_batches`; creates no loader."""
        world = trainer.num_devices * trainer.num_nodes
        order = self.training.order(self.queries_per_batch, 0, world)
        return limited(len(order), trainer.limit_train_batches)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Loaders of [queries, passages] (retriever) or [pairs] (reranker) of each collection."""
        found = [one.batches(self.token_budget) for one in self.validations]
        return [self._loader(batches) for of_one in found for batches in of_one]

    def _loader(self, batches: TextBatches | PairBatches) -> DataLoader[Any]:
        share = rank_share(len(batches), self._trainer.global_rank, self._trainer.world_size)
        # a worker copies the memory of this process, too much for a few seconds of tokenizing
        workers = self.num_workers if len(share) > FEW_BATCHES else 0
        return TextLoader(batches, share, workers)

    @property
    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the loaders belong to a trainer: call trainer.fit first")
        return self.trainer
