"""Processes that tests share, so that a fit on several ranks does not pay for imports."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

LONGEST = 600  # seconds; more than any test takes on a slow machine


class TwoRanks:
    """A pair of processes, or more, that call the same function with the same arguments."""

    def __init__(self, number: int = 2) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.fitting"])  # imported once, for both
        self.ends, self.processes = [], []
        for rank in range(number):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, number, port, there), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *given: Any, **settings: Any) -> list[Any]:
        """What each rank returns.

        Raises:
            RuntimeError: a rank failed, or they wait for each other.
        """
        for end in self.ends:
            end.send((function, given, settings))
        found: dict[int, Any] = {}
        while len(found) < len(self.ends):
            waited = [end for rank, end in enumerate(self.ends) if rank not in found]
            ready = multiprocessing.connection.wait(waited, LONGEST)
            answers = {self.ends.index(end): end.recv() for end in ready}
            failed = [text for text, _ in answers.values() if text]
            if failed or not ready:
                self.close()  # else the other rank would wait forever
                raise RuntimeError(failed[0] if failed else "the ranks wait for each other")
            found |= {rank: value for rank, (_, value) in answers.items()}
        return [found[rank] for rank in sorted(found)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, number: int, port: int, end: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # for everything that they run
    while True:
        try:
            function, given, settings = end.recv()
        except EOFError:
            return
        try:
            end.send(("", function(*given, **settings)))
        except Exception:  # noqa: BLE001 - raised where the test is
            end.send((traceback.format_exc(), None))
