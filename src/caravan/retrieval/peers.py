"""The processes that torchrun or srun start together: they wait for each other's files.

Every process has a TCP connection to rank 0. The system closes it when a process ends for whatever
reason, and keepalive probes find a machine that has disappeared. A process that is slow or stopped
keeps its connection, so it is never mistaken for one that has ended. When one ends, all others do:
at once if they wait, else after the shard that they compute. Finished shards are kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from caravan.distributed import rank, world_size
from caravan.errors import InputError, first_line

JOIN_S = 300
"""All processes must have started and imported torch within this time."""
VISIBLE_S = 120
"""Network file systems show a new file late: NFS after up to a minute."""
PROBES = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
"""A connection without traffic counts as closed after 60 s without an answer of the machine."""
WARN_AFTER_S = 60
HERE = -1
"""The message of a process that waits, and rank 0's answer when all do; else an ended rank."""
MESSAGE = struct.Struct("!i")

log = logging.getLogger(__name__)


def join() -> None:
    """Connect to the other processes, if there are any; the first call waits for all of them.

    Raises:
        InputError: "no-rendezvous" if they do not find each other.
    """
    _peers(rank(), world_size())


def check() -> None:
    """Raise an InputError ("peer-ended") if another process has ended."""
    if (peers := _peers(rank(), world_size())) is not None:
        peers.read(timeout=0)


def meet(seen: Callable[[], bool], path: Path) -> None:
    """Wait until all processes have called this, and this one sees the files of the others.

    Args:
        seen: whether the files below `path` are as expected.

    Raises:
        InputError: "peer-ended", or "folder-not-shared" if the files do not appear.
    """
    if (peers := _peers(rank(), world_size())) is not None:
        peers.meet()
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


class Peers:
    """The connections of a process: of rank 0 to all others, of the others to rank 0."""

    def __init__(self, own: int, size: int) -> None:
        self.rank, self.size = own, size
        self._here: set[int] = set()
        try:
            self._links = self._connected(*_rendezvous(own, size))
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                "no-rendezvous",
                f"the {size} processes of this command do not find each other"
                f" ({first_line(error)}); start all of them with torchrun or srun, or set"
                " MASTER_ADDR and MASTER_PORT to the machine of rank 0 and a free port there",
            ) from error
        for link in self._links.values():
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in PROBES.items():
                if hasattr(socket, name):  # not on every system
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _connected(self, store: Any, host: str) -> dict[int, socket.socket]:
        if self.rank:
            link = socket.create_connection((host, int(store.get("caravan"))), JOIN_S)
            link.sendall(MESSAGE.pack(self.rank))
            return {0: link}
        links: dict[int, socket.socket] = {}
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both) as server:
            server.settimeout(JOIN_S)
            store.set("caravan", str(server.getsockname()[1]))
            while len(links) < self.size - 1:
                link, _ = server.accept()
                link.settimeout(10)
                other = _received(link)
                if other is not None and 0 < other < self.size:  # else of another program
                    links[other] = link
        return links

    def meet(self) -> None:
        """Wait until all processes have called this."""
        if self.rank:
            self._send(0, HERE)
        while len(self._here) < len(self._links):
            if not self.read(WARN_AFTER_S) and not self.rank:
                late = sorted(self._links.keys() - self._here)
                log.warning("waiting for rank %s", ", ".join(map(str, late)))
        self._here.clear()
        if not self.rank:
            for other in self._links:
                self._send(other, HERE)

    def read(self, timeout: float) -> bool:
        """Read the messages that come within `timeout` seconds; whether there were any.

        Raises:
            InputError: "peer-ended".
        """
        ranks = {link: other for other, link in self._links.items()}
        ready = wait(list(ranks), timeout)
        for link in ready:
            assert isinstance(link, socket.socket)
            message = _received(link)
            if message != HERE:
                self._end(ranks[link] if message is None else message)
            self._here.add(ranks[link])
        return bool(ready)

    def _send(self, other: int, value: int) -> None:
        try:
            self._links[other].sendall(MESSAGE.pack(value))
        except OSError:
            self._end(other)

    def _end(self, ended: int) -> None:
        if not self.rank:
            for other in self._links.keys() - {ended}:
                with contextlib.suppress(OSError):
                    self._links[other].sendall(MESSAGE.pack(ended))
        raise InputError(
            "peer-ended",
            f"rank {ended} of {self.size} has ended, so rank {self.rank} ends too; see the output"
            f" of rank {ended} (if it has none, the system killed it, most likely for lack of"
            " memory), and start all processes again: finished shards are kept",
        )


def _received(link: socket.socket) -> int | None:
    """The next message; None if the connection is closed, reset, or answers no probe."""
    try:
        return int(MESSAGE.unpack(link.recv(MESSAGE.size, socket.MSG_WAITALL))[0])
    except (OSError, struct.error):
        return None


@lru_cache(maxsize=1)
def _peers(own: int, size: int) -> Peers | None:
    return Peers(own, size) if size > 1 else None


def _rendezvous(own: int, size: int) -> tuple[Any, str]:
    """torch's key-value store of all processes, and the host of rank 0.

    srun sets no MASTER_ADDR: rank 0 is on the first of the step's nodes, and the ids of job and
    step give the port, as in Lightning.
    """
    environ = os.environ
    if "MASTER_ADDR" not in environ and (nodes := environ.get("SLURM_STEP_NODELIST")):
        environ["MASTER_ADDR"] = _first_node(nodes)
        job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
        environ.setdefault("MASTER_PORT", str(12_000 + (10 * int(job) + int(step)) % 20_000))
    store, _, _ = next(dist.rendezvous("env://", own, size, timeout=timedelta(seconds=JOIN_S)))
    return store, environ["MASTER_ADDR"]


def _first_node(nodes: str) -> str:
    """The first of SLURM's list of nodes.

    >>> [_first_node(nodes) for nodes in ("gpu[07-09,12],login", "n3,n5", "a[1,4]-ib", "x")]
    ['gpu07', 'n3', 'a1-ib', 'x']
    """
    return re.sub(r"\[([^],-]+).*?\]", r"\1", nodes).split(",")[0]
