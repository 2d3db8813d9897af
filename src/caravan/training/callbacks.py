"""Callbacks of the training loop: log lines, throughput, and the checkpoint to resume from."""

from __future__ import annotations

import logging
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

from caravan.errors import InputError
from caravan.models.hardware import parameter_counts
from caravan.training.checkpoints import LAST, absolute, relative
from caravan.training.fsdp import FullySharded

log = logging.getLogger(__name__)


class FitSummary(pl.Callback):
    """Logs the model, the data and the batch size at the start of training.

    Args:
        precision: "bf16" or "float32".
    """

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # exclude loading from the peak memory
        trained, total = parameter_counts(pl_module)
        if not trained:
            raise InputError(
                "nothing-to-train",
                "all weights are frozen, so there is nothing to train; set peft=none or peft=lora",
            )
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        sharded, strategy = "", trainer.strategy
        if isinstance(strategy, FullySharded):
            sharded = f", weights sharded over {strategy.shards} ranks"
        accumulated = trainer.accumulate_grad_batches
        trains_on = data.training.summary(data.name, data.queries_per_batch, accumulated)
        batches = data.batches_per_epoch(trainer)
        lines = [
            f"{trainer.world_size} x {device.type}, {self.precision}{sharded};"
            f" {trained:,} trainable parameters of {total:,}",
            f"{trains_on}; {trainer.max_steps:,} updates, {batches:,} batches an epoch",
        ]
        for one in data.validations:
            queries = len(one.qrels.queries)
            name = f" of {one.name}" if one.name else ""
            if one.candidates is not None:
                candidates = len(one.candidates.passage_rows)
                lines.append(f"validation{name}: {candidates:,} candidates of {queries:,} queries")
            else:
                passages = f"{len(one.passages):,} of {len(one.collection.corpus):,} passages"
                lines.append(f"validation{name}: {queries:,} queries over {passages}")
        for line in lines:
            log.info(line)


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
        value = trainer.callback_metrics.get("train/loss")
        loss = "" if value is None else f", loss {float(value):.4f}"
        remaining = timedelta(seconds=round(left))
        log.info(f"update {done:,} of {last:,}{loss}, about {remaining} left")

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
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            # Ranks have about equally many tokens, so the sum is estimated from rank 0.
            tokens = self._tokens * trainer.world_size
            speed = tokens / max(self._seconds, 1e-9)
            pl_module.log("train/tokens_per_second", speed, prog_bar=True)
            pl_module.log("train/padding", 1 - self._tokens / max(self._padded, 1))
            self._seconds, self._tokens, self._padded = 0.0, 0, 0


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, from which `resume=true` continues at the next batch.

    Contents of a checkpoint (the same in best.ckpt), and the code that adds them:

    ===================  ==========================================  ==============================
    entry                content                                     from
    ===================  ==========================================  ==============================
    state_dict           trainable weights, unsharded on the CPU     `Stage.on_save_checkpoint`,
                                                                     `FullySharded`
    optimizer_states     Adam's moments, unsharded on the CPU        Lightning, `FullySharded`
    lr_schedulers        position in the schedule                    Lightning
    loops                updates, batches and validations done;      Lightning,
                         epoch and position of the training loader   `caravan.data.loaders`
    callbacks            best metric and path, patience, ...;        each callback; paths below
                         paths relative to run_dir                   run_dir by `LastCheckpoint`
    should_stop          whether early stopping has ended the run;   `LastCheckpoint`
                         not set again by it after a resume
    epoch, global_step,  counters                                    Lightning
    ...version
    ===================  ==========================================  ==============================

    A checkpoint has no frozen weights (the manifest of the run has the digest of the base model)
    and no random states: dropout, negatives and batches are functions of the seed and the position
    (`Stage.on_train_batch_start`, `caravan.data.negatives`).

    It is written every `every_n_steps` updates and after every validation: not before a validation
    that follows an update, so that a run killed during a validation repeats it, nor between the
    batches of one update, since it has no gradients. Lightning calls a `Checkpoint` after the other
    callbacks, so their state is up to date.
    """

    def __init__(self, folder: str, every_n_steps: PositiveInt = 100) -> None:
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self._saved_at
        if due and not _accumulates(trainer, batch_idx) and not _validates_now(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not _accumulates(trainer, trainer.fit_loop.batch_idx):
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        checkpoint["should_stop"] = trainer.should_stop
        checkpoint["callbacks"] = relative(checkpoint["callbacks"], Path(trainer.default_root_dir))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        trainer.should_stop = checkpoint.get("should_stop", False)
        checkpoint["callbacks"] = absolute(checkpoint["callbacks"], Path(trainer.default_root_dir))

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(self.path)


def _accumulates(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether gradients are kept for the next batch; never true for the last batch of an epoch."""
    last = batch_idx + 1 >= trainer.num_training_batches
    return not last and (batch_idx + 1) % trainer.accumulate_grad_batches != 0


def _validates_now(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch; the same conditions as in Lightning's loop."""
    epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
    other_epoch = epochs is not None and (trainer.current_epoch + 1) % epochs
    if not trainer.enable_validation or every is None or other_epoch:  # None: by time
        return False
    if trainer.should_stop:
        return True
    if every == float("inf"):
        return batch_idx + 1 >= trainer.num_training_batches
    counted = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return (counted + 1) % int(every) == 0
