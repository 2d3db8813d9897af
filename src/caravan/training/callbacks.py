"""What happens around the steps: throughput, lines in the log, the point to resume from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pydantic import PositiveInt
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger

from caravan.data.batch import RerankBatch, TrainBatch
from caravan.training.checkpoints import LAST, absolute, relative

log = logging.getLogger(__name__)


class Lines(pl.Callback):
    """Tells in the log how far the run is, and each validation's figures.

    The bar of a terminal is in no file, and a job that a scheduler runs has no terminal.

    Args:
        seconds: between two lines about updates.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._told = self._begun = 0.0
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._told = self._begun = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch | RerankBatch,
        batch_idx: int,
    ) -> None:
        now, done = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero or now - self._told < self.seconds or done <= self._first:
            return
        self._told = now
        last = trainer.fit_loop.epoch_loop.max_steps
        left = (now - self._begun) / (done - self._first) * (last - done)
        loss = trainer.callback_metrics.get("train/loss")
        told = "" if loss is None else f", loss {float(loss):.4f}"
        log.info(
            "update %s of %s%s, about %s left",
            *(f"{done:,}", f"{last:,}", told, timedelta(seconds=round(left))),
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        figures = named(trainer.callback_metrics)
        if figures:
            log.info("validation after update %s: %s", f"{trainer.global_step:,}", figures)


def named(metrics: Mapping[str, Any]) -> str:
    """A validation's figures in words, such as `MRR@10 .2239, R@100 .5786`."""
    found = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
    return ", ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in found.items())


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, with the number of finished updates as the step of each value.

    Lightning counts from 0: without this, a validation after update 40 would be at step 39.
    """

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + 1)


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
        batch: TrainBatch | RerankBatch,
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
    the run was told to stop is kept, since what told it (early stopping) has had its say. Paths of
    callbacks, such as that of the best checkpoint, are relative to run_dir, which may be moved.

    Args:
        folder: where the checkpoints lie.
        every_n_steps: updates between two writes.
    """

    def __init__(self, folder: str, every_n_steps: PositiveInt = 100) -> None:
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch | RerankBatch,
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
        checkpoint["callbacks"] = relative(checkpoint["callbacks"], Path(trainer.default_root_dir))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trainer.should_stop = checkpoint.get("should_stop", False)
        checkpoint["callbacks"] = absolute(checkpoint["callbacks"], Path(trainer.default_root_dir))

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
