from __future__ import annotations

import pytest
import torch

from caravan.distributed import LAUNCHERS
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


@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        (0, {"LOCAL_RANK": "3"}, "cpu"),
        (8, {}, "cuda:0"),
        (8, {"LOCAL_RANK": "3"}, "cuda:3"),
        (8, {"SLURM_LOCALID": "3"}, "cuda:3"),
        (1, {"SLURM_LOCALID": "3"}, "cuda:0"),  # srun --gpus-per-task=1 shows each task one
    ],
)
def test_each_process_of_a_machine_has_its_own_gpu(
    gpus: int, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(hardware.device()) == expected
