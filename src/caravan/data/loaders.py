"""The DataLoaders with their worker processes.

The position in training is two integers, epoch and batch, so a checkpoint in the middle of an epoch
resumes at the next batch.

Workers tokenize and send numpy arrays (`caravan.data.batch.Unpacked`), which the main process packs
into tensors. A failing worker ends the run instead of hanging it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from caravan.data.batch import Unpacked
from caravan.data.batching import QueryOrder, TrainingSet
from caravan.errors import InputError

log = logging.getLogger(__name__)


def limited(batches: int, limit: int | float) -> int:
    """The batches per epoch under Lightning's `limit_train_batches`, a number or a fraction.

    >>> limited(10, 4), limited(10, 0.5), limited(10, 1.0)
    (4, 5, 10)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def rank_share(items: int, rank: int, world: int) -> list[int]:
    """The items of one rank; the first items are repeated so that all ranks have equally many.

    >>> [rank_share(5, rank, 2) for rank in range(2)]
    [[0, 2, 4], [1, 3, 0]]
    """
    each = -(-items // world)
    return [(rank + i * world) % items for i in range(each)]


class BatchLoader(DataLoader[Any]):
    """Loads the batches of a dataset of `Unpacked` items and packs them in the main process.

    An `InputError` or `OSError` in a worker is raised here unchanged, any other exception with the
    worker's traceback. If a worker dies, torch raises a RuntimeError, which
    `caravan.errors.sentence` explains.

    Args:
        seed: seed of the loader's generator; a base seed from torch's global state would make a
            resumed run differ from an uninterrupted one.
    """

    def __init__(
        self, batches: Any, sampler: Any, num_workers: int, seed: int = 0, **settings: Any
    ) -> None:
        super().__init__(
            _Caught(batches),
            sampler=sampler,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            worker_init_fn=_start_worker if num_workers else None,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # after a fork, free memory that the parent reuses would exist twice, once in the worker
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        # Ctrl-C reaches all processes of a terminal; the main process ends the workers
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            items = super().__iter__()  # starts the workers
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return map(_packed, items)


class TrainLoader(BatchLoader):
    """Loads training batches; its state is the epoch and the number of batches handed out.

    It counts epochs itself, because Lightning's counter lags by one after two resumes in a row from
    the end of an epoch.

    Args:
        per_epoch: batches that Lightning takes per epoch; None for all of `order`.
    """

    def __init__(
        self,
        training: TrainingSet,
        order: QueryOrder,
        num_workers: int,
        per_epoch: int | None = None,
    ) -> None:
        # persistent workers are forked before training allocates memory, which they would copy
        super().__init__(
            training, order, num_workers, training.seed, persistent_workers=num_workers > 0
        )
        self.order = order
        self.per_epoch = len(order) if per_epoch is None else per_epoch
        self.handed_out = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.handed_out >= self.per_epoch:
            self.order.epoch += 1
            self.handed_out = 0
        self.order.start = self.handed_out
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.order.epoch = state["epoch"]
        self.handed_out = state["handed_out"]


class TextLoader(BatchLoader):
    """Loads texts to embed or pairs to score; its workers end with the last batch.

    Lightning keeps the iterator of a validation, unexhausted, until the next validation.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for left in reversed(range(len(self))):
            batch = next(batches)
            if not left:
                del batches
            yield batch


def _start_worker(_: int) -> None:
    # The tokenizer's threads do not survive the fork; each worker uses one thread.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # With few cores, a worker would otherwise slow down the threads of the training step.
    os.nice(10)
    # torch's handler would report a lack of shared memory, which is not used.
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    # By default an error in the sending thread is only printed, and the main process waits for the
    # batch forever. The main process does detect the exit of a worker.
    Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _: Any) -> None:
    if not isinstance(error, ConnectionError):  # raised if the main process has ended
        log.error("a DataLoader worker cannot send a batch: %s: %s", type(error).__name__, error)
    os._exit(1)


def _packed(item: Unpacked[Any] | Exception) -> Any:
    if isinstance(item, Exception):
        raise item
    return item.packed()


def _unchanged(item: Any) -> Any:
    """Replaces torch's collate function, which would create tensors."""
    return item


class _Caught(Dataset[Any]):
    """Returns the items of a dataset, or the exception that torch would turn into a traceback."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.batches[item]
        except (InputError, OSError) as error:
            return error
