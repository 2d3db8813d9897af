"""Which of several processes this is, before any process group exists.

Lightning, torchrun and SLURM start processes and tell each its rank in the environment; what only
one of them may do (write a file, say something) asks here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

PAUSE = 0.2  # seconds; what is waited for takes minutes
LONG = 60  # seconds after which it is said once; a block takes about that

log = logging.getLogger(__name__)


def rank() -> int:
    """A number that is 0 in the one process that is_main_process, and in one that is alone.

    torchrun sets RANK; Lightning's own launcher LOCAL_RANK in the processes that it starts, with
    NODE_RANK (or GROUP_RANK) set on every node by whoever starts the nodes; srun SLURM_PROCID.
    """
    whole, local = _number("RANK"), _number("LOCAL_RANK")
    if whole is not None:
        return whole
    nodes = [_number(name) for name in ("NODE_RANK", "GROUP_RANK")]
    node = next((number for number in nodes if number is not None), None)
    if local is not None:
        return local or node or 0
    return node or _number("SLURM_PROCID") or 0


def is_main_process() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0


def world() -> int:
    """How many processes were started together, by torchrun or by srun; 1 if it is alone."""
    return max(_number("WORLD_SIZE") or _number("SLURM_STEP_NUM_TASKS") or 1, 1)


def local_rank() -> int:
    """Which of its machine's processes this is, and so which of its devices it has."""
    return _number("LOCAL_RANK") or _number("SLURM_LOCALID") or 0


def wait_until(holds: Callable[[], bool]) -> None:
    """Look again and again; whoever starts several processes ends all of them if one fails."""
    since, told = time.monotonic(), False
    while not holds():
        time.sleep(PAUSE)
        if not told and time.monotonic() - since > LONG:
            log.warning("waiting for the other processes: %d were started together", world())
            told = True


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else None
