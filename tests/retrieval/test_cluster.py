"""`engine=ray`: the bytes of one process, also if an actor is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate, products
from tests.refusals import refused
from tests.tiny import write_beir

from caravan.errors import InputError
from caravan.retrieval import stages
from caravan.retrieval.store import Shards

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _two_devices() -> Iterator[None]:
    from caravan.retrieval import cluster

    with pytest.MonkeyPatch.context() as patch:
        start = ray.init
        patch.setattr(ray, "init", lambda *given, **more: start(*given, **more, num_cpus=2))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster.Cluster()
        yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PART", 64)


def actors() -> list[int]:
    """The processes of the actors on this machine."""

    def title(process: Path) -> bytes:
        try:
            return (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            return b""

    found = (path for path in Path("/proc").iterdir() if path.name.isdigit())
    return [int(path.name) for path in found if title(path).startswith(b"ray::Worker")]


def systems(folders: dict[str, str], *more: str) -> tuple[str, ...]:
    blocks = ("block=8", "rerank.block=16", "rerank.depth=20", "index.k=50", "measures=[MRR@5]")
    return (folders["retriever"], f"reranker={folders['reranker']}", *blocks, *more)


@pytest.mark.parametrize("kills", [False, True])
def test_actors_write_the_bytes_of_one_process_also_if_one_of_them_is_killed(
    kills: bool, folders: dict[str, str], tmp_path: Path
) -> None:
    beir, killed = write_beir(tmp_path / "data", passages=3000 if kills else 300), []

    def kill_half_way() -> None:
        while len(list((tmp_path / "ray").rglob("0*.npy"))) < 100:
            time.sleep(0.01)
        killed.extend(actors()[:1])
        os.kill(killed[0], signal.SIGKILL)

    one = evaluate(beir, tmp_path / "one", *systems(folders))
    killer = threading.Thread(target=kill_half_way) if kills else threading.Thread()
    killer.start()
    many = evaluate(beir, tmp_path / "ray", *systems(folders, "engine=ray", "num_workers=1"))
    killer.join()
    assert bool(killed) == kills
    assert many["overall"] == one["overall"]
    written = products(tmp_path / "one")
    for product in ("passages", "found", "scores.test", "queries.test"):
        assert any(name.startswith(f"store/{product}.") for name in written)
    assert products(tmp_path / "ray") == written


def shards(folder: Path, compute: Any) -> Shards:
    folder.mkdir()
    return Shards(folder, {}, 4, compute)


def test_an_error_in_an_actor_is_that_of_the_driver_and_the_next_product_is_not_disturbed(
    tmp_path: Path,
) -> None:
    from caravan.retrieval.cluster import Cluster

    def fails(numbers: list[int]) -> Iterator[np.ndarray]:
        raise InputError("diverged-model", "NaN")

    def works(numbers: list[int]) -> Iterator[np.ndarray]:
        return (np.full(3, number) for number in numbers)

    engine = Cluster()
    with refused("diverged-model"):
        engine.write(shards(tmp_path / "fails", fails), [0, 1, 2, 3])
    good = shards(tmp_path / "works", works)
    engine.write(good, [0, 1, 2, 3])
    assert [array[0] for array in good] == [0, 1, 2, 3]


def test_a_shard_that_ends_every_actor_ends_the_command(tmp_path: Path) -> None:
    from caravan.retrieval.cluster import Cluster

    def dies(numbers: list[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield np.full(3, number)

    product = shards(tmp_path / "product", dies)
    with refused("actors-died", "00000002.npy"):
        Cluster().write(product, [0, 1, 2, 3])
    assert product.missing([0, 1]) == []


def test_a_folder_that_a_node_does_not_have_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caravan.retrieval.cluster import Cluster

    monkeypatch.setattr(os, "getcwd", lambda: "/not/on/this/node")
    with refused("folder-not-shared", "/not/on/this/node"):
        Cluster().write(shards(tmp_path / "product", None), [0])


def test_several_drivers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from caravan.retrieval.cluster import Cluster

    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("several-drivers", "2 were started"):
        Cluster()
