"""The mean of figures over queries: in parts, over ranks, and with ranks that have none."""

import numpy as np
import pytest
import torch.distributed as dist
from tests.two_ranks import TwoRanks

from caravan.data.collection import Qrels
from caravan.data.runs import Run
from caravan.retrieval.metrics import per_query
from caravan.training.validation_metrics import MeanMeasures

MEASURES = ["MRR@10", "nDCG@10", "R@100"]
QUERIES = 7


def case(queries: list[int]) -> tuple[Run, Qrels]:
    """A run of some of seven queries and the judgements of these."""
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(50) for _ in range(QUERIES)])
    scores = -np.sort(-rng.random((QUERIES, 50)))
    relevant = rng.integers(0, 50, QUERIES)
    run = Run.from_topk(np.array(queries, dtype=np.int64), scores[queries], rows[queries])
    return run, Qrels(np.array(queries), relevant[queries], np.ones(len(queries)))


def whole() -> dict[str, float]:
    figures = per_query(*case(list(range(QUERIES))), MEASURES)
    return {name: float(values.mean()) for name, values in figures.items()}


def test_parts_give_the_value_of_the_whole() -> None:
    metric = MeanMeasures(MEASURES)
    for part in ([0, 1, 2, 3, 4], [5], [6]):
        metric.update(per_query(*case(part), MEASURES))
    means = {name: value.item() for name, value in metric.compute().items()}
    assert means == pytest.approx(whole(), abs=1e-6)
    metric.reset()
    metric.update(per_query(*case([0]), MEASURES))
    assert metric.compute()["R@100"].item() == 1


def test_no_query_at_all_is_zero_and_not_nan() -> None:
    metric = MeanMeasures(MEASURES)
    metric.update(per_query(*case([]), MEASURES))
    assert [value.item() for value in metric.compute().values()] == [0, 0, 0]


def on_rank() -> tuple[dict[str, float], float]:
    rank = dist.get_rank()
    metric = MeanMeasures(MEASURES)
    # five queries and two; every rank updates as often as it likes
    for part in ([[0, 1], [2, 3, 4]], [[5, 6]])[rank]:
        metric.update(per_query(*case(part), MEASURES))
    values = {name: value.item() for name, value in metric.compute().items()}
    lonely = MeanMeasures(MEASURES)
    lonely.update(per_query(*case([3] if rank else []), MEASURES))
    return values, lonely.compute()["R@100"].item()


def test_two_ranks_give_the_value_of_one_process(two_ranks: TwoRanks) -> None:
    results = two_ranks(on_rank)
    assert results[0] == results[1]
    values, lonely = results[0]
    assert values == pytest.approx(whole(), abs=1e-6)
    # the mean of the ranks' means is another number, so sums it must be
    means = [
        float(per_query(*case(part), MEASURES)["MRR@10"].mean())
        for part in ([0, 1, 2, 3, 4], [5, 6])
    ]
    assert abs(values["MRR@10"] - np.mean(means)) > 1e-3
    assert lonely == 1  # a rank without queries does not pull the mean down
