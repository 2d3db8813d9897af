"""What happens around the steps: retrieval evaluation, throughput, the point to resume from.

`RetrievalEvaluation` is the figure that a loss is not: at every validation the loop embeds the
development queries and passages, and the callback gathers them over ranks, builds a faiss index,
searches, and logs MRR@10, nDCG@10 and R@100, one value on every rank; checkpoints and early
stopping go by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from caravan.batches import EncodeBatch, TrainBatch
from caravan.data.datamodule import DataModule
from caravan.data.runs import Run, canonical, write_run
from caravan.retrieval.index import ArrayBlocks
from caravan.retrieval.metrics import per_query
from caravan.training import parallel
from caravan.training.validation_metrics import MeanMeasures

QUERIES, PASSAGES = 0, 1  # the validation loaders, in this order


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
        depth = min(self.index.k, len(passages))
        scores, found = self.index.search(queries[mine], depth)
        found = np.where(found >= 0, passage_rows[found], -1)
        run = Run.from_topk(query_rows[mine], scores, found)
        metric = MeanMeasures(self.measures).to(pl_module.device)
        metric.update(self._own_figures(run, data))
        for name, value in metric.compute().items():
            pl_module.log(
                f"val/{name}", value, prog_bar=name == self.measures[0], rank_zero_only=False
            )
        self._write(query_rows, scores, found, mine, data, trainer, pl_module.device)

    def _own_figures(self, run: Run, data: DataModule) -> dict[str, np.ndarray]:
        """Figures [n] of the queries that this rank has searched."""
        qrels = data.dev_qrels
        own = np.isin(qrels.query_rows, run.query_rows)
        share = type(qrels)(qrels.query_rows[own], qrels.passage_rows[own], qrels.grades[own])
        return per_query(canonical(run, data.collection.corpus), share, self.measures)

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
            run = canonical(Run.from_topk(asked, scores, found), data.collection.corpus)
            self.run_file.parent.mkdir(parents=True, exist_ok=True)
            write_run(self.run_file, run, data.collection.queries, data.collection.corpus)


def _all_ranks(rows: Tensor, device: torch.device) -> np.ndarray:
    if parallel.world() == 1:
        return rows.numpy()
    rows = rows.to(device)
    return parallel.gather(rows, parallel.sizes(len(rows), device)).cpu().numpy()


class Throughput(pl.Callback):
    """Logs tokens a second and the share of padding, over the steps since the last log."""

    def __init__(self) -> None:
        self._since = 0.0
        self._seconds = 0.0
        self._tokens = 0
        self._padded = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now
        self._tokens += batch.tokens
        self._padded += batch.padded
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            # Every rank has about the same share; the sum over ranks is told from rank 0's.
            pl_module.log(
                "train/tokens_per_second",
                self._tokens * trainer.world_size / max(self._seconds, 1e-9),
                prog_bar=True,
            )
            pl_module.log("train/padding", 1 - self._tokens / max(self._padded, 1))
            self._seconds, self._tokens, self._padded = 0.0, 0, 0


class ResumePoint(Checkpoint):
    """Keeps `last.ckpt`, the state that `resume=true` goes on from.

    It is written every so many updates and after every validation, but not in the update that a
    validation follows: a run that is killed during the validation must do it again. (A `Checkpoint`
    is called after the other callbacks, and after the best checkpoint, whose state it must hold.)
    Nor is it written between the batches of one update, for gradients are in no checkpoint. That
    the run was told to stop is kept, since what told it (early stopping) has had its say.

    Args:
        folder: where the checkpoints lie.
        every_n_steps: updates between two writes.
    """

    def __init__(self, folder: str, every_n_steps: int = 100) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self._saved_at
        if due and not _accumulates(trainer, batch_idx) and not _validates_now(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if not _accumulates(trainer, trainer.fit_loop.batch_idx):
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["should_stop"] = trainer.should_stop

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trainer.should_stop = checkpoint.get("should_stop", False)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self.path)


def _accumulates(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the gradients of this batch wait for those of the next; an epoch's last never do."""
    if batch_idx + 1 >= trainer.num_training_batches:
        return False
    return (batch_idx + 1) % trainer.accumulate_grad_batches != 0


def _validates_now(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch, as Lightning's training loop decides it."""
    epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or every is None:  # None: by the clock
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    if trainer.should_stop:
        return True
    if every == float("inf"):
        return batch_idx + 1 >= trainer.num_training_batches
    counted = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return (counted + 1) % int(every) == 0


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves the old or the new."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = final.with_name(f".{final.name}.part")
        with scratch.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, final)
