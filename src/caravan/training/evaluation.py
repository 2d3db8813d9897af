"""Validation: retrieval or reranking metrics of the current weights.

For a retriever the validation loop embeds the development queries and passages; the callback
gathers them over ranks, builds a faiss index, searches, and logs MRR@10, nDCG@10 and R@100. For a
reranker it scores the candidates of a fixed run, and the callback logs the metrics of the new
order. The value is the same on every rank; checkpoints and early stopping monitor it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric

from caravan.data.batch import EncodeBatch, PairBatch
from caravan.data.datamodule import DataModule
from caravan.data.runs import Run, canonical, write_run
from caravan.distributed import is_main_process
from caravan.retrieval.index import ArrayBlocks
from caravan.retrieval.metrics import per_query, spelled
from caravan.training import parallel
from caravan.training.callbacks import in_words
from caravan.training.optim import batches_in_run

log = logging.getLogger(__name__)

QUERIES, PASSAGES = 0, 1  # a retriever's validation loaders, in this order


class RetrievalEvaluation(pl.Callback):
    """Searches the validation's passages for its queries and logs `val/<measure>`.

    Args:
        index: `caravan.retrieval.index.Faiss` or `Exact`; every rank builds it over all passages.
        measures: which metrics are logged.
        run_file: where the run of the latest validation is written.
    """

    def __init__(self, index: Any, measures: Sequence[str], run_file: str) -> None:
        self.index = index
        self.measures = list(measures)
        self.run_file = Path(run_file)
        self._parts: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._parts = ([], [])

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: EncodeBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        part = outputs["rows"].cpu(), outputs["vectors"].float().cpu()
        self._parts[dataloader_idx].append(part)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        query_rows, queries = self._gathered(QUERIES, pl_module.device)
        passage_rows, passages = self._gathered(PASSAGES, pl_module.device)
        self._parts = ([], [])
        mine = slice(trainer.global_rank, None, trainer.world_size)  # this rank's queries
        self.index.build(ArrayBlocks(passages))
        depth = min(self.index.k + data.ignore_identical_ids, len(passages))
        scores, found = self.index.search(queries[mine], depth)
        found = np.where(found >= 0, passage_rows[found], -1)
        run = data.without_own(Run.from_topk(query_rows[mine], scores, found), self.index.k)
        _log_means(pl_module, "val", _per_query(run, query_rows[mine], data, self.measures))
        columns = (torch.from_numpy(query_rows[mine]), *map(torch.from_numpy, (scores, found)))
        rows, scores, found = (_all_ranks(column, pl_module.device) for column in columns)
        if trainer.is_global_zero:
            run = data.without_own(Run.from_topk(rows, scores, found), self.index.k)
            _write(self.run_file, run, data)

    def _gathered(self, loader: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N] ascending and vectors [N, d] of all ranks, each row once."""
        parts = self._parts[loader]
        rows = _all_ranks(torch.cat([part[0] for part in parts]), device)
        vectors = torch.cat([part[1] for part in parts])
        # Over a whole corpus vectors are gigabytes: free each copy once the next one exists.
        parts.clear()
        gathered = _all_ranks(vectors, device)
        del vectors
        if (np.diff(rows) > 0).all():
            return rows, gathered
        unique, first = np.unique(rows, return_index=True)
        return unique, gathered[first]


class RerankingEvaluation(pl.Callback):
    """Reorders fixed candidates by their scores and logs `val/<measure>`.

    The metrics of the candidates' own order are logged as `val/first_stage/<measure>`.

    Args:
        measures: which metrics are logged.
        run_file: where the run of the latest validation is written.
    """

    def __init__(self, measures: Sequence[str], run_file: str) -> None:
        self.measures = list(measures)
        self.run_file = Path(run_file)
        self._parts: list[tuple[Tensor, ...]] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        names = ("query_rows", "passage_rows", "scores")
        self._parts.append(tuple(outputs[name].cpu() for name in names))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        columns = [
            _all_ranks(torch.cat(parts), pl_module.device)
            for parts in zip(*self._parts, strict=True)
        ]
        self._parts = []
        pairs = columns[0] * len(data.collection.corpus) + columns[1]
        first = np.unique(pairs, return_index=True)[1]  # ranks repeat a batch to stay in step
        query_rows, passage_rows, scores = (column[first] for column in columns)
        run = Run.from_flat(query_rows, passage_rows, scores)
        assert data.candidates is not None  # a reranker's data module has them
        # Every rank has all pairs, and computes the metrics of its share of the queries.
        mine = data.dev_qrels.queries[trainer.global_rank :: trainer.world_size]
        for name, ranked in (("val", run), ("val/first_stage", data.candidates)):
            values = _per_query(ranked.only(mine), mine, data, self.measures)
            _log_means(pl_module, name, values)
        if trainer.is_global_zero:
            _write(self.run_file, run, data)


