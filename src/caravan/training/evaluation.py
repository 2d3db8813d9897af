"""Validation: retrieval or reranking metrics of the current weights.

For a retriever the validation loop embeds the development queries and passages; the callback
gathers them over ranks, builds a faiss index and searches. For a reranker it scores the candidates
of a fixed run. In the end every rank has the whole run and computes the same metrics from it, which
checkpoints and early stopping monitor.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from caravan.data.runs import Run, canonical, write_run
from caravan.data.segments import Reading
from caravan.data.validation import Validation
from caravan.distributed import is_main_process
from caravan.models import hardware
from caravan.retrieval.index import ArrayBlocks, BestSegments
from caravan.retrieval.metrics import per_query, spelled
from caravan.training import parallel
from caravan.training.callbacks import in_words
from caravan.training.datamodule import DataModule
from caravan.training.optim import batches_in_run
from caravan.training.stage import Stage

log = logging.getLogger(__name__)


class Evaluation(pl.Callback, ABC):
    """Collects the outputs of a validation, makes a run of them, and computes its metrics.

    Logged are `val/<measure>` and, of several collections, `val/<name>/<measure>` of each; then
    `val/<measure>` is their mean, in which each collection counts the same. For a reranker,
    `val/first_stage/<measure>` are the metrics of the candidates in their own order.

    Args:
        measures: which metrics are logged.
        run_file: where the run of the latest validation is written, or of several collections
            `<stem>.<name>.trec`.
    """

    loaders: int
    """Loaders of a collection (`caravan.data.validation.Validation.batches`)."""
    dtype: torch.dtype
    """Of the embeddings or scores that are gathered, as an evaluation stores them."""

    def __init__(self, measures: Sequence[str], run_file: str) -> None:
        self.measures, self.run_file = list(measures), Path(run_file)
        self._outputs: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self._tokens: Counter[int] = Counter()  # by loader, without padding
        self._started = self._seconds = 0.0  # until the last batch is computed

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._outputs.clear()
        self._tokens.clear()
        self._started = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, rows in outputs.items():
            rows = rows.to(self.dtype) if rows.is_floating_point() else rows
            self._outputs[dataloader_idx, name].append(rows.cpu())
        self._tokens[dataloader_idx] += batch.texts.tokens

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._seconds = time.monotonic() - self._started
        validations, device = trainer.datamodule.validations, pl_module.device
        found: list[dict[str, Tensor]] = []
        for i, data in enumerate(validations):
            run = self.run_of(data, i * self.loaders, device)
            metrics = self._means(run, data, device)
            if data.candidates is not None:
                before = self._means(data.candidates, data, device)
                metrics |= {f"first_stage/{name}": value for name, value in before.items()}
            found.append(metrics)
            if trainer.is_global_zero:
                self._write(run, data)
        for i, measure in enumerate(found[0]):
            values = [one[measure] for one in found]
            if len(validations) > 1:
                for data, value in zip(validations, values, strict=True):
                    name = f"val/{data.name}/{measure}"
                    pl_module.log(name, value, rank_zero_only=False)
            mean = torch.stack(values).mean()
            pl_module.log(f"val/{measure}", mean, prog_bar=i == 0, rank_zero_only=False)

    @abstractmethod
    def run_of(self, data: Validation, loader: int, device: torch.device) -> Run:
        """The run over a collection's queries, the same on each rank.

        Args:
            loader: the first loader of the collection.
            device: of the collectives.
        """

    def gathered(self, loader: int, name: str, device: torch.device) -> np.ndarray:
        """The outputs of all ranks under one name [N, ...], once."""
        # Over a whole corpus vectors are gigabytes: free each copy once the next one exists.
        return parallel.gather_to_host(torch.cat(self._outputs.pop((loader, name))), device)

    def cost(self, validations: Sequence[Validation], device: torch.device) -> dict[str, float]:
        """Tokens per text in the latest validation, and its seconds of encoding or scoring.

        Padding does not count; batches that ranks repeat to stay in step do. A reranker's queries
        count with all their candidates.
        """
        tokens, texts = Counter[str](), Counter[str]()
        for i, data in enumerate(validations):
            numbers = {"query": len(data.qrels.queries), "passage": len(data.passages)}
            if data.candidates is not None:
                numbers = {"query": len(data.candidates.query_rows)}
            for loader, (name, number) in enumerate(numbers.items(), i * self.loaders):
                read = torch.tensor([self._tokens[loader]])
                tokens[name] += int(parallel.gather_to_host(read, device).sum())
                texts[name] += number
        cost = {f"tokens_per_{name}": round(tokens[name] / texts[name], 1) for name in texts}
        return {**cost, "seconds": round(self._seconds, 3)}

    def _means(self, run: Run, data: Validation, device: torch.device) -> dict[str, Tensor]:
        """Each measure's mean over all queries, float64; a query without results has 0."""
        names = spelled(self.measures, data.relevant_from)
        # Every rank has the whole run, and computes the metrics of its share of the queries.
        share = data.qrels.only(data.qrels.queries[parallel.rank() :: parallel.world()])
        own = canonical(run.only(share.queries), data.collection.corpus)
        values = per_query(own, share, names)
        found = {}
        for measure, name in zip(self.measures, names, strict=True):
            # Sums and counts over ranks, which may have different numbers of queries, or none.
            mean = MeanMetric().set_dtype(torch.float64).to(device)
            mean.update(torch.from_numpy(values[name]).to(device))
            found[measure] = mean.compute()
        return found

    def _write(self, run: Run, data: Validation) -> None:
        path = self.run_file
        if data.name:
            path = path.with_name(f"{path.stem}.{data.name}{path.suffix}")
        write_run(path, run, data.collection.queries, data.collection.corpus)


