"""Which of several processes this is, before any process group exists.

Lightning, torchrun and SLURM start processes and tell each its rank in the environment; what only
one of them may do (write a file, say something) asks here.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process' rank, 0 where it is alone."""
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def leads() -> bool:
    """Whether this process writes and speaks for all."""
    return rank() == 0
