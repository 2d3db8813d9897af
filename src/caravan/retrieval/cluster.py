"""`engine=ray`: the actors of a Ray cluster, one a device, compute the shards of the store.

The driver runs the stages and hands shard numbers to actors, which write into the folder as a rank
of torchrun does: all nodes need the folders of the run, its store, the cache and the models. The
shards of an actor that dies are handed to others. More actors are requested than the cluster has
devices, so nodes that join get work. `RAY_ADDRESS` names a cluster; without it, Ray starts on this
machine. Needs the extra `ray`.
"""

from __future__ import annotations

import contextlib
import copyreg
import logging
import os
import signal
import socket
from collections import Counter, deque
from functools import lru_cache
from typing import Any, NamedTuple

import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from caravan.distributed import LAUNCHERS, world_size
from caravan.errors import InputError, first_line
from caravan.progress import progress
from caravan.retrieval.inference import Inference
from caravan.retrieval.peers import wait_for_files
from caravan.retrieval.store import Shards

SPARE = 8
"""Actors requested beyond those that run, at least."""
MOST = 8
"""Shards per call: an actor loads and tokenizes the next one while it computes."""
ATTEMPTS = 4
"""How many actors may die on one shard, or in a row while they start on nodes that live."""
WARN_AFTER_S = 60.0

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _opened(settings: tuple[tuple[str, Any], ...], overrides: Any) -> Inference:
    """The model of a driver, which an actor loads once for all its shards."""
    return Inference(overrides=dict(overrides), **dict(settings))


def _without_weights(model: Inference) -> tuple[Any, ...]:
    names = ("folder", "precision", "num_workers", "attention", "trust_remote_code")
    settings = {"token_budget": model.given_budget} | {name: getattr(model, name) for name in names}
    return _opened, (tuple(settings.items()), tuple(model.overrides.items()))


copyreg.pickle(Inference, _without_weights)


class Worker:
    """The actor: computes shards on its device."""

    def __init__(self) -> None:
        self._folder = ""
        self._shards: Shards | None = None
        for name in LAUNCHERS:  # of the process that started the node, such as srun
            os.environ.pop(name, None)

    def write(self, directory: str, folder: str, pickled: bytes, numbers: list[int]) -> None:
        """Compute and write shards.

        Args:
            directory: the working directory of the driver, from which its paths start.
            folder, pickled: of the shards, which are opened once.
        """
        try:
            os.chdir(directory)
            if folder != self._folder:
                self._shards = None  # frees its model before the next is loaded
                self._shards = cloudpickle.loads(pickled)
                self._folder = folder
            assert self._shards is not None
            self._shards.write(numbers)
        except FileNotFoundError as error:
            raise InputError(
                "folder-not-shared",
                f"{error.filename} does not exist on {socket.gethostname()}; engine=ray needs the"
                " working directory, run_dir, store, cache_dir and the models on every node",
            ) from None


class Call(NamedTuple):
    """What an actor does; no shards: it starts.

    Attributes:
        dead: the nodes that had died when the actor was requested, if it starts. Ray queues several
            such actors at one node, and they all die with it.
    """

    actor: Any
    shards: list[int]
    dead: frozenset[str] = frozenset()


class Cluster:
    """Hands shards to actors; see the docstring of this module.

    An actor takes a GPU if the cluster has any, else as many CPUs as torch has threads here
    (`OMP_NUM_THREADS`).

    Raises:
        InputError: If several processes were started, or no cluster answers.
    """

    def __init__(self) -> None:
        if world_size() > 1:
            raise InputError(
                "several-drivers",
                f"engine=ray starts its own processes, but {world_size()} were started; start"
                " evaluate.py once, without torchrun or srun",
            )
        if not ray.is_initialized():
            _connect()
        gpus = ray.cluster_resources().get("GPU", 0)
        cpus = 1 if gpus else torch.get_num_threads()
        self._actor = ray.remote(Worker).options(num_cpus=cpus, num_gpus=min(gpus, 1))
        self._device = "GPU" if gpus else f"{cpus} CPUs"
        self._idle: list[Any] = []
        self._calls: dict[Any, Call] = {}

    def write(self, shards: Shards, numbers: list[int]) -> None:
        """Return when these shards are in the folder."""
        try:
            with progress(shards.folder.name.partition(".")[0], len(numbers), "shards") as done:
                self._write(shards, numbers, done)
        except BaseException:  # nobody waits for what they compute
            for actor in [*self._idle, *(call.actor for call in self._calls.values())]:
                _kill(actor)
            self._idle, self._calls = [], {}
            raise
        wait_for_files(lambda: not shards.missing(numbers), shards.folder)

    def _write(self, shards: Shards, numbers: list[int], done: Any) -> None:
        left, deaths = deque(numbers), Counter[int]()
        product = os.getcwd(), str(shards.folder), ray.put(cloudpickle.dumps(shards))

        def start(call: Call) -> None:
            self._calls[call.actor.write.remote(*product, call.shards)] = call

        while left or any(call.shards for call in self._calls.values()):
            running = len(self._idle) + sum(bool(call.shards) for call in self._calls.values())
            waiting = len(self._calls) + len(self._idle) - running
            more = min(len(left) - len(self._idle), max(SPARE, running)) - waiting
            dead = _dead_nodes() if more > 0 else frozenset()
            for _ in range(more):
                start(Call(self._actor.remote(), [], dead))  # when a device is free
            while left and self._idle:
                size = len(left) // (2 * (len(self._idle) + len(self._calls)))
                mine = [left.popleft() for _ in range(max(1, min(MOST, size)))]
                start(Call(self._idle.pop(), mine))
            ready, _ = ray.wait(list(self._calls), timeout=WARN_AFTER_S)
            if not ready and not running:
                log.warning("waiting for %s of the Ray cluster: none is free", self._device)
            for one in ready:
                actor, mine, dead = self._calls.pop(one)
                try:
                    ray.get(one)
                except RayTaskError as error:  # of the work, not of the actor
                    raise error.cause from error
                except RayError as error:
                    _kill(actor)
                    missing = shards.missing(mine)
                    left.extendleft(reversed(missing))
                    done(len(mine) - len(missing))
                    if not mine and _dead_nodes() - dead:
                        log.warning("an actor has died with its node before it had a shard")
                        continue
                    first = missing[0] if missing else -1  # -1: it died before it had a shard
                    deaths[first] += 1
                    if deaths[first] == ATTEMPTS:
                        raise _given_up(shards, missing, error) from error
                    log.warning("an actor has died: %d of its shards go to others", len(missing))
                else:
                    deaths[-1] = 0
                    done(len(mine))
                    self._idle.append(actor)


def _connect() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one on this machine, quietly."""
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")  # warnings about actors that wait
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    before = signal.getsignal(signal.SIGTERM)
    address = os.environ.get("RAY_ADDRESS", "local")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            "no-ray-cluster",
            f"RAY_ADDRESS={address}: no Ray cluster answers ({first_line(error)}); start it with"
            " ray start --head, or unset RAY_ADDRESS to use this machine",
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray replaces the handler


def _dead_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError, ValueError):
        ray.kill(actor)


def _given_up(shards: Shards, missing: list[int], error: RayError) -> InputError:
    what = f"computing {shards.path(missing[0])}" if missing else "starting"
    return InputError(
        "actors-died",
        f"{ATTEMPTS} actors in turn died while {what}, the last with: {first_line(error)} See the"
        " logs of Ray; without a reason there, most likely for lack of memory. Finished shards are"
        " kept",
    )
