"""Exact search on a GPU that the tests imitate: its devices, streams and copies."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tests.retrieval.test_index import vectors

from caravan.data.tokenization import log_once
from caravan.retrieval.exact import Exact
from caravan.retrieval.index import ArrayBlocks


class Stream:
    """A stream whose copies end when another stream waits for an event after them."""

    def __init__(self, device: Any) -> None:
        self.device = str(device)
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record_event(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        copies, self.copies = self.copies, []
        return copies

    def wait_event(self, event: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in event:
            target.copy_(source)


class Gpus:
    """Eight GPUs whose memory is that of the CPU; copies on another stream than the default lag."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.devices: list[str] = []
        self.copied_on: list[Stream] = []
        self.used_on: list[Stream] = []
        self.default, self._of_thread = Stream("cuda:3"), threading.local()
        for name, replacement in {
            "is_available": lambda: True,
            "device_count": lambda: 8,
            "get_device_name": lambda device: "a GPU",
            "Stream": Stream,
            "set_stream": lambda stream: setattr(self._of_thread, "stream", stream),
            "current_stream": lambda device: self.current,
        }.items():
            monkeypatch.setattr(torch.cuda, name, replacement)
        for name, method in {
            "pin_memory": torch.Tensor.clone,
            "record_stream": lambda tensor, stream: self.used_on.append(stream),
            "to": lambda tensor, device, **_: self._to(tensor, device),
        }.items():
            monkeypatch.setattr(torch.Tensor, name, method)

    @property
    def current(self) -> Stream:
        stream: Stream = getattr(self._of_thread, "stream", self.default)
        return stream

    def _to(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.devices.append(str(device))
        if self.current is self.default:
            return tensor.clone()
        copy = torch.full_like(tensor, torch.nan)
        self.current.copies.append((copy, tensor))
        self.copied_on.append(self.current)
        return copy


def test_a_process_searches_on_the_gpu_on_which_it_encodes_and_copies_beside_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, blocks = vectors(5, seed=1), ArrayBlocks(vectors(90).astype(np.float16), 30)
    index, on_cpu = Exact(k=7), Exact(k=7, device="cpu")
    for one in (index, on_cpu):
        one.build(blocks)
    expected = on_cpu.search(queries)
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpus = Gpus(monkeypatch)
    found = index.search(queries)
    assert gpus.devices == ["cuda:3"] * 4  # the queries and three blocks
    assert [stream.device for stream in gpus.copied_on] == ["cuda:3"] * 3
    assert gpus.used_on == [gpus.default] * 3
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_the_log_has_the_device_of_the_search(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    log_once.cache_clear()
    index = Exact(k=5, device="cpu")
    index.build(ArrayBlocks(vectors(100)))
    for _ in range(2):
        index.search(vectors(3))
    assert caplog.messages == ["exact search on cpu"]
