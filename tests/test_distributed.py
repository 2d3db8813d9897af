"""The rank of a process, from the environment of each launcher."""

from __future__ import annotations

import pytest

from caravan.distributed import is_main_process, rank

VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        # torchrun
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        # torchrun inside of a SLURM job, one task a node
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, False),
        # Lightning's launcher: the process that the user starts has no LOCAL_RANK
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "0"}, True),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        # ... in an interactive SLURM job, where every process inherits its shell's SLURM_PROCID
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
        # srun
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "2"}, False),
        ({"SLURM_PROCID": "1", "NODE_RANK": "0"}, False),
        ({"RANK": "", "SLURM_PROCID": "1"}, False),
    ],
)
def test_each_launcher_starts_one_main_process(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() is expected
    assert (rank() == 0) is expected
