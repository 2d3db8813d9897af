"""Loaders and their worker processes: nothing in shared memory, and no failure that hangs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from caravan.data.batch import EncodeBatch, TokenIds, Unpacked
from caravan.data.batching import Groups, PairBatches, QueryOrder, TextBatches
from caravan.data.collection import Collection
from caravan.data.loaders import BatchLoader, TextLoader, TrainLoader
from caravan.data.pairs import PairTemplates
from caravan.data.unlabelled import JointTemplates, Unlabelled
from caravan.encoding import Encoding
from caravan.errors import InputError, is_termination, sentence


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A loader that waits for ever fails its test after two minutes."""

    def fail(*_: Any) -> None:
        raise TimeoutError("the loader waits for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Items(Dataset[Any]):
    """Each item is what a function gives for it, in the worker."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __getitem__(self, number: int) -> Any:
        return self.item(number)


def texts_of_lengths(lengths: np.ndarray) -> Unpacked[EncodeBatch]:
    texts = TokenIds(np.ones(lengths.sum(), np.int32), lengths.astype(np.int32))
    return Unpacked(EncodeBatch, {"rows": np.arange(len(lengths)), "texts": texts}, 256, 0)


def plain(value: Any) -> Any:
    """A batch as dicts and lists of numbers."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return plain(list(vars(value).items())) if hasattr(value, "__dict__") else value


def loaded(item: Callable[[int], Any], items: int = 1) -> list[Any]:
    """The batches of items that a worker makes."""
    return list(BatchLoader(Items(item), range(items), num_workers=1, seed=0))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_continues_where_its_state_was_taken(groups: Groups, num_workers: int) -> None:
    def rows(loader: TrainLoader, number: int) -> list[Any]:
        batches = iter(loader)
        return [next(batches).passage_rows.tolist() for _ in range(number)]

    def loader() -> TrainLoader:
        return TrainLoader(groups, QueryOrder(len(groups), 3), num_workers)

    before = torch.get_rng_state()
    whole, first = rows(loader(), 5), loader()
    assert rows(first, 2) == whole[:2]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert rows(second, 3) == whole[2:]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_last_batch_though_the_iterator_is_kept(groups: Groups) -> None:
    before = set(multiprocessing.active_children())
    blocks = TextBatches(
        groups.collection.corpus, np.arange(20), groups.templates, "passage", 8, 64
    )
    batches = iter(TextLoader(blocks, range(len(blocks)), num_workers=1))
    rows = [row for _ in range(len(blocks)) for row in next(batches).rows.tolist()]
    assert rows == list(range(20))
    assert set(multiprocessing.active_children()) == before


@pytest.fixture
def no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that one process sends to another fails there; torch would share its memory."""

    def refuse(tensor: torch.Tensor) -> Any:
        raise TypeError("a tensor is sent between processes")

    reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    for kind in (torch.Tensor, torch.nn.Parameter, torch.UntypedStorage):
        monkeypatch.setitem(reducers, kind, refuse)


def test_tensors_between_processes_are_noticed_by_these_tests(no_tensors: None) -> None:
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        loaded(lambda _: Unpacked(dict, {"rows": torch.ones(2)}, 1, 0))  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", ["groups", "pair groups", "texts", "pairs", "unlabelled"])
def test_workers_send_no_tensor_and_the_batches_are_those_without_workers(
    kind: str, groups: Groups, collection: Collection, tokenizer: Any, no_tensors: None
) -> None:
    short = Encoding(query_length=32, passage_length=64)
    pairs = PairTemplates(tokenizer, Encoding(kind="reranker", query_length=32, passage_length=64))
    joint = JointTemplates(tokenizer, short, (" Self:", " Next:"))
    rows = np.arange(12)
    datasets: dict[str, Any] = {
        "groups": groups,
        "pair groups": Groups(collection, groups.qrels, groups.negatives, pairs, 128, seed=0),
        "texts": TextBatches(collection.corpus, rows, groups.templates, "passage", 5, 64),
        "pairs": PairBatches(collection.queries, collection.corpus, rows, rows, pairs, 5, 200),
        "unlabelled": Unlabelled(collection.corpus, joint, "all", 4, ("ebae", "ebar"), 200, seed=0),
    }
    blocks = kind in ("texts", "pairs")
    items = list(range(3)) if blocks else [(0, np.arange(4)), (1, np.arange(4, 9))]
    alone, sent = (
        list(BatchLoader(datasets[kind], items, num_workers, seed=0)) for num_workers in (0, 1)
    )
    assert len(alone) == len(items)
    assert plain(sent) == plain(alone)


@pytest.mark.parametrize(("number", "longest"), [(16_384, 130), (1_000, 4_096)])
def test_a_block_of_many_chunks_needs_few_file_descriptors(number: int, longest: int) -> None:
    lengths = np.random.default_rng(0).integers(longest // 3, longest, number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, hard))
    try:
        batches = loaded(lambda _: texts_of_lengths(lengths), items=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [batch.texts.tokens for batch in batches] == [lengths.sum()] * 2
    assert len(batches[0].texts.chunks) > 500


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        InputError("malformed-line", "2 rows are wrong:\n  the first\n  the second"),
        FileNotFoundError(2, "no", "/a"),
    ],
)
def test_a_mistake_found_by_a_worker_is_raised_as_it_is(error: Exception, num_workers: int) -> None:
    def refuse(_: int) -> Any:
        raise error

    with pytest.raises(type(error)) as raised:
        list(BatchLoader(Items(refuse), range(2), num_workers, seed=0))
    assert sentence(raised.value) == sentence(error)


def test_a_batch_that_cannot_be_sent_ends_the_run(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def local() -> None: ...

    logging.getLogger("caravan").addHandler(handler := logging.StreamHandler())
    try:
        with pytest.raises(RuntimeError) as raised:
            loaded(lambda _: local)
    finally:
        logging.getLogger("caravan").removeHandler(handler)
    assert "exited unexpectedly" in (sentence(raised.value) or "")
    shown = capfd.readouterr().err
    assert "cannot send a batch" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(signal.SIGKILL, "memory"), (signal.SIGBUS, "corpus.arrow"), (signal.SIGTERM, "")],
)
def test_a_worker_that_is_killed_ends_the_run_with_the_likely_reason(
    number: int, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError) as raised:
        loaded(lambda _: os.kill(os.getpid(), number))
    assert shown in (sentence(raised.value) or "")
    assert is_termination(raised.value) == (number == signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_left_to_the_main_process() -> None:
    def blocked(_: int) -> Unpacked[EncodeBatch]:
        if signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []):
            return texts_of_lengths(np.ones(1, int))
        raise InputError("unexpected", "a worker would raise KeyboardInterrupt")

    assert len(loaded(blocked)) == 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
