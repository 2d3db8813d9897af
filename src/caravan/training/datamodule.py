"""What a training reads: its training batches and its validations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from caravan.data.batching import PairBatches, TextBatches, TrainingSet
from caravan.data.loaders import TextLoader, TrainLoader, limited, rank_share
from caravan.data.mixture import MixedSet, Mixture, Part
from caravan.data.unlabelled import Unlabelled
from caravan.data.validation import Validation
from caravan.errors import InputError
from caravan.models import hardware
from caravan.training.stage import Stage

FEW_BATCHES = 8  # tokenized in seconds


class DataModule(pl.LightningDataModule):
    """Loaders of a run's training batches and of its validations.

    Args:
        source: the data source of the run.
        parts: its collections (`caravan.data.mixture.open_parts`).
        stage: makes the training sets, and has the templates of the validations.
        validation: arguments of `Validation`.
        queries_per_batch: queries (or segments) per forward pass, summed over ranks.
        token_budget: padded tokens per chunk (see `caravan.data.batch.pack`); None: by device.
        num_workers: worker processes for tokenization.

    Attributes:
        name: of the collection, or of the mixture of collections.
        training: the training set.
        validations: those of the dev split, one for each collection; of unlabelled
            text, only for collections with judgements.
    """

    def __init__(
        self,
        source: Any,
        parts: Sequence[Part],
        stage: Stage,
        validation: Mapping[str, Any],
        queries_per_batch: int,
        token_budget: int | None,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.parts, self.stage, self.validation = parts, stage, validation
        self.queries_per_batch, self.num_workers = queries_per_batch, num_workers
        self.token_budget = hardware.chunk(token_budget)
        trained = [part for part in parts if part.entry.weight]
        sets = [
            stage.training_set(one.collection, one.train_split, one.sampler, self.token_budget)
            for one in trained
        ]
        self.name = parts[0].collection.name
        self.training: TrainingSet = sets[0]
        if isinstance(source, Mixture):
            self.name = source.name
            self.training = MixedSet(source, trained, sets, stage.seed)
        self._validated = parts
        if isinstance(sets[0], Unlabelled):
            self._validated = [part for part in parts if part.collection.splits]
        self.validations = self.validations_on("dev_split")

    def validations_on(self, split: str, **settings: Any) -> list[Validation]:
        """The validation of each collection.

        Args:
            split: "dev_split" or "train_split", as the data sources name them.
            settings: in place of those of the run.
        """
        found = []
        for part in self._validated:
            own = {"run": part.entry.validation_run} if part.entry.validation_run else {}
            templates = self.stage.reading(part.collection.name)
            given = {**self.validation, **own, **settings, "name": part.name}
            found.append(Validation(part.collection, templates, getattr(part, split), **given))
        return found

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
        assert self.trainer is not None  # it calls the loaders
        return self.trainer


def validated(validations: Sequence[Validation]) -> dict[str, Any]:
    """Facts of the validation for the model card; numbers are sums over the collections."""
    names = ", ".join(one.collection.name for one in validations)
    searched = [len(one.passages) for one in validations if one.candidates is None]
    return {
        "collection": names if len(validations) == 1 else f"mean of {names}",
        "split": ", ".join(dict.fromkeys(one.split for one in validations)),
        "queries": sum(len(one.qrels.queries) for one in validations),
        "passages": sum(searched) if searched else None,
    }