class RetrievalEvaluation(Evaluation):
    """Searches the validation's passages for its queries.

    Args:
        index: a `caravan.retrieval.index.Index`; every rank builds it over all passages, and
            searches for its share of the queries.
        The others: see `Evaluation`.
    """

    loaders, dtype = 2, torch.float16

    def __init__(self, index: Any, measures: Sequence[str], run_file: str) -> None:
        super().__init__(measures, run_file)
        self.index = index

    def run_of(self, data: Validation, loader: int, device: torch.device) -> Run:
        query_rows, halves = self._vectors(loader, device)
        queries = halves.astype(np.float32)  # as an evaluation reads them
        rows, passages = self._vectors(loader + 1, device)
        passage_rows, counts = np.unique(data.read.documents(rows), return_counts=True)
        whole = len(passage_rows) == len(rows)
        index = self.index if whole else BestSegments(self.index, counts)
        index.build(ArrayBlocks(passages))
        mine = slice(parallel.rank(), None, parallel.world())
        depth = min(self.index.k + data.ignore_identical_ids, len(passage_rows))
        scores, found = index.search(queries[mine], depth)
        found = np.where(found >= 0, passage_rows[found], -1)
        columns = [torch.from_numpy(column) for column in (query_rows[mine], scores, found)]
        query_rows, scores, found = (parallel.gather_to_host(one, device) for one in columns)
        return data.without_own(Run.from_topk(query_rows, scores, found), self.index.k)

    def _vectors(self, loader: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N] ascending and vectors [N, d] of all ranks, each row once."""
        rows = self.gathered(loader, "rows", device)
        vectors = self.gathered(loader, "vectors", device)
        if (np.diff(rows) > 0).all():
            return rows, vectors
        unique, first = np.unique(rows, return_index=True)
        return unique, vectors[first]


class RerankingEvaluation(Evaluation):
    """Reorders the validation's fixed candidates by their scores."""

    loaders, dtype = 1, torch.float32

    def run_of(self, data: Validation, loader: int, device: torch.device) -> Run:
        names = ("query_rows", "passage_rows", "scores")
        query_rows, rows, scores = (self.gathered(loader, name, device) for name in names)
        size = len(data.collection.corpus)
        # A pair has several scores if it is read by segments, or if ranks repeat a batch.
        pairs = query_rows * size + data.read.documents(rows)
        pairs, places = np.unique(pairs, return_inverse=True)
        best = np.full(len(pairs), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, places, scores)
        return Run.from_flat(pairs // size, pairs % size, best)


def evaluate_again(
    name: str, module: pl.LightningModule, data: DataModule, trainer: Any
) -> dict[str, float]:
    """Metrics of one more validation after training, {measure: value}.

    Its run is written as `<name>.trec`, and its values appear in no curve.
    """
    trainer.loggers = []
    for callback in trainer.callbacks:
        if isinstance(callback, Evaluation):
            callback.run_file = callback.run_file.with_name(f"{name}.trec")
    (*_, metrics) = trainer.validate(module, datamodule=data, verbose=False)
    log.info("%s: %s", name, in_words(metrics))
    return {
        key.removeprefix("val/"): value
        for key, value in metrics.items()
        if key.startswith("val/") and "first_stage" not in key
    }


def evaluate_reading(
    reading: Reading, module: Stage, data: DataModule, trainer: Any
) -> dict[str, Any]:
    """Metrics and cost of one more validation after training, with other lengths or segments.

    The validations of `data` keep this reading.

    Returns:
        The fields of the reading; `scores`, {measure: value}; `tokens_per_query` and, of a
        retriever, `tokens_per_passage`; `seconds` of encoding or scoring; `memory_gib`, the
        peak of the GPU, or of the main process on a CPU (None where it cannot be measured).
    """
    device = trainer.strategy.root_device
    for one in data.validations:
        one.templates = module.reading(one.collection.name, reading.lengths)
        one.reading = reading
    hardware.reset_peak_memory(device)
    found = {**asdict(reading), "scores": evaluate_again(reading.name, module, data, trainer)}
    for callback in trainer.callbacks:
        if isinstance(callback, Evaluation):
            found |= callback.cost(data.validations, device)
    return {**found, "memory_gib": hardware.peak_memory(device)}


def validate_at_least_once(trainer: pl.Trainer, batches: int) -> None:
    """Validate at the end of a run, or epoch, that would end before its first validation.

    Without a validation there would be no metric and no best checkpoint. `batches`: of one epoch.
    """
    every, by_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
    last = batches if by_epoch else batches_in_run(trainer, batches)
    if isinstance(every, int) and 0 < last < every:
        if is_main_process():
            whole = "an epoch" if by_epoch else "the run"
            log.warning(
                f"trainer.val_check_interval={every} is beyond the {last} batches of {whole};"
                f" validating after {last}"
            )
        trainer.val_check_interval = last
