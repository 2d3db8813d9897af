"""The LightningDataModule: training batches, and the queries and passages of the validation.

Validation embeds the development queries and either the whole corpus or a fixed subset: all judged
passages, the top of a run (hard passages) and random passages. Subsets are drawn with a constant
seed, so that trainings with different seeds are compared on the same queries and passages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from caravan.data.batching import PairBatches, TextBatches, TrainingSet
from caravan.data.collection import Collection
from caravan.data.loaders import QueryOrder, TextLoader, TrainLoader, limited, rank_share
from caravan.data.negatives import own_passages, warn_if_queries_are_passages
from caravan.data.pairs import PairTemplates
from caravan.data.qrels import Qrels
from caravan.data.runs import Run, read_run
from caravan.data.segments import Cut, Reading, cut
from caravan.data.tokenization import Templates
from caravan.distributed import is_main_process
from caravan.errors import InputError

BATCH_SIZE = 1024  # texts: enough to sort by length, few enough to balance ranks
FEW_BATCHES = 8  # tokenized in seconds
SUBSET_SEED = 0  # for the queries and passages of the validation; independent of the training seed

_NONE = Qrels(np.empty(0), np.empty(0), np.empty(0))


class DataModule(pl.LightningDataModule):
    """Loaders of a collection's training batches and of its validation.

    Args:
        templates: tokenize queries and passages in the validation.
        training: the training set (`caravan.training.stage.Stage.training_set`).
        dev_split: split with the validation queries; None disables validation.
        queries_per_batch: queries (or segments) per forward pass, summed over ranks.
        token_budget: padded tokens per chunk (see `caravan.data.batch.pack`).
        num_workers: worker processes for tokenization.
        passages: number of passages to search in validation; None searches the whole corpus.
        queries: number of development queries to score in validation; None scores all.
        run, run_depth: a run over the development queries; its top passages are in the subset, or
            for a reranker are the candidates to rerank.
        ignore_identical_ids: drop the passage with the query's id from its results, as in
            `evaluate.py` (`caravan.data.negatives.warn_if_queries_are_passages`).
    """

    def __init__(
        self,
        collection: Collection,
        templates: Templates | PairTemplates,
        training: TrainingSet,
        dev_split: str | None,
        queries_per_batch: int,
        token_budget: int,
        num_workers: int,
        passages: int | None = None,
        queries: int | None = None,
        run: str | None = None,
        run_depth: int = 100,
        ignore_identical_ids: bool = False,
    ) -> None:
        super().__init__()
        self.collection = collection
        self.templates = templates
        self.queries_per_batch = queries_per_batch
        self.token_budget = token_budget
        self.num_workers = num_workers
        self.dev_split = dev_split
        self.ignore_identical_ids = ignore_identical_ids
        self.training = training
        self.dev_qrels = _NONE
        self.dev_passages = np.empty(0, dtype=np.int64)
        self.relevant_from = 1  # the lowest relevant grade in metrics without grades
        self.candidates: Run | None = None
        self.reading = Reading()  # its lengths are those of the templates
        self.passages_read: Cut  # what the latest loaders read: passages, or their segments
        if dev_split is not None:
            self.set_validation(dev_split, queries, passages, run, run_depth)

    def set_validation(
        self,
        split: str,
        queries: int | None,
        passages: int | None,
        run: str | None = None,
        run_depth: int = 100,
    ) -> None:
        """Validate on the queries of a split; arguments as for the class.

        Raises:
            InputError: "empty-split", "missing-run", "other-queries".
        """
        self.relevant_from = self.collection.relevant_from.get(split, 1)
        # Queries without a relevant passage in the corpus score 0 for any model. evaluate.py counts
        # them; validation excludes them.
        judged = self.collection.qrels(split)
        dev = judged.only(judged.query_rows[judged.grades >= 1])
        if queries is not None and queries < len(dev.queries):
            rng = np.random.default_rng(SUBSET_SEED)
            dev = dev.only(rng.choice(dev.queries, queries, replace=False))
        if not len(dev):
            raise InputError(
                "empty-split",
                f"{self.collection.name}: split {split!r} has no query with a relevant passage, so"
                " validation is not possible; choose another split with data.dev_split",
            )
        self.dev_qrels = dev
        if not self.ignore_identical_ids and is_main_process():
            warn_if_queries_are_passages(self.collection, dev.queries)
        if isinstance(self.templates, PairTemplates):
            self.candidates = self._candidates(run, run_depth)
            self.dev_passages = np.unique(self.candidates.passage_rows)
        else:
            self.dev_passages = self._validation_passages(passages, run, run_depth)

    def setup(self, stage: str | None = None) -> None:
        self.training.open()

    def without_own(self, run: Run, depth: int) -> Run:
        """Cut a run to `depth`, dropping own passages if `ignore_identical_ids`."""
        if self.ignore_identical_ids:
            run = run.without(run.query_rows, own_passages(self.collection, run.query_rows))
        return run.top(depth)

    def _candidates(self, path: str | None, depth: int) -> Run:
        """The top of a run, which the validation of a reranker reranks."""
        if path is None:
            raise InputError(
                "missing-run",
                "a reranker is validated on candidates: set validation.run to a run over the"
                f" {self.dev_split} queries",
            )
        run = self._read(path, depth + self.ignore_identical_ids)
        candidates = self.without_own(run.only(self.dev_qrels.queries), depth)
        if not len(candidates):
            raise InputError(
                "other-queries",
                f"{path} ranks none of the {self.dev_split} queries; create a run with evaluate.py"
                f" data.split={self.dev_split}",
            )
        return candidates

    def _validation_passages(self, size: int | None, run: str | None, depth: int) -> np.ndarray:
        """Passage rows [n] to search in validation, ascending."""
        corpus = len(self.collection.corpus)
        if size is None or size >= corpus:
            return np.arange(corpus)
        chosen = [self.dev_qrels.passage_rows]
        if run is not None:
            top = self._read(run, depth)
            chosen += [top.of(int(row))[0] for row in self.dev_qrels.queries]
        rows = np.unique(np.concatenate(chosen))
        if len(rows) < size:
            others = np.setdiff1d(np.arange(corpus), rows, assume_unique=True)
            rng = np.random.default_rng(SUBSET_SEED)
            rows = np.union1d(rows, rng.choice(others, size - len(rows), replace=False))
        return rows

    def _read(self, run: str, depth: int) -> Run:
        path = self.collection.run_path(run)
        return read_run(path, self.collection.queries, self.collection.corpus, depth=depth)

    def train_dataloader(self) -> TrainLoader:
        trainer = self._trainer
        order = QueryOrder(
            len(self.training), self.queries_per_batch, trainer.global_rank, trainer.world_size
        )
        if not len(order):
            raise InputError(
                "too-few-texts",
                f"{len(self.training)} training texts are too few for {order.world} ranks",
            )
        per_epoch = limited(len(order), trainer.limit_train_batches)
        return TrainLoader(self.training, order, self.num_workers, per_epoch)

    def batches_per_epoch(self, trainer: pl.Trainer) -> int:
        """Batches per epoch on one rank, under `limit_train_batches`; creates no loader."""
        world = trainer.num_devices * trainer.num_nodes
        order = QueryOrder(len(self.training), self.queries_per_batch, 0, world)
        return limited(len(order), trainer.limit_train_batches)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Loaders of [queries, passages] (retriever), [pairs] (reranker) or [] (no validation)."""
        if not len(self.dev_qrels):
            return []
        queries, corpus = self.collection.queries, self.collection.corpus
        templates, sizes = self.templates, (BATCH_SIZE, self.token_budget)
        if isinstance(templates, PairTemplates):
            run = self.candidates
            assert run is not None  # `set_validation` reads the candidates for pair templates
            read = self.passages_read = cut(corpus, run.passage_rows, self.reading)
            query_rows = read.repeated(np.repeat(run.query_rows, run.counts))
            rows = (query_rows, read.rows)
            return [self._loader(PairBatches(queries, read.texts, *rows, templates, *sizes))]
        asked = self.dev_qrels.queries
        read = self.passages_read = cut(corpus, self.dev_passages, self.reading)
        return [
            self._loader(TextBatches(queries, asked, templates, "query", *sizes)),
            self._loader(TextBatches(read.texts, read.rows, templates, "passage", *sizes)),
        ]

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
