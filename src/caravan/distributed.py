"""The rank of this process, before any process group exists.

Lightning, torchrun and SLURM start processes and set the rank of each in its environment. Code that
only one process may run (writing a file, logging) checks `is_main_process`.
"""

from __future__ import annotations

import os

LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)
"""The environment variables that give a process its place among others."""


def rank() -> int:
    """The rank of this process; 0 if it is alone.

    torchrun sets RANK. Lightning's own launcher sets LOCAL_RANK in the processes that it starts,
    and needs NODE_RANK (or GROUP_RANK) on every node. srun sets SLURM_PROCID.
    """
    whole, local = _number("RANK"), _number("LOCAL_RANK")
    if whole is not None:
        return whole
    node = _number("NODE_RANK") or _number("GROUP_RANK")
    if local is not None:
        return local or node or 0
    return node or _number("SLURM_PROCID") or 0


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world_size() -> int:
    """The number of processes started together by torchrun or srun; 1 for one alone."""
    return max(_number("WORLD_SIZE") or _number("SLURM_STEP_NUM_TASKS") or 1, 1)


def local_rank() -> int:
    """The rank among the processes of this machine, which selects the device."""
    return _number("LOCAL_RANK") or _number("SLURM_LOCALID") or 0


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None
