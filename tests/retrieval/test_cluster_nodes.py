"""`engine=ray` while nodes of the cluster leave and join: the bytes of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands import evaluate, products
from tests.tiny import write_beir

from caravan.retrieval import stages
from caravan.retrieval.store import Store

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
DEADLINE_S = 180
MEMORY = 80 << 20
"""Bytes of /dev/shm that a node takes, little more than Ray's minimum."""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of the driver's node, which has no device: it works when others join."""
    from ray.cluster_utils import Cluster

    from caravan.retrieval import cluster as engine

    cluster = Cluster()
    cluster.add_node(num_cpus=0, object_store_memory=MEMORY)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    engine.Cluster()  # connects; Ray sets signals, which only the main thread may
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def stops_on_the_first_node(compute: Any, started: Path) -> Any:
    """`compute`, except that the first node to begin stops after its first array."""

    def here(numbers: list[int]) -> Iterable[np.ndarray]:
        first = not any(started.iterdir())
        (started / ray.get_runtime_context().get_node_id()).touch()
        for array in compute(numbers):
            yield array
            if first:
                time.sleep(2 * DEADLINE_S)
                raise TimeoutError("this node has not left")

    return here


def test_nodes_that_join_half_way_get_work_and_the_work_of_those_that_leave_is_done_by_others(
    nodes: Any, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {name: tmp_path / "started" / name for name in ("passages", "found", "scores.test")}
    shards = Store.shards

    def watched(
        self: Store, name: str, inputs: dict[str, Any], count: int, compute: Callable[..., Any]
    ) -> Any:
        if self.engine is not None and name in started:
            compute = stops_on_the_first_node(compute, started[name])
        return shards(self, name, inputs, count, compute)

    def wait_for(count: int, folder: Path, work: Future[Any]) -> None:
        end = time.monotonic() + DEADLINE_S
        while len(list(folder.iterdir())) < count:
            assert not work.done(), work.result()
            assert time.monotonic() < end, f"{folder.name}: fewer than {count} nodes have started"
            time.sleep(0.05)

    monkeypatch.setattr(stages, "PART", 64)
    monkeypatch.setattr(Store, "shards", watched)
    settings = ["block=8", "rerank.block=16", "rerank.depth=20", "index.k=50", "measures=[MRR@5]"]
    settings += [f"reranker={folders['reranker']}", "num_workers=1"]
    beir = write_beir(tmp_path / "data", passages=300)
    one = evaluate(beir, tmp_path / "one", folders["retriever"], *settings)
    for folder in started.values():
        folder.mkdir(parents=True)
    settings.append("engine=ray")
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(evaluate, beir, tmp_path / "ray", folders["retriever"], *settings)
        leaves = nodes.add_node(num_cpus=1, object_store_memory=MEMORY)
        for folder in started.values():
            wait_for(1, folder, work)
            joins = nodes.add_node(num_cpus=1, object_store_memory=MEMORY)
            wait_for(2, folder, work)
            nodes.remove_node(leaves, allow_graceful=False)
            leaves = joins
        assert work.result()["overall"] == one["overall"]
    assert products(tmp_path / "ray") == products(tmp_path / "one")