class MeanMeasures(Metric):
    """Mean over queries of each measure, over all ranks.

    States are sums and counts, not means: ranks may have different numbers of queries, or none.

    Args:
        measures: their names, such as "MRR@10".
    """

    full_state_update = False
    total: Tensor  # [M] float64
    queries: Tensor  # [] float64

    def __init__(self, measures: Sequence[str]) -> None:
        super().__init__()
        self.measures = list(measures)
        zeros = torch.zeros(len(self.measures), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the values of queries: {measure: [Q]}, as `metrics.per_query` returns them."""
        rows = torch.as_tensor(
            np.stack([values[name] for name in self.measures]), device=self.device
        )
        self.total += rows.double().sum(dim=1)
        self.queries += rows.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """{measure: mean over the queries of all ranks}, 0 without any query."""
        means = self.total / self.queries.clamp(min=1)
        return dict(zip(self.measures, means.float(), strict=True))


def evaluate_again(
    name: str, module: pl.LightningModule, data: DataModule, trainer: pl.Trainer
) -> dict[str, float]:
    """Metrics of one more validation, {measure: value}.

    Its run is written as `<name>.trec`, and its values appear in no curve.
    """
    both = (RetrievalEvaluation, RerankingEvaluation)
    callbacks = [one for one in trainer.callbacks if isinstance(one, both)]  # type: ignore[attr-defined]
    files, loggers = [callback.run_file for callback in callbacks], trainer.loggers
    for callback, file in zip(callbacks, files, strict=True):
        callback.run_file = file.with_name(f"{name}.trec")
    trainer.loggers = []
    try:
        (*_, metrics) = trainer.validate(module, datamodule=data, verbose=False)
    finally:
        trainer.loggers = loggers
        for callback, file in zip(callbacks, files, strict=True):
            callback.run_file = file
    log.info("%s: %s", name, in_words(metrics))
    return {
        key.removeprefix("val/"): value
        for key, value in metrics.items()
        if key.startswith("val/") and "first_stage" not in key
    }


def validate_at_least_once(trainer: pl.Trainer, batches: int) -> None:
    """Validate at the end of a run that would end before its first validation.

    Without a validation there would be no metric and no best checkpoint.

    Args:
        batches: of one epoch.
    """
    every, by_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
    last = batches if by_epoch else batches_in_run(trainer, batches)
    if not isinstance(every, int) or last is None or not 0 < last < every:
        return
    if is_main_process():
        whole = "an epoch" if by_epoch else "the run"
        log.warning(
            f"trainer.val_check_interval={every} is beyond the {last} batches of {whole};"
            f" validating after {last}"
        )
    trainer.val_check_interval = last


def _per_query(
    run: Run, query_rows: np.ndarray, data: DataModule, measures: Sequence[str]
) -> dict[str, np.ndarray]:
    """Values [n] of each measure for these queries; a query without results has 0."""
    share = data.dev_qrels.only(query_rows)
    names = spelled(measures, data.relevant_from)
    values = per_query(canonical(run, data.collection.corpus), share, names)
    return {measure: values[name] for measure, name in zip(measures, names, strict=True)}


def _log_means(module: pl.LightningModule, name: str, values: dict[str, np.ndarray]) -> None:
    """Log the means over the queries of all ranks as `<name>/<measure>`, the same on each rank."""
    metric = MeanMeasures(list(values)).to(module.device)
    metric.update(values)
    for i, (measure, value) in enumerate(metric.compute().items()):
        shown = name == "val" and i == 0
        module.log(f"{name}/{measure}", value, prog_bar=shown, rank_zero_only=False)


def _write(path: Path, run: Run, data: DataModule) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    run = canonical(run, data.collection.corpus)
    write_run(path, run, data.collection.queries, data.collection.corpus)


def _all_ranks(rows: Tensor, device: torch.device) -> np.ndarray:
    if parallel.world() == 1:
        return rows.numpy()
    rows = rows.to(device)
    return parallel.gather(rows, parallel.sizes(len(rows), device)).cpu().numpy()
