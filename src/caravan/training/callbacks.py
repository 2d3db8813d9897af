"""Callbacks of the training loop: log lines, throughput, and the checkpoint to resume from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pydantic import PositiveInt
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger

from caravan.models.hardware import parameter_counts
from caravan.training.checkpoints import LAST, with_paths
from caravan.training.fsdp import FullySharded

RUN_DIR = "<run_dir>"
"""Stands for run_dir in the paths of a checkpoint."""

log = logging.getLogger(__name__)


def is_log_step(trainer: Any) -> bool:
    """Whether this batch ends an update whose values the loggers get.

    `trainer.log_every_n_steps` counts updates, of which each may have several batches.
    """
    due = trainer._logger_connector.should_update_logs
    return bool(due) and not trainer.fit_loop.epoch_loop._should_accumulate()


class FitSummary(pl.Callback):
    """Logs the model, the data and the batch size at the start of training."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        device, strategy, data = trainer.strategy.root_device, trainer.strategy, trainer.datamodule
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # exclude loading from the peak memory
        if not trainer.is_global_zero:
            return
        precision = "bf16" if pl_module.bf16 else "float32"
        if isinstance(strategy, FullySharded):
            precision += f", weights sharded over {strategy.shards} ranks"
        trained, total = parameter_counts(pl_module)
        log.info(
            f"{trainer.world_size} x {device.type}, {precision};"
            f" {trained:,} trainable parameters of {total:,}"
        )
        accumulated = trainer.accumulate_grad_batches
        trains_on = data.training.summary(data.name, data.queries_per_batch, accumulated)
        batches = data.batches_per_epoch(trainer)
        log.info(f"{trains_on}; {trainer.max_steps:,} updates, {batches:,} batches an epoch")
        for one in data.validations:
            name = f" of {one.name}" if one.name else ""
            ranked = f"{len(one.passages):,} of {len(one.collection.corpus):,} passages"
            if one.candidates is not None:
                ranked = f"{len(one.candidates.passage_rows):,} candidates"
            log.info(f"validation{name}: {len(one.qrels.queries):,} queries over {ranked}")


class ProgressLog(pl.Callback):
    """Logs the progress of training every `seconds`, and the metrics of each validation.

    Log files have no progress bar, and scheduled jobs have no terminal.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._logged_at = self._started_at = 0.0
        self._first = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._logged_at = self._started_at = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        now, done, last = time.monotonic(), trainer.global_step, trainer.max_steps
        due = now - self._logged_at >= self.seconds
        if not trainer.is_global_zero or not due or done <= self._first:
            return
        self._logged_at = now
        left = (now - self._started_at) / (done - self._first) * (last - done)
        loss = trainer.callback_metrics.get("train/loss")  # None before the first log step
        found = "" if loss is None else f", loss {loss:.4f}"
        remaining = timedelta(seconds=round(left))
        log.info(f"update {done:,} of {last:,}{found}, about {remaining} left")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = in_words(trainer.callback_metrics)
        if metrics and trainer.state.fn == "fit" and trainer.is_global_zero:
            log.info(f"validation after update {trainer.global_step:,}: {metrics}")


def in_words(metrics: Mapping[str, Any]) -> str:
    """Format the metrics of a validation as one line.

    >>> in_words({"train/loss": 1.5, "val/MRR@10": 0.2239, "val/R@100": 0.5786})
    'MRR@10 0.2239, R@100 0.5786'
    """
    found = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
    return ", ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in found.items())


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger with the number of finished updates as the step.

    Lightning counts from 0, so it would log a validation after update 40 at step 39.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + 1)


class Throughput(pl.Callback):
    """Logs tokens per second and the share of padding since the last log."""

    def __init__(self) -> None:
        self._since = self._seconds = 0.0
        self._tokens = self._padded = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = time.monotonic()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self._seconds += now - self._since
        self._since = now
        self._tokens += batch.texts.tokens
        self._padded += batch.texts.padded
        if is_log_step(trainer):
            # Ranks have about equally many tokens, so the sum is estimated from rank 0.
            tokens = self._tokens * trainer.world_size
            speed = tokens / max(self._seconds, 1e-9)
            pl_module.log("train/tokens_per_second", speed, prog_bar=True)
            pl_module.log("train/padding", 1 - self._tokens / max(self._padded, 1))
            self._seconds, self._tokens, self._padded = 0.0, 0, 0


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, from which `resume=true` continues at the next batch.

    For the contents see `caravan.training.checkpoints`.

    It is written every `every_n_steps` updates and after every validation: not before a validation
    that follows an update, so that a run killed during a validation repeats it, nor between the
    batches of one update, since it has no gradients. Lightning calls a `Checkpoint` after the other
    callbacks, so their state is up to date.
    """

    def __init__(self, folder: str, every_n_steps: PositiveInt = 100) -> None:
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if trainer.global_step % self.every_n_steps == 0 and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["should_stop"] = trainer.should_stop
        run_dir = os.path.realpath(trainer.default_root_dir)
        checkpoint["callbacks"] = with_paths(checkpoint["callbacks"], run_dir, RUN_DIR)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        trainer.should_stop = checkpoint.get("should_stop", False)
        run_dir = os.path.realpath(trainer.default_root_dir)
        checkpoint["callbacks"] = with_paths(checkpoint["callbacks"], RUN_DIR, run_dir)

    def _save(self, trainer: Any) -> None:
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            trainer.save_checkpoint(self.path)
