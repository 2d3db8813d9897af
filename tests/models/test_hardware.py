from __future__ import annotations

import pytest
import torch

from caravan.models import hardware


@pytest.mark.parametrize(
    ("parameters", "gpus", "cores", "expected"),
    [
        (6_700_000_000, 1, 64, 1),
        (600_000_000, 1, 64, 2),
        (22_000_000, 1, 64, 8),
        (22_000_000, 8, 48, 5),  # a core of each GPU's six stays free
        (22_000_000, 8, 8, 1),
        (None, 1, 64, 1),
        (22_000_000, 0, 64, 1),
    ],
)
def test_small_models_on_gpus_get_more_processes_that_tokenize(
    parameters: int | None,
    gpus: int,
    cores: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(hardware, "cores", lambda: cores)
    assert hardware.workers(None, parameters) == expected
    assert hardware.workers(3, parameters) == 3
