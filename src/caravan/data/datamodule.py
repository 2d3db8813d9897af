"""The LightningDataModule: training groups, and the queries and passages of the validation.

Validation embeds the development queries and either the whole corpus or a fixed subset that keeps
the figures telling: every judged passage, the top of a run (the hard ones), and a random fill.
Subsets are drawn from a constant and not from the training seed, so that trainings of several seeds
are compared on the same queries and passages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from caravan.data.batching import (
    Groups,
    PairBlocks,
    QueryOrder,
    TextBlocks,
    limited,
    rank_share,
)
from caravan.data.collection import Collection, Qrels
from caravan.data.identical import own_passages, tell_if_queries_are_passages, without
from caravan.data.loaders import TrainLoader, text_loader
from caravan.data.pairs import PairTemplates
from caravan.data.runs import Run, read_run
from caravan.data.tokenization import Templates
from caravan.data.unlabelled import Unlabelled
from caravan.distributed import is_main_process
from caravan.errors import InputError

BLOCK = 1024  # texts a validation batch: enough to sort by length, few enough to be balanced
FEW_BLOCKS = 8  # tokenised in seconds
SUBSET_SEED = 0  # of the validation's queries and passages, whatever the training's seed is

_NONE = Qrels(np.empty(0), np.empty(0), np.empty(0))


class DataModule(pl.LightningDataModule):
    """Wires a collection, what is trained on, and how it is read into loaders.

    Args:
        templates: how queries and passages are read in the validation.
        training: what is trained on (`caravan.training.stage.Stage.training_set`).
        dev_split: whose queries are asked in the validation; None goes without one.
        queries_per_batch: queries (or chunks of text) a forward pass, over all ranks together.
        token_budget: padded tokens a chunk (see `caravan.data.batch.pack`).
        num_workers: processes that tokenise ahead.
        passages: how many passages validation searches; None is the whole corpus.
        queries: how many development queries validation asks; None is all of them.
        run, run_depth: a run over the development queries whose top passages are in the subset; of
            a reranker, the candidates that it puts into order.
        ignore_identical_ids: leave the passage with a query's id out of what the query finds, as
            `evaluate.py` does (`caravan.data.identical`).
    """

    def __init__(
        self,
        collection: Collection,
        templates: Templates | PairTemplates,
        training: Groups | Unlabelled,
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
        self.relevant_from = 1  # the lowest grade that counts in measures without grades
        self.candidates: Run | None = None
        if dev_split is not None:
            self.ask(dev_split, queries, passages, run, run_depth)

    def ask(
        self,
        split: str,
        queries: int | None,
        passages: int | None,
        run: str | None = None,
        run_depth: int = 100,
    ) -> None:
        """Let the validation ask the queries of a split; arguments as for the class."""
        self.relevant_from = self.collection.relevant_from.get(split, 1)
        # A query without a relevant passage in the corpus scores 0 whatever the model does:
        # evaluate.py counts it, the validation leaves it out.
        dev = _with_relevant(self.collection.qrels(split))
        self.dev_qrels = dev if queries is None else _subset(dev, queries)
        if not len(self.dev_qrels):
            raise InputError(
                f"{self.collection.name}: split {split!r} has no query with a relevant passage, so"
                " nothing can be validated; choose another with data.dev_split"
            )
        if not self.ignore_identical_ids and is_main_process():
            tell_if_queries_are_passages(self.collection, self.dev_qrels.queries)
        if isinstance(self.templates, PairTemplates):
            self.candidates = self._candidates(run, run_depth)
            self.dev_passages = np.unique(self.candidates.passage_rows)
        else:
            self.dev_passages = self._validation_passages(passages, run, run_depth)

    def setup(self, stage: str | None = None) -> None:
        if isinstance(self.training, Groups):
            self.training.open()

    def without_own(self, run: Run, depth: int) -> Run:
        """The `depth` best of a run, without the passages with the queries' ids where these are
        ignored.
        """
        if self.ignore_identical_ids:
            run = without(run, run.query_rows, own_passages(self.collection, run.query_rows))
        return run.top(depth)

    def _candidates(self, path: str | None, depth: int) -> Run:
        """What a reranker puts into order in validation: a run's top passages of each query."""
        if path is None:
            raise InputError(
                "a reranker's validation puts the candidates of a run into order: give a run over"
                f" the {self.dev_split} queries as validation.run"
            )
        run = self._read(path, depth + self.ignore_identical_ids)
        kept = self.without_own(run.only(self.dev_qrels.queries), depth)
        if not len(kept):
            raise InputError(
                f"{path} ranks none of the {self.dev_split} queries; write one with evaluate.py"
                f" data.split={self.dev_split}"
            )
        return kept

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
            fill = np.random.default_rng(SUBSET_SEED).choice(
                others, size - len(rows), replace=False
            )
            rows = np.union1d(rows, fill)
        return rows

    def _read(self, run: str, depth: int) -> Run:
        path = self.collection.run_path(run)
        return read_run(path, self.collection.queries, self.collection.corpus, depth=depth)

    def train_dataloader(self) -> TrainLoader:
        order = self._order()
        if not len(order):
            raise InputError(
                f"{len(self.training)} training texts are too few for {order.world} ranks"
            )
        per_epoch = limited(len(order), self._trainer.limit_train_batches)
        return TrainLoader(self.training, order, self.num_workers, per_epoch)

    def batches_per_epoch(self, trainer: pl.Trainer) -> int:
        """Batches of one epoch on one rank, `limit_train_batches` counted in; makes no loader."""
        world = trainer.num_devices * trainer.num_nodes
        order = QueryOrder(len(self.training), self.queries_per_batch, 0, world)
        return limited(len(order), trainer.limit_train_batches)

    def _order(self) -> QueryOrder:
        trainer = self._trainer
        return QueryOrder(
            len(self.training), self.queries_per_batch, trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        if not len(self.dev_qrels):
            return []
        if isinstance(self.templates, PairTemplates):
            return [self._pair_loader(self.templates)]
        return [
            self._text_loader(self.collection.queries, self.dev_qrels.queries, "query"),
            self._text_loader(self.collection.corpus, self.dev_passages, "passage"),
        ]

    def _pair_loader(self, templates: PairTemplates) -> DataLoader[Any]:
        run = self.candidates
        assert run is not None  # of a reranker's templates come candidates
        query_rows = np.repeat(run.query_rows, run.counts)
        texts = self.collection.queries, self.collection.corpus
        return self._shared(
            PairBlocks(*texts, query_rows, run.passage_rows, templates, BLOCK, self.token_budget)
        )

    def _text_loader(self, texts: Any, rows: np.ndarray, side: str) -> DataLoader[Any]:
        assert isinstance(self.templates, Templates)
        return self._shared(TextBlocks(texts, rows, self.templates, side, BLOCK, self.token_budget))

    def _shared(self, blocks: TextBlocks | PairBlocks) -> DataLoader[Any]:
        share = rank_share(len(blocks), self._trainer.global_rank, self._trainer.world_size)
        # A worker copies this process's memory: not for a few seconds of tokenising.
        workers = self.num_workers if len(share) > FEW_BLOCKS else 0
        return text_loader(blocks, share, workers)

    @property
    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the loaders belong to a trainer: call trainer.fit first")
        return self.trainer


def _subset(qrels: Qrels, number: int) -> Qrels:
    """The judgements of `number` queries, the same ones every time."""
    if number >= len(qrels.queries):
        return qrels
    kept = np.random.default_rng(SUBSET_SEED).choice(qrels.queries, number, replace=False)
    return qrels.only(kept)


def _with_relevant(qrels: Qrels) -> Qrels:
    """The judgements of the queries that have a relevant passage."""
    return qrels.only(qrels.query_rows[qrels.grades >= 1])
