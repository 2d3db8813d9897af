"""Validation callbacks and the mean over queries: in parts, over ranks, with ranks without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.two_ranks import TwoRanks

from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run, read_run
from caravan.retrieval.index import Exact
from caravan.retrieval.metrics import per_query
from caravan.training.evaluation import PASSAGES, QUERIES, MeanMeasures, RetrievalEvaluation

MEASURES = ["MRR@10", "nDCG@10", "R@100"]
COUNT = 7


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2], [5, 7]], [[5, 7], [0, 1, 2]], [[0, 1, 2], [5, 7], [0, 1, 2]]]
)
@pytest.mark.parametrize(("relevant_from", "mrr"), [(1, 1.0), (2, 0.5)])
def test_passages_are_searched_once_in_any_order_and_low_grades_do_not_count(
    parts: list[list[int]], relevant_from: int, mrr: float, collection: Collection, tmp_path: Path
) -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **_: logged.update({name: float(value)})
    )
    data = SimpleNamespace(
        collection=collection,
        dev_qrels=Qrels(np.array([3, 3]), np.array([7, 5]), np.array([1, 2])),
        relevant_from=relevant_from,
        ignore_identical_ids=False,
        without_own=lambda run, depth: run.top(depth),
    )
    trainer: Any = SimpleNamespace(
        sanity_checking=False, datamodule=data, global_rank=0, world_size=1, is_global_zero=True
    )
    evaluation = RetrievalEvaluation(Exact(k=4), ["MRR@10"], str(tmp_path / "run.trec"))
    batches = [(QUERIES, [3], [[1.0, 0.0]])]
    batches += [(PASSAGES, rows, [[float(row), 1.0] for row in rows]) for rows in parts]
    for loader, rows, vectors in batches:
        out = {"rows": torch.tensor(rows), "vectors": torch.tensor(vectors)}
        evaluation.on_validation_batch_end(trainer, module, out, None, 0, loader)  # type: ignore[arg-type]
    evaluation.on_validation_epoch_end(trainer, module)
    assert logged == {"val/MRR@10": mrr}
    run = read_run(tmp_path / "run.trec", collection.queries, collection.corpus)
    assert run.of(3)[0].tolist() == [7, 5, 2, 1]


def case(queries: list[int]) -> dict[str, np.ndarray]:
    """Values of some of seven queries with a random run and random judgements."""
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(50) for _ in range(COUNT)])
    scores = -np.sort(-rng.random((COUNT, 50)))
    relevant = rng.integers(0, 50, COUNT)
    run = Run.from_topk(np.array(queries, dtype=np.int64), scores[queries], rows[queries])
    qrels = Qrels(np.array(queries), relevant[queries], np.ones(len(queries)))
    return per_query(run, qrels, MEASURES)


def whole() -> dict[str, float]:
    return {name: float(values.mean()) for name, values in case(list(range(COUNT))).items()}


def mean(*parts: list[int]) -> dict[str, float]:
    metric = MeanMeasures(MEASURES)
    for part in parts:
        metric.update(case(part))
    return {name: value.item() for name, value in metric.compute().items()}


def test_parts_give_the_mean_of_the_whole_and_no_query_gives_zero() -> None:
    assert mean([0, 1, 2, 3, 4], [5], [6]) == pytest.approx(whole(), abs=1e-6)
    assert mean([]) == dict.fromkeys(MEASURES, 0)


def on_rank() -> tuple[dict[str, float], dict[str, float]]:
    rank = dist.get_rank()
    return mean(*([[0, 1], [2, 3, 4]], [[5, 6]])[rank]), mean([3] if rank else [])


def test_two_ranks_give_the_mean_of_one_process(two_ranks: TwoRanks) -> None:
    one, other = two_ranks(on_rank)
    assert one == other
    assert one[0] == pytest.approx(whole(), abs=1e-6)
    # The mean of the ranks' means is another number.
    means = [mean(part)["MRR@10"] for part in ([0, 1, 2, 3, 4], [5, 6])]
    assert abs(one[0]["MRR@10"] - np.mean(means)) > 1e-3
    assert one[1]["R@100"] == 1  # a rank without queries does not lower the mean
