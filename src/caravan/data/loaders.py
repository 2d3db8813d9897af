"""DataLoaders of batches, and the worker processes behind them.

Workers tokenize and send numpy arrays (`caravan.data.batch.Unpacked`); the main process cuts chunks
and makes tensors of them. A worker that fails ends the run: no failure leaves the main process
waiting.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from caravan.data.batch import Unpacked
from caravan.data.batching import PairBlocks, QueryOrder, TextBlocks
from caravan.errors import InputError

log = logging.getLogger(__name__)


class BatchLoader(DataLoader[Any]):
    """Loads the batches of a dataset of `Unpacked` items, and packs them in the main process.

    What fails in a worker raises here: an `InputError` or `OSError` as it is, anything else with
    the worker's traceback. A worker that dies raises torch's RuntimeError, which
    `caravan.errors.sentence` explains.

    Args:
        seed: of a generator of its own, which keeps the loader from drawing its base seed out of
            torch's global state: a resumed run would differ from an uninterrupted one.
    """

    def __init__(
        self, batches: Dataset[Any], sampler: Any, num_workers: int, seed: int, **settings: Any
    ) -> None:
        super().__init__(
            _Reported(batches),
            sampler=sampler,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            worker_init_fn=_start_worker if num_workers else None,
            generator=torch.Generator().manual_seed(seed),
            **settings,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        release_free_memory()
        # Ctrl-C goes to all processes of a terminal; the main process ends its workers itself.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            items = super().__iter__()  # starts the workers
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return map(_packed, items)


class TrainLoader(BatchLoader):
    """Loads training batches and knows which epoch it is in and how many it has handed out.

    It counts epochs itself: Lightning's counter lags by one after two resumes in a row from a
    checkpoint at an epoch's end, and the order would be that of another epoch.

    Args:
        training: `Groups`, or `caravan.data.unlabelled.Unlabelled`.
        per_epoch: batches that are asked of it in an epoch; None means all of `order`.
    """

    def __init__(
        self, training: Any, order: QueryOrder, num_workers: int, per_epoch: int | None = None
    ) -> None:
        # Its worker is forked before training has filled any memory, and kept: one that is forked
        # in a later epoch would hold a copy of what the process has by then.
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
    """Loads texts to embed or pairs to score.

    Its workers start with the memory in use, and end with the last batch.
    Lightning keeps the iterator of a validation until the next one, and never asks it for more than
    there is: workers that waited for that would keep a copy of the training process all the time.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for left in reversed(range(len(self))):
            batch = next(batches)
            if not left:
                del batches
            yield batch


def text_loader(
    blocks: TextBlocks | PairBlocks, indices: Sequence[int], num_workers: int, seed: int = 0
) -> DataLoader[Any]:
    """Load the blocks of `indices`, in this order."""
    return TextLoader(blocks, list(indices), num_workers, seed)


def release_free_memory() -> None:
    """Return free memory of the allocator to the system (glibc only).

    A process that forks with gigabytes of it keeps them twice: the parent writes to its copy, and
    the worker holds the other.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _start_worker(_: int) -> None:
    # The tokenizer's own threads do not survive the fork; each worker is one thread of its own.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Where there are few cores, a worker that takes one stalls the step's other threads.
    os.nice(10)
    # torch's handler would blame shared memory, which is not in use, before the worker dies.
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    # By default a failure of the thread that sends the batches is printed, and the main process
    # waits for the batch forever. The death of a worker is noticed.
    Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _: Any) -> None:
    if not isinstance(error, ConnectionError):  # raised where the main process has ended
        log.error("a DataLoader worker cannot send a batch: %s: %s", type(error).__name__, error)
    os._exit(1)


def _packed(item: Unpacked[Any] | Exception) -> Any:
    if isinstance(item, Exception):
        raise item
    return item.packed()


def _unchanged(item: Any) -> Any:
    """In place of torch's collate function, which makes tensors."""
    return item


class _Reported(Dataset[Any]):
    """The items of a dataset, or the `InputError` or `OSError` that an item raises.

    torch would wrap the exception into the text of a traceback.
    """

    def __init__(self, batches: Dataset[Any]) -> None:
        self.batches = batches

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.batches[item]
        except (InputError, OSError) as error:
            return error
