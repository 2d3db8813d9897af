"""The processes that torchrun or srun start together: they wait for each other's files.

They form a gloo process group, whose barrier fails when a process has ended. The others wait
for a slow or stopped process. When one ends, they finish their own shards and then end; finished
shards are kept.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from caravan.distributed import rank, world_size
from caravan.errors import InputError, first_line

JOIN = timedelta(minutes=5)
"""All processes must have started and imported torch within this time."""
TIMEOUT = timedelta(days=20)
"""How long a process waits for the others: ranks may be slow, with unequal work."""
VISIBLE_S = 120
"""Network file systems show a new file late: NFS after up to a minute."""


def join() -> None:
    """Connect to the other processes, if there are any; waits until all have called it.

    srun sets no MASTER_ADDR: rank 0 is on the first of the step's nodes, and the ids of job and
    step give the port.

    Raises:
        InputError: "no-rendezvous" if they do not find each other.
    """
    own, size, environ = rank(), world_size(), os.environ
    if size == 1:
        return
    import torch.distributed as dist  # not at the top: BM25's processes do without torch

    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in environ and (nodes := environ.get("SLURM_STEP_NODELIST")):
        from pytorch_lightning.plugins.environments import SLURMEnvironment

        environ["MASTER_ADDR"] = SLURMEnvironment.resolve_root_node_address(nodes)
        job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
        environ.setdefault("MASTER_PORT", str(12_000 + (10 * int(job) + int(step)) % 20_000))
    try:
        store, _, _ = next(dist.rendezvous("env://", own, size, timeout=JOIN))
        dist.init_process_group("gloo", store=store, rank=own, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "no-rendezvous",
            f"the {size} processes of this command cannot find each other ({first_line(error)});"
            " start all of them with torchrun or srun, or set MASTER_ADDR and MASTER_PORT to the"
            " machine of rank 0 and a free port there, and GLOO_SOCKET_IFNAME to the network"
            " interface between the machines",
        ) from error


def barrier(seen: Callable[[], bool], path: Path) -> None:
    """Wait until all processes have called this, and this one sees the files of the others.

    Args:
        seen: whether the files below `path` are as expected.

    Raises:
        InputError: "peer-ended", or "folder-not-shared" if the files do not appear.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    try:
        dist.barrier()
    except RuntimeError as error:
        raise InputError(
            "peer-ended",
            f"another of the {world_size()} processes has ended, so rank {rank()} ends too; see"
            " the output of the others (if one has none, the system killed it, most likely for"
            " lack of memory), and start all processes again: finished shards are kept",
        ) from error
    wait_for_files(seen, path)


def wait_for_files(seen: Callable[[], bool], path: Path) -> None:
    """Wait until files that another process has written are visible, at most `VISIBLE_S`.

    Raises:
        InputError: "folder-not-shared".
    """
    end = time.monotonic() + VISIBLE_S
    while not seen():
        if time.monotonic() > end:
            raise InputError(
                "folder-not-shared",
                f"{path} on {socket.gethostname()} lacks files that another process has written;"
                " set run_dir and store to folders that all machines share",
            )
        time.sleep(0.2)
