"""Exact search on a GPU, which tests replace: the devices and the order of its copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.retrieval.test_index import vectors

from caravan.retrieval.exact import Exact
from caravan.retrieval.index import ArrayBlocks


def test_a_process_searches_on_the_gpu_on_which_it_encodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index, queries = Exact(k=7), vectors(5, seed=1)
    index.build(ArrayBlocks(vectors(90).astype(np.float16), 30))
    expected = index.search(queries)
    devices: list[str] = []

    def to(tensor: torch.Tensor, device: torch.device, **_: Any) -> torch.Tensor:
        devices.append(str(device))
        return tensor.clone()

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", to)
    found = index.search(queries)
    assert devices == ["cuda:3"] * 4  # the queries and three blocks
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)
