"""The figure that a loss is not: retrieval, or reranking, measured at every validation.

For a retriever the validation loop embeds the development queries and passages; the callback
gathers them over ranks, builds a faiss index, searches, and logs MRR@10, nDCG@10 and R@100. For a
reranker it scores the candidates of a fixed run, and the callback logs the same measures of the new
order. One value on every rank; checkpoints and early stopping go by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from caravan.data.batch import EncodeBatch, PairBatch
from caravan.data.datamodule import DataModule
from caravan.data.runs import Run, canonical, write_run
from caravan.retrieval.index import ArrayBlocks
from caravan.retrieval.metrics import per_query, spelled
from caravan.training import parallel
from caravan.training.validation_metrics import MeanMeasures

QUERIES, PASSAGES = 0, 1  # a retriever's validation loaders, in this order


class RetrievalEvaluation(pl.Callback):
    """Searches the validation's passages for its queries and logs `val/<measure>`.

    Args:
        index: `caravan.retrieval.index.Faiss` or `Exact`.
        measures: what is logged.
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
        # Each rank searches its share of the queries over all passages.
        mine = slice(trainer.global_rank, None, trainer.world_size)
        self.index.build(ArrayBlocks(passages))
        depth = min(self.index.k + data.ignore_identical_ids, len(passages))
        scores, found = self.index.search(queries[mine], depth)
        found = np.where(found >= 0, passage_rows[found], -1)
        run = data.without_own(Run.from_topk(query_rows[mine], scores, found), self.index.k)
        log_means(
            pl_module, "val", own_figures(run, query_rows[mine], data, self.measures), shown=True
        )
        self._write(query_rows, scores, found, mine, data, trainer, pl_module.device)

    def _gathered(self, loader: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Rows [N] ascending and vectors [N, d] of all ranks, each row once."""
        parts = self._parts[loader]
        rows = _all_ranks(torch.cat([part[0] for part in parts]), device)
        vectors = torch.cat([part[1] for part in parts])
        # Over a whole corpus the vectors are gigabytes: each copy goes as soon as the next is made.
        parts.clear()
        gathered = _all_ranks(vectors, device)
        del vectors
        if (np.diff(rows) > 0).all():
            return rows, gathered
        unique, first = np.unique(rows, return_index=True)
        return unique, gathered[first]

    def _write(
        self,
        query_rows: np.ndarray,
        scores: np.ndarray,
        found: np.ndarray,
        mine: slice,
        data: DataModule,
        trainer: pl.Trainer,
        device: torch.device,
    ) -> None:
        asked = _all_ranks(torch.from_numpy(query_rows[mine]), device)
        scores = _all_ranks(torch.from_numpy(scores), device)
        found = _all_ranks(torch.from_numpy(found), device)
        if trainer.is_global_zero:
            run = data.without_own(Run.from_topk(asked, scores, found), self.index.k)
            write(self.run_file, run, data)


class RerankingEvaluation(pl.Callback):
    """Puts fixed candidates into a new order and logs `val/<measure>`, and the old order's figures.

    Args:
        measures: what is logged; of the candidates as they came, as `val/first_stage/<measure>`.
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
        first = np.unique(pairs, return_index=True)[1]  # ranks repeat a block to even out
        query_rows, passage_rows, scores = (column[first] for column in columns)
        run = Run.from_flat(query_rows, passage_rows, scores)
        assert data.candidates is not None  # a reranker's data module has them
        # Every rank has all pairs, and takes its share of the queries.
        mine = data.dev_qrels.queries[trainer.global_rank :: trainer.world_size]
        for name, ranked in (("val", run), ("val/first_stage", data.candidates)):
            figures = own_figures(ranked.only(mine), mine, data, self.measures)
            log_means(pl_module, name, figures, shown=name == "val")
        if trainer.is_global_zero:
            write(self.run_file, run, data)


def own_figures(
    run: Run, query_rows: np.ndarray, data: DataModule, measures: Sequence[str]
) -> dict[str, np.ndarray]:
    """Metrics [n] of this rank's share of the queries; a query without results has 0."""
    share = data.dev_qrels.only(query_rows)
    names = spelled(measures, data.relevant_from)
    figures = per_query(canonical(run, data.collection.corpus), share, names)
    return {asked: figures[name] for asked, name in zip(measures, names, strict=True)}


def log_means(
    module: pl.LightningModule, name: str, figures: dict[str, np.ndarray], shown: bool
) -> None:
    """Log the means over the queries of all ranks as `<name>/<measure>`, the same on each rank."""
    metric = MeanMeasures(list(figures)).to(module.device)
    metric.update(figures)
    for i, (measure, value) in enumerate(metric.compute().items()):
        module.log(f"{name}/{measure}", value, prog_bar=shown and i == 0, rank_zero_only=False)


def write(path: Path, run: Run, data: DataModule) -> None:
    """Keep the run of a validation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = canonical(run, data.collection.corpus)
    write_run(path, run, data.collection.queries, data.collection.corpus)


def _all_ranks(rows: Tensor, device: torch.device) -> np.ndarray:
    if parallel.world() == 1:
        return rows.numpy()
    rows = rows.to(device)
    return parallel.gather(rows, parallel.sizes(len(rows), device)).cpu().numpy()
